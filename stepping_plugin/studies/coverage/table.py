"""Coverage results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["markdown_table", "summary_lines", "write_table"]

BEGIN, END = "<!-- results: written by `stepping coverage --table` -->", "<!-- end of results -->"

Row = dict[str, Any]
_FREE_OF_PINS = 0.01  # share of pinned channels below which a model counts as movable


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """Counts over all rows, as Markdown list items."""
    total = len(rows)
    passed = lambda stage: sum(_passed(row, stage) for row in rows)  # noqa: E731
    few = sum(1 for row in rows if row.get("pinned_share", 1.0) < _FREE_OF_PINS)
    toolkit = [row["toolkit"] for row in rows if "toolkit" in row]
    agreeing = sum(1 for t in toolkit if t["finished"] and not t["only_torch_pruning_sets"])
    return [
        f"- models: {total} of {len({row['module'] for row in rows})} modules; every check passed: "
        f"{sum(row['status'] == 'ok' for row in rows)}",
        f"- converted: {passed('convert')}; equal to the original in eval mode: {passed('identity')}, in train mode: "
        f"{passed('train_mode')}; nested and cut out exactly: {passed('nested')}; stepped exactly: {passed('engine')}; "
        f"MACs as fvcore counts them: {passed('macs')}; budgets met: {passed('budgets')}",
        f"- less than 1 % of the channels pinned: {few}",
        f"- torch-pruning's graph finished on {sum(t['finished'] for t in toolkit)}; it ties no units that the channel "
        f"graph keeps apart on {agreeing} of these",
    ]


def write_table(path: str | Path, rows: Sequence[Row]) -> None:
    """Write summary and table to a Markdown file; in a file that has the two marks, between them."""
    path = Path(path)
    text = "\n".join([BEGIN, "", *summary_lines(rows), "", markdown_table(rows), "", END])
    page = path.read_text() if path.exists() else ""
    if BEGIN in page and END in page:
        text = page[: page.index(BEGIN)] + text + page[page.index(END) + len(END) :]
    else:
        text += "\n"
    path.write_text(text)


def _passed(row: Row, stage: str) -> bool:
    return stage in row.get("seconds", {}) and stage not in row.get("failures", {})


_COLUMNS = (
    "module", "model", "status", "units (groups)", "pinned", "why", "identity", "train mode", "leak", "cut out",
    "engine", "floor", "budgets used", "torch-pruning", "convert, s", "all, s",
)  # fmt: skip


def markdown_table(rows: Sequence[Row]) -> str:
    """One line per model; errors are relative to the largest class score, in float64."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    number = lambda key: f"{row[key]:.0e}" if key in row else "-"  # noqa: E731
    model = row["model"] + ("" if not row.get("reduced") else " (reduced)")
    pinned = f"{row['pinned_share']:.1%}" if "pinned_share" in row else "-"
    train = max((row[k] for k in ("train_identity", "train_statistics") if k in row), default=None)
    used = ", ".join(f"{u:.1%}" for u in row.get("budget_used", [])) or "-"
    return [
        row["module"],
        model,
        row["status"].replace("|", "/").splitlines()[0],
        f"{row['units']:,} ({row['groups']})" if "units" in row else "-",
        pinned,
        _reasons(row),
        number("identity"),
        "-" if train is None else f"{train:.0e}",
        number("leak"),
        number("extract"),
        number("engine"),
        f"{row['floor_share']:.1%}" if "floor_share" in row else "-",
        used,
        _toolkit(row),
        f"{row['seconds']['convert']:.0f}" if "convert" in row.get("seconds", {}) else "-",
        f"{row['wall_seconds']:.0f}" if "wall_seconds" in row else "-",
    ]


def _reasons(row: Row) -> str:
    if not row.get("pinned_channels"):
        return ""
    reasons: dict[str, int] = {}
    for pin in row["pins"]:
        key = f"{pin['reason']} ({pin['operator']})"
        reasons[key] = reasons.get(key, 0) + pin.get("channels", pin.get("times", 0))
    return "; ".join(sorted(reasons, key=lambda key: -reasons[key])[:2])


def _toolkit(row: Row) -> str:
    found = row.get("toolkit")
    if found is None:
        return "-"
    if not found["finished"]:
        return "stopped" if "stopped" in (found["error"] or "") else "fails"
    extra = found["only_torch_pruning_sets"]
    return f"agrees on {found['agreed_units']:,}" + (f", ties {extra} more" if extra else "")
