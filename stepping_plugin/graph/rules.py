"""Label rules: what every operator does to units.

A rule takes the labels and a node and returns the node's label tensor (or None: not covered, the units it reads are
pinned to level 1). To add an operator, register a rule under its ATen name.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from .labels import Labels, Role, Rule, compress, labelled_axis
from .products import join_groups
from .program import batch_hint, call_arg, op_name, tensor_inputs
from .registry import RULES, dynamic_inputs, free, is_pointwise, pass_per_level, rule, shape_of
from .unionfind import FREE

__all__ = ["RULES", "is_elementwise", "reduced_axes", "rule_of"]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# ------------------------------------------------------------------------------------------------- data movement

MOVES = _names(
    """
    reshape view permute transpose.int t unsqueeze squeeze squeeze.dim squeeze.dims expand flatten.using_ints
    unflatten.int slice.Tensor select.int roll flip index.Tensor index_select repeat pixel_shuffle pixel_unshuffle
    unfold channel_shuffle movedim.int narrow diagonal repeat_interleave.self_int tile
    """
)
IDENTITIES = _names(
    """
    clone contiguous alias detach dropout _to_copy to.dtype lift_fresh_copy feature_dropout alpha_dropout
    feature_alpha_dropout type_as
    """
)


@rule(*IDENTITIES)
def identity(labels: Labels, node: fx.Node) -> Tensor | None:
    passed = pass_per_level(labels, node)
    return passed if passed is not None else labels.of(dynamic_inputs(node)[0])


@rule(*MOVES)
def move(labels: Labels, node: fx.Node) -> Tensor | None:
    """Run the operator on the label tensor itself (for batch size 1)."""
    passed = pass_per_level(labels, node)
    if passed is not None:
        return passed
    source = node.args[0]
    label = labels.of(source) if isinstance(source, fx.Node) else None
    if 0 in shape_of(node):
        return free(node)
    if label is None or label.numel() == 1:
        return free(node) + (label.flatten()[0] if label is not None else FREE)
    name = op_name(node)
    if name in (
        "reshape",
        "view",
        "squeeze",
        "squeeze.dim",
        "squeeze.dims",
        "flatten.using_ints",
        "unflatten.int",
    ):
        return compress(label.expand(shape_of(source)).reshape(shape_of(node)))
    if name in ("permute", "transpose.int", "t", "unsqueeze"):
        return node.target(label, *node.args[1:])
    arguments = _with_index_values(node)
    if arguments is None:
        return None
    args, kwargs = arguments
    return compress(node.target(label.expand(shape_of(source)), *args, **kwargs))


def _with_index_values(node: fx.Node) -> tuple[list[Any], dict[str, Any]] | None:
    """Remaining arguments with constant index tensors as values; None if an index is computed from data."""
    indices = [n for n in tensor_inputs(node) if n is not node.args[0]]
    if any("value" not in n.meta for n in indices):
        return None
    resolve = lambda a: fx.node.map_arg(batch_hint(a), lambda n: n.meta["value"])  # noqa: E731
    return [resolve(a) for a in node.args[1:]], {k: resolve(v) for k, v in node.kwargs.items()}


@rule("pad", "constant_pad_nd")
def pad(labels: Labels, node: fx.Node) -> Tensor | None:
    """Padding is available to everybody, so it is `FREE` where it lies along the labelled axis."""
    passed = pass_per_level(labels, node)
    if passed is not None:
        return passed
    source, amounts = node.args[0], node.args[1]
    label, rank = labels.of(source), len(shape_of(node))
    padded = [rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0]
    if all(label.shape[a] == 1 for a in padded):
        return label
    if op_name(node) == "pad" and call_arg(node, "mode", "constant") != "constant":
        return None
    full = label.expand([shape_of(source)[d] if d in padded else label.shape[d] for d in range(rank)])
    return torch.nn.functional.pad(full, amounts)


@rule("cat", "stack")
def concatenate(labels: Labels, node: fx.Node) -> Tensor | None:
    pieces: list[fx.Node] = list(node.args[0])
    rank = len(shape_of(node))
    dim = call_arg(node, "dim", 0) % rank
    if any(p in labels.per_level for p in pieces):
        if all(p in labels.per_level or labels.is_free(p) for p in pieces):
            labels.per_level.add(node)
            return free(node)
        return None
    stacked = op_name(node) == "stack"
    parts = [labels.of(p).unsqueeze(dim) if stacked else labels.of(p) for p in pieces]
    sizes = [1 if stacked else shape_of(p)[dim] for p in pieces]
    elsewhere = any(part.shape[d] > 1 for part in parts for d in range(rank) if d != dim)
    if elsewhere and not any(part.shape[dim] > 1 for part in parts) and not stacked:
        joined = labels.join(parts, rank)  # pieces along the token axis: all carry the channels' labels
        return _pin_beside_batch(labels, node, joined, pieces)
    widths = [max(part.shape[d] for part in parts) for d in range(rank)]
    spread = [p.expand([s if d == dim else widths[d] for d in range(rank)]) for p, s in zip(parts, sizes, strict=True)]
    return compress(torch.cat(spread, dim))


# ------------------------------------------------------------------------------------------------- elementwise

ELEMENTWISE = _names(
    """
    add.Tensor sub.Tensor mul.Tensor div.Tensor add.Scalar sub.Scalar mul.Scalar div.Scalar rsub.Scalar relu relu6
    gelu silu sigmoid hardswish hardsigmoid hardtanh clamp clamp_min clamp_max leaky_relu elu selu celu tanh exp log
    sqrt rsqrt pow.Tensor_Scalar pow.Scalar pow.Tensor_Tensor neg mish softplus maximum minimum abs reciprocal
    addcmul addcdiv where.self sin cos square erf bitwise_not eq.Scalar ne.Scalar masked_fill.Scalar log_sigmoid
    prelu zeros_like ones_like full_like lerp.Scalar lerp.Tensor sign floor fmod.Scalar log1p expm1 threshold
    hardshrink softsign tanhshrink logical_not gt.Scalar lt.Scalar ge.Scalar le.Scalar bernoulli.p rand_like
    randn_like silu_backward div.Tensor_mode clamp.Tensor clamp_min.Tensor clamp_max.Tensor empty_like bernoulli
    rrelu real imag complex polar _conj resolve_conj
    """
)


def is_elementwise(node: fx.Node) -> bool:
    """Whether an operator joins the labels that meet: those listed, and all others that torch calls pointwise."""
    return op_name(node) in ELEMENTWISE or (op_name(node) not in RULES and is_pointwise(node))


def rule_of(node: fx.Node) -> Rule | None:
    """The label rule of a node's operator, if there is one."""
    return elementwise if is_elementwise(node) else RULES.get(op_name(node))


