"""The report of a run: report.json, two pictures, a self-contained HTML page, and a table for the terminal.

The data are a plain dictionary (accuracies are shares in [0, 1], MACs are per image):

    original:  {macs: int, accuracy: float | None}
    subnets:   [{subnet: 1.., macs: int, budget: int, accuracy: float | None,
                 accuracy_before_retraining: float | None}, ...]
    layers:    [{name: str, units_per_level: [int, ...]}, ...], one entry per level 1..N, then the spare units
    early_exit: {rule: str, thresholds_from: str, points: [{threshold, macs (average), accuracy, subnets: shares of the
                 samples that stop there}, ...]} (optional)
    contribution: see `files.headers.Contribution` (optional)
    warnings:  [str, ...], see `runs.judgement` (optional)
    recipe:    str, the resolved recipe as YAML (optional)
    title:     str (optional)

Whatever else they hold (history, machine, times) goes into report.json as it is.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.files.headers import Contribution
from stepping_plugin.tensorfile import write_bytes
from stepping_plugin.views.contribution import contribution_rows, idle_levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_accuracy", "draw_units", "exit_table", "results_table", "write_report"]

_INK, _ACCENT, _MUTED, _GRID = "#1f2933", "#1b6ca8", "#8795a1", "#e4e7eb"
_SECOND, _SPARE = "#c2571a", "#d5d9de"


def write_report(folder: str | os.PathLike[str], data: Mapping[str, Any]) -> Path:
    """Write report.json, accuracy_vs_macs.png, units_per_layer.png and index.html; returns the page's path.

    Every file appears whole or not at all: it is written beside its place and then renamed.

    Raises:
        SteppingError: data incomplete, or the folder cannot be written.
    """
    plain = _plain(data)
    _check(plain)
    folder = Path(folder)
    pictures = {
        "accuracy_vs_macs.png": _png(draw_accuracy(plain)),
        "units_per_layer.png": _png(draw_units(plain)),
    }
    page = _page(plain, pictures)
    contents = {
        "report.json": json.dumps(plain, indent=2, allow_nan=False).encode() + b"\n",
        **pictures,
        "index.html": page.encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_bytes(folder / name, content)
    except OSError as error:
        raise SteppingError(f"the report cannot be written to {folder}: {error.strerror or error}") from error
    return folder / "index.html"


def results_table(data: Mapping[str, Any]) -> Table:
    """Rows of the original and of every subnet, for `rich.print`."""
    table = Table(title=data.get("title"))
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in _rows(data):
        table.add_row(*row)
    return table


def exit_table(data: Mapping[str, Any]) -> Table:
    """The early-exit curve, for `rich.print`."""
    table = Table(title=f"early exit, thresholds from {data['early_exit']['thresholds_from']}")
    for column in _EXIT_COLUMNS:
        table.add_column(column, justify="right")
    for row in _exit_rows(data):
        table.add_row(*row)
    return table


# --- The data -----------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Tensors, numpy scalars, paths and tuples as JSON knows them; NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # tensors and numpy
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _check(data: Mapping[str, Any]) -> None:
    missing = [key for key in ("original", "subnets", "layers") if not data.get(key)]
    if missing:
        raise SteppingError(explain("report data are incomplete", got=f"no {', '.join(missing)}"))
    accuracies = [row.get("accuracy") for row in (data["original"], *data["subnets"])]
    beyond = [value for value in accuracies if value is not None and not 0 <= value <= 1]
    if beyond:
        raise SteppingError(explain("bad accuracy in report data", got=beyond[0], expected="a share in [0, 1]"))


_COLUMNS = ("network", "MACs", "of M_t", "budget", "before retraining", "accuracy")


def _rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    reference = data["original"]["macs"]
    rows: list[tuple[str, ...]] = [
        ("original", _si(reference), _percent(1.0), "", "", _percent(data["original"].get("accuracy"), 2))
    ]
    for subnet in data["subnets"]:
        rows.append(
            (
                f"subnet {subnet['subnet']}",
                _si(subnet["macs"]),
                _percent(subnet["macs"] / reference),
                _percent(subnet["budget"] / reference),
                _percent(subnet.get("accuracy_before_retraining"), 2),
                _percent(subnet.get("accuracy"), 2),
            )
        )
    return rows


_EXIT_COLUMNS = ("stop at probability", "average MACs", "of M_t", "accuracy", "stop at subnet 1 / 2 / ..., %")


def _exit_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            f"{point['threshold']:.4f}",
            _si(point["macs"]),
            _percent(point["macs"] / data["original"]["macs"]),
            _percent(point["accuracy"], 2),
            " / ".join(f"{100 * share:.0f}" for share in point["subnets"]),
        )
        for point in data["early_exit"]["points"]
    ]


def _percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def _si(macs: float) -> str:
    """1234567 -> 1.23 M."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if macs >= factor:
            return f"{macs / factor:.3g}{unit}"
    return f"{macs:.0f}"


