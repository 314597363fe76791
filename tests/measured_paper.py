"""LeNet-5 on CIFAR-10 beside the paper's Table I, from docs/measured/cifar10_lenet5.json; see `measured`."""

from __future__ import annotations

import json
from pathlib import Path

from stepping_plugin.studies.compare.tables import markdown

MEASURED = Path(__file__).resolve().parent.parent / "docs" / "measured"
TOTAL = 0.7496  # accuracy of the paper's original
SUBNETS = {0.1364: 0.5180, 0.2654: 0.5956, 0.5507: 0.6864, 0.8274: 0.7203}  # share of its MACs -> accuracy


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def cifar10_lenet5() -> str:
    """MACs of the original's, and accuracy, of every subnet."""
    rows = [["the paper", _percent(TOTAL), *[f"{_percent(m)}: {_percent(a)}" for m, a in SUBNETS.items()]]]
    for run in json.loads((MEASURED / "cifar10_lenet5.json").read_text(encoding="utf-8")):
        total = run["original"]["macs"]
        own = [f"{_percent(s['macs'] / total)}: {_percent(s['accuracy'])}" for s in run["subnets"]]
        rows.append([f"seed {run['seed']}", _percent(run["original"]["accuracy"]), *own])
    return markdown(["LeNet-5, CIFAR-10", "original", *[f"subnet {i}" for i in range(1, 5)]], rows)


BLOCKS = {"cifar10-lenet5": cifar10_lenet5}
