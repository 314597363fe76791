"""The report's tables: for the terminal, and as rows for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from stepping_plugin.views.metrics import metrics_titles, metrics_values

__all__ = ["COLUMNS", "EXIT_COLUMNS", "calibrated_rows", "calibrated_sentence", "calibrated_table", "exit_rows",
           "exit_table", "judged", "metrics_table", "percent", "result_rows", "results_table", "si"]  # fmt: skip

COLUMNS = ("network", "MACs", "of M_t", "budget", "before retraining", "accuracy")


def result_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    reference = data["original"]["macs"]
    rows: list[tuple[str, ...]] = [
        ("original", si(reference), percent(1.0), "", "", percent(data["original"].get("accuracy"), 2))
    ]
    for subnet in data["subnets"]:
        rows.append(
            (
                f"subnet {subnet['subnet']}",
                si(subnet["macs"]),
                percent(subnet["macs"] / reference),
                percent(subnet["budget"] / reference),
                percent(subnet.get("accuracy_before_retraining"), 2),
                percent(subnet.get("accuracy"), 2),
            )
        )
    return rows


EXIT_COLUMNS = ("stop at probability", "average MACs", "of M_t", "accuracy", "stop at subnet 1 / 2 / ..., %")


def exit_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            f"{point['threshold']:.4f}",
            si(point["macs"]),
            percent(point["macs"] / data["original"]["macs"]),
            percent(point["accuracy"], 2),
            " / ".join(f"{100 * share:.0f}" for share in point["subnets"]),
        )
        for point in data["early_exit"]["points"]
    ]


def percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def si(macs: float) -> str:
    """1234567 -> 1.23 M."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if macs >= factor:
            return f"{macs / factor:.3g}{unit}"
    return f"{macs:.0f}"


def judged(data: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the networks that metrics are known of, and the metrics."""
    known, calibrated = data.get("metrics") or {}, data.get("calibrated_exit") or {}
    pairs = [("original", known.get("original"))]
    pairs += [(f"subnet {i}", metrics) for i, metrics in enumerate(known.get("subnets", []), start=1)]
    pairs.append(("early exit", calibrated.get("metrics")))
    kept = [(name, metrics) for name, metrics in pairs if metrics]
    return [name for name, _ in kept], [metrics for _, metrics in kept]


def calibrated_sentence(found: Mapping[str, Any], reference_macs: float) -> str:
    """What was asked for, and what test pictures say."""
    facts = [f"accuracy {percent(found['metrics']['accuracy'], 2)}"]
    if found["quality"].lower() != "accuracy":
        facts.insert(0, f"{found['quality']} {percent(found['test'], 2)}")
    share = percent(found["macs"] / reference_macs)
    return (
        f"{found['sentence']}. On {found['metrics']['pictures']:,} test pictures: {', '.join(facts)}, "
        f"{si(found['macs'])} MACs on average ({share} of M_t)."
    )


def calibrated_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row per fact, then one cell per subnet."""
    steps = {step["subnet"]: step for step in found["steps"]}
    subnets = range(1, len(found["temperatures"]) + 1)
    return [
        ["pictures that stop here", *(percent(share) for share in found["subnets"])],
        ["temperature", *(f"{t:.3g}" for t in found["temperatures"])],
        ["threshold", *(_threshold(row) for row in found["thresholds"]), ""],
        ["its step makes right", *(percent(steps[i]["better"], 2) if i in steps else "" for i in subnets)],
        ["its step makes wrong", *(percent(steps[i]["worse"], 2) if i in steps else "" for i in subnets)],
    ]


def _threshold(row: list[float | None]) -> str:
    """Of a subnet; of several classes the range."""
    known = [t for t in row if t is not None]
    if not known:
        return "never"
    low, high = min(known), max(known) if len(known) == len(row) else None
    if low == high:
        return f"{low:.4f}"
    return f"{low:.4f} to {'never' if high is None else f'{high:.4f}'}"


def metrics_table(data: Mapping[str, Any]) -> Table:
    """Metrics of all networks, for `rich.print`."""
    names, found = judged(data)
    titles = metrics_titles(found)
    table = Table("network", title=f"metrics on {data['metrics']['pictures']:,} test pictures")
    for title in titles.values():
        table.add_column(title, justify="right")
    for name, metrics in zip(names, found):
        table.add_row(name, *metrics_values(metrics, titles))
    return table


def calibrated_table(data: Mapping[str, Any]) -> Table:
    """The calibrated exit, for `rich.print`."""
    found = data["calibrated_exit"]
    table = Table("", title=f"early exit: {found['target']}")
    for i in range(len(found["temperatures"])):
        table.add_column(f"subnet {i + 1}", justify="right")
    for row in calibrated_rows(found):
        table.add_row(*row)
    return table


def results_table(data: Mapping[str, Any]) -> Table:
    """Rows of the original and of every subnet, for `rich.print`."""
    table = Table(title=data.get("title"))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in result_rows(data):
        table.add_row(*row)
    return table


def exit_table(data: Mapping[str, Any]) -> Table:
    """The early-exit curve, for `rich.print`."""
    table = Table(title=f"early exit, thresholds from {data['early_exit']['thresholds_from']}")
    for column in EXIT_COLUMNS:
        table.add_column(column, justify="right")
    for row in exit_rows(data):
        table.add_row(*row)
    return table
