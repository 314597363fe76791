"""Simplifications of a captured program that let units be told apart where its own form would mix them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from .program import Program, add_constant, batch_hint, op_name

__all__ = ["fuse_shuffles"]

aten = torch.ops.aten
_MOVES = {"reshape", "view", "permute", "transpose.int", "clone", "contiguous", "alias"}


def fuse_shuffles(program: Program) -> None:
    """Replace view-transpose-view by one `index_select` where all it does is to reorder an axis (channel shuffle).

    Between the views, channels lie across two axes, of which labels keep only one.
    """
    for node in list(program.graph.nodes):
        if node.op != "call_function" or op_name(node) not in ("reshape", "view"):
            continue
        chain, source = _chain(node)
        if len(chain) < 3 or source.meta.get("shape") != node.meta["shape"]:
            continue
        found = _reordered_axis(chain, source)
        if found is None:
            continue
        axis, order = found
        with program.graph.inserting_before(node):
            fused = program.graph.call_function(
                aten.index_select.default, (source, axis, add_constant(program, "order", order))
            )
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
    program.graph.eliminate_dead_code()


def _chain(node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """Data movements that end in `node` and are used for nothing else, first to last, and what they move."""
    chain, source = [node], node.args[0]
    while source.op == "call_function" and op_name(source) in _MOVES and len(source.users) == 1:
        chain.insert(0, source)
        source = source.args[0]
    return chain, source


def _reordered_axis(chain: list[fx.Node], source: fx.Node) -> tuple[int, Tensor] | None:
    """The axis that a chain of movements permutes, and the old position behind every new one."""
    shape = source.meta["shape"]
    before = torch.arange(math.prod(shape)).reshape(shape)
    after = before
    for node in chain:
        after = node.target(after, *batch_hint(list(node.args[1:])), **dict(node.kwargs))
    for axis in range(1, len(shape)):
        line = after.movedim(axis, 0).flatten(1)[:, 0]
        order = line // math.prod(shape[axis + 1 :]) % shape[axis]
        if not torch.equal(order, torch.arange(shape[axis])) and torch.equal(before.index_select(axis, order), after):
            return axis, order
    return None
