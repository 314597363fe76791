"""Printable description of a net."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from .contribution import contribution_table, idle_levels

if TYPE_CHECKING:
    from ..nested.net import NestedNet
    from ..units.analysis import UnitGroup

__all__ = ["channels_in_multiples_of", "human_macs", "summary", "units_per_level"]


def human_macs(macs: float) -> str:
    """MACs with a unit: 1.81 G, 56.5 M, 820 k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(macs) >= size:
            return f"{macs / size:.3g} {unit}"
    return str(int(macs))


def units_per_level(levels: Tensor, group: UnitGroup, n: int) -> list[int]:
    """Units of a group at levels 1..n and, last, spare ones."""
    return torch.bincount(levels[group.units], minlength=n + 2)[1 : n + 2].tolist()


def channels_in_multiples_of(net: NestedNet, group: UnitGroup) -> int:
    """Largest number of which the channels that every level adds to the first layer of a group are multiples."""
    outputs = net.analysis.weight_units[group.weights[0]][0]
    own = outputs[torch.isin(outputs, group.units)]
    return math.gcd(*torch.bincount(net.levels[own], minlength=net.num_subnets + 2)[1 : net.num_subnets + 1].tolist())


def summary(net: NestedNet) -> Group:
    """Tables of subnets and of unit groups."""
    found = net.contribution
    added: list[Table | str] = [] if found is None else [contribution_table(found), *idle_levels(found)]
    return Group(_subnets(net), _groups(net), *added, *net.notes)


def _subnets(net: NestedNet) -> Table:
    table = Table(
        title=f"Subnets (M_t = {human_macs(net.reference_macs)} MACs)",
        caption="extract(i) multiplies the zeros of dead synapses; engine and extract(i, exact=True) execute the MACs.",
    )
    for column in ("subnet", "MACs", "of M_t", "step", "budget", "below budget", "extract(i)"):
        table.add_column(column, justify="right")
    previous = 0
    for i, (macs, budget, dense) in enumerate(zip(net.macs, net.budgets, net.dense_macs), start=1):
        gap = f"{100 * (budget - macs) / budget:.2f} %"
        share = f"{100 * macs / net.reference_macs:.2f} %"
        table.add_row(
            str(i),
            human_macs(macs),
            share,
            "+" + human_macs(macs - previous),
            human_macs(budget),
            gap,
            human_macs(dense),
        )
        previous = macs
    return table


def _groups(net: NestedNet) -> Table:
    table = Table(title=f"{net.analysis.num_units} units")
    table.add_column("made by")
    table.add_column("units", justify="right")
    for i in range(1, net.num_subnets + 1):
        table.add_column(f"level {i}", justify="right")
    table.add_column("spare", justify="right")
    table.add_column("channels", justify="right")
    levels = net.levels
    for group in net.analysis.groups:
        others = f" (+{len(group.weights) - 1})" if len(group.weights) > 1 else ""
        counts = units_per_level(levels, group, net.num_subnets)
        table.add_row(
            group.name + others, str(len(group.units)), *map(str, counts), f"{channels_in_multiples_of(net, group)} x"
        )
    return table
