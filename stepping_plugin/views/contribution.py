"""What every level adds, measured on pictures: units that say anything, and how much of the class scores they carry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import Tensor

from ..errors import SteppingError, explain
from ..files.headers import Contribution
from ..graph.structure import class_scores
from ..nested.liveness import measure_life

if TYPE_CHECKING:
    from ..nested.net import NestedNet

__all__ = ["contribution_rows", "contribution_table", "idle_levels", "measure_contribution"]

NOTHING = 0.005  # a level that carries less of the scores and changes fewer answers than this adds nothing


@torch.no_grad()
def measure_contribution(net: NestedNet, batches: Iterable[Tensor]) -> Contribution:
    """Measure what every level adds.

    Args:
        net: evaluated in eval mode where it is; its mode is restored.
        batches: images (B, C, H, W) on any device, a few hundred in all.
    """
    training, place = net.training, net.unit_levels.device
    images = [x.to(place) for x in batches]
    if not images:
        raise SteppingError(explain("no images", where="measure", got="no batch", expected="a few hundred images"))
    net.eval()
    try:
        scores = torch.cat([_scores(net, x).double().cpu() for x in images], 1)
        alive = measure_life(net, images).alive()
    finally:
        net.train(training)
    increments = torch.diff(scores, dim=0, prepend=torch.zeros_like(scores[:1]))
    variance = increments.var(1, correction=0).sum(1)
    answers = scores.argmax(-1)
    changed = (answers[1:] != answers[:-1]).double().mean(1).tolist()
    levels, n = net.levels, net.num_subnets
    return Contribution(
        pictures=scores.shape[1],
        live={group.name: _live_shares(alive, levels, group.units, n) for group in net.analysis.groups},
        scores=(variance / variance.sum().clamp(min=1e-300)).tolist(),
        changed=[0.0, *changed],
    )


def _scores(net: NestedNet, images: Tensor) -> Tensor:
    action = "Compare the subnets' outputs by a metric of your own: net.forward_all(images)."
    what = "what every level adds is measured on class scores"
    return class_scores(net.forward_all(images), what, "measure", action)


def _live_shares(alive: Tensor, levels: Tensor, units: Tensor, n: int) -> list[float | None]:
    own = [alive[units[levels[units] == level]] for level in range(1, n + 1)]
    return [float(found.double().mean()) if len(found) else None for found in own]


def idle_levels(found: Contribution) -> list[str]:
    """One sentence per level that adds nothing."""
    facts = enumerate(zip(found.scores, found.changed), start=1)
    return [
        f"subnet {i} answers like subnet {i - 1}: level {i} carries {100 * share:.2f} % of the scores and changes "
        f"{100 * changed:.2f} % of the answers. Put these budgets further apart, train longer, or use fewer budgets."
        for i, (share, changed) in facts
        if i > 1 and share < NOTHING and changed < NOTHING
    ]


def contribution_rows(found: Contribution) -> list[list[str]]:
    """A row per fact: what it is, then one cell per level."""
    rows = [
        ["carries of the scores", *(f"{100 * share:.1f} %" for share in found.scores)],
        ["changes of the answers", "", *(f"{100 * share:.1f} %" for share in found.changed[1:])],
    ]
    for name, shares in found.live.items():
        rows.append([f"live units of {name}", *("-" if s is None else f"{100 * s:.0f} %" for s in shares)])
    return rows


def contribution_table(found: Contribution) -> Table:
    """Per level: share of the scores, answers changed, and per group the share of live units."""
    table = Table(title=f"What every level adds (measured on {found.pictures:,} pictures)")
    table.add_column("")
    for level in range(1, len(found.scores) + 1):
        table.add_column(f"level {level}", justify="right")
    for row in contribution_rows(found):
        table.add_row(*row)
    return table