# --- Pictures -----------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture. Made without pyplot: no global state, no window, safe in threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.tick_params(colors=_INK, labelsize=9)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def draw_accuracy(data: Mapping[str, Any]) -> Figure:
    """Accuracy of every subnet against its MACs as a share of the original's."""
    reference = data["original"]["macs"]
    subnets = [row for row in data["subnets"] if row.get("accuracy") is not None]
    figure, axes = _figure(7.2, 4.4)
    original = data["original"].get("accuracy")
    if original is not None:
        axes.axhline(100 * original, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.plot(100, 100 * original, "D", color=_INK, markersize=6, label="original", zorder=3)
    before = [row for row in subnets if row.get("accuracy_before_retraining") is not None]
    if before:
        axes.plot(
            [100 * row["macs"] / reference for row in before],
            [100 * row["accuracy_before_retraining"] for row in before],
            "o--",
            color=_MUTED,
            markerfacecolor="white",
            markersize=5,
            linewidth=1.2,
            label="subnets before retraining",
        )
    if points := (data.get("early_exit") or {}).get("points"):
        axes.plot(
            [100 * row["macs"] / reference for row in points],
            [100 * row["accuracy"] for row in points],
            ".-",
            color=_SECOND,
            linewidth=1.2,
            label="early exit by max. probability (average MACs)",
        )
    shares = [100 * row["macs"] / reference for row in subnets]
    accuracies = [100 * row["accuracy"] for row in subnets]
    axes.plot(shares, accuracies, "o-", color=_ACCENT, markersize=6, linewidth=2, label="subnets", zorder=4)
    for row, share, accuracy in zip(subnets, shares, accuracies):
        axes.annotate(
            f"{row['subnet']}: {accuracy:.1f}",
            (share, accuracy),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=_ACCENT,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
        )
    for row in data["subnets"]:
        axes.axvline(100 * row["budget"] / reference, color=_GRID, linewidth=1, zorder=0)
    axes.set_xlim(0, max([100, *shares]) * 1.06)
    axes.margins(y=0.15)
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= min(high, 100)])
    axes.set_ylim(low, high)
    axes.set_xlabel(f"MACs, % of the original's {_si(reference)}  (grey lines: budgets)", color=_INK)
    axes.set_ylabel("accuracy, %", color=_INK)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def draw_units(data: Mapping[str, Any]) -> Figure:
    """Per layer one bar: which share of its units each level holds, with the numbers of units written in."""
    layers = data["layers"]
    levels = len(data["subnets"])
    dense = len(layers) > 40
    figure, axes = _figure(7.8, 1.3 + len(layers) * (0.16 if dense else 0.34))
    size = 6 if dense else 8.5
    totals = [max(sum(layer["units_per_level"]), 1) for layer in layers]
    lefts = [0.0] * len(layers)
    most = max(len(layer["units_per_level"]) for layer in layers)
    for level in range(most):
        colour, ink = _level_colours(level, levels)
        counts = [dict(enumerate(layer["units_per_level"])).get(level, 0) for layer in layers]
        shares = [100 * count / total for count, total in zip(counts, totals)]
        axes.barh(
            range(len(layers)),
            shares,
            left=lefts,
            height=0.78,
            color=colour,
            edgecolor="white",
            linewidth=0.6,
        )
        for row, (count, share, left) in enumerate(zip(counts, shares, lefts)):
            if share > 0.18 * size * (1 + len(str(count))):  # the number fits
                axes.text(left + share / 2, row, str(count), ha="center", va="center", fontsize=size, color=ink)
        lefts = [left + share for left, share in zip(lefts, shares)]
    for row, layer in enumerate(layers):
        axes.text(101, row, str(sum(layer["units_per_level"])), va="center", fontsize=size, color=_INK)
    axes.set_yticks(range(len(layers)), [layer["name"] for layer in layers], fontsize=size)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of the layer's units, %  (numbers: units; right: in all)", color=_INK)
    _level_legend(axes, levels, spare=most > levels)
    return figure


