"""Rewrite a labelled `Program` into its nested form.

The rewritten graph has the same operators, except that
- a weight between units is multiplied by its live mask (nesting rule: k -> j is live iff level[k] <= level[j]),
- statistics over channels become prefix statistics,
- heads (the classifier) are evaluated once per subnet on the channels of levels <= i; what follows them, too;
- units that leave the model do so once per subnet, with 0 in place of those above it.
It depends on the units and on the number of subnets, not on the level vector: masks and level vectors are inputs, so
that construction can move units without rebuilding anything.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.labels import Role
from ..graph.program import Program, call_arg, op_name
from ..graph.rules import reduced_axes
from ..graph.structure import Structure
from ..graph.weights import is_direct, weight_key
from ..units.analysis import channel_axis
from . import functional
from .norm import prefix_norm

__all__ = ["NestedGraph", "build_nested"]


@dataclass
class NestedGraph:
    """A nested forward function and what it takes.

    Attributes:
        module: called with the image batch and then one tensor per entry of `inputs`; returns the outputs of all
            subnets (n, ...), followed by new values of the buffers in `mutations`.
        inputs: ("tensor", parameter or buffer name), ("constant", name), ("mask", weight name) or
            ("levels", key of `level_vectors`).
        level_vectors: units per channel whose levels the function reads.
        constants: values of the "constant" inputs.
        mutations: buffers that the extra results update.
        structure: how the outputs are put together.
    """

    module: fx.GraphModule
    inputs: list[tuple[str, str]]
    level_vectors: dict[str, Tensor]
    constants: dict[str, Tensor]
    mutations: list[str]
    structure: Structure


@dataclass
class _Builder:
    program: Program
    n: int
    standalone: bool = False
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)
    per_level: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    masked: dict[fx.Node, fx.Node] = field(default_factory=dict)
    inputs: dict[tuple[str, str], fx.Node] = field(default_factory=dict)
    level_vectors: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    def run(self) -> NestedGraph:
        for node in self.program.graph.nodes:
            if node is self.program.image:
                self.values[node] = self.graph.placeholder("x")
            elif node.op == "placeholder":
                name = node.meta["tensor"]
                kind = "constant" if name in self.program.constants else "tensor"
                self.values[node] = self._input(kind, name)
                self.values[node].meta["source"] = node
            elif node.op == "call_function":
                self._operator(node)
        leaving = [self._leaving(node) for node in self.program.outputs]
        self.graph.output((*leaving, *[self.values[m] for m in self.program.mutated]))
        self.graph.eliminate_dead_code()
        for key, node in list(self.inputs.items()):
            if not node.users:
                self.graph.erase_node(node)
                del self.inputs[key]
        self.graph.lint()
        module = fx.GraphModule({}, self.graph)
        constants = {**self.program.constants, **self.constants}
        return NestedGraph(
            module, list(self.inputs), self.level_vectors, constants, self.program.mutations, self.program.structure
        )

    def _leaving(self, node: fx.Node) -> fx.Node:
        """An output for all subnets, or for the one of a standalone network."""
        if self.standalone:
            return self._levels_of(node)[-1]
        units = node.meta.get("units")
        if node in self.per_level or units is None:
            return self.call(torch.stack, self._levels_of(node))
        return self.call(functional.leave, self.values[node], self.levels(units), self.n, node.meta["axis"])

    # -- small helpers

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _input(self, kind: str, name: str) -> fx.Node:
        key = (kind, name)
        if key not in self.inputs:
            last = [n for n in self.graph.nodes if n.op == "placeholder"]
            with self.graph.inserting_after(last[-1]):
                self.inputs[key] = self.graph.placeholder(f"{kind}_{len(self.inputs)}")
        return self.inputs[key]

    def levels(self, units: Tensor) -> fx.Node:
        """Input that holds the levels of these units."""
        key = next((k for k, v in self.level_vectors.items() if torch.equal(v, units)), str(len(self.level_vectors)))
        self.level_vectors[key] = units
        return self._input("levels", key)

    def _levels_of(self, node: fx.Node) -> list[fx.Node]:
        """A value as a list per level."""
        return self.per_level.get(node) or [self.values[node]] * self.n

    def _arguments(self, node: fx.Node, replace: Mapping[fx.Node, Any]) -> tuple[tuple, dict]:
        return fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: replace.get(n) or self.values[n])

    # -- operators

    def _operator(self, node: fx.Node) -> None:
        self._dispatch(node)
        if node in self.values:  # lets `verify` name the first layer that reads a larger subnet
            described = {key: node.meta.get(key) for key in ("axis", "units", "module")}
            self.values[node].meta.update(described, source=node)

    def _dispatch(self, node: fx.Node) -> None:
        role = node.meta.get("role")
        if role == Role.HEAD:
            self._head(node)
        elif role == Role.PREFIX_REDUCE:
            self._prefix_reduce(node)
        elif node.meta.get("per_level"):
            self._once_per_level(node)
        elif role == Role.CHANNELS and not (self.standalone and is_direct(node.args[1])):
            self._masked(node)
        elif role == Role.PREFIX_NORM and self.n > 1 and self._source_units(node) is not None:
            self._prefix_norm(node)
        elif role == Role.TAPS and node.meta["units"] is not None:
            self._taps(node)
        else:
            self._plain(node)

    def _taps(self, node: fx.Node) -> None:
        weight, bias = self.values[node.args[1]], self.values.get(call_arg(node, "bias"))
        units = node.meta["units"]
        positions = node.meta.get("positions", torch.arange(len(units)))
        width = node.args[1].meta["shape"][-1]
        name = f"neighbours.{node.name}"
        self.constants[name] = functional.tap_neighbours(positions, width)
        self.values[node] = self.call(
            functional.prefix_taps,
            self.values[node.args[0]],
            weight,
            bias,
            self.levels(units),
            self._input("constant", name),
        )

    def _source_units(self, node: fx.Node) -> Tensor | None:
        return node.args[0].meta.get("units")

    def _plain(self, node: fx.Node) -> None:
        """The original operator; values per level are read by every channel at its own level."""
        replace = {}
        for source in node.all_input_nodes:
            if source in self.per_level:
                replace[source] = self._pick(node, source)
        args, kwargs = self._arguments(node, replace)
        self.values[node] = self.graph.call_function(node.target, args, kwargs)

    def _pick(self, node: fx.Node, source: fx.Node) -> fx.Node:
        if node.meta["units"] is None:  # all channels are at level 1
            return self.per_level[source][0]
        axis = node.meta["axis"] - len(node.meta["shape"]) + len(source.meta["shape"])
        if axis < 0:
            raise AssertionError(f"{node}: a value per level cannot be broadcast over the units of {op_name(node)}")
        return self.call(functional.pick_levels, self.per_level[source], self.levels(node.meta["units"]), axis)

    def _once_per_level(self, node: fx.Node) -> None:
        if op_name(node) == "batch_norm" and node.args[5] and node.args[3] is not None:
            self._shared_batch_norm(node)
            return
        results = []
        for s in range(self.n):
            replace = {n: self.per_level[n][s] for n in node.all_input_nodes if n in self.per_level}
            args, kwargs = self._arguments(node, replace)
            results.append(self.graph.call_function(node.target, args, kwargs))
        self.per_level[node] = results

    def _shared_batch_norm(self, node: fx.Node) -> None:
        """Training batch norm of values per level: every level by its own statistics, the running ones updated once."""
        source: fx.Node = node.args[0]
        args, _ = self._arguments(node, {source: self._levels_of(source)})
        self.per_level[node] = self._unpack(self.call(functional.shared_batch_norm, *args))

    def _same_for_all(self, node: fx.Node) -> None:
        args, kwargs = self._arguments(node, {})
        self.per_level[node] = [self.graph.call_function(node.target, args, kwargs)] * self.n

    def _masked(self, node: fx.Node) -> None:
        weight: fx.Node = node.args[1]
        if weight not in self.masked:
            mask = self._input("mask", weight_key(weight))
            self.masked[weight] = self.call(torch.ops.aten.mul.Tensor, self.values[weight], mask)
        args, kwargs = self._arguments(node, {weight: self.masked[weight]})
        self.values[node] = self.graph.call_function(node.target, args, kwargs)

    def _head(self, node: fx.Node) -> None:
        source: fx.Node = node.args[0]
        units = source.meta.get("units")
        if source in self.per_level:
            self._once_per_level(node)
            return
        last_only = self.standalone and not _read_by_units(node)
        if units is None or last_only:  # the same scores for all subnets that are asked for
            self._same_for_all(node)
            return
        axis = channel_axis(source, node)
        stacked = self.call(functional.accumulate_head, self.values[source], self.levels(units), self.n, axis)
        args, kwargs = self._arguments(node, {source: stacked})
        result = self.graph.call_function(node.target, args, kwargs)
        self.per_level[node] = self._unpack(self.call(torch.chunk, result, self.n, 0))

    def _unpack(self, listed: fx.Node) -> list[fx.Node]:
        return [self.call(operator.getitem, listed, s) for s in range(self.n)]

    def _prefix_norm(self, node: fx.Node) -> None:
        name, rank = op_name(node), len(node.meta["shape"])
        axes = list(range(1, rank)) if name == "group_norm" else list(range(rank - len(node.args[1]), rank))
        weight, bias = call_arg(node, "weight"), (call_arg(node, "bias") if name != "rms_norm" else None)
        affine = [self._channel_shaped(p, name, rank) for p in (weight, bias)]
        default_eps = torch.finfo(node.meta["dtype"]).eps if name == "rms_norm" else 1e-5
        eps = call_arg(node, "eps")
        source: fx.Node = node.args[0]
        self.values[node] = self.call(
            prefix_norm, self.values[source], self.levels(source.meta["units"]), self.n, axes,
            source.meta["axis"], *affine, default_eps if eps is None else eps, name != "rms_norm",
        )  # fmt: skip

    def _channel_shaped(self, parameter: fx.Node | None, name: str, rank: int) -> fx.Node | None:
        if parameter is None:
            return None
        value = self.values[parameter]
        if name != "group_norm":
            return value
        return self.call(torch.ops.aten.reshape.default, value, [-1] + [1] * (rank - 2))

    def _prefix_reduce(self, node: fx.Node) -> None:
        source: fx.Node = node.args[0]
        if source.meta.get("units") is None:
            self._same_for_all(node)
            return
        kinds = {
            "mean.dim": "mean",
            "sum.dim_IntList": "sum",
            "amax": "amax",
            "amin": "amin",
            "linalg_vector_norm": "norm",
            "var.correction": "var",
        }
        keep = len(node.meta["shape"]) == len(source.meta["shape"])
        correction = call_arg(node, "correction", 1) if op_name(node) == "var.correction" else 0
        listed = self.call(
            functional.prefix_reduce, self.values[source], self.levels(source.meta["units"]), self.n,
            kinds[op_name(node)], reduced_axes(node), source.meta["axis"], keep,
            1 if correction is None else correction,
        )  # fmt: skip
        self.per_level[node] = self._unpack(listed)


def _read_by_units(node: fx.Node) -> bool:
    """Whether a value per level is read by channels, each at its own level, and not only on the way to the scores."""
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user.op == "call_function" and not user.meta.get("per_level"):
                return True
            pending.append(user)
    return False


def build_nested(program: Program, n: int, standalone: bool = False) -> NestedGraph:
    """Nested form of an analysed program for n subnets.

    Args:
        program: analysed, sliced to the units of the n subnets if `standalone`.
        n: number of subnets.
        standalone: return the outputs of subnet n only, and expect weights whose dead synapses are 0 instead of
            multiplying masks.
    """
    return _Builder(program, n, standalone).run()