@rule(*ELEMENTWISE)
def elementwise(labels: Labels, node: fx.Node) -> Tensor | None:
    """Join the labels that meet. A value per level joins nothing: every unit reads the one of its own level."""
    inputs = dynamic_inputs(node)
    if op_name(node) == "prelu" and len(shape_of(node)) < 2:
        return None
    if not inputs:  # random numbers in the shape of a parameter
        return free(node)
    joined = labels.join([labels.of(n) for n in inputs], len(shape_of(node)))
    if any(n in labels.per_level for n in inputs) and not bool((joined != FREE).any()):
        labels.per_level.add(node)
    return _pin_beside_batch(labels, node, joined, inputs)


def _pin_beside_batch(labels: Labels, node: fx.Node, joined: Tensor, operands: list[fx.Node]) -> Tensor:
    """Where units and the batch share an axis, a tensor without units cannot be cut for fewer of them."""
    axis = labelled_axis(compress(joined))
    if axis is not None and axis == node.meta.get("batch_axis"):
        for operand in operands:
            own = axis - len(shape_of(node)) + len(shape_of(operand))
            if own >= 0 and shape_of(operand)[own] > 1 and labels.of(operand).shape[own] == 1:
                labels.pin(joined, node, "a tensor without units on the axis of batch and units")
    return labels.sets.find(joined)


@rule("new_empty", "new_zeros", "new_ones", "new_full")
def made_from_size(labels: Labels, node: fx.Node) -> Tensor | None:
    return free(node)


# ------------------------------------------------------------------------------------------------- norms and reductions


