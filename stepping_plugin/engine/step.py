"""The graph of one step under construction: caches, constants, prefixes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.operands import Operands
from .plan import Plan

__all__ = ["IMAGE", "StepGraph", "output_names"]

aten = torch.ops.aten
IMAGE, SCORES = "image", "scores"


def output_names(count: int) -> list[str]:
    """Caches that hold the outputs of a step: "scores" if there is one, else "output.0", "output.1", ..."""
    return [SCORES] if count == 1 else [f"output.{k}" for k in range(count)]


class StepGraph(Operands):
    """Where the operators of one level find their operands.

    Args:
        plan: what all steps share.
        level: s.
        wanted: caches that later steps read -> the last level that does.
    """

    def __init__(self, plan: Plan, level: int, wanted: dict[str, int]) -> None:
        self.plan, self.level, self.wanted = plan, level, wanted
        self.graph, self.root = fx.Graph(), nn.Module()
        self.values: dict[fx.Node, fx.Node] = {}
        self.prefixes: dict[fx.Node, fx.Node] = {}
        self.caches: dict[str, fx.Node] = {}  # placeholders
        self.made: dict[str, fx.Node] = {}  # new contents of caches
        self.sources: dict[str, fx.Node] = {}
        self.batches: dict[int, fx.Node] = {}
        self.tensors: dict[tuple, fx.Node] = {}
        self.output_names = output_names(plan.program.structure.count)

    def _is_available(self, node: fx.Node) -> bool:
        return node in self.values or (node is self.plan.program.image and self.level == 1)

    # -- graph

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def unpack(self, several: fx.Node, count: int) -> list[fx.Node]:
        return [self.call(operator.getitem, several, k) for k in range(count)]

    def cache(self, name: str, source: fx.Node) -> fx.Node:
        """What lower levels left under a name."""
        if name not in self.caches:
            last = next(reversed(self.caches.values()), None)
            with self.graph.inserting_after(last) if last else self.graph.inserting_before(None):
                number = len(self.caches)  # names alone could clash: "cat.2" and "cat_2"
                self.caches[name] = self.graph.placeholder(f"cache{number}_{name}".replace(".", "_"))
            self.sources[name] = source
        return self.caches[name]

    def keep(self, name: str, value: fx.Node, source: fx.Node) -> None:
        """Offer a new content of a cache; it is returned if a later step reads it."""
        self.made[name], self.sources[name] = value, source

    def tensor(self, value: Tensor, key: tuple) -> fx.Node:
        """A constant of the program."""
        if key not in self.tensors:
            name = f"t{len(self.tensors)}"
            self.root.register_buffer(name, value.detach().clone(memory_format=torch.contiguous_format))
            self.tensors[key] = self.graph.get_attr(name)
        return self.tensors[key]

    # -- what Operands asks for

    def value(self, node: fx.Node) -> fx.Node:
        if node in self.values:
            return self.values[node]
        if node is self.plan.program.image and self.level == 1:
            self.values[node] = self.cache(IMAGE, node)
            return self.values[node]
        assert node.meta.get("units") is None and self.level > 1, f"{node} has nothing at level {self.level}"
        return self.prefix(node)

    def positions(self, node: fx.Node) -> Tensor:
        return self.plan.positions(node, self.level)

    def reach(self, node: fx.Node) -> tuple[fx.Node, Tensor]:
        return self.prefix(node), self.reach_positions(node)

    def reach_positions(self, node: fx.Node) -> Tensor:
        return self.plan.prefix_positions(node, self.level)

    def gather(self, node: fx.Node, axis: int, want: Tensor) -> fx.Node:
        if node.meta.get("units") is None:
            return self._select(self.value(node), axis, torch.arange(node.meta["shape"][axis]), want)
        have = self.positions(node)
        if bool(torch.isin(want, have).all()):
            return self._select(self.value(node), axis, have, want)
        return self._select(self.prefix(node), axis, self.plan.prefix_positions(node, self.level), want)

    def _select(self, value: fx.Node, axis: int, have: Tensor, want: Tensor) -> fx.Node:
        place = torch.full((int(have.max()) + 1,), -1)
        place[have] = torch.arange(len(have))
        index = place[want]
        if torch.equal(index, torch.arange(len(have))):
            return value
        first = int(index[0])
        if torch.equal(index, torch.arange(first, first + len(index))):
            return self.call(aten.slice.Tensor, value, axis, first, first + len(index))
        return self.call(aten.index_select.default, value, axis, self._index(index))

    def _index(self, index: Tensor) -> fx.Node:
        device = self.plan.device
        return self.tensor(index.to(device), ("index", tuple(index.tolist())))

    def static(self, node: fx.Node | None, *wanted: tuple[int, Tensor] | None) -> fx.Node | None:
        if node is None:
            return None
        picks = [pair for pair in wanted if pair is not None]
        key = (node, *((axis, tuple(index.tolist())) for axis, index in picks))
        if key in self.tensors:
            return self.tensors[key]
        value = self.plan.static(node)
        for axis, index in picks:
            if not torch.equal(index, torch.arange(value.shape[axis])):
                value = value.index_select(axis, index.to(value.device))
        return self.tensor(value, key)

    def batch(self, factor: int) -> fx.Node:
        if factor not in self.batches:
            if 1 not in self.batches:
                anchor = self.cache(IMAGE, self.plan.program.image) if self.level == 1 else self._previous_output()
                with self.graph.inserting_after(anchor):
                    self.batches[1] = self.graph.call_function(aten.sym_size.int, (anchor, 0))
            if factor != 1:
                with self.graph.inserting_after(self.batches[1]):
                    self.batches[factor] = self.graph.call_function(operator.mul, (self.batches[1], factor))
        return self.batches[factor]

    def _previous_output(self) -> fx.Node:
        """What the last step left that has one sample per image on its first axis."""
        for name, node in zip(self.output_names, self.plan.program.outputs):
            if node.meta.get("batch_axis") == 0 and node.meta["shape"][0] == 1:
                return self.cache(name, node)
        return self.cache(IMAGE, self.plan.program.image)

    # -- prefixes

    def part_name(self, node: fx.Node, level: int) -> str:
        """Name of the cache with what a node computes at that level."""
        return f"{node.name}.{level}" if self._grows(node) else node.name

    def prefix(self, node: fx.Node) -> fx.Node:
        """The tensor of a node up to this level, ordered by level along its unit axis."""
        if node not in self.prefixes:
            self.prefixes[node] = self._prefix(node)
        return self.prefixes[node]

    def _prefix(self, node: fx.Node) -> fx.Node:
        if not self._grows(node):
            return self.value(node) if self._is_available(node) else self.cache(node.name, node)
        parts = [
            self.value(node) if level == self.level else self.cache(self.part_name(node, level), node)
            for level in range(1, self.level + 1)
            if self.plan.is_new(node, level)
        ]
        behind = node.meta["axis"] - len(node.meta["shape"])  # counted from behind, `fuse` knows it without the rank
        return parts[0] if len(parts) == 1 else self.call(aten.cat.default, parts, behind)

    def _grows(self, node: fx.Node) -> bool:
        """Whether every level adds positions to a tensor."""
        return node.meta.get("units") is not None and not node.meta.get("per_level")
