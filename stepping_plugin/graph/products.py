"""Label rules of operators with weights and of products: convolutions, linears, matrix products, attention."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .labels import Labels, Role
from .program import call_arg, is_static, op_name
from .registry import dynamic_inputs, free, pass_per_level, rule, shape_of
from .weights import weight_key

__all__ = ["join_groups"]

# ------------------------------------------------------------------------------------------------- weights

CONVOLUTIONS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv2d.padding",
    "conv1d.padding",
    "conv3d.padding",
    "conv_transpose1d",
    "conv_transpose2d.input",
    "conv_transpose3d.input",
)


@rule("linear", *CONVOLUTIONS)
def weighted(labels: Labels, node: fx.Node) -> Tensor | None:
    """Convolutions and linears: fresh units on the output channels, unless the labels lie on another axis."""
    source, weight = node.args[:2]
    if not is_static(weight):
        return None
    rank = len(shape_of(node))
    axis = rank - 1 if op_name(node) == "linear" else 1
    groups = 1 if op_name(node) == "linear" else call_arg(node, "groups", 1)
    label = labels.of(source)
    if labels.role.get(node) == Role.HEAD:
        return _head(labels, node, label, axis)
    if source in labels.per_level:
        labels.per_level.add(node)
        return free(node)
    if groups > 1:
        labels.role[node] = Role.GROUPED
        label = labels.merge(label, range(2, label.dim()))
        return join_groups(labels, label, groups, shape_of(source)[1], shape_of(node)[1])
    elsewhere = [d for d in range(label.dim()) if d != axis and label.shape[d] > 1]
    if elsewhere and op_name(node) != "linear":
        carried = _convolution_beside_units(labels, node, label)
        if carried is not None:
            return carried
        label = labels.merge(label, range(2, label.dim()))
    elif elsewhere:
        labels.role[node] = Role.CARRIED
        return labels.merge(label, [axis])
    return _channels(labels, node, label, axis)


def _head(labels: Labels, node: fx.Node, label: Tensor, axis: int) -> Tensor:
    elsewhere = [d for d in range(label.dim()) if d != axis and label.shape[d] > 1]
    if elsewhere and label.shape[axis] > 1:  # channels spread over positions, as by a pixel shuffle
        labels.merge(label, elsewhere)
    elif elsewhere:
        labels.pin(label, node, "the classifier reads units along another axis than its channels")
    labels.per_level.add(node)
    return free(node)


def _channels(labels: Labels, node: fx.Node, label: Tensor, axis: int) -> Tensor:
    weight: fx.Node = node.args[1]
    entry = labels.weight(weight_key(weight), shape_of(node)[axis])
    inputs = label.expand([shape_of(node.args[0])[d] if d == axis else 1 for d in range(label.dim())]).flatten()
    source: fx.Node = node.args[0]
    if entry.inputs is None or entry.source is None:
        entry.inputs, entry.source = inputs, source
    elif labels.adopt(entry.source, inputs, axis) or labels.adopt(source, entry.inputs, axis):
        entry.inputs = torch.maximum(*map(labels.sets.find, (entry.inputs, inputs)))
    else:  # call sites of one weight share their units, and its one mask
        labels.tie(entry.inputs, inputs, node)
    labels.role[node] = Role.CHANNELS
    return labels.sets.find(entry.out).reshape([-1 if d == axis else 1 for d in range(len(shape_of(node)))])


def _convolution_beside_units(labels: Labels, node: fx.Node, label: Tensor) -> Tensor | None:
    """A convolution whose spatial axes carry the units: pointwise along them, or sliding over them (ECA)."""
    weight_shape = node.args[1].meta["shape"]
    along = [d for d in range(2, label.dim()) if label.shape[d] > 1]
    if label.shape[1] != 1:
        return None
    if all(weight_shape[d] == 1 for d in along) and shape_of(node)[2:] == shape_of(node.args[0])[2:]:
        labels.role[node] = Role.CARRIED
        return label
    if op_name(node) == "conv1d" and tuple(weight_shape[:2]) == (1, 1) and shape_of(node) == shape_of(node.args[0]):
        labels.role[node] = Role.TAPS
        return label
    return None


def join_groups(labels: Labels, label: Tensor, groups: int, inputs: int, outputs: int) -> Tensor:
    """Labels (1, inputs, ...) joined inside each of `groups` channel groups, as labels of `outputs` channels."""
    rest = list(label.shape[2:])
    grouped = label.expand(label.shape[0], inputs, *rest).reshape(label.shape[0], groups, inputs // groups, *rest)
    joined = labels.sets.find(labels.merge(grouped, [2]))
    spread = joined.expand(-1, groups, outputs // groups, *rest)
    return spread.reshape(label.shape[0], outputs, *rest)


# ------------------------------------------------------------------------------------------------- products


@rule("matmul", "bmm")
def matmul(labels: Labels, node: fx.Node) -> Tensor | None:
    """Products of two computed matrices: units of both join, except along axes that neither contracts nor spans."""
    a, b = node.args[:2]
    rank = len(shape_of(node))
    if (is_static(a) or is_static(b)) and (passed := pass_per_level(labels, node)) is not None:
        return passed
    if is_static(b):
        return _times_matrix(labels, node, labels.of(a), -1)
    if is_static(a):
        return _times_matrix(labels, node, labels.of(b), -2)
    left, right = labels.of(a), labels.of(b)
    if a in labels.per_level or b in labels.per_level:
        if labels.is_free(a) and labels.is_free(b):
            labels.per_level.add(node)
            return free(node)
        return None
    spread = lambda label: label.reshape([1] * (rank - label.dim()) + list(label.shape))  # noqa: E731
    left, right = spread(labels.merge(left, [-1])), spread(labels.merge(right, [-2]))
    return _join_or_pin(labels, node, [left, right])


def _join_or_pin(labels: Labels, node: fx.Node, operands: list[Tensor]) -> Tensor:
    """Units of the operands of a product join along its leading axes (heads).

    Where that would leave one single unit (one head, keys that all heads share, a product of features and states), only
    the operand with several heads, else the one with the most units, keeps them; the others stay at level 1.
    """
    rank = len(shape_of(node))
    trial = labels.copy()
    if trial.units_in(trial.join([trial.merge(o, [-1, -2]) for o in operands], rank)) > 1:
        return labels.join([labels.merge(o, [-1, -2]) for o in operands], rank)
    kept = max(operands, key=lambda o: (any(size > 1 for size in o.shape[:-2]), labels.units_in(o)))
    for operand in operands:
        if operand is not kept:
            labels.pin(operand, node, "a product with a tensor of other units")
    return labels.sets.find(kept)


def _times_matrix(labels: Labels, node: fx.Node, label: Tensor, contracted: int) -> Tensor | None:
    """Product with a matrix of parameters along an axis that carries no units."""
    if label.shape[contracted] > 1:
        label = labels.merge(label, [contracted])
    if label.dim() != len(shape_of(node)):
        return None
    labels.role[node] = Role.CARRIED
    return label


@rule("scaled_dot_product_attention")
def attention(labels: Labels, node: fx.Node) -> Tensor | None:
    """A head is one unit: its queries, keys, values and outputs."""
    tensors = [n for n in dynamic_inputs(node)]
    if any(n in labels.per_level for n in tensors):
        if not all(labels.is_free(n) for n in tensors):
            return None
        labels.per_level.add(node)
        return free(node)
    merged = [labels.merge(labels.of(n), [-1, -2]) for n in tensors]
    query = labels.join(merged[:1] + merged[3:], len(shape_of(node)))  # a bias is added to the product with the queries
    return _join_or_pin(labels, node, [query, *merged[1:3]])
