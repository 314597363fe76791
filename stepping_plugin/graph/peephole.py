"""Simplifications of a captured program that let units be told apart where its own form would mix them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from .program import Program, add_constant, batch_hint, call_arg, is_static, op_name

__all__ = ["fuse_shuffles", "spell_out_softmaxes", "split_readers_of_scores"]

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


def split_readers_of_scores(program: Program, heads: set[fx.Node]) -> None:
    """Write layers that read scores beside features as a sum of one layer for the scores and one for the features.

    Scores exist once per subnet, features have units: a concatenation of both has no labels, the layers behind it do.

    Args:
        heads: the classifiers of the program.
    """
    behind = set(heads)
    for node in list(program.operators()):
        if any(source in behind for source in node.all_input_nodes):
            behind.add(node)
        if op_name(node) == "linear" and is_static(node.args[1]):
            pieces = _pieces(node.args[0])
            if len({piece in behind for piece in pieces}) == 2:
                _split_linear(program, node, pieces, behind)
    program.graph.eliminate_dead_code()


def _pieces(node: fx.Node) -> list[fx.Node]:
    """What a tensor is concatenated from along its last axis."""
    if op_name(node) != "cat" or call_arg(node, "dim", 0) % len(node.meta["shape"]) != len(node.meta["shape"]) - 1:
        return [node]
    return [piece for part in node.args[0] for piece in _pieces(part)]  # type: ignore[union-attr]


def _split_linear(program: Program, node: fx.Node, pieces: list[fx.Node], behind: set[fx.Node]) -> None:
    total, start, bias = None, 0, call_arg(node, "bias")
    with program.graph.inserting_before(node):
        for piece in pieces:
            size = piece.meta["shape"][-1]
            columns = program.graph.call_function(aten.slice.Tensor, (node.args[1], 1, start, start + size))
            weight: fx.Node = node.args[1]  # type: ignore[assignment]
            columns.meta = {**weight.meta, "shape": (weight.meta["shape"][0], size)}
            columns.meta.pop("tensor", None)
            part = program.graph.call_function(node.target, (piece, columns, None if start else bias))  # type: ignore[arg-type]
            part.meta = dict(node.meta)
            if total is not None:
                part = program.graph.call_function(aten.add.Tensor, (total, part))
                part.meta = {**node.meta, "head": False}
            total, start = part, start + size
    assert total is not None
    if node in behind:
        behind.add(total)
    node.replace_all_uses_with(total)
    program.graph.erase_node(node)


def spell_out_softmaxes(program: Program, chosen: set[fx.Node]) -> Program:
    """A copy of a program with some softmaxes as maxima, sums and quotients, which have forms for prefixes of units.

    Args:
        program: captured, not annotated yet; not changed.
        chosen: softmaxes and logarithms of softmaxes of it, or of another mode of the same model.
    """
    mapped: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, mapped))
    for old, new in mapped.items():
        new.meta = dict(old.meta)
    copied = replace(program, graph=graph, image=mapped[program.image])
    calls = {_call(n) for n in chosen}
    for node in [mapped[n] for n in program.operators() if _call(n) in calls]:
        _spell_out(graph, node)
    return copied


def _call(node: fx.Node) -> tuple[str, ...]:
    """What the captures of both modes have in common: operator, module and line of code."""
    return op_name(node), node.meta.get("module", ""), node.meta.get("code") or ""


def _spell_out(graph: fx.Graph, node: fx.Node) -> None:
    x, dim = node.args[:2]

    def emit(target: Any, *args: Any) -> fx.Node:
        created = graph.call_function(target, args)
        created.meta = dict(node.meta)
        if target in (aten.amax.default, aten.sum.dim_IntList, aten.log.default):
            shape = list(node.meta["shape"])
            shape[dim] = 1  # type: ignore[index]
            created.meta["shape"] = tuple(shape)
        return created

    with graph.inserting_before(node):
        shifted = emit(aten.sub.Tensor, x, emit(aten.amax.default, x, [dim], True))
        weights = emit(aten.exp.default, shifted)
        total = emit(aten.sum.dim_IntList, weights, [dim], True)
        logarithm = op_name(node).startswith("log")
        last = (
            (aten.sub.Tensor, shifted, emit(aten.log.default, total))
            if logarithm
            else (aten.div.Tensor, weights, total)
        )
        node.replace_all_uses_with(emit(*last))
    graph.erase_node(node)
