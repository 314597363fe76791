"""Pictures of a comparison: accuracy against MACs per method (Fig. 6), expansion (Fig. 7), ablation (Fig. 8)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

from .tables import VIEWS, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_ablation", "draw_curves", "png"]

_FAR = 4.0  # points below the lowest bar of the first variant
_STYLES = ("o-", "s--", "^--", "v:", "D--", "P:", "X:", "<:", ">:", "h:", "*:")


def png(figure: Figure) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    """Made without pyplot: no global state, no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels + 1.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False, sharey=True)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        panel.set_axisbelow(True)
    return figure, axes


def draw_curves(groups: Sequence[Group], views: Sequence[str] = tuple(VIEWS)) -> Figure:
    """Accuracy against MACs, one line per variant, error bars over seeds, one panel per view."""
    figure, panels = _figure(len(views))
    for panel, view in zip(panels, views):
        for group, style in zip(groups, _STYLES * len(groups)):
            columns = group.accuracies(view)
            reference = group.first.reference.macs
            shares = [100 * mean(a[i].executed for a in group.answers(view)) / reference for i in range(len(columns))]
            errors = [stdev(c) if len(c) > 1 else 0.0 for c in columns]
            panel.errorbar(
                shares, [mean(c) for c in columns], errors, fmt=style, label=group.label, markersize=5, linewidth=1.3,
                capsize=2.5,
            )  # fmt: skip
        original = mean(100 * r.reference.accuracy for group in groups for r in group.results)
        panel.axhline(original, color="#8795a1", linewidth=1, linestyle=(0, (4, 3)))
        panel.set_title(VIEWS[view], fontsize=10)
        panel.set_xlabel("executed MACs, % of the original")
    panels[0].set_ylabel("accuracy, %  (grey: original)")
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def draw_ablation(groups: Sequence[Group]) -> Figure:
    """Accuracy of every subnet, one bar per variant.

    There are more variants than a legend inside leaves room for. A bar that ends far below the first variant's has its
    number instead: it would squeeze the others.
    """
    from matplotlib import colormaps

    figure, (panel,) = _figure(1)
    figure.set_size_inches(10.5, 4.6)
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    width = 0.8 / len(groups)
    bars = [group.accuracies("alone") for group in groups]
    values = [v for columns in bars for column in columns for v in column]
    bottom = max(min(values), min(map(min, bars[0])) - _FAR) - 1.5
    for k, (group, columns) in enumerate(zip(groups, bars)):
        places = [i + (k - (len(groups) - 1) / 2) * width for i in range(len(columns))]
        errors = [stdev(c) if len(c) > 1 and mean(c) >= bottom else 0.0 for c in columns]
        panel.bar(
            places, [mean(c) for c in columns], width * 0.92, yerr=errors, capsize=1.5, label=group.label,
            color=colours[k % len(colours)], error_kw={"elinewidth": 0.8},
        )  # fmt: skip
        for place, column in zip(places, columns):
            if mean(column) < bottom:
                panel.text(
                    place, bottom + 0.1, f"{mean(column):.0f}", rotation=90, ha="center", va="bottom", fontsize=7
                )
    panel.set_ylim(bottom, max(values) + 1.0)
    panel.set_xticks(range(len(columns)), [f"subnet {i + 1}" for i in range(len(columns))])
    panel.set_ylabel("accuracy, %")
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure
