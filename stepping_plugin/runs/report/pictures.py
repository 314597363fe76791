"""The report's pictures, made without pyplot."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .tables import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_accuracy", "draw_units", "png"]

_INK, _ACCENT, _MUTED, _GRID = "#1f2933", "#1b6ca8", "#8795a1", "#e4e7eb"
_SECOND, _SPARE = "#c2571a", "#d5d9de"


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


def png(figure: Figure) -> bytes:
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
    if chosen := data.get("calibrated_exit"):
        place = 100 * chosen["macs"] / reference, 100 * chosen["metrics"]["accuracy"]
        axes.plot(*place, "*", color=_SECOND, markersize=13, markeredgecolor="white", label="early exit, as calibrated",
                  zorder=5)  # fmt: skip
    shares = [100 * row["macs"] / reference for row in subnets]
    accuracies = [100 * row["accuracy"] for row in subnets]
    axes.plot(shares, accuracies, "o-", color=_ACCENT, markersize=6, linewidth=2, label="subnets", zorder=4)
    for row, share, accuracy in zip(subnets, shares, accuracies):
        axes.annotate(
            f"{row['subnet']}: {accuracy:.1f}",
            (share, accuracy),
            xytext=(6, -13),  # below: the curve of early exit runs above
            textcoords="offset points",
            ha="left",
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
    axes.set_xlabel(f"MACs, % of the original's {si(reference)}  (grey lines: budgets)", color=_INK)
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
