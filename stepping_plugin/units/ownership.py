"""Which subnet is the first that may read an element of a parameter.

Parameters reach the operators that read images through views, slices, transposes, concatenations, norms and other
arithmetic that needs no image. What counts is the value that such an operator reads: its *static operand*.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..graph.labels import Role
from ..graph.program import call_arg, is_static, op_name, tensor_inputs
from ..graph.rules import is_elementwise
from .analysis import Analysis, channel_axis, full_units
from .levels import channel_levels

__all__ = ["NEVER", "first_readers"]

NEVER = 1 << 30  # "subnet" that reads a dead synapse


def first_readers(analysis: Analysis, levels: Tensor) -> dict[fx.Node, Tensor]:
    """Per static operand of the eval program: the smallest subnet that may read each of its elements.

    Args:
        analysis: units of the model.
        levels: LongTensor (num_units,), 1..N + 1.

    Returns:
        LongTensors of the operands' ranks that broadcast to their shapes; `NEVER` for synapses that are dead in all
        subnets. Where an operand has several readers, the smallest subnet of all of them.
    """
    found: dict[fx.Node, Tensor] = {}
    for node in analysis.eval_program.operators():
        for operand in (n for n in tensor_inputs(node) if is_static(n)):
            reader = _reader(node, operand, levels)
            found[operand] = torch.minimum(found[operand], reader) if operand in found else reader
    return found


def _reader(node: fx.Node, operand: fx.Node, levels: Tensor) -> Tensor:
    name, rank = op_name(node), len(operand.meta["shape"])
    if name == "linear" or name.startswith("conv"):
        if operand is node.args[1]:
            return _weight_reader(node, operand, levels)
        axis: int | None = 0 if node.meta["axis"] == channel_axis(node) else None
    else:
        axis = _operand_axis(node, operand)
    units = node.meta["units"]
    if units is None or axis is None or operand.meta["shape"][axis] != len(units):
        return torch.ones([1] * rank, dtype=torch.long)
    return channel_levels(levels, units).reshape([-1 if d == axis else 1 for d in range(rank)])


def _weight_reader(node: fx.Node, weight: fx.Node, levels: Tensor) -> Tensor:
    """A synapse k -> j is read from subnet level[j] on, and never if level[k] > level[j]."""
    role, shape = node.meta.get("role"), weight.meta["shape"]
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    everything = torch.ones([1] * len(shape), dtype=torch.long)
    columns = channel_levels(levels, full_units(source, channel_axis(source, node)))
    rows = channel_levels(levels, full_units(node, channel_axis(node)))
    transposed = "transpose" in op_name(node)
    if role == Role.CHANNELS:
        first = torch.where(columns[None, :] <= rows[:, None], rows[:, None], NEVER)
        first = first.t() if transposed else first
    elif role == Role.HEAD and call_arg(node, "groups", 1) == 1:
        first = columns[:, None] if transposed else columns[None, :]
    elif role == Role.GROUPED:
        first = (columns if transposed else rows)[:, None]
    else:
        return everything
    return first.reshape([*first.shape] + [1] * (len(shape) - 2))


_PER_CHANNEL = ("batch_norm", "instance_norm", "group_norm", "prelu")
_ALIGNED = {"layer_norm", "rms_norm", "masked_fill.Tensor"}


def _operand_axis(node: fx.Node, operand: fx.Node) -> int | None:
    """Axis of a static operand that meets the unit axis of the operator; None if each unit may read all of it."""
    name, axis = op_name(node), node.meta["axis"]
    own_rank, rank = len(operand.meta["shape"]), len(node.meta["shape"])
    if axis is None:
        return None
    if name in _PER_CHANNEL and operand is not node.args[0]:
        return 0 if axis == 1 else None
    if name in ("cat", "stack"):
        dim = call_arg(node, "dim", 0) % rank
        own = axis - (name == "stack" and dim < axis)
        return None if dim == axis else own
    products = name in ("matmul", "bmm", "scaled_dot_product_attention") and axis < rank - 2
    own = axis - rank + own_rank
    return own if own >= 0 and (products or name in _ALIGNED or is_elementwise(node)) else None
