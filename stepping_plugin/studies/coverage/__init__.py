"""`stepping coverage`: converts models one after the other and checks every promise on each of them.

`families` says which models, `check` what is checked, `runner` runs each model in a process of its own, `table` writes
the results as Markdown, `fuzz` makes random networks.
"""
