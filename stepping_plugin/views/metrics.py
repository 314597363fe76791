"""Metrics of several nets side by side: as rows for pages, as tables for terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.table import Table

__all__ = ["MOST_ROWS", "class_header", "class_rows", "metrics_table", "metrics_titles", "metrics_values"]

_TITLES = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced", "precision": "precision", "recall": "recall",
    "f1": "F1", "auc": "AUC", "average_precision": "mAP", "ece": "ECE",
}  # fmt: skip
MOST_ROWS = 20  # of a table by class


def metrics_titles(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Titles of the metrics that any of the nets has, by key. Balanced accuracy is the mean recall: shown once."""
    known = {key: title for key, title in _TITLES.items() if any(m.get(key) is not None for m in found)}
    return {key: title for key, title in known.items() if key != "recall" or "balanced_accuracy" not in known}


def metrics_values(metrics: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    """One cell per title: percent, and three decimals for what is no share of pictures."""
    return [_cell(key, metrics.get(key)) for key in titles]


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if key in ("auc", "ece", "average_precision", "f1") else f"{100 * value:.2f} %"


def class_header(names: Sequence[str]) -> list[str]:
    """Columns of `class_rows` for nets of these names."""
    return ["class", "pictures", *names]


def class_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Per class: how many pictures show it, and how many of those every net finds.

    Of many classes the `MOST_ROWS` that the last net finds worst.
    """
    shown = [k for k, entry in enumerate(found[-1]["classes"]) if entry["pictures"]]
    if len(shown) > MOST_ROWS:
        shown = sorted(shown, key=lambda k: found[-1]["classes"][k]["recall"])[:MOST_ROWS]
    rows = []
    for k in shown:
        entries = [m["classes"][k] for m in found]
        cells = [f"{e['found']:,} ({100 * e['recall']:.1f} %)" for e in entries]
        rows.append([entries[0]["name"], f"{entries[0]['pictures']:,}", *cells])
    return rows


class _Metrics(Protocol):
    """See `training.metrics.Metrics`."""

    def as_dict(self) -> dict[str, Any]: ...


def metrics_table(found: Sequence[_Metrics]) -> Table:
    """What `net.evaluate` gives, for `rich.print`."""
    plain = [m.as_dict() for m in found]
    titles = metrics_titles(plain)
    table = Table(title=f"Metrics on {plain[0]['pictures']:,} pictures")
    for column in ("subnet", *titles.values()):
        table.add_column(column, justify="right")
    for i, metrics in enumerate(plain, start=1):
        table.add_row(str(i), *metrics_values(metrics, titles))
    return table