def _level_colours(level: int, levels: int) -> tuple[Any, str]:
    """(bar, text) colour of a level counted from 0: dark to light in order, spare units grey."""
    if level >= levels:
        return _SPARE, _INK
    from matplotlib import colormaps

    position = level / max(levels - 1, 1)
    return colormaps["YlGnBu"](0.9 - 0.68 * position), "white" if position < 0.55 else _INK


def _level_legend(axes: Axes, levels: int, spare: bool) -> None:
    from matplotlib.patches import Patch

    names = [f"level {level + 1}" for level in range(levels)] + ["spare"] * spare
    handles = [Patch(color=_level_colours(level, levels)[0], label=name) for level, name in enumerate(names)]
    axes.figure.legend(
        handles=handles, ncols=min(len(handles), 6), loc="outside upper center", frameon=False, fontsize=9
    )


# --- Page and files -----------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 56rem;
       margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .9rem; text-align: right; border-bottom: 1px solid #e4e7eb; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
img {{ max-width: 100%; height: auto; }}
pre {{ background: #f5f7fa; padding: 1rem; overflow-x: auto; font-size: .85rem; }}
.wide {{ overflow-x: auto; }} .note {{ color: #616e7c; font-size: .9rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="wide">{results}</div>
<p class="note">MACs: multiply-accumulates per image, of subnet 1 up to and including this one. M_t: MACs of
the original network.</p>
<h2>Accuracy against MACs</h2>
<img alt="Accuracy of each subnet against its MACs" src="{accuracy_vs_macs}">
{early_exit}
<h2>Units per layer and level</h2>
<img alt="Share of each layer's units in each level" src="{units_per_layer}">
<details><summary>As a table</summary><div class="wide">{units}</div></details>
{contribution}
{recipe}
</body>
</html>
"""


def _page(data: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The HTML page; needs nothing but itself."""
    sources = {
        name.removesuffix(".png"): "data:image/png;base64," + base64.b64encode(png).decode()
        for name, png in pictures.items()
    }
    most = max(len(layer["units_per_level"]) for layer in data["layers"])
    levels = len(data["subnets"])
    header = ["layer", *(f"level {level + 1}" if level < levels else "spare" for level in range(most))]
    units = [[layer["name"], *map(str, layer["units_per_level"])] for layer in data["layers"]]
    recipe = data.get("recipe")
    return _PAGE.format(
        title=html.escape(str(data.get("title") or "SteppingNet report")),
        results=_html_table(_COLUMNS, _rows(data)) + _warnings(data),
        units=_html_table(header, units),
        early_exit=_early_exit(data),
        contribution=_contribution(data),
        recipe=f"<h2>Recipe</h2>\n<pre>{html.escape(str(recipe))}</pre>" if recipe else "",
        **sources,
    )


def _warnings(data: Mapping[str, Any]) -> str:
    return "".join(f"<p><strong>{html.escape(text)}</strong></p>" for text in data.get("warnings", []))


def _early_exit(data: Mapping[str, Any]) -> str:
    """The early-exit curve as a table, folded; empty without one."""
    if not data.get("early_exit"):
        return ""
    where = html.escape(data["early_exit"]["thresholds_from"])
    table = _html_table(_EXIT_COLUMNS, _exit_rows(data))
    note = f'<p class="note">Thresholds were chosen on {where}.</p>'
    return f'<details><summary>Early exit, as a table</summary>{note}<div class="wide">{table}</div></details>'


def _contribution(data: Mapping[str, Any]) -> str:
    """What every level adds, as a table with a sentence per level that adds nothing; empty where not measured."""
    if not data.get("contribution"):
        return ""
    found = Contribution(**data["contribution"])
    header = ["", *(f"level {level + 1}" for level in range(len(found.scores)))]
    warnings = "".join(f"<p><strong>{html.escape(text)}</strong></p>" for text in idle_levels(found))
    note = (
        f'<p class="note">Measured on {found.pictures:,} pictures: the share of each level in what the class scores of '
        "the subnets differ by, the answers that it changes, and per layer its units that say anything at all.</p>"
    )
    table = _html_table(header, contribution_rows(found))
    return f'<h2>What every level adds</h2>\n{warnings}<div class="wide">{table}</div>{note}'


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
