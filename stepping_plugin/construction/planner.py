"""Moves between neighbouring subnets with exact MACs: the hands of every policy, of construction and of landing.

Units move in *blocks*: so many units of one width as hardware wants at a time (`rounding.multiples`), often one. A
planner keeps the number of units of every level in whole blocks, from its first state on; what a width has over whole
blocks is in the last subnet or spare.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..units.analysis import Analysis
from ..units.levels import check_scores
from ..units.macs import MacModel
from .counts import Array, CountModel, UnitClasses, to_array
from .plugs import head_units
from .rounding import smaller
from .uniform import Band

__all__ = ["LOCKS_ONLY", "NEW_HEAD_UNITS", "TIERS", "Planner"]

# How much a move may disturb, from gentle to bare. The next one is tried only if the one before did not do.
GIVES = (0.0, 0.1, 0.3, 0.5)  # the band first, then bounds that give up so much: what is left goes to all widths alike
IN_BAND, *_, NEW_UNITS, NEW_HEAD_UNITS, LOCKS_ONLY = TIERS = range(len(GIVES) + 3)
BATCH = 0.25  # share of the distance to the target that is covered at once, before values are computed anew


class _Blocks(NamedTuple):
    """Units that move together, block after block, the block to move first in front.

    Attributes:
        units: (K,).
        ends: (B,) where each block ends in `units`.
        kind: (B,) class of a block's units: a block of several has them from one class.
        size: (B,) units.
    """

    units: Array
    ends: Array
    kind: Array
    size: Array

    def first(self, count: int) -> Array:
        """Units of the first so many blocks."""
        return self.units[: self.ends[count - 1]] if count else self.units[:0]

    def only(self, index: int) -> _Blocks:
        """One block."""
        return self.where(np.arange(len(self.ends)) == index)

    def where(self, mask: Array) -> _Blocks:
        """The blocks in a mask (B,)."""
        size = self.size[mask]
        return _Blocks(self.units[np.repeat(mask, self.size)], np.cumsum(size), self.kind[mask], size)


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
        multiples: (W,) units of each width that move at once, from `rounding.multiples`; by default one.

    A unit's *value* is its share of its group's importance in the subnet per MAC that it costs there, a block's that of
    its units on average. Moves take the lowest values out and the highest in.
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
        multiples: Array | None = None,
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
        self.wanted = np.ones_like(self.classes.width_size) if multiples is None else multiples
        self.multiple = self.wanted.copy()  # what blocks are made of now: less where a budget asks for it
        self._complete_blocks()

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

    def inside(self, subnet: int) -> Array:
        """Units of every width in a subnet, (W,)."""
        return self.width_counts()[:, 1 : subnet + 1].sum(1)

    def _new(self, tier: int) -> Array:
        """Least number of units of each level 1..n in every width, (W, n): a block, where there are enough of them."""
        required = self.classes.width_size >= self.n * self.multiple
        if tier == NEW_HEAD_UNITS:
            required &= self.read_by_head
        elif tier == LOCKS_ONLY:
            required[:] = False
        new = np.repeat((required * self.multiple)[:, None], self.n, axis=1)
        if tier >= NEW_UNITS or self.band is None:
            return new
        return np.maximum(new, _down(self.band.new, self.multiple[:, None]))

    def limits(self, subnet: int, tier: int = IN_BAND) -> tuple[Array, Array]:
        """Lowest and highest cumulative number of units of every width in a subnet, (W,) each: whole blocks."""
        new, size = self._new(tier), self.classes.width_size
        before = self.inside(subnet - 1)
        upper = np.maximum(size - new[:, subnet:].sum(1), before)
        lower = np.maximum(np.minimum(before + new[:, subnet - 1], upper), self.locked_count)
        most = upper
        if tier < NEW_UNITS and self.band is not None:
            give = GIVES[tier]
            least, most, own = (b[:, subnet - 1] for b in (self.band.lower, self.band.upper, self.band.most))
            lower = np.maximum(lower, np.minimum(least - np.ceil(give * least), upper))
            most = np.minimum(most + np.ceil(give * most), before + own + np.ceil(give * own))
        return self._whole(subnet, lower, upper, most)

    def _whole(self, subnet: int, lower: Array, upper: Array, most: Array) -> tuple[Array, Array]:
        """Bounds in whole blocks: outwards from the band's, inwards from `upper`; the last subnet may have the rest."""
        block, before = self.multiple, self.inside(subnet - 1)
        if subnet < self.n:
            upper = before + _down(upper - before, block)
        upper = np.minimum(upper, before + _up(np.maximum(most - before, 0), block))
        lower = before + np.maximum(_down(np.maximum(lower - before, 0), block), _up(self.locked_count - before, block))
        lower = np.minimum(lower, self.classes.width_size)
        return lower, np.maximum(upper, lower)

    # -- blocks

    def _complete_blocks(self, first: int = 1) -> None:
        """Bring the number of units of every level from `first` on to whole blocks; changes nothing where it is."""
        for subnet in range(first, self.n + 1):
            for width in np.flatnonzero(self._over(subnet)):
                self._complete(int(width), subnet)

    def _over(self, subnet: int) -> Array:
        """Units of a level that are over whole blocks, (W,); the last subnet may have all that there are."""
        over = self.width_counts()[:, subnet] % self.multiple
        return np.where((subnet == self.n) & (self.inside(subnet) == self.classes.width_size), 0, over)

    def _complete(self, width: int, subnet: int) -> None:
        """Move the units of a width that are over whole blocks out of a subnet, or fill their block up."""
        block, over = int(self.multiple[width]), int(self._over(subnet)[width])
        here = self.classes.width[self.classes.of_unit] == width
        own = np.flatnonzero(here & (self.unit_levels == subnet) & ~self.locked)
        above = np.flatnonzero(here & (self.unit_levels > subnet))
        above = above[np.lexsort((-self.scores[above], self.unit_levels[above]))]
        first = len(own) < block or 2 * over >= block or len(own) < over
        if first and len(above) >= block - over:
            self._move(above[: block - over], subnet)
        else:
            self._move(own[np.argsort(self.scores[own], kind="stable")[:over]], subnet + 1)

    def refine(self) -> bool:
        """Smaller blocks, for what whole ones cannot do. Returns whether there are any."""
        finer = smaller(self.multiple)
        changed = bool((finer < self.multiple).any())
        self.multiple = finer
        return changed

    def coarsen(self, settled: int) -> None:
        """The wanted blocks again for the levels above a settled subnet, or smaller ones if not every level has one."""
        left = self.classes.width_size - self.inside(settled)
        self.multiple = self.wanted.copy()
        while (too_large := (self.multiple > 1) & (self.multiple * (self.n - settled) > left)).any():
            self.multiple = np.where(too_large, smaller(self.multiple), self.multiple)
        self._complete_blocks(settled + 1)

    def _blocks(self, units: Array, value: Array, over: Array | None = None, rest: Array | None = None) -> _Blocks:
        """Blocks of units, lowest mean value first; units that are not enough for a block are left out.

        Args:
            units: by ascending value.
            value: of each unit.
            over: (W,) units of the level that they leave: what is over whole blocks goes first.
            rest: (W,) widths whose last block may be incomplete.
        """
        kind = self.classes.of_unit[units]
        if (self.multiple == 1).all():
            ones = np.ones(len(units), dtype=np.int64)
            return _Blocks(units, np.cumsum(ones), kind, ones)
        width = self.classes.width[kind]
        block = self.multiple[width]
        rank, have = _rank(width, len(self.multiple))
        short = np.zeros_like(block) if over is None else -over[width] % block
        index = (rank + short) // block
        whole = (index + 1) * block - short <= have[width]
        if rest is not None:
            whole |= rest[width]
        units, kind, value = units[whole], kind[whole], value[whole]
        key = (width * (len(self.order) + 1) + index)[whole]
        _, first, number, size = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
        mean = np.bincount(number, value, minlength=len(size)) / np.maximum(size, 1)
        order = np.lexsort((first, mean))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        units = units[np.argsort(place[number], kind="stable")]
        return _Blocks(units, np.cumsum(size[order]), kind[first[order]], size[order])

    def _saving(self, blocks: _Blocks, saved: Array, subnet: int) -> Array:
        """MACs that a subnet loses with each block of its own level, (B,), from those of one unit, (C,)."""
        return blocks.size * saved[blocks.kind] - self._mutual(blocks.kind, blocks.size, subnet)

    def _cost(self, blocks: _Blocks, added: Array, subnet: int) -> Array:
        """MACs that a subnet gains by each block, (B,), from those of one unit, (C,)."""
        return blocks.size * added[blocks.kind] + self._mutual(blocks.kind, blocks.size, subnet)

    def _mutual(self, kind: Array, size: Array, subnet: int) -> Array:
        """MACs between the units of one block, counted for one of the two."""
        return np.where(self.model.dead[kind] & (subnet > 1), 0.0, size * (size - 1) * self.model.own[kind])

    # -- moves

    def thin(self, subnet: int, target: int, tier: int = IN_BAND) -> bool:
        """Move blocks of lowest value from `subnet` to the next one until its MACs are at most `target`.

        Returns:
            Whether the target was reached; if not, everything that may move did.
        """
        lower, _ = self.limits(subnet, tier)
        while (excess := self.macs(subnet) - target) > 0:
            units = self._ranked((self.unit_levels == subnet) & ~self.locked)
            saved = self.model.saved(self.counts, subnet)
            value = self._shares(units, subnet) / np.maximum(saved, 1e-9)[self.classes.of_unit[units]]
            units, value = self._allowed(units, value, self.inside(subnet) - lower, saved > 0)
            blocks = self._blocks(units, value, over=self.width_counts()[:, subnet])
            if not len(blocks.ends):
                return False
            cost = self._saving(blocks, saved, subnet)
            if cost.min() >= excess:  # the last move: overshoot as little as possible
                blocks, cost = blocks.only(int(np.argmin(cost))), cost.min(keepdims=True)
            else:
                blocks, cost = blocks.where(cost <= excess), cost[cost <= excess]
            self._move(blocks.first(max(1, _fitting(cost, BATCH * excess))), subnet + 1)
        return True

    def narrow(self, subnet: int) -> None:
        """Move the least important units of every width that is above its band to the next subnet."""
        _, upper = self.limits(subnet)
        units, over = self._ranked((self.unit_levels == subnet) & ~self.locked), self.width_counts()[:, subnet]
        units, value = self._allowed(units, self.scores[units], self.inside(subnet) - upper)
        self._move(self._blocks(units, value, over=over).units, subnet + 1)

    def widen(self, subnet: int) -> None:
        """Move the most important units of every width that is below its band into the subnet, from the next levels."""
        if self.band is None:
            return
        for source in range(subnet + 1, self.n + 2):
            lower, _ = self.limits(subnet)
            quota = np.minimum(lower - self.inside(subnet), self._leaves(source, IN_BAND))
            units = self._ranked((self.unit_levels == source) & ~self.locked)
            units, value = self._allowed(units, -self.scores[units], quota)
            self._move(self._blocks(units, value).units, subnet)

    def fill(self, subnet: int, budget: int, goal: float, tier: int = IN_BAND) -> bool:
        """Move blocks of highest value into `subnet` until its MACs are at least `goal`.

        Units of the next level come first; the MACs never exceed `budget`. Returns whether the goal was met.
        """
        for source in range(subnet + 1, self.n + 2):
            while self.macs(subnet) < goal:
                blocks = self._pick(subnet, source, budget - self.macs(subnet), tier)
                count = len(blocks.ends)
                if not count:
                    break
                self._move(blocks.units, subnet)
                while self.macs(subnet) > budget:  # single costs add up to less than the batch costs together
                    count, kept = count // 2, blocks.first(count)
                    self._move(kept[len(blocks.first(count)) :], source)
        return self.macs(subnet) >= goal

    def _pick(self, subnet: int, source: int, slack: int, tier: int) -> _Blocks:
        """Blocks of level `source` to add: some of the most valuable ones, or one, the largest that fits."""
        added = self.model.added(self.counts, subnet)
        units = self._ranked(self.unit_levels == source)[::-1]
        quota = self._room(subnet, source, tier)
        value = -self._shares(units, subnet) / np.maximum(added, 1e-9)[self.classes.of_unit[units]]
        units, value = self._allowed(units, value, quota, added <= slack)
        rest = self.inside(subnet) + quota == self.classes.width_size if subnet == self.n else None
        blocks = self._blocks(units, value, rest=rest)
        cost = self._cost(blocks, added, subnet)
        blocks, cost = blocks.where(cost <= slack), cost[cost <= slack]
        count = _fitting(cost, BATCH * slack)
        if count or not len(cost):
            return blocks.where(np.arange(len(cost)) < count)
        return blocks.only(int(np.argmax(cost)))  # first of its kind: the most valuable

    def _leaves(self, source: int, tier: int) -> Array:
        """How many units of every width may leave a level, (W,)."""
        counts = self.width_counts()[:, source]
        return counts - self._new(tier)[:, source - 1] if source <= self.n else counts

    def _room(self, subnet: int, source: int, tier: int) -> Array:
        """How many units of every width may move from level `source` to `subnet`."""
        return np.minimum(self.limits(subnet, tier)[1] - self.inside(subnet), self._leaves(source, tier))

    def exchange(self, subnet: int, budget: int, tier: int = IN_BAND) -> bool:
        """Swap a block of `subnet` for a larger one of the next: the pair that comes closest to the budget.

        Returns whether there was a pair that raises the MACs without exceeding the budget.
        """
        mine = (self.unit_levels == subnet) & ~self.locked
        saved, added = self.model.saved(self.counts, subnet), self.model.added(self.counts, subnet)
        block, kinds = self.multiple[self.classes.width], np.arange(len(self.classes.size))
        mutual = self._mutual(kinds, block, subnet)
        own, room = self.width_counts()[:, subnet], self.inside(subnet) - self.limits(subnet, tier)[0]
        may = (room >= self.multiple) & (own % self.multiple == 0)
        leaving = (self._class_count(mine) >= block) & may[self.classes.width]
        slack, pairs = budget - self.macs(subnet), self.model.pairs() * np.outer(block, block)
        for source in range(subnet + 1, self.n + 2):
            there = self.unit_levels == source
            fits = self._room(subnet, source, tier) >= self.multiple
            entering = (self._class_count(there) >= block) & fits[self.classes.width]
            gain = (block * added + mutual) - (block * saved - mutual)[:, None] - pairs
            gain = np.where(leaving[:, None] & entering & (gain <= slack), gain, -1.0)
            old, new = np.unravel_index(np.argmax(gain), gain.shape)
            if gain[old, new] > 0:
                worst = self._ranked(mine & (self.classes.of_unit == old))[: block[old]]
                best = self._ranked(there & (self.classes.of_unit == new))[-block[new] :]
                self._move(worst, subnet + 1)
                self._move(best, subnet)
                return True
        return False

    def seed(self, subnet: int) -> None:
        """Give the subnet a new block that the classifier reads, if it has none."""
        counts = self.width_counts()
        if counts[self.read_by_head, subnet].any():
            return
        enough = counts[:, subnet + 1 :] >= self.multiple[:, None]
        for width in np.flatnonzero(self.read_by_head & enough.any(1)):
            source = subnet + 1 + int(np.argmax(enough[width]))
            units = self._ranked((self.unit_levels == source) & (self.classes.width[self.classes.of_unit] == width))
            self._move(units[np.argsort(-self.scores[units], kind="stable")[: self.multiple[width]]], subnet)

    def reserve(self, subnet: int) -> None:
        """Leave every larger subnet a block that the classifier reads, where budgets alone would leave it none."""
        head = self.read_by_head[self.classes.width[self.classes.of_unit]]
        above = (self.width_counts()[:, subnet + 1 :].sum(1) // self.multiple)[self.read_by_head].sum()
        own = self._ranked(head & (self.unit_levels == subnet) & ~self.locked)
        own = own[np.argsort(self.scores[own], kind="stable")]
        blocks = self._blocks(own, self.scores[own], over=self.width_counts()[:, subnet])
        leave = min(self.n - subnet - int(above), len(blocks.ends) - int(subnet > 1))
        self._move(blocks.first(max(0, leave)), subnet + 1)

    # -- helpers

    def _class_count(self, mask: Array) -> Array:
        return np.bincount(self.classes.of_unit[mask], minlength=len(self.classes.size))

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

    def _allowed(self, units: Array, value: Array, quota: Array, usable: Array | None = None) -> tuple[Array, Array]:
        """Units of usable classes by ascending value, of every width no more than its quota; and their values."""
        order = np.argsort(value, kind="stable")
        units, value = units[order], value[order]
        if usable is not None:
            fine = usable[self.classes.of_unit[units]]
            units, value = units[fine], value[fine]
        width = self.classes.width[self.classes.of_unit[units]]
        within = _rank(width, len(quota))[0] < quota[width]
        return units[within], value[within]

    def _move(self, units: Array, level: int) -> None:
        kinds = self.classes.of_unit[units]
        np.subtract.at(self.counts, (kinds, self.unit_levels[units]), 1)
        np.add.at(self.counts, (kinds, np.full(len(units), level)), 1)
        self.unit_levels[units] = level


def _rank(width: Array, widths: int) -> tuple[Array, Array]:
    """Place of every unit among those of its width, in the order given, and units per width (widths,)."""
    by_width = np.argsort(width, kind="stable")
    have = np.bincount(width, minlength=widths)
    starts = np.concatenate([[0], np.cumsum(have)])
    rank = np.empty(len(width), dtype=np.int64)
    rank[by_width] = np.arange(len(width)) - starts[width[by_width]]
    return rank, have


def _fitting(cost: Array, limit: float) -> int:
    """How many blocks, in order, cost no more than the limit together."""
    return int(np.searchsorted(np.cumsum(cost), limit, side="right"))


def _down(bound: Array, block: Array) -> Array:
    return (np.floor(bound).astype(np.int64) // block) * block


def _up(bound: Array, block: Array) -> Array:
    return -(-np.ceil(bound).astype(np.int64) // block) * block
