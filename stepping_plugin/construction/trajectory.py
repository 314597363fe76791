"""The band of the trajectory flow: how wide layers may be while the subnets are on their way down."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .counts import Array, UnitClasses
from .uniform import Band

__all__ = ["narrow", "narrowing_band"]


def narrowing_band(band: Band, classes: UnitClasses, progress: float) -> Band:
    """Between no band and the given one.

    The upper bounds come down geometrically, as the MAC targets do; the lower bounds are the final ones.

    Args:
        band: at the end.
        classes: whose widths it bounds.
        progress: 0 (no upper bounds) to 1 (the given ones).
    """
    size = classes.width_size[:, None]

    def coming_down(bound: Array) -> Array:
        return np.ceil(size * (np.minimum(bound, size) / size) ** progress - 1e-9).astype(np.int64)

    return Band(band.lower, coming_down(band.upper), np.zeros_like(band.new), coming_down(band.most))


def narrow(
    levels: Tensor, i: int, band: Band, classes: UnitClasses, scores: Tensor, locked: Tensor, multiples: Array
) -> Tensor:
    """Levels after the least important units have left subnet i wherever a width is above an upper bound.

    Args:
        levels: LongTensor (num_units,); not modified.
        i: the subnet; its units of exactly level i may go to level i + 1.
        band: bounds.
        classes: whose widths the band bounds.
        scores: (num_units,) importance.
        locked: BoolTensor (num_units,), units that stay.
        multiples: (W,) units of a block; the bounds are rounded up to whole ones.
    """
    width = classes.width[classes.of_unit]
    upper, most = (-(-bound[:, i - 1] // multiples) * multiples for bound in (band.upper, band.most))
    excess = np.maximum(
        np.bincount(width[(levels <= i).numpy()], minlength=len(upper)) - upper,
        np.bincount(width[(levels == i).numpy()], minlength=len(most)) - most,
    )
    units = ((levels == i) & ~locked).nonzero().flatten().numpy()
    units = units[np.lexsort((scores.numpy()[units], width[units]))]
    rank = np.arange(len(units)) - np.searchsorted(width[units], width[units])
    return levels.index_fill(0, torch.from_numpy(units[rank < excess[width[units]]]), i + 1)
