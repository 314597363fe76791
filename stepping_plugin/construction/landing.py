"""Moving units between subnets until every subnet meets its budget exactly.

Subnets are settled in ascending order: MACs of subnet i depend only on the units of levels <= i, so a subnet
that holds stays as it is while the larger ones are settled. `Planner` is the moving part, for policies and
for construction; `land` brings any level vector onto its budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import BudgetError
from ..units.analysis import Analysis
from ..units.levels import check_scores
from ..units.macs import MacModel
from .counts import Array, CountModel, UnitClasses, to_array
from .plugs import find_plugs, head_units
from .uniform import Band, uniform_band

__all__ = ["LandingResult", "Planner", "land", "result_of", "settle"]

ENOUGH = 0.99  # a subnet that costs less than this share of its budget needs a reason
GOAL = 0.998  # landing stops adding here: the last permille would go to whatever is cheap, against the score

# How much a move may disturb, from gentle to bare. The next one is tried only if the one before did not do.
GIVES = (0.0, 0.1, 0.3, 0.5)  # the band first, then bounds that give up so much: what is left goes to all widths alike
IN_BAND, *_, NEW_UNITS, NEW_HEAD_UNITS, LOCKS_ONLY = TIERS = range(len(GIVES) + 3)
BATCH = 0.25  # share of the distance to the target that is covered at once, before values are computed anew


@dataclass
class LandingResult:
    """Levels (LongTensor, num_units), MACs of subnets 1..N, a sentence per subnet that is not as asked."""

    levels: Tensor
    macs: list[int]
    notes: list[str] = field(default_factory=list)


class Planner:
    """Levels of all units, and moves between neighbouring subnets with exact MACs.

    Args:
        analysis: units of the model.
        macs_model: its MACs.
        levels: LongTensor (num_units,) with values 1..n + 1; not modified.
        n: number of subnets.
        scores: (num_units,) importance, higher is better; any scale per group.
        locked: BoolTensor (num_units,), units that stay at level 1.
        band: bounds on the widths; none by default.

    A unit's *value* is its share of its group's importance in the subnet per MAC that it costs there. Moves
    take the lowest values out and the highest in.
    """

    def __init__(
        self,
        analysis: Analysis,
        macs_model: MacModel,
        levels: Tensor,
        n: int,
        scores: Tensor,
        locked: Tensor,
        band: Band | None = None,
    ) -> None:
        self.n = n
        self.classes = UnitClasses(analysis, macs_model, small=n)
        self.model = CountModel(self.classes, macs_model)
        self.locked = to_array(locked)
        self.unit_levels = np.where(self.locked, 1, to_array(levels))
        self.scores = check_scores(scores, analysis.num_units).numpy()
        self.band = band
        self.order = np.lexsort((self.scores, self.classes.of_unit))
        self.unit_group = self.classes.group[self.classes.of_unit] + 1  # 0 for units without a group
        self.counts = self.classes.counts(self.unit_levels, n + 2)
        self.locked_count = self._per_width(self.classes.counts(self.locked.astype(np.int64), 2))[:, 1]
        head = to_array(head_units(analysis))
        self.read_by_head = self._per_width(self.classes.counts(head.astype(np.int64), 2))[:, 1] > 0

    @property
    def levels(self) -> Tensor:
        """LongTensor (num_units,)."""
        return torch.from_numpy(self.unit_levels.copy())

    def macs(self, subnet: int) -> int:
        """MACs of a subnet."""
        return round(self.model.macs(self.counts, subnet))

    # -- widths

    def _per_width(self, counts: Array) -> Array:
        result = np.zeros((len(self.classes.width_size), counts.shape[1]), dtype=np.int64)
        np.add.at(result, self.classes.width, counts)
        return result

    def width_counts(self) -> Array:
        """Units per width and level, (W, n + 2), column s for level s."""
        return self._per_width(self.counts)

    def _new(self, tier: int) -> Array:
        """Least number of units of each level 1..n in every width, (W, n): one, where it is large enough."""
        required = self.classes.width_size >= self.n
        if tier == NEW_HEAD_UNITS:
            required &= self.read_by_head
        elif tier == LOCKS_ONLY:
            required[:] = False
        new = np.repeat(required[:, None].astype(np.int64), self.n, axis=1)
        return np.maximum(new, self.band.new) if tier < NEW_UNITS and self.band is not None else new

    def limits(self, subnet: int, tier: int = IN_BAND) -> tuple[Array, Array]:
        """Lowest and highest cumulative number of units of every width in a subnet, (W,) each."""
        new = self._new(tier)
        before = self.width_counts()[:, 1:subnet].sum(1)
        upper = np.maximum(self.classes.width_size - new[:, subnet:].sum(1), before)
        lower = np.maximum(np.minimum(before + new[:, subnet - 1], upper), self.locked_count)
        if tier < NEW_UNITS and self.band is not None:
            give = GIVES[tier]
            least, most, own = (b[:, subnet - 1] for b in (self.band.lower, self.band.upper, self.band.most))
            lower = np.maximum(lower, np.minimum(least - np.ceil(give * least), upper))
            most = np.minimum(most + np.ceil(give * most), before + own + np.ceil(give * own))
            upper = np.minimum(upper, most)
        return lower, np.maximum(upper, lower)

    # -- moves

    def thin(self, subnet: int, target: int, tier: int = IN_BAND) -> bool:
        """Move units of lowest value from `subnet` to the next one until its MACs are at most `target`.

        Returns:
            Whether the target was reached; if not, everything that may move did.
        """
        lower, _ = self.limits(subnet, tier)
        while (excess := self.macs(subnet) - target) > 0:
            units = self._ranked((self.unit_levels == subnet) & ~self.locked)
            saved = self.model.saved(self.counts, subnet)
            quota = self.width_counts()[:, 1 : subnet + 1].sum(1) - lower
            value = self._shares(units, subnet) / np.maximum(saved, 1e-9)[self.classes.of_unit[units]]
            units = self._allowed(units[np.argsort(value, kind="stable")], quota, saved > 0)
            if not len(units):
                return False
            cost = saved[self.classes.of_unit[units]]
            if cost.min() >= excess:  # the last move: overshoot as little as possible
                units = units[[np.argmin(cost)]]
            else:
                units = units[cost <= excess]
            self._move(units[: max(1, self._fitting(units, saved, BATCH * excess))], subnet + 1)
        return True

    def narrow(self, subnet: int) -> None:
        """Move the least important units of every width that is above its band to the next subnet."""
        _, upper = self.limits(subnet)
        units = self._ranked((self.unit_levels == subnet) & ~self.locked)
        units = units[np.argsort(self.scores[units], kind="stable")]
        quota = self.width_counts()[:, 1 : subnet + 1].sum(1) - upper
        self._move(self._allowed(units, quota), subnet + 1)

    def widen(self, subnet: int) -> None:
        """Move the most important units of every width that is below its band into the subnet, from the next levels."""
        if self.band is None:
            return
        for source in range(subnet + 1, self.n + 2):
            lower, _ = self.limits(subnet)
            counts = self.width_counts()
            leaves = counts[:, source] - (self._new(IN_BAND)[:, source - 1] if source <= self.n else 0)
            quota = np.minimum(lower - counts[:, 1 : subnet + 1].sum(1), leaves)
            units = self._ranked((self.unit_levels == source) & ~self.locked)
            self._move(self._allowed(units[np.argsort(-self.scores[units], kind="stable")], quota), subnet)

    def fill(self, subnet: int, budget: int, goal: float, tier: int = IN_BAND) -> bool:
        """Move units of highest value into `subnet` until its MACs are at least `goal`.

        Units of the next level come first; the MACs never exceed `budget`. Returns whether the goal was met.
        """
        for source in range(subnet + 1, self.n + 2):
            while self.macs(subnet) < goal:
                units = self._pick(subnet, source, budget - self.macs(subnet), tier)
                if not len(units):
                    break
                before = self.unit_levels[units]
                self._move(units, subnet)
                while self.macs(subnet) > budget:  # single costs add up to less than the batch costs together
                    back, units = units[len(units) // 2 :], units[: len(units) // 2]
                    self._move(back, int(before[0]))
        return self.macs(subnet) >= goal

    def _pick(self, subnet: int, source: int, slack: int, tier: int) -> Array:
        """Units of level `source` to add: some of the most valuable ones, or one, the largest that fits."""
        added = self.model.added(self.counts, subnet)
        fits = added <= slack
        if not fits.any():
            return self.order[:0]
        units = self._ranked(self.unit_levels == source)[::-1]
        quota = self._room(subnet, source, tier)
        value = self._shares(units, subnet) / np.maximum(added, 1e-9)[self.classes.of_unit[units]]
        units = self._allowed(units[np.argsort(-value, kind="stable")], quota, fits)
        count = self._fitting(units, added, BATCH * slack)
        if count or not len(units):
            return units[:count]
        largest = np.argmax(added[self.classes.of_unit[units]])  # first of its kind: the most valuable
        return units[largest : largest + 1]

    def _room(self, subnet: int, source: int, tier: int) -> Array:
        """How many units of every width may move from level `source` to `subnet`."""
        counts = self.width_counts()
        room = self.limits(subnet, tier)[1] - counts[:, 1 : subnet + 1].sum(1)
        leaves = counts[:, source] - (self._new(tier)[:, source - 1] if source <= self.n else 0)
        return np.minimum(room, leaves)

    def exchange(self, subnet: int, budget: int, tier: int = IN_BAND) -> bool:
        """Swap a unit of `subnet` for a larger one of the next: the pair that comes closest to the budget.

        Returns whether there was a pair that raises the MACs without exceeding the budget.
        """
        inside = (self.unit_levels == subnet) & ~self.locked
        lower = self.limits(subnet, tier)[0]
        spare_room = self.width_counts()[:, 1 : subnet + 1].sum(1) > lower
        leaving = self._class_has(inside) & spare_room[self.classes.width]
        saved, added = self.model.saved(self.counts, subnet), self.model.added(self.counts, subnet)
        slack = budget - self.macs(subnet)
        for source in range(subnet + 1, self.n + 2):
            entering = (
                self._class_has(self.unit_levels == source) & (self._room(subnet, source, tier) > 0)[self.classes.width]
            )
            gain = np.where(leaving[:, None] & entering, added - saved[:, None] - self.model.pairs(), -1.0)
            gain[gain > slack] = -1.0
            old, new = np.unravel_index(np.argmax(gain), gain.shape)
            if gain[old, new] > 0:
                worst = self._ranked(inside & (self.classes.of_unit == old))[:1]
                best = self._ranked((self.unit_levels == source) & (self.classes.of_unit == new))[-1:]
                self._move(worst, subnet + 1)
                self._move(best, subnet)
                return True
        return False

    def seed(self, subnet: int) -> None:
        """Give the subnet a new unit that the classifier reads, if it has none."""
        counts = self.width_counts()
        if counts[self.read_by_head, subnet].any():
            return
        for width in np.flatnonzero(self.read_by_head & (counts[:, subnet + 1 :].sum(1) > 0)):
            above = self._ranked((self.unit_levels > subnet) & (self.classes.width[self.classes.of_unit] == width))
            self._move(above[np.argmax(self.scores[above])][None], subnet)

    def reserve(self, subnet: int) -> None:
        """Leave every larger subnet a unit that the classifier reads, where budgets alone would leave it none."""
        head = self.read_by_head[self.classes.width[self.classes.of_unit]]
        missing = self.n - subnet - int((head & (self.unit_levels > subnet)).sum())
        own = np.flatnonzero(head & (self.unit_levels == subnet) & ~self.locked)
        leave = min(missing, len(own) - int(subnet > 1))
        if leave > 0:
            self._move(own[np.argsort(self.scores[own], kind="stable")[:leave]], subnet + 1)

    # -- helpers

    def _class_has(self, mask: Array) -> Array:
        return np.bincount(self.classes.of_unit[mask], minlength=len(self.classes.size)) > 0

    def _ranked(self, mask: Array) -> Array:
        """Units in the mask by class, least important first."""
        return self.order[mask[self.order]]

    def _shares(self, units: Array, subnet: int) -> Array:
        """Importance of units as a share of what their group has in the subnet."""
        inside = self.unit_levels <= subnet
        size = int(self.unit_group.max()) + 1
        total = np.bincount(self.unit_group[inside], np.abs(self.scores[inside]), minlength=size)
        count = np.bincount(self.unit_group[inside], minlength=size)
        group = self.unit_group[units]
        dead = total[group] == 0  # no importance at all: every unit counts the same
        return np.where(dead, 1.0, self.scores[units]) / np.where(dead, np.maximum(count[group], 1), total[group])

    def _allowed(self, units: Array, quota: Array, usable: Array | None = None) -> Array:
        """Units (in order of preference) of usable classes, of every width no more than its quota."""
        if usable is not None:
            units = units[usable[self.classes.of_unit[units]]]
        width = self.classes.width[self.classes.of_unit[units]]
        by_width = np.argsort(width, kind="stable")
        starts = np.searchsorted(width[by_width], np.arange(len(quota)))
        rank = np.empty(len(units), dtype=np.int64)
        rank[by_width] = np.arange(len(units)) - starts[width[by_width]]
        return units[rank < quota[width]]

    def _fitting(self, units: Array, cost: Array, limit: float) -> int:
        """How many units, in order, cost no more than the limit together."""
        return int(np.searchsorted(np.cumsum(cost[self.classes.of_unit[units]]), limit, side="right"))

    def _move(self, units: Array, level: int) -> None:
        kinds = self.classes.of_unit[units]
        np.subtract.at(self.counts, (kinds, self.unit_levels[units]), 1)
        np.add.at(self.counts, (kinds, np.full(len(units), level)), 1)
        self.unit_levels[units] = level


# ------------------------------------------------------------------------------------------------- landing


def land(
    analysis: Analysis,
    macs_model: MacModel,
    levels: Tensor,
    budgets: Sequence[int],
    scores: Tensor,
    locked: Tensor,
    band: Band | None = None,
) -> LandingResult:
    """Move single units until every subnet costs at least 99 % of its budget and never more than the budget.

    Args:
        analysis: units of the model.
        macs_model: its MACs.
        levels: LongTensor (num_units,) with values 1..N + 1.
        budgets: MACs of subnets 1..N, ascending.
        scores: (num_units,) importance, higher is better.
        locked: BoolTensor (num_units,) from `units.levels.locked_units`.
        band: bounds on the widths that moves keep as long as the budget can be met inside them; by default
            those of `uniform_band`, or what `levels` has where that is outside.

    Raises:
        BudgetError: a subnet is above its budget with everything moved out that may move.
    """
    planner = Planner(analysis, macs_model, levels, len(budgets), scores, locked, band)
    if band is None:
        planner.band = _around(planner, uniform_band(analysis, macs_model, budgets))
    notes: list[str] = []
    for subnet, budget in enumerate(budgets, start=1):
        notes += settle(planner, subnet, int(budget))
    return result_of(planner, analysis, macs_model, notes)


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
    if not any(planner.thin(subnet, budget, tier) for tier in TIERS):
        cost = planner.macs(subnet)
        raise BudgetError(
            f"budget {subnet} is {budget:,} MACs, but subnet {subnet} costs {cost:,} without own units. "
            f"Raise budget {subnet} or lower the ones before it."
        )
    for tier in TIERS[:LOCKS_ONLY]:
        if planner.fill(subnet, budget, GOAL * budget, tier) or planner.macs(subnet) >= ENOUGH * budget:
            return []
        while planner.macs(subnet) < ENOUGH * budget and planner.exchange(subnet, budget, tier):
            pass
        if planner.macs(subnet) >= ENOUGH * budget:
            return []
    return [_shortfall(planner, subnet, budget)]


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
