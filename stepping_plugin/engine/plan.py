"""What all step programs of one engine share: the folded eval graph, the levels and the tensors behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..graph.labels import Role
from ..graph.operands import VIEWS
from ..graph.program import Program, call_arg, is_static, op_name, static_value

__all__ = ["BatchAxis", "Plan", "batch_axes", "fold_batch_norms"]


class Plan:
    """A labelled eval program with a level for every unit.

    Args:
        program: annotated eval program (`units.analyse`).
        levels: LongTensor (num_units,), 1..num_subnets, or more for spare units.
        num_subnets: N.
        lookup: gives the tensor of a name (parameter, buffer or constant).
    """

    def __init__(self, program: Program, levels: Tensor, num_subnets: int, lookup: Callable[[str], Tensor]) -> None:
        self.program = fold_batch_norms(program)
        self.device = next((lookup(n.meta["tensor"]).device for n in program.tensor_nodes()), torch.device("cpu"))
        self.levels, self.num_subnets, self.lookup = levels, num_subnets, lookup
        self._statics: dict[fx.Node, Tensor] = {}
        self._positions: dict[tuple[fx.Node, int], Tensor] = {}

    def static(self, node: fx.Node) -> Tensor:
        """Value of a static node at full width."""
        return static_value(node, self.lookup, self._statics)

    def positions(self, node: fx.Node, level: int) -> Tensor:
        """Positions along the unit axis of a node whose unit has that level; level 1 has those of no unit,
        too."""
        key = node, level
        if key not in self._positions:
            units = node.meta["units"]
            own = (
                torch.where(units >= 0, self.levels[units.clamp(min=0)], 1)
                if len(self.levels)
                else torch.ones_like(units)
            )
            self._positions[key] = torch.nonzero(own == level).flatten()
        return self._positions[key]

    def prefix_positions(self, node: fx.Node, level: int) -> Tensor:
        """Positions of levels up to `level`, ordered by level."""
        return torch.cat([self.positions(node, s) for s in range(1, level + 1)])

    def is_new(self, node: fx.Node, level: int) -> bool:
        """Whether the node computes something at that level."""
        if node.meta.get("per_level"):
            return True
        if node.meta.get("units") is None:
            return level == 1
        return len(self.positions(node, level)) > 0


class BatchAxis(NamedTuple):
    """Where a tensor holds its samples: sample b has the places (o * B + b) * inner + i of one axis, o < outer.

    Views fold the batch into other axes: windows and heads lie behind it (outer is 1), but a model that works on
    (tokens, batch, channels) may flatten tokens in front of it.
    """

    axis: int
    outer: int


def batch_axes(program: Program) -> dict[fx.Node, BatchAxis | None]:
    """The batch axis of every tensor that depends on the images; None where it has none.

    Shapes count the batch as 1, so what lies in front of it is the product of the sizes before its axis, and a view
    changes nothing about how many numbers that are.
    """
    found: dict[fx.Node, BatchAxis | None] = {program.image: BatchAxis(0, 1)}
    for node in program.operators():
        axis = node.meta.get("batch_axis")
        sources = [(n, found[n]) for n in node.all_input_nodes if found.get(n) is not None]
        if axis is None:
            found[node] = None
            continue
        outer = max((known.outer for _, known in sources if known), default=1)
        if op_name(node) in VIEWS and sources:
            source, known = sources[0]
            assert known is not None
            outer = known.outer * math.prod(source.meta["shape"][: known.axis]) // math.prod(node.meta["shape"][:axis])
        found[node] = BatchAxis(axis, max(1, outer))
    return found


def normalised_axes(node: fx.Node) -> list[int]:
    """Axes that a layer, group or RMS norm runs over."""
    rank = len(node.meta["shape"])
    if op_name(node) == "group_norm":
        return list(range(1, rank))
    return list(range(rank - len(node.args[1]), rank))  # type: ignore[arg-type]


def spread(node: fx.Node, axes: list[int]) -> int:
    """Numbers per position of the unit axis that a statistic of `node` over `axes` runs over."""
    size = 1
    for axis in axes:
        if axis != node.meta["axis"]:
            size *= node.meta["shape"][axis]
    return size


# ------------------------------------------------------------------------------------------------- folding


def fold_batch_norms(program: Program) -> Program:
    """A copy of an eval program in which what follows convolutions and linears channel by channel (batch norm,
    layer scale) is part of their weights, and operators that pass their input on are left out."""
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(program.graph, mapped)
    graph.output(output)
    for old, new in mapped.items():
        new.meta = dict(old.meta)
    folded = Program(graph, mapped[program.image], program.training, dict(program.constants), list(program.mutations))
    for node in list(graph.nodes):
        if node.op != "call_function" or is_static(node):
            continue
        if op_name(node) in _IDENTITIES and node is not folded.output:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)
        elif op_name(node) == "batch_norm":
            _fold(graph, node)
        elif op_name(node) == "mul.Tensor":
            _fold_scale(graph, node)
    graph.eliminate_dead_code()
    return folded


_IDENTITIES = {
    "alias",
    "detach",
    "clone",
    "contiguous",
    "lift_fresh_copy",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
}


def _can_absorb(source: Any) -> bool:
    """Whether a node is a convolution or linear with one reader and a constant weight."""
    if not isinstance(source, fx.Node) or source.op != "call_function" or len(source.users) > 1:
        return False
    weighted = op_name(source) == "linear" or op_name(source).startswith("conv")
    return weighted and source.meta.get("role") not in (Role.HEAD, Role.TAPS) and is_static(source.args[1])


def _fold_scale(graph: fx.Graph, product: fx.Node) -> None:
    """A product with one number per channel, which layer scale is."""
    for source, scale in (product.args[:2], product.args[1::-1]):
        if not _can_absorb(source) or not _is_per_channel(scale, source):  # type: ignore[arg-type]
            continue
        weight, bias = source.args[1], call_arg(source, "bias")  # type: ignore[union-attr,arg-type]
        with graph.inserting_before(product):
            new = [t and graph.call_function(scaled, (t, scale)) for t in (weight, bias)]
        for node, old in zip(new, (weight, bias)):
            if node is not None:
                node.meta = _static_like(old)  # type: ignore[union-attr,arg-type]
        _absorb(graph, source, product, *new)  # type: ignore[arg-type]
        return


def _is_per_channel(scale: Any, source: fx.Node) -> bool:
    """Whether an operand is static and holds one number per output channel of a convolution or linear."""
    if not is_static(scale) or "transpose" in op_name(source):
        return False
    full = source.meta["shape"]
    axis = len(full) - 1 if op_name(source) == "linear" else 1
    wanted = [size if d == axis else 1 for d, size in enumerate(full)]
    own = list(scale.meta["shape"])
    return [1] * (len(full) - len(own)) + own == wanted


def _static_like(node: fx.Node) -> dict[str, Any]:
    return {**{k: v for k, v in node.meta.items() if k != "value"}, "static": True}


def _absorb(graph: fx.Graph, source: fx.Node, last: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    """Put a convolution or linear with other parameters in the place of itself and of what follows it."""
    with graph.inserting_before(last):
        kwargs = {k: v for k, v in source.kwargs.items() if k != "bias"}
        new = graph.call_function(source.target, (source.args[0], weight, bias, *source.args[3:]), kwargs)  # type: ignore[arg-type]
    new.meta = dict(source.meta)
    last.replace_all_uses_with(new)
    graph.erase_node(last)
    graph.erase_node(source)


def scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    """A weight or bias times one number per output channel, which comes first."""
    return tensor * scale.flatten().view([-1] + [1] * (tensor.dim() - 1))


def _fold(graph: fx.Graph, norm: fx.Node) -> None:
    source: fx.Node = norm.args[0]  # type: ignore[assignment]
    if not _can_absorb(source) or norm.args[5]:
        return
    weight, bias = source.args[1], call_arg(source, "bias")
    channels_last = op_name(source) == "linear"
    if channels_last and len(source.meta["shape"]) != 2:
        return
    scale, shift, mean, variance, eps = *norm.args[1:5], norm.args[7]
    transposed = "transpose" in op_name(source)
    groups = 1 if channels_last else call_arg(source, "groups", 1)
    with graph.inserting_before(norm):
        new_weight = graph.call_function(folded_weight, (weight, scale, variance, eps, groups if transposed else 0))
        new_bias = graph.call_function(folded_bias, (bias, scale, shift, mean, variance, eps))
    new_weight.meta = _static_like(weight)
    new_bias.meta = {"shape": (norm.meta["shape"][1],), "dtype": weight.meta["dtype"], "static": True}  # type: ignore[union-attr]
    _absorb(graph, source, norm, new_weight, new_bias)


def _norm_scale(scale: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    factor = torch.rsqrt(variance.double() + eps)
    return factor if scale is None else factor * scale.double()


def folded_weight(weight: Tensor, scale: Tensor | None, variance: Tensor, eps: float, transposed_groups: int) -> Tensor:
    """Weight times gamma / sqrt(variance + eps) of its output channel, computed in float64.

    Args:
        transposed_groups: 0 if output channels come first; else the groups of a transposed convolution (I, O
            / groups, ...).
    """
    factor = _norm_scale(scale, variance, eps)
    if not transposed_groups:
        return (weight.double() * factor.view([-1] + [1] * (weight.dim() - 1))).to(weight.dtype)
    inputs, outputs = weight.shape[:2]
    per_input = factor.view(transposed_groups, 1, outputs).expand(-1, inputs // transposed_groups, -1)
    per_input = per_input.reshape([inputs, outputs] + [1] * (weight.dim() - 2))
    return (weight.double() * per_input).to(weight.dtype)


def folded_bias(
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> Tensor:
    """beta + (bias - mean) * gamma / sqrt(variance + eps), computed in float64."""
    factor = _norm_scale(scale, variance, eps)
    centred = -mean.double() if bias is None else bias.double() - mean.double()
    result = centred * factor
    return (result if shift is None else result + shift.double()).to(mean.dtype)


def norm_options(node: fx.Node) -> tuple[Any, Any, float, bool]:
    """Weight, bias, eps and whether the mean is subtracted, of a layer, group or RMS norm."""
    centred = op_name(node) != "rms_norm"
    eps = call_arg(node, "eps")
    if eps is None:
        eps = 1e-5 if centred else torch.finfo(node.meta["dtype"]).eps
    return call_arg(node, "weight"), call_arg(node, "bias") if centred else None, eps, centred
