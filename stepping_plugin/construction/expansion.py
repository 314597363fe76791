"""How much wider a network has to be so that its largest subnet can use up its budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..units.analysis import Analysis, restrict
from ..units.macs import MacModel
from .rounding import ANY, Grid
from .uniform import needed_widening
from .widening import copies_for

__all__ = ["least_expansion"]

STEP = 0.05
ROOM = 1.02  # widths are whole numbers, and not every layer has the width of the regular pattern
LARGEST = 4.0  # beyond it, something that cannot grow carries the MACs


def least_expansion(analysis: Analysis, budgets: Sequence[int], grid: Grid = ANY) -> float:
    """The least widening, in steps of 0.05 and with 2 % of room, with which the last budget can be used up.

    The nesting rule takes the synapses from larger to smaller subnets away, so that a network of the original's widths
    costs less than the original. Where parts of a network cannot grow, the others have to grow by more; where no
    factor up to 4 is enough, the least one that comes as close as any.

    Args:
        analysis: units of the original network.
        budgets: MACs of subnets 1..N.
        grid: which widths the network is to get.

    Returns:
        A factor from 1 up, see `widening.widen`.
    """
    needed = needed_widening(analysis, MacModel(analysis), budgets)
    if needed <= 1:
        return 1.0
    factor, missing = 1.0, {1.0: ROOM * needed}
    while missing[factor] > 1 and factor < LARGEST:
        further = max(factor * missing[factor], factor + STEP)
        factor = min(LARGEST, round(math.ceil(further / STEP - 1e-6) * STEP, 2))
        copies, _ = copies_for(analysis, factor, torch.Generator().manual_seed(0), grid)
        wide, _ = restrict(analysis, copies)
        missing[factor] = ROOM * needed_widening(wide, MacModel(wide), budgets)
    nearest = max(1.0, min(missing.values()))
    return min(f for f, left in missing.items() if left <= nearest * (1 + 1e-3))
