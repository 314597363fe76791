"""The channel graph: a model captured as ATen operators, with a unit label on every tensor element."""
