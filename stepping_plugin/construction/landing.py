"""Moving units between subnets until every subnet meets its budget exactly.

Subnets are settled in ascending order: MACs of subnet i depend only on the units of levels <= i, so a subnet
that holds stays as it is while the larger ones are settled. `Planner` is the moving part, for policies and
for construction; `land` brings any level vector onto its budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import BudgetError
from ..units.analysis import Analysis
from ..units.macs import MacModel
from .counts import Array
from .planner import LOCKS_ONLY, NEW_HEAD_UNITS, TIERS, Planner
from .plugs import find_plugs
from .rounding import smaller
from .uniform import Band, uniform_band

__all__ = ["LandingResult", "in_blocks", "land", "result_of", "settle"]

ENOUGH = 0.99  # a subnet that costs less than this share of its budget needs a reason
GOAL = 0.998  # landing stops adding here: the last permille would go to whatever is cheap, against the score
WHOLE = TIERS[:3]  # so much is tried in whole blocks before smaller ones are
WORTH = 0.005  # of the budgets together: smaller blocks everywhere have to bring that much


@dataclass
class LandingResult:
    """Levels (LongTensor, num_units), MACs of subnets 1..N, a sentence per subnet that is not as asked."""

    levels: Tensor
    macs: list[int]
    notes: list[str] = field(default_factory=list)


def land(
    analysis: Analysis,
    macs_model: MacModel,
    levels: Tensor,
    budgets: Sequence[int],
    scores: Tensor,
    locked: Tensor,
    band: Band | None = None,
    multiples: Array | None = None,
) -> LandingResult:
    """Move blocks of units until every subnet costs at least 99 % of its budget and never more than the budget.

    Args:
        analysis: units of the model.
        macs_model: its MACs.
        levels: LongTensor (num_units,) with values 1..N + 1.
        budgets: MACs of subnets 1..N, ascending.
        scores: (num_units,) importance, higher is better.
        locked: BoolTensor (num_units,) from `units.levels.locked_units`.
        band: bounds on the widths that moves keep as long as the budget can be met inside them; by default
            those of `uniform_band`, or what `levels` has where that is outside.
        multiples: (W,) units of each width that are to be a block, see `rounding.multiples`; by default one.

    Raises:
        BudgetError: a subnet is above its budget with everything moved out that may move.
    """
    planner = Planner(analysis, macs_model, levels, len(budgets), scores, locked, band, multiples)
    if band is None:
        planner.band = _around(planner, uniform_band(analysis, macs_model, budgets))
    notes: list[str] = []
    for subnet, budget in enumerate(budgets, start=1):
        notes += settle(planner, subnet, int(budget))
    return result_of(planner, analysis, macs_model, notes)


def in_blocks(multiples: Array, budgets: Sequence[int], attempt: Callable[[Array], LandingResult]) -> LandingResult:
    """A landing with the largest blocks that stand in the way of no budget.

    Args:
        multiples: (W,) units of each width that are to be a block, see `rounding.multiples`.
        budgets: MACs of subnets 1..N.
        attempt: lands with given blocks.

    Raises:
        BudgetError: what `attempt` raises with single units.
    """
    best: LandingResult | None = None
    least = math.inf
    while True:
        finer = smaller(multiples)
        last = bool((finer == multiples).all())
        try:
            result = attempt(multiples)
        except BudgetError:
            if last and best is None:
                raise
        else:
            missing = sum(max(0.0, ENOUGH - macs / budget) for macs, budget in zip(result.macs, budgets))
            if missing < least - WORTH:
                best, least = result, missing
        if best is not None and (last or least == 0):
            return best
        multiples = finer


def _around(planner: Planner, band: Band) -> Band:
    """A band widened so far that the planner's levels lie inside it."""
    new = planner.width_counts()[:, 1 : planner.n + 1]
    inside = new.cumsum(1)
    return Band(
        np.minimum(band.lower, inside),
        np.maximum(band.upper, inside),
        np.minimum(band.new, new),
        np.maximum(band.most, new),
    )


def result_of(planner: Planner, analysis: Analysis, macs_model: MacModel, notes: list[str]) -> LandingResult:
    """The planner's levels with their MACs, and notes on plugs."""
    levels = torch.where(analysis.dead_ends & (planner.levels > 1), planner.n + 1, planner.levels)
    for plug in find_plugs(analysis, levels, planner.n):
        notes.append(
            f"subnet {plug.subnet} gives the scores of subnet {plug.subnet - 1}: the classifier reads no "
            f"unit of level {plug.subnet} (it reads {', '.join(plug.groups) or 'pinned channels only'})"
        )
    return LandingResult(levels, macs_model.subnet_macs(levels, planner.n).tolist(), notes)


def settle(planner: Planner, subnet: int, budget: int) -> list[str]:
    """Bring one subnet onto its budget, the smaller ones being settled; returns notes about it."""
    planner.seed(subnet)
    planner.reserve(subnet)
    while not any(planner.thin(subnet, budget, tier) for tier in TIERS[:NEW_HEAD_UNITS]) and planner.refine():
        pass  # smaller blocks, rather than widths without new units
    if not any(planner.thin(subnet, budget, tier) for tier in TIERS[NEW_HEAD_UNITS:]):
        cost = planner.macs(subnet)
        raise BudgetError(
            f"budget {subnet} is {budget:,} MACs, but subnet {subnet} costs {cost:,} without own units. "
            f"Raise budget {subnet} or lower the ones before it."
        )
    enough = any(_use_up(planner, subnet, budget, tier) for tier in WHOLE)
    enough = enough or any(_use_up(planner, subnet, budget, tier, finer=True) for tier in TIERS[:LOCKS_ONLY])
    planner.coarsen(subnet)
    return [] if enough else [_shortfall(planner, subnet, budget)]


def _use_up(planner: Planner, subnet: int, budget: int, tier: int, finer: bool = False) -> bool:
    """Whether a subnet could be brought near its budget: in whole blocks, or with a few smaller ones."""
    while True:
        if planner.fill(subnet, budget, GOAL * budget, tier) or planner.macs(subnet) >= ENOUGH * budget:
            return True
        while planner.macs(subnet) < ENOUGH * budget and planner.exchange(subnet, budget, tier):
            pass
        if planner.macs(subnet) >= ENOUGH * budget:
            return True
        if not (finer and planner.refine()):
            return False


def _shortfall(planner: Planner, subnet: int, budget: int) -> str:
    """Why a subnet stays below 99 % of its budget."""
    share = planner.macs(subnet) / budget
    above = planner.classes.counts(planner.unit_levels, planner.n + 2)[:, subnet + 1 :].sum(1) > 0
    text = f"subnet {subnet} costs {share:.1%} of its budget: "
    if not above.any():
        return text + (
            "all units are in it already, and the nesting rule leaves out the synapses from larger to "
            "smaller subnets. Lower this budget or widen the network."
        )
    added = np.where(above, planner.model.added(planner.counts, subnet), np.inf)
    smallest = int(np.argmin(added))
    name = planner.classes.names[planner.classes.width[smallest]]
    if added[smallest] > budget - planner.macs(subnet):
        return text + f"the smallest unit that could be added ({name}) costs {added[smallest] / budget:.1%} of it."
    return text + "the other units are needed so that the larger subnets differ from it."
