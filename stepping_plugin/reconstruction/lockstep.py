"""Two networks side by side, operator by operator: the original and a nested net that descends from it.

Every batch of images goes through each graph once, however often it is stopped on the way: a `Run` keeps the values
that are still needed where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import SteppingError, explain
from ..graph.program import Program
from ..graph.slicing import repeated_positions, repeated_units, slice_programs
from ..units.analysis import Analysis

__all__ = ["Run", "Walk", "ancestors", "inherited_positions", "operands_first"]


@dataclass
class Run:
    """How far one batch has come: operators done, and values that are still needed."""

    values: dict[fx.Node, Any]
    done: int = 0

    def size(self) -> int:
        """Bytes of all values, each storage once."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(self.values.values())
        }
        return sum(storages.values())


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@dataclass
class Walk:
    """Executes the operators of a graph that depend on the image.

    Args:
        order: its nodes in the order of execution, everything before what reads it.
        image: placeholder of the images.
        read: gives the tensor of any other placeholder.
        kept: nodes whose values stay although no operator needs them any more.
    """

    order: Sequence[fx.Node]
    image: fx.Node
    read: Callable[[fx.Node], Tensor]
    kept: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        dynamic = {self.image}
        for node in self.order:
            if node.op == "call_function" and any(n in dynamic for n in node.all_input_nodes):
                dynamic.add(node)
        self.order = [n for n in self.order if n in dynamic and n is not self.image]
        self.place = {node: place for place, node in enumerate(self.order)}
        self.dynamic = dynamic
        self._last = {n: place for place, node in enumerate(self.order) for n in node.all_input_nodes if n in dynamic}
        self._static: dict[fx.Node, Any] = {}

    def start(self, images: Tensor) -> Run:
        return Run({self.image: images})

    def advance(self, run: Run, end: int) -> None:
        """Execute the operators before place `end` that this run has not executed."""
        while run.done < end:
            node = self.order[run.done]
            run.values[node] = self.call(run, node)
            run.done += 1
            self._forget(run, node.all_input_nodes)
            self._forget(run, [node])

    def call(self, run: Run, node: fx.Node) -> Any:
        """Result of an operator whose inputs are there."""
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self.value(run, n))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def value(self, run: Run, node: fx.Node) -> Any:
        return run.values[node] if node in self.dynamic else self.static(node)

    def static(self, node: fx.Node) -> Any:
        """Value of a node that needs no image."""
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [n for n in current.all_input_nodes if n not in self._static]
            if current in self._static or not missing:
                pending.pop()
            if current in self._static:
                continue
            if missing:
                pending.extend(missing)
            elif current.op == "placeholder":
                self._static[current] = self.read(current)
            else:
                args, kwargs = fx.node.map_arg((current.args, dict(current.kwargs)), self._static.__getitem__)
                self._static[current] = current.target(*args, **kwargs)  # type: ignore[operator]
        return self._static[node]

    def renew(self) -> None:
        """Parameters have changed."""
        self._static.clear()

    def release(self, runs: Iterable[Run], node: fx.Node) -> None:
        """A kept value is not needed any more."""
        self.kept.discard(node)
        for run in runs:
            self._forget(run, [node])

    def _forget(self, run: Run, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            if node not in self.kept and self._last.get(node, -1) < run.done:
                run.values.pop(node, None)


def operands_first(outputs: Sequence[fx.Node], last: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Everything that some nodes need, in an order of execution.

    Args:
        outputs: the nodes.
        last: operators -> the operand that is to be computed after their other operands.
    """
    order: dict[fx.Node, None] = {}
    pending = list(outputs)[::-1]
    while pending:
        node = pending[-1]
        inputs = [n for n in node.all_input_nodes if n not in order]
        if node in last:
            inputs.sort(key=lambda n: n is last[node])
        if node in order or not inputs:
            pending.pop()
            order.setdefault(node)
        else:
            pending.append(inputs[0])
    return list(order)


def ancestors(original: Analysis, lineage: Sequence[Tensor], program: Program) -> dict[fx.Node, fx.Node]:
    """Node of the original eval program behind every node of a program that descends from it.

    Args:
        original: analysis of the original model, made for this call: its nodes are marked.
        lineage: copies of every unit, one LongTensor per widening or compaction.
        program: what came out of them.

    Raises:
        SteppingError: it did not.
    """
    programs = original.programs
    for node in original.eval_program.graph.nodes:
        node.meta["origin"] = node
    for copies in lineage:
        if len(copies) != _units_in(programs):
            raise _foreign()
        programs, _ = slice_programs(programs, copies)
    mine, theirs = list(programs[False].graph.nodes), list(program.graph.nodes)
    alike = lambda a, b: a.op == b.op and (a.op != "call_function" or a.target == b.target)  # noqa: E731
    if len(mine) != len(theirs) or not all(map(alike, mine, theirs)):
        raise _foreign()
    if any(a.meta.get("shape") != b.meta.get("shape") for a, b in zip(mine, theirs)):
        raise _foreign()
    return {b: a.meta["origin"] for a, b in zip(mine, theirs) if "origin" in a.meta}


def _units_in(programs: dict[bool, Program]) -> int:
    found = [n.meta["units"].max() for p in programs.values() for n in p.operators() if n.meta["units"] is not None]
    return int(max(found)) + 1 if found else 0


def _foreign() -> SteppingError:
    return SteppingError(
        explain(
            "not the network that the net was made from",
            where="original",
            expected="the model that apply_steppingnet was given, or one of the same structure",
        )
    )


def inherited_positions(units: Tensor, lineage: Sequence[Tensor]) -> Tensor:
    """Position of the original's axis behind every position of a descendant's.

    Args:
        units: (C,) unit per position in the original, -1 for none.
        lineage: copies of every unit, one LongTensor per widening or compaction.
    """
    positions = torch.arange(len(units))
    for copies in lineage:
        positions, units = positions[repeated_positions(units, copies)], repeated_units(units, copies)
    return positions