@rule("batch_norm")
def batch_norm(labels: Labels, node: fx.Node) -> Tensor | None:
    passed = pass_per_level(labels, node)
    return passed if passed is not None else labels.of(node.args[0])


@rule("instance_norm")
def instance_norm(labels: Labels, node: fx.Node) -> Tensor | None:
    passed = pass_per_level(labels, node)
    return passed if passed is not None else labels.merge(labels.of(node.args[0]), range(2, len(shape_of(node))))


@rule("layer_norm", "rms_norm")
def layer_norm(labels: Labels, node: fx.Node) -> Tensor | None:
    rank = len(shape_of(node))
    return _norm(labels, node, list(range(rank - len(node.args[1]), rank)))


@rule("group_norm")
def group_norm(labels: Labels, node: fx.Node) -> Tensor | None:
    """One group: prefix statistics. Several groups: a whole group is a unit."""
    groups, rank = int(node.args[1]), len(shape_of(node))
    if groups == 1 or node.args[0] in labels.per_level:
        return _norm(labels, node, list(range(1, rank)))
    label = labels.merge(labels.of(node.args[0]), range(2, rank))
    return join_groups(labels, label, groups, shape_of(node)[1], shape_of(node)[1])


def _norm(labels: Labels, node: fx.Node, axes: list[int]) -> Tensor | None:
    passed = pass_per_level(labels, node)
    if passed is not None:
        return passed
    label = labels.of(node.args[0])
    varying = [d for d in range(label.dim()) if label.shape[d] > 1]
    if not any(d in axes for d in varying):
        if labels.role.get(node) == Role.PREFIX_NORM:
            del labels.role[node]
        return label
    if len(varying) == 1 and labels.units_after_merge(label, axes) <= 1:
        labels.role[node] = Role.PREFIX_NORM
        return label
    return labels.merge(label, axes)


REDUCTIONS = _names(
    """
    mean.dim amax amin linalg_vector_norm var.correction std.correction sum.dim_IntList softmax.int _softmax
    log_softmax.int _safe_softmax cumsum mean sum prod.dim_int all.dim any.dim logsumexp argmax
    """
)
PREFIX_REDUCTIONS = ("mean.dim", "sum.dim_IntList", "amax", "amin", "linalg_vector_norm", "var.correction")
KEEP_SHAPE = ("softmax.int", "_softmax", "log_softmax.int", "_safe_softmax", "cumsum")


@rule(*REDUCTIONS)
def reduction(labels: Labels, node: fx.Node) -> Tensor | None:
    """Along units' own axis a mean, sum, maximum or norm becomes a prefix statistic; all else joins the units."""
    passed = pass_per_level(labels, node)
    if passed is not None:
        return passed
    source: fx.Node = node.args[0]
    rank, name = len(shape_of(source)), op_name(node)
    dims = reduced_axes(node)
    label = labels.of(source)
    labels.role.pop(node, None)
    if any(label.shape[d] > 1 for d in dims):
        varying = [d for d in range(rank) if label.shape[d] > 1]
        if _has_prefix_form(node, varying) and len(varying) == 1 and labels.units_after_merge(label, dims) <= 1:
            labels.role[node] = Role.PREFIX_REDUCE
            labels.per_level.add(node)
            return free(node)
        if (
            "softmax" in name
            and len(varying) == 1
            and labels.units_in(label) > 1 >= labels.units_after_merge(label, dims)
        ):
            labels.softmaxes.add(node)
        label = labels.merge(label, dims)
    if name not in KEEP_SHAPE and len(shape_of(node)) != rank:
        for d in sorted(dims, reverse=True):
            label = label.squeeze(d)
    return label


def _has_prefix_form(node: fx.Node, varying: list[int]) -> bool:
    """Means, sums, extremes, variances and L2 norms have one (other norms are written out in those, `decompositions`).

    An unbiased variance needs more than one number: those of one channel must be enough.
    """
    name, shape = op_name(node), shape_of(node.args[0])
    if name == "linalg_vector_norm":
        return call_arg(node, "ord", 2) == 2
    if name == "var.correction":
        numbers = math.prod(shape[d] for d in reduced_axes(node) if d not in varying)
        correction = call_arg(node, "correction")
        return numbers > (1 if correction is None else correction)
    return name in PREFIX_REDUCTIONS


