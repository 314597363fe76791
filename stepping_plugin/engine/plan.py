"""What all step programs of one engine share: the folded eval graph, the levels and the tensors behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..graph.operands import VIEWS
from ..graph.program import Program, call_arg, is_static, op_name, static_value
from ..units.levels import channel_levels
from .fold import fold_batch_norms, fold_norm_weights

__all__ = ["BatchAxis", "Plan", "batch_axes", "norm_options", "normalised_axes", "spread"]


_LARGE_PATCH = 8  # images cut into smaller squares are quicker read by a convolution


class Plan:
    """A labelled eval program with a level for every unit.

    Args:
        program: annotated eval program (`units.analysis.analyse`).
        levels: LongTensor (num_units,), 1..num_subnets, or more for spare units.
        num_subnets: N.
        lookup: gives the tensor of a name (parameter, buffer or constant).
    """

    def __init__(self, program: Program, levels: Tensor, num_subnets: int, lookup: Callable[[str], Tensor]) -> None:
        self.program = fold_batch_norms(program)
        tensors = [lookup(n.meta["tensor"]) for n in program.tensor_nodes()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        self.levels, self.num_subnets, self.lookup = levels, num_subnets, lookup
        self._statics: dict[fx.Node, Tensor] = {}
        self._positions: dict[tuple[fx.Node, int], Tensor] = {}
        fold_norm_weights(self.program, self._levels_of)

    def static(self, node: fx.Node) -> Tensor:
        """Value of a static node at full width."""
        return static_value(node, self.lookup, self._statics)

    def positions(self, node: fx.Node, level: int) -> Tensor:
        """Positions along the unit axis of a node whose unit has that level; level 1 has those of no unit,
        too."""
        key = node, level
        if key not in self._positions:
            self._positions[key] = torch.nonzero(self._levels_of(node) == level).flatten()
        return self._positions[key]

    def _levels_of(self, node: fx.Node) -> Tensor:
        """Level of every position along the unit axis of a node."""
        return channel_levels(self.levels, node.meta["units"])

    def prefix_positions(self, node: fx.Node, level: int) -> Tensor:
        """Positions of levels up to `level`, ordered by level."""
        return torch.cat([self.positions(node, s) for s in range(1, level + 1)])

    def patch_size(self, node: fx.Node) -> int:
        """Side of the squares that a convolution of the images cuts them into, if they are large; else 0."""
        if op_name(node) != "conv2d" or node.args[0] is not self.program.image or node.meta.get("units") is None:
            return 0
        weight: fx.Node = node.args[1]  # type: ignore[assignment]
        size, (height, width) = weight.meta["shape"][2], self.program.image.meta["shape"][2:]
        given = [call_arg(node, name) for name in ("stride", "padding", "dilation", "groups")]
        side_by_side = given == [[size, size], [0, 0], [1, 1], 1] and weight.meta["shape"][3] == size
        no_edge = height % size == width % size == 0
        return size if side_by_side and no_edge and is_static(weight) and size >= _LARGE_PATCH else 0

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


def norm_options(node: fx.Node) -> tuple[Any, Any, float, bool]:
    """Weight, bias, eps and whether the mean is subtracted, of a layer, group or RMS norm."""
    centred = op_name(node) != "rms_norm"
    eps = call_arg(node, "eps")
    if eps is None:
        eps = 1e-5 if centred else torch.finfo(node.meta["dtype"]).eps
    return call_arg(node, "weight"), call_arg(node, "bias") if centred else None, eps, centred
