"""Hardware-sized levels: how many units of a width make one block.

A step computes only the channels that its level adds, so that it is their number, layer by layer, that hardware sees:
kernels work on 8 or 16 channels at once, and some runtimes leave their fast layout where channels are no multiple of
that. `round_to` asks for such multiples. A unit of several channels (an attention head, the group of a grouped
convolution) brings some of them along. A width in which a level has too few channels gets a smaller multiple, a
divisor of `round_to`, down to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..units.analysis import Analysis
from ..units.macs import MacModel
from .counts import Array, CountModel, UnitClasses
from .uniform import uniform_levels

__all__ = ["ANY", "Grid", "channels_per_unit", "multiples", "smaller"]

LEAST = 0.5  # blocks: what the regular pattern adds to a width at its smallest step must round up to one


def multiples(analysis: Analysis, macs_model: MacModel, budgets: Sequence[int], round_to: int) -> Array:
    """Units per block of every width, (W,).

    Args:
        analysis: units of the model.
        macs_model: its MACs.
        budgets: MACs of subnets 1..N.
        round_to: channels wanted per block; 1: none.

    Returns:
        What makes `round_to` channels, or the largest part of it with which every level has a block of the width:
        the width has at least one for each, and the regular pattern at these budgets at least half a one.
    """
    classes = UnitClasses(analysis, macs_model, small=len(budgets))
    size = classes.width_size
    if round_to == 1:
        return np.ones_like(size)
    shares = uniform_levels(analysis, macs_model, budgets)[1]
    step = (size[:, None] * np.diff(shares, prepend=0.0)).min(1)
    most = np.minimum(size // len(budgets), np.floor(step / LEAST))
    most[np.bincount(classes.width) > 1] = 1  # small classes that differ: no block could be the same for all readers
    block = _units_for(round_to, classes, macs_model)
    while (too_large := block > np.maximum(most, 1)).any():
        block = np.where(too_large, smaller(block), block)
    return block


def _units_for(round_to: int, classes: UnitClasses, macs_model: MacModel) -> Array:
    """Units of every width that make `round_to` channels, or a multiple of it, in all layers that have them, (W,)."""
    return round_to // np.gcd(round_to, channels_per_unit(classes, CountModel(classes, macs_model)))


def channels_per_unit(classes: UnitClasses, model: CountModel) -> Array:
    """What divides the channels of a unit in every layer that makes or reads it, (W,)."""
    of_class = np.gcd.reduce(np.concatenate([model.out, model.inputs]).astype(np.int64), axis=0)
    found = np.zeros_like(classes.width_size)
    np.gcd.at(found, classes.width, of_class)
    return np.maximum(found, 1)


def smaller(block: Array) -> Array:
    """Every block divided by its smallest prime factor: what is in whole blocks stays so."""
    return np.array([b // next((p for p in range(2, int(b) + 1) if b % p == 0), 1) for b in block], dtype=np.int64)


@dataclass(frozen=True)
class Grid:
    """Which widths a widened network gets: whole blocks, where every one of so many levels can have one.

    Attributes:
        round_to: channels per block; 1: any width.
        levels: N.
    """

    round_to: int = 1
    levels: int = 1

    def blocks(self, analysis: Analysis) -> Array:
        """Units of a unit's width that make a block, (num_units,)."""
        if self.round_to == 1:
            return np.ones(analysis.num_units, dtype=np.int64)
        macs_model = MacModel(analysis)
        classes = UnitClasses(analysis, macs_model)
        return _units_for(self.round_to, classes, macs_model)[classes.width[classes.of_unit]]

    def width(self, factor: float, size: int, block: int) -> int:
        """About `factor` times a width of `size` units."""
        block_size = np.array([block])
        while factor > 1 and block_size[0] > max(1.0, factor * size / self.levels):
            block_size = smaller(block_size)
        block = int(block_size[0]) if factor > 1 else 1
        return max(size, block * round(factor * size / block))


ANY = Grid()
