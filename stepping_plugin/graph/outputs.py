"""What leaves a model: scores that accumulate over the levels, or units.

An output comes from its *last weights*: the convolutions and linears that lie on the ways to it with no other behind
them. Where these only serve outputs, they are heads (`Role.HEAD`): all of their result is in every subnet, and the
levels add to it, whatever is done with it afterwards (resizing, activations, softmax, products, concatenation over
anchors). Where they also carry the rest of the network, as those of a backbone's feature maps do, or a norm over the
units stands behind them, the units themselves leave the model: subnet i has the channels of levels <= i.
"""

from __future__ import annotations

from torch import fx

from .program import Program, call_arg, is_static, op_name, tensor_inputs

__all__ = ["mark_heads"]

NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
WEIGHTED = {
    "linear", "addmm", "mm", "conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding",
    "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input",
}  # fmt: skip


def mark_heads(program: Program) -> set[fx.Node]:
    """Find the heads, the last weights of all outputs that are scores, and set `meta["head"]` on them.

    An output is none if, with the last weights of all scores taken away, last weights of an output are cut off from
    the images by its own: the network goes on from there. A head that reads other heads' scores beside features (coarse
    classes for the fine ones, heat maps for the next stage) is not cut off.
    """
    last = {node: _last_weights(node) for node in program.outputs}
    scores = {node for node, (_, normalised) in last.items() if not normalised}
    ends = set().union(*(weights for weights, _ in last.values()))
    while True:
        heads: set[fx.Node] = set().union(*(last[node][0] for node in scores))
        cut = set().union(*(_cut_off(end, heads, program.image) for end in ends))
        carrying = {node for node in scores if last[node][0] & cut}
        if not carrying:
            break
        scores -= carrying
    for node in heads:
        node.meta["head"] = True
    return heads


def _last_weights(output: fx.Node) -> tuple[set[fx.Node], bool]:
    """The last weights of an output, and whether there is a norm behind them."""
    found: set[fx.Node] = set()
    pending, seen, normalised = [output], {output}, False
    while pending:
        node = pending.pop()
        if is_static(node):
            continue
        if _is_weighted(node):
            found.add(node)
            continue
        normalised |= op_name(node) in NORMS
        new = [n for n in tensor_inputs(node) if n not in seen]
        seen.update(new)
        pending.extend(new)
    return found, normalised


def _is_weighted(node: fx.Node) -> bool:
    """Whether a node mixes channels by weights. Convolutions in groups do not mix them all (bilinear upsampling)."""
    name = op_name(node)
    return name in WEIGHTED and (not name.startswith("conv") or call_arg(node, "groups", 1) == 1)


def _cut_off(end: fx.Node, heads: set[fx.Node], image: fx.Node) -> set[fx.Node]:
    """The heads that stand between a node and the images on every way; empty if there is a way around them."""
    between: set[fx.Node] = set()
    pending, seen = [end], {end}
    while pending:
        for source in tensor_inputs(pending.pop()):
            if source is image:
                return set()
            if source in heads:
                between.add(source)
            elif source not in seen:
                seen.add(source)
                pending.append(source)
    return between
