"""The recipe of the fixture `small_run`."""

SMALL = ["data.limit=200", "train.epochs=1", "construction.iterations=2", "construction.batches=1", "retrain.epochs=1",
         "budgets=0.3,0.7", "device=cpu"]  # fmt: skip
