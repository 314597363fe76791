"""The regular pattern: the same share of every width in a subnet, found from the budget.

It is what the any-width policy uses, and what the band of the other policies is measured by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..units.analysis import Analysis
from ..units.levels import locked_units
from ..units.macs import MacModel
from .counts import Array, CountModel, UnitClasses

__all__ = ["BAND", "INCREMENTS", "Band", "needed_widening", "positions", "uniform_band", "uniform_levels"]

BAND = (0.8, 1.25)  # how far a width may be from the uniform one at the same budget
INCREMENTS = (0.5, 1.5)  # the same for the new units of a level: no width may be nearly a plug, or swallow a budget


@dataclass
class Band:
    """Bounds on every width: arrays (W, N), column i - 1 for subnet i.

    `lower` and `upper` bound the units of levels <= i, `new` and `most` those of level i itself.
    """

    lower: Array
    upper: Array
    new: Array
    most: Array


def uniform_levels(
    analysis: Analysis, macs_model: MacModel, budgets: Sequence[int], multiples: Array | None = None
) -> tuple[Tensor, Array]:
    """The prefix pattern at or just below the budgets.

    Args:
        multiples: (W,) units of each width that are not parted, see `rounding.multiples`; by default one.

    Returns:
        levels: LongTensor (num_units,).
        shares: (N,) share of every width in subnets 1..N, the largest ones that the budgets allow.
    """
    pattern = _Prefix(analysis, macs_model, len(budgets), multiples)
    shares = [pattern.grow(subnet, budget) for subnet, budget in enumerate(budgets, start=1)]
    return torch.from_numpy(pattern.levels), np.array(shares)


class _Prefix:
    """Levels in network order: subnet after subnet takes the next units of every width."""

    def __init__(self, analysis: Analysis, macs_model: MacModel, n: int, multiples: Array | None) -> None:
        self.n = n
        self.classes = UnitClasses(analysis, macs_model, small=n)
        self.model = CountModel(self.classes, macs_model)
        first = -torch.arange(analysis.num_units, dtype=torch.float64)
        locked = locked_units(analysis, first).numpy()
        self.position, self.width = positions(self.classes, locked)
        self.size = self.classes.width_size
        self.block = np.ones_like(self.size) if multiples is None else multiples
        locked_count = np.bincount(self.width[locked], minlength=len(self.size))
        self.locked_count = -(-locked_count // self.block) * self.block
        self.levels = np.full(analysis.num_units, n + 1)
        self.taken = np.zeros_like(self.size)

    def grow(self, subnet: int, budget: int) -> float:
        """Give the subnet the largest share of every width that its budget allows; returns the share."""
        new = self._macs(subnet, self._units(subnet, 0.0, True)) <= budget
        low, high = 0.0, 1.0
        if self._macs(subnet, self._units(subnet, 1.0, new)) <= budget:
            low = 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            fits = self._macs(subnet, self._units(subnet, middle, new)) <= budget
            low, high = (middle, high) if fits else (low, middle)
        units = self._units(subnet, low, new)
        self.levels = self._levels(subnet, units)
        self.taken = units
        return low

    def _units(self, subnet: int, share: float, new: bool) -> Array:
        """Units per width at a share; with `new`, large widths get at least one new block in every subnet."""
        each = int(new) * self.block * (self.size >= self.n * self.block)
        lower = np.maximum(np.maximum(self.taken + each, self.locked_count), int(new) * self.block)
        upper = self.size - (self.n - subnet) * each
        if subnet < self.n:
            upper = upper // self.block * self.block
        units = np.floor(share * self.size / self.block + 0.5).astype(np.int64) * self.block
        return np.minimum(np.maximum(np.minimum(units, upper), lower), self.size)

    def _levels(self, subnet: int, units: Array) -> Array:
        new = (self.levels > self.n) & (self.position < units[self.width])
        return np.where(new, subnet, self.levels)

    def _macs(self, subnet: int, units: Array) -> float:
        return self.model.macs(self.classes.counts(self._levels(subnet, units), self.n + 2), subnet)


def positions(classes: UnitClasses, first: Array | None = None) -> tuple[Array, Array]:
    """Position of every unit in its width, 0, 1, ... in network order, and its width.

    Units of the mask `first` come before the others.
    """
    width = classes.width[classes.of_unit]
    later = np.zeros_like(width) if first is None else ~first
    order = np.lexsort((later, width))
    starts = np.concatenate([[0], np.cumsum(classes.width_size)])
    position = np.empty(len(width), dtype=np.int64)
    position[order] = np.arange(len(width)) - starts[width[order]]
    return position, width


def uniform_band(
    analysis: Analysis,
    macs_model: MacModel,
    budgets: Sequence[int],
    relative: tuple[float, float] = BAND,
    increments: tuple[float, float] | None = INCREMENTS,
) -> Band:
    """Bounds on every width, rounded outwards.

    Args:
        relative: least and greatest number of units of levels <= i, as multiples of the uniform pattern's.
        increments: the same for the units of level i itself; None: free.
    """
    shares = uniform_levels(analysis, macs_model, budgets)[1]
    width = UnitClasses(analysis, macs_model, small=len(budgets)).width_size[:, None] * shares
    step = np.diff(width, axis=1, prepend=0)
    upper = np.maximum(np.ceil(relative[1] * width), 1)
    least, most = (0.0, np.inf) if increments is None else increments
    bounds = (
        np.maximum(np.floor(relative[0] * width), 1),
        upper,
        np.floor(least * step),
        np.minimum(np.maximum(np.ceil(most * step), 1), upper),
    )
    return Band(*(bound.astype(np.int64) for bound in bounds))


def needed_widening(analysis: Analysis, macs_model: MacModel, budgets: Sequence[int]) -> float:
    """How many times as wide the network would have to be to use the last budget up; below 1: it is wide enough.

    A nested network costs less than a dense one of the same widths: synapses from larger to smaller subnets
    are missing.
    """
    classes = UnitClasses(analysis, macs_model)
    model = CountModel(classes, macs_model)
    counts = np.zeros((len(classes.size), len(budgets) + 1))
    share = 0.0
    for subnet, budget in enumerate(budgets, start=1):
        low, high = share, 64.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            counts[:, subnet] = (middle - share) * classes.size
            low, high = (middle, high) if model.macs(counts, subnet) <= budget else (low, middle)
        counts[:, subnet] = (low - share) * classes.size
        share = low
    return share
