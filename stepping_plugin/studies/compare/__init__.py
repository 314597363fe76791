"""The comparison: every method on the same data, budgets, updates and MAC counts; results as JSON, tables from them.

runner.py     what is missing gets run; one JSON file per (recipe, variant, seed)
studies.py    the variants of a study: methods, expansion (Fig. 7), ablation (Fig. 8)
methods.py    SteppingNet, any-width, slimmable, separately pruned nets, nets from scratch
slimmable.py, dense.py   what the rivals need
timing.py     costs of training and latencies, as ratios in one process
results.py    the JSON schema
tables.py, pictures.py   the page, made from the JSON alone
"""
