"""Dense nets of one width share: the first units of every width, as many as a budget of MACs allows.

Slimmable networks and nets from scratch are made of them. Within a dense net every unit reads every unit, so its MACs
are those of a subnet that holds all of its units at level 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...construction.widening import reinitialise
from ...errors import BudgetError, explain
from ...nested.subnet import Subnet, extract_subnet
from ...units.analysis import Analysis
from ...units.levels import locked_units
from ...units.macs import MacModel

__all__ = ["dense_net", "dense_units"]

SLACK = 1.25  # how much wider than the uniform share a width may be, as in the band of the construction


def dense_units(analysis: Analysis, macs_model: MacModel, budget: int) -> Tensor:
    """The dense net of one width share that uses a budget up: BoolTensor (num_units,), True = in the net.

    The share is the largest one that fits. Widths are whole numbers, so single units are added afterwards, to the
    widths that rounding cut most, while the budget allows.

    Args:
        analysis: units of the model.
        macs_model: its MACs.
        budget: MACs.

    Raises:
        BudgetError: one unit per width costs more.
    """
    widths = _Widths(analysis, macs_model)
    low, high = 0.0, 1.0
    if widths.macs(widths.at(low)) > budget:
        got = f"{widths.macs(widths.at(low)):,} MACs with one unit per width"
        raise BudgetError(explain(f"no dense net of {budget:,} MACs", got=got, action="Raise the budget."))
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if widths.macs(widths.at(middle)) <= budget else (low, middle)
    return widths.units(widths.filled(low, budget))


class _Widths:
    """Nets as numbers of units per group, taken from the front."""

    def __init__(self, analysis: Analysis, macs_model: MacModel) -> None:
        self.analysis, self.model = analysis, macs_model
        first = locked_units(analysis, -torch.arange(analysis.num_units, dtype=torch.float64))
        self.groups = [torch.cat([g.units[first[g.units]], g.units[~first[g.units]]]) for g in analysis.groups]
        self.least = [max(1, int(first[g].sum())) for g in self.groups]

    def at(self, share: float) -> list[int]:
        sizes = [max(least, int(share * len(g) + 0.5)) for g, least in zip(self.groups, self.least)]
        return [min(size, len(g)) for size, g in zip(sizes, self.groups)]

    def filled(self, share: float, budget: int) -> list[int]:
        """Single units on top, where rounding cut most first, up to `SLACK` times the uniform width."""
        sizes, wanted = self.at(share), [share * len(g) for g in self.groups]
        most = [min(len(g), max(size, math.ceil(SLACK * w))) for g, size, w in zip(self.groups, sizes, wanted)]
        growing = [k for k in range(len(sizes)) if sizes[k] < most[k]]
        while growing:
            k = max(growing, key=lambda k: (wanted[k] - sizes[k]) / wanted[k])
            larger = [size + (k == j) for j, size in enumerate(sizes)]
            if self.macs(larger) <= budget:
                sizes = larger
            else:
                growing.remove(k)
            growing = [j for j in growing if sizes[j] < most[j]]
        return sizes

    def units(self, sizes: list[int]) -> Tensor:
        kept = torch.zeros(self.analysis.num_units, dtype=torch.bool)
        for group, size in zip(self.groups, sizes):
            kept[group[:size]] = True
        return kept

    def macs(self, sizes: list[int]) -> int:
        levels = torch.where(self.units(sizes), 1, 2)
        return int(self.model.subnet_macs(levels, 1)[0])


def dense_net(model: nn.Module, analysis: Analysis, kept: Tensor, seed: int | None = None) -> Subnet:
    """The dense net as a module of its own, with the model's weights, or with new ones.

    Args:
        model: owner of the weights; not modified.
        analysis: its units.
        kept: BoolTensor (num_units,), from `dense_units`.
        seed: of new weights; None: keep the model's.
    """
    net = extract_subnet(model, analysis, torch.where(kept, 1, 2), 1)
    if seed is not None:
        reinitialise(net.model, seed)
    return net
