"""What every level adds, measured on pictures: units that say anything, and how much of the class scores they carry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from ..nested.liveness import measure_life

if TYPE_CHECKING:
    from ..nested.net import NestedNet

__all__ = ["Contribution", "contribution_table", "measure_contribution"]

NOTHING = 0.005  # a level that changes fewer answers and carries less of the scores than this adds nothing


@dataclass
class Contribution:
    """What levels 1..N add.

    Attributes:
        pictures: how many it was measured on.
        live: per group of units, share of its units of levels 1..N that say anything (see `nested.liveness`); None
            where the group has no unit of that level.
        scores: share of the variance over pictures of all score increments o_1..o_N that each level has,
            o_i = scores_i - scores_(i-1).
        changed: share of pictures whose answer changes from subnet i - 1 to i; 0 for i = 1.
    """

    pictures: int
    live: dict[str, list[float | None]]
    scores: list[float]
    changed: list[float]
    idle: list[int] = field(init=False)

    def __post_init__(self) -> None:
        facts = zip(self.scores[1:], self.changed[1:])
        self.idle = [i for i, (share, moved) in enumerate(facts, start=2) if share < NOTHING and moved < NOTHING]

    @property
    def warnings(self) -> list[str]:
        """One sentence per level that adds nothing."""
        return [
            f"subnet {i} answers like subnet {i - 1}: level {i} carries {100 * self.scores[i - 1]:.2f} % of the scores and "
            f"changes {100 * self.changed[i - 1]:.2f} % of the answers. Put these budgets further apart, train longer, or "
            "use fewer budgets."
            for i in self.idle
        ]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; `Contribution.of` reads it."""
        return {key: value for key, value in asdict(self).items() if key != "idle"}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Contribution:
        """From `as_dict`."""
        return cls(**{key: facts[key] for key in ("pictures", "live", "scores", "changed")})


@torch.no_grad()
def measure_contribution(net: NestedNet, batches: Iterable[Tensor]) -> Contribution:
    """Measure what every level adds.

    Args:
        net: evaluated in eval mode; its mode is restored.
        batches: images (B, C, H, W), where the net is; a few hundred in all.
    """
    training, batches = net.training, list(batches)
    net.eval()
    try:
        scores = torch.cat([net.forward_all(x).double().cpu() for x in batches], 1)
        alive = measure_life(net, batches).alive()
    finally:
        net.train(training)
    increments = torch.diff(scores, dim=0, prepend=torch.zeros_like(scores[:1]))
    variance = increments.var(1, correction=0).sum(1)
    answers = scores.argmax(-1)
    changed = (answers[1:] != answers[:-1]).double().mean(1).tolist()
    return Contribution(
        scores.shape[1],
        {group.name: _live_shares(alive, net.levels, group.units, net.num_subnets) for group in net.analysis.groups},
        (variance / variance.sum().clamp(min=1e-300)).tolist(),
        [0.0, *changed],
    )


def _live_shares(alive: Tensor, levels: Tensor, units: Tensor, n: int) -> list[float | None]:
    own = [alive[units[levels[units] == level]] for level in range(1, n + 1)]
    return [float(found.double().mean()) if len(found) else None for found in own]


def contribution_table(found: Contribution) -> Table:
    """Per level: share of the scores, answers changed, and per group the share of live units."""
    levels = range(1, len(found.scores) + 1)
    table = Table(title=f"What every level adds (measured on {found.pictures:,} pictures)")
    table.add_column("")
    for level in levels:
        table.add_column(f"level {level}", justify="right")
    table.add_row("carries of the scores", *(f"{100 * share:.1f} %" for share in found.scores))
    table.add_row(
        "changes of the answers", *(f"{100 * share:.1f} %" if k else "" for k, share in enumerate(found.changed))
    )
    for name, shares in found.live.items():
        table.add_row(f"live units of {name}", *("-" if s is None else f"{100 * s:.0f} %" for s in shares))
    return table
