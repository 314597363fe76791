"""Exact MACs of every subnet, as a closed form over the level vector.

A MAC is one multiply-accumulate of a convolution, linear, matrix product or attention product, for one image, in eval
mode. Biases, norms, activations, pools and softmax are not MACs. With

    out[l, s], in[l, s] = number of output / input channels of layer l whose unit has level s,

a layer between units costs `per_synapse[l] * sum_s out[l, s] * in[l, <= s]` up to level i (nesting rule: a unit reads
units of its own and lower levels), everything else costs a fixed amount per unit. Units that only pinned channels read
(`Analysis.dead_ends`) cost nothing above level 1, where nothing computes them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from ..graph.demand import needed_levels
from ..graph.labels import Role
from ..graph.program import Program, is_static, op_name
from .analysis import Analysis, Layer

__all__ = ["MacModel", "dense_macs", "static_macs"]


def dense_macs(node: fx.Node) -> int:
    """MACs of one call of a convolution, linear, matmul or attention at full width, batch 1."""
    name, shape = op_name(node), node.meta["shape"]
    first, second = (a.meta["shape"] for a in node.args[:2])
    if name == "scaled_dot_product_attention":
        return math.prod(first[:-1]) * second[-2] * first[-1] + math.prod(shape) * second[-2]
    if name in ("matmul", "bmm"):
        return math.prod(shape) * first[-1]
    if name in ("mv", "dot", "vdot"):
        return math.prod(first)
    if name == "linear":
        return math.prod(shape) * second[-1]
    if "transpose" in name:
        return math.prod(first) * math.prod(second[1:])
    return math.prod(shape) * math.prod(second[1:])


def static_macs(program: Program) -> int:
    """MACs of products that depend on parameters only (networks for position biases), which need no image.

    A plain forward pass repeats them for every batch, so counters see them; the nested net's MACs leave them out.
    """
    products = ("linear", "conv", "matmul", "bmm", "mv", "dot", "vdot", "scaled_dot_product_attention")
    nodes = (n for n in program.graph.nodes if n.op == "call_function" and is_static(n))
    return sum(dense_macs(node) for node in nodes if op_name(node).startswith(products))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


class MacModel:
    """MACs of all subnets for any level vector of an analysed model.

    Args:
        analysis: result of `units.analysis.analyse`; the eval graph is counted.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.num_units = analysis.num_units
        self.dead_ends = analysis.dead_ends
        self._executed: tuple[Tensor, int, Tensor] | None = None  # of the level vector asked for last
        self.unit_cost = torch.zeros(analysis.num_units, dtype=torch.long)
        self.fixed = 0  # level-1 operators
        self.per_level = 0  # evaluated once for every subnet
        self.layer_names: list[str] = []
        self.total = 0
        pairs: list[tuple[int, Tensor, Tensor]] = []
        for layer in analysis.layers:
            macs = dense_macs(layer.node)
            self.total += macs
            if layer.role == Role.CHANNELS:
                synapses = len(layer.out_units) * len(layer.in_units)
                pairs.append((macs // synapses, layer.out_units, layer.in_units))
                self.layer_names.append(layer.name)
            else:
                self._add_fixed_costs(layer, macs)
        self._index_pairs(pairs)

    def _add_fixed_costs(self, layer: Layer, macs: int) -> None:
        units = self._charged_units(layer)
        if units is None:
            self.per_level += macs
            return
        if not len(units):
            self.fixed += macs
            return
        cost = macs // len(units)
        movable = units >= 0
        self.fixed += cost * int((~movable).sum())
        self.unit_cost.index_add_(0, units[movable], torch.full((int(movable.sum()),), cost))

    @staticmethod
    def _charged_units(layer: Layer) -> Tensor | None:
        """Units among which the cost of a layer is shared out; None if it runs once per subnet."""
        source: fx.Node = layer.node.args[0]
        if layer.role == Role.HEAD and not source.meta.get("per_level"):
            return layer.in_units
        return None if layer.node.meta.get("per_level") else layer.out_units

    def _index_pairs(self, pairs: list[tuple[int, Tensor, Tensor]]) -> None:
        """Flatten all layers into vectors: one entry per (layer, unit) with the unit's channel counts."""
        self.per_synapse = torch.tensor([cost for cost, _, _ in pairs], dtype=torch.long)
        layers, units, outs, ins = [], [], [], []
        self.free_out = torch.zeros(len(pairs), dtype=torch.long)
        self.free_in = torch.zeros(len(pairs), dtype=torch.long)
        for index, (_, out_units, in_units) in enumerate(pairs):
            self.free_out[index] = int((out_units < 0).sum())
            self.free_in[index] = int((in_units < 0).sum())
            members = torch.unique(torch.cat([out_units, in_units]))
            members = members[members >= 0]
            layers.append(torch.full_like(members, index))
            units.append(members)
            outs.append(torch.bincount(out_units[out_units >= 0], minlength=self.num_units)[members])
            ins.append(torch.bincount(in_units[in_units >= 0], minlength=self.num_units)[members])
        self.pair_layer, self.pair_unit, self.pair_out, self.pair_in = map(_joined, (layers, units, outs, ins))

    def _useful(self, levels: Tensor, n: int) -> Tensor:
        """Levels in which units that nothing can read above level 1 are spare."""
        return torch.where(self.dead_ends & (levels > 1), n + 1, levels)

    def _histograms(self, levels: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Channels per layer and level: out (L, n + 2) and in (L, n + 2), column s for level s; column 0 is empty."""
        columns = n + 2
        levels = self._useful(levels, n)
        key = self.pair_layer * columns + levels[self.pair_unit]
        out = torch.zeros(len(self.per_synapse) * columns, dtype=torch.long).index_add_(0, key, self.pair_out)
        inputs = torch.zeros(len(self.per_synapse) * columns, dtype=torch.long).index_add_(0, key, self.pair_in)
        out, inputs = out.view(-1, columns), inputs.view(-1, columns)
        out[:, 1] += self.free_out
        inputs[:, 1] += self.free_in
        return out, inputs

    def layer_macs(self, levels: Tensor, n: int) -> Tensor:
        """MACs that each level adds in every layer between units, LongTensor (L, n); rows follow `layer_names`."""
        out, inputs = self._histograms(levels, n)
        return (self.per_synapse[:, None] * out * inputs.cumsum(1))[:, 1 : n + 1]

    def subnet_macs(self, levels: Tensor, n: int) -> Tensor:
        """Cumulative MACs of subnets 1..n, LongTensor (n,), if something reads every unit: what budgets bound.

        Args:
            levels: LongTensor (num_units,) with values 1..n + 1 (n + 1 = spare).
            n: number of subnets.
        """
        added = self.layer_macs(levels, n).sum(0)
        useful = self._useful(levels, n)
        own = torch.zeros(n + 2, dtype=torch.long).index_add_(0, useful, self.unit_cost)[1 : n + 1]
        steps = torch.arange(1, n + 1)
        return (added + own).cumsum(0) + self.fixed + steps * self.per_level

    def executed_macs(self, levels: Tensor, n: int) -> Tensor:
        """Cumulative MACs of subnets 1..n that are executed, LongTensor (n,): `subnet_macs` without idle units.

        A unit is idle if nothing of its level or above reads it in any subnet (a level vector may leave a layer without
        units of some level); no class score depends on it, and the engine does not compute it.
        """
        if self._executed is not None and self._executed[1] == n and torch.equal(self._executed[0], levels):
            return self._executed[2].clone()
        needed = needed_levels(self.analysis.eval_program, levels, n)
        between = iter(self.layer_macs(levels, n))
        added = torch.zeros(n, dtype=torch.long)
        for layer in self.analysis.layers:
            own = next(between) if layer.role == Role.CHANNELS else self._other_macs(layer, levels, n)
            for level in needed.get(layer.node, ()):
                added[level - 1] += own[level - 1]
        self._executed = levels.clone(), n, added.cumsum(0)
        return self._executed[2].clone()

    def _other_macs(self, layer: Layer, levels: Tensor, n: int) -> Tensor:
        """MACs per level of a layer that is not between units, LongTensor (n,)."""
        macs, units = dense_macs(layer.node), self._charged_units(layer)
        if units is None:
            return torch.full((n,), macs)
        if not len(units):
            return torch.tensor([macs] + [0] * (n - 1))
        own = torch.cat([levels, levels.new_ones(1)])[units]
        return torch.bincount(own, minlength=n + 2)[1 : n + 1] * (macs // len(units))

    def move_delta(self, levels: Tensor, n: int, shift: int = 1) -> Tensor:
        """Change of every subnet's MACs if one unit moved by one level, for all units at once.

        Args:
            levels: LongTensor (num_units,).
            n: number of subnets.
            shift: +1 moves to the next larger subnet, -1 to the next smaller one.

        Returns:
            LongTensor (num_units, n); rows of units that cannot move that way are 0.
        """
        out, inputs = self._histograms(levels, n)
        reach = inputs.cumsum(1)
        layer, unit = self.pair_layer, self.pair_unit
        o, i, s = self.pair_out, self.pair_in, levels[unit]
        low = s if shift > 0 else s - 1  # the lower of the two levels involved
        can = (low >= 1) & (low <= n)
        layer, unit, o, i, low = layer[can], unit[can], o[can], i[can], low[can]
        cost = self.per_synapse[layer]
        high_in = reach[layer, low + 1]  # inputs of levels <= low + 1: the same before and after the move
        low_in, low_out = reach[layer, low], out[layer, low]
        if shift > 0:
            at_low = -o * low_in - low_out * i + o * i
            at_high = o * high_in
        else:
            at_low = o * low_in + low_out * i + o * i
            at_high = -o * high_in
        change = torch.zeros(self.num_units, n + 2, dtype=torch.long)
        flat = change.view(-1)
        flat.index_add_(0, unit * (n + 2) + low, cost * at_low)
        flat.index_add_(0, unit * (n + 2) + low + 1, cost * at_high)
        units = torch.arange(self.num_units)
        low = levels if shift > 0 else levels - 1
        can = (low >= 1) & (low <= n)
        sign = -shift
        flat.index_add_(0, units[can] * (n + 2) + low[can], sign * self.unit_cost[can])
        flat.index_add_(0, units[can] * (n + 2) + low[can] + 1, -sign * self.unit_cost[can])
        return change[:, 1 : n + 1].cumsum(1)
