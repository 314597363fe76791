"""Folding: constant factors and shifts of channels become part of the weights beside them.

Batch norm and layer scale go into the convolution or linear layer before them, the weight and bias of a prefix norm
into those behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.labels import Role
from ..graph.program import Program, call_arg, is_static, op_name

__all__ = ["fold_batch_norms", "fold_norm_weights"]


def fold_batch_norms(program: Program) -> Program:
    """A copy of an eval program in which what follows convolutions and linears channel by channel (batch norm,
    layer scale) is part of their weights, and operators that pass their input on are left out."""
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(program.graph, mapped)
    graph.output(output)
    for old, new in mapped.items():
        new.meta = dict(old.meta)
    folded = replace(program, graph=graph, image=mapped[program.image], constants=dict(program.constants))
    for node in list(graph.nodes):
        if node.op != "call_function" or is_static(node):
            continue
        if _passes_on(node) and node not in folded.outputs:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)
        elif op_name(node) == "batch_norm":
            _fold(graph, node)
        elif op_name(node) == "mul.Tensor":
            _fold_scale(graph, node)
    graph.eliminate_dead_code()
    return folded


_IDENTITIES = {"alias", "detach", "clone", "contiguous", "lift_fresh_copy"}
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}


def _passes_on(node: fx.Node) -> bool:
    """Whether an operator returns its input. Dropout does, unless the model draws random numbers in eval mode, too."""
    return op_name(node) in _IDENTITIES or (op_name(node) in _DROPOUTS and not call_arg(node, "train"))


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


# ------------------------------------------------------------------------------------------------- prefix norms


def fold_norm_weights(program: Program, levels_of: Callable[[fx.Node], Tensor]) -> None:
    """Let prefix norms only normalise, in place, where nothing but products without padding reads them.

    A product takes the weight g and bias h of the norm into its own: W'[j, k] = W[j, k] g[k]; b'[j] = b[j] + the sum
    of W[j, k] h[k] over the inputs k that output j reads, those of no higher level.

    Args:
        program: a copy that may be changed.
        levels_of: level of every position along the unit axis of a node.
    """
    for norm in program.operators():
        if norm.meta.get("role") != Role.PREFIX_NORM or op_name(norm) not in ("layer_norm", "group_norm", "rms_norm"):
            continue
        weight, bias = call_arg(norm, "weight"), None if op_name(norm) == "rms_norm" else call_arg(norm, "bias")
        products = _reading_products(norm)
        if weight is None or not products or not all(_takes(p, norm, weight, bias) for p in products):
            continue
        for product in products:
            _take(program.graph, product, weight, bias, levels_of)
        norm.args, norm.kwargs = norm.args[:2], {"eps": call_arg(norm, "eps")}


def _reading_products(node: fx.Node) -> list[fx.Node] | None:
    """The products that read a tensor, perhaps with its axes in another order; None if others read it, too."""
    found: list[fx.Node] = []
    for user in node.users:
        if op_name(user) in ("permute", "transpose.int"):
            behind = _reading_products(user)
            if behind is None:
                return None
            found += behind
        elif op_name(user) in ("linear", "conv1d", "conv2d", "conv3d") and user.args[0] is node:
            found.append(user)
        else:
            return None
    return found


def _takes(product: fx.Node, norm: fx.Node, weight: fx.Node, bias: fx.Node | None) -> bool:
    """Whether a product may take the weight and bias of a norm."""
    units, matrix = norm.meta.get("units"), product.args[1]
    if product.meta.get("role") != Role.CHANNELS or units is None or product.meta.get("units") is None:
        return False
    if not all(is_static(p) for p in (matrix, weight, bias, call_arg(product, "bias")) if p is not None):
        return False
    if op_name(product) != "linear" and (
        call_arg(product, "groups") != 1 or call_arg(product, "padding") not in (0, [0], [0, 0], [0, 0, 0])
    ):
        return False
    read = product.args[0].meta["units"]  # type: ignore[union-attr]
    width = (len(units),)
    return matrix.meta["shape"][1:2] == weight.meta["shape"] == width and torch.equal(units, read)  # type: ignore[union-attr]


def _take(
    graph: fx.Graph, product: fx.Node, weight: fx.Node, bias: fx.Node | None, levels_of: Callable[[fx.Node], Tensor]
) -> None:
    source, matrix, own = product.args[0], product.args[1], call_arg(product, "bias")
    levels = tuple(tuple(levels_of(n).tolist()) for n in (product, source))  # type: ignore[arg-type]
    with graph.inserting_before(product):
        scaled_matrix = graph.call_function(scaled_inputs, (matrix, weight))
        scaled_matrix.meta = _static_like(matrix)  # type: ignore[arg-type]
        if bias is not None:
            own = graph.call_function(shifted_bias, (own, matrix, bias, *levels))
            own.meta = {"shape": matrix.meta["shape"][:1], "dtype": matrix.meta["dtype"], "static": True}  # type: ignore[union-attr]
    kwargs = {k: v for k, v in product.kwargs.items() if k != "bias"}
    product.args, product.kwargs = (source, scaled_matrix, own, *product.args[3:]), kwargs


def scaled_inputs(matrix: Tensor, scale: Tensor) -> Tensor:
    """A weight (J, K, ...) times one number per input channel."""
    return matrix * scale.view([1, -1] + [1] * (matrix.dim() - 2))


def shifted_bias(
    bias: Tensor | None, matrix: Tensor, shift: Tensor, outputs: tuple[int, ...], inputs: tuple[int, ...]
) -> Tensor:
    """What a constant input adds to a bias, through the live synapses only, computed in float64.

    Args:
        matrix: weight (J, K, ...).
        shift: (K,), added to every input.
        outputs, inputs: levels of outputs (J) and inputs (K).
    """
    live = torch.tensor(inputs)[None, :] <= torch.tensor(outputs)[:, None]
    reach = matrix.double().flatten(2).sum(2) if matrix.dim() > 2 else matrix.double()
    added = (reach * live.to(matrix.device)) @ shift.double()
    return (added if bias is None else added + bias.double()).to(matrix.dtype)