def reduced_axes(node: fx.Node) -> list[int]:
    """Non-negative axes that a reduction runs over."""
    rank = len(node.args[0].meta["shape"])
    dims = call_arg(node, "dim", None)
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


SPATIAL = {
    name: rank
    for rank, names in {
        1: "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d.vec upsample_linear1d.vec "
        "reflection_pad1d replication_pad1d",
        2: "avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d.vec upsample_nearest2d "
        "upsample_bilinear2d.vec upsample_bilinear2d upsample_bicubic2d.vec upsample_bicubic2d _upsample_bilinear2d_aa "
        "_upsample_bicubic2d_aa reflection_pad2d replication_pad2d",
        3: "avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d.vec "
        "upsample_trilinear3d.vec reflection_pad3d replication_pad3d",
    }.items()
    for name in names.split()
}


@rule(*SPATIAL)
def spatial(labels: Labels, node: fx.Node) -> Tensor | None:
    """Pooling and resizing mix the last axes."""
    passed = pass_per_level(labels, node)
    if passed is not None:
        return passed
    rank = len(shape_of(node))
    return labels.merge(labels.of(node.args[0]), range(rank - SPATIAL[op_name(node)], rank))


@rule("im2col")
def im2col(labels: Labels, node: fx.Node) -> Tensor | None:
    """(B, C, H, W) -> (B, C * kh * kw, positions): every channel spreads over its window."""
    source: fx.Node = node.args[0]
    label = labels.merge(labels.of(source), [2, 3])
    if label.shape[1] == 1:
        return label.reshape(1, 1, 1)
    channels, rows = shape_of(source)[1], shape_of(node)[1]
    return label.reshape(1, channels, 1).repeat_interleave(rows // channels, dim=1)


@rule("col2im")
def col2im(labels: Labels, node: fx.Node) -> Tensor | None:
    """(B, C * kh * kw, positions) -> (B, C, H, W): what overlaps is added, so a window's rows join."""
    source: fx.Node = node.args[0]
    label = labels.merge(labels.of(source), [2])
    channels, rows = shape_of(node)[1], shape_of(source)[1]
    windows = label.expand(1, rows, 1).reshape(1, channels, rows // channels, 1)
    return labels.merge(windows, [2])


# ------------------------------------------------------------------------------------------------- Fourier transforms

# Name -> axes that the operator runs over by default, counted from behind; None: all.
TRANSFORMS: dict[str, list[int] | None] = {
    **{f"fft_{name}": [-1] for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")},
    **{f"fft_{name}": [-2, -1] for name in ("fft2", "ifft2", "rfft2", "irfft2", "hfft2", "ihfft2")},
    **{
        f"fft_{name}": None for name in ("fftn", "ifftn", "rfftn", "irfftn", "hfftn", "ihfftn", "fftshift", "ifftshift")
    },
}


@rule(*TRANSFORMS)
def transform(labels: Labels, node: fx.Node) -> Tensor | None:
    """A transform over space keeps channels apart; one over the channels makes them one unit."""
    passed = pass_per_level(labels, node)
    return passed if passed is not None else labels.merge(labels.of(node.args[0]), _transformed_axes(node))


def _transformed_axes(node: fx.Node) -> list[int]:
    rank, name = len(shape_of(node)), op_name(node)
    axes = call_arg(node, "dim", TRANSFORMS[name])
    if axes is None:
        sizes = call_arg(node, "s")
        axes = range(rank) if sizes is None else range(rank - len(sizes), rank)
    return [a % rank for a in ([axes] if isinstance(axes, int) else axes)]


@rule("view_as_real", "view_as_complex")
def complex_view(labels: Labels, node: fx.Node) -> Tensor | None:
    """Complex numbers as pairs along a last axis, and back."""
    passed = pass_per_level(labels, node)
    if passed is not None:
        return passed
    label = labels.of(node.args[0])
    return label.unsqueeze(-1) if op_name(node) == "view_as_real" else labels.merge(label, [-1]).squeeze(-1)
