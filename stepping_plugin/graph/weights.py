"""The weights of convolutions and linears: parameters as they are, or static values made from them."""

from __future__ import annotations

import zlib

from torch import fx

from .program import is_static, op_name

__all__ = ["is_direct", "weight_key", "weight_sources"]

REARRANGING = {
    "permute", "transpose.int", "t", "slice.Tensor", "select.int", "narrow", "index.Tensor", "index_select", "roll",
    "flip", "movedim.int", "cat", "stack", "repeat", "tile", "diagonal", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "unfold", "repeat_interleave.self_int",
}  # fmt: skip


def weight_key(weight: fx.Node) -> str:
    """Name shared by all call sites of a weight: of the parameter behind it, if no element of that is moved.

    Slices, transposes and joined parameters get names that say what they are, like `slice.Tensor(in_proj_weight, 0, 0,
    8)`: the units of their rows are not those of the parameter's rows.
    """
    if weight.op == "placeholder":
        return weight.meta["tensor"]
    return _movement(weight) or weight.name


def _movement(node: fx.Node) -> str:
    """Which matrices a static value is made from, and how their elements are moved; arithmetic is left out.

    So are vectors, which scale: where a spectral norm updates its own in train mode, the weight keeps its name.
    """
    if "value" in node.meta or len(node.meta.get("shape", ())) < 2:
        return ""
    if node.op == "placeholder":
        return node.meta["tensor"]
    if op_name(node) in REARRANGING:
        arguments = [fx.node.map_arg(a, lambda n: _digest(n) if "value" in n.meta else _movement(n)) for a in node.args]
        return f"{op_name(node)}({', '.join(map(str, arguments))})"
    return "+".join(dict.fromkeys(filter(None, map(_movement, node.all_input_nodes))))


def _digest(index: fx.Node) -> str:
    return f"#{zlib.crc32(str(index.meta['value'].tolist()).encode()):08x}"


def _static_steps(node: fx.Node) -> set[fx.Node]:
    """A static node and everything that it is computed from."""
    found, pending = {node}, [node]
    while pending:
        new = set(pending.pop().all_input_nodes) - found
        found |= new
        pending.extend(new)
    return found


def weight_sources(weight: fx.Node) -> set[str]:
    """Names of the matrices (parameters and buffers) that a static tensor is computed from."""
    inputs = (n for n in _static_steps(weight) if n.op == "placeholder")
    return {n.meta["tensor"] for n in inputs if len(n.meta["shape"]) > 1}


def is_direct(weight: fx.Node) -> bool:
    """Whether a weight is a parameter as it is, that nothing else is computed from: a mask can be folded into it."""
    return weight.op == "placeholder" and not any(is_static(user) for user in weight.users)
