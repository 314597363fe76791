"""Tables of docs/results/rounding.md, from docs/measured/rounding-*.json; see `measured`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepping_plugin.studies.compare.tables import markdown

MEASURED = Path(__file__).resolve().parent.parent / "docs" / "measured"


def entries(name: str) -> list[dict[str, Any]]:
    return json.loads((MEASURED / f"{name}.json").read_text(encoding="utf-8"))["results"]


def speed() -> str:
    """Sum of the steps over one dense run, per network, runtime and batch size; the MACs of both beside."""
    found, rows = entries("rounding-speed"), []
    multiples = sorted({e["round_to"] for e in found})
    for key in dict.fromkeys((e["model"], e["runtime"], e["batch"]) for e in found):
        own = {e["round_to"]: e for e in found if (e["model"], e["runtime"], e["batch"]) == key}
        macs = own[1]["macs"][-1] / own[1]["reference_macs"]
        rows.append([*map(str, key), f"{macs:.2f}", *[f"{own[m]['ratio']:.2f}" for m in multiples]])
    heading = [f"in multiples of {m}" if m > 1 else "any number" for m in multiples]
    return markdown(["network", "runtime", "batch", "MACs", *heading], rows)


def accuracy() -> str:
    """Test accuracy of all subnets, paired: every seed has one original; the mean difference to no rounding beside."""
    found, rows = entries("rounding-accuracy"), []
    for e in found:
        (free,) = (o for o in found if (o["recipe"], o["seed"], o["round_to"]) == (e["recipe"], e["seed"], 1))
        gain = 100 * (_mean(e["accuracy"]) - _mean(free["accuracy"]))
        used = ", ".join(f"{100 * macs / budget:.1f}" for macs, budget in zip(e["macs"], e["budgets"]))
        multiple = f"multiples of {e['round_to']}" if e["round_to"] > 1 else "any number"
        shown = ", ".join(f"{100 * share:.2f}" for share in e["accuracy"])
        rows.append([e["recipe"], str(e["seed"]), multiple, shown, f"{gain:+.2f}", used])
    heading = ["recipe", "seed", "levels", "accuracy of subnets 1 to 4", "mean, minus any number", "of the budgets, %"]
    return markdown(heading, rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


BLOCKS = {"rounding-speed": speed, "rounding-accuracy": accuracy}
