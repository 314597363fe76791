"""Rewrite a labelled program for another number of copies of every unit.

`copies[unit] = 0` removes a unit physically (standalone subnets, dropping spare units), 1 keeps it, more duplicates it
(function-preserving widening, Net2Wider, Chen et al. 2016). Data movement needs no index arithmetic: the elements of
a tensor are enumerated in row-major order before and after a view, so a view of the sliced tensor is the sliced view.
Duplicates are inserted run by run (a run is a stretch of neighbouring positions of one unit, e.g. the channels of an
attention head), which keeps that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from .labels import Role
from .operands import Operands, find_positions
from .program import Program, add_constant, batch_expression

__all__ = ["ParameterSlice", "repeated_positions", "repeated_units", "slice_programs"]

aten = torch.ops.aten


def repeated_positions(units: Tensor, copies: Tensor) -> Tensor:
    """Positions of an axis after every unit got its number of copies, run by run.

    Args:
        units: LongTensor (C,), unit per position, -1 = always there once.
        copies: LongTensor (num_units,).

    Returns:
        LongTensor (C',): old position behind every new one.
    """
    return _repeated(units, copies)[0]


def repeated_units(units: Tensor, copies: Tensor) -> Tensor:
    """New unit per new position: the copy's number is how often the old position has been met before."""
    positions, copy = _repeated(units, copies)
    old = units[positions]
    first_copy = torch.cat([torch.zeros(1, dtype=torch.long), copies.cumsum(0)])[:-1]
    return torch.where(old >= 0, first_copy[old.clamp(min=0)] + copy, -1)


def _repeated(units: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """(old position, number of the copy) behind every new position: a run of one unit is repeated as a whole."""
    count = torch.where(units >= 0, copies[units.clamp(min=0)], 1)
    if bool((count <= 1).all()):
        kept = torch.nonzero(count).flatten()
        return kept, torch.zeros_like(kept)
    starts = torch.cat([torch.tensor([True]), units[1:] != units[:-1]]).nonzero().flatten()
    lengths = torch.diff(starts, append=torch.tensor([len(units)]))
    total = lengths * count[starts]
    run = torch.repeat_interleave(total)
    offset = torch.arange(len(run)) - (total.cumsum(0) - total)[run]
    return starts[run] + offset % lengths[run], offset // lengths[run]


@dataclass(frozen=True)
class ParameterSlice:
    """How a tensor of the sliced program comes from the original one: `index_select` along some axes, in order."""

    indices: tuple[tuple[int, tuple[int, ...]], ...]

    def apply(self, tensor: Tensor) -> Tensor:
        for axis, index in self.indices:
            tensor = tensor.index_select(axis, torch.tensor(index, device=tensor.device))
        return tensor


def slice_programs(
    programs: dict[bool, Program], copies: Tensor
) -> tuple[dict[bool, Program], dict[str, ParameterSlice]]:
    """Sliced programs, and for every tensor that shrinks or grows the slice that makes it.

    Args:
        programs: analysed programs (`units.analysis.analyse`), by training flag.
        copies: LongTensor (num_units,), copies of every unit. Units left are renumbered in their old order; all copies
            of a unit become units of their own, in the order of `repeat_interleave(copies)`.
    """
    slicers = {training: _Slicer(program, copies) for training, program in programs.items()}
    sliced = {training: slicer.run() for training, slicer in slicers.items()}
    return sliced, _fold_parameter_slices(sliced)


def take(tensor: Tensor, indices: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Placeholder operator for a parameter slice; folded into the parameter or lowered to `index_select`."""
    raise AssertionError("replaced before the program runs")


class _Slicer(Operands):
    def __init__(self, program: Program, copies: Tensor) -> None:
        self.program, self.copies = program, copies
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.batches: dict[int, fx.Node] = {}
        self.result = replace(program, graph=self.graph, constants=dict(program.constants),
                              mutations=list(program.mutations))  # fmt: skip
        self._positions: dict[fx.Node, Tensor] = {}

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                created = self.graph.placeholder(node.name)
                created.meta = dict(node.meta)
                self.values[node] = created
                if node is self.program.image:
                    self.result.image = created
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._operator(node)
        leaving = [self._completed(n) for n in self.program.outputs]
        self.graph.output((*leaving, *[self.values[n] for n in self.program.mutated]))
        self.graph.eliminate_dead_code()
        return self.result

    # -- positions

    def positions(self, node: fx.Node) -> Tensor:
        """Old positions along the unit axis of a node that the sliced tensor consists of."""
        if node not in self._positions:
            self._positions[node] = repeated_positions(node.meta["units"], self.copies)
        return self._positions[node]

    # -- operands

    def static(self, node: fx.Node | None, *wanted: tuple[int, Tensor] | None) -> fx.Node | None:
        """A static tensor at given positions: (axis, positions) pairs; None entries are skipped."""
        if node is None:
            return None
        keep = []
        for pair in wanted:
            if pair is None:
                continue
            axis, positions = pair
            if not torch.equal(positions, torch.arange(node.meta["shape"][axis])):
                keep.append((axis, tuple(positions.tolist())))
        if not keep:
            return self.values[node]
        created = self.graph.call_function(take, (self.values[node], tuple(keep)))
        shape = list(node.meta["shape"])
        for axis, index in keep:
            shape[axis] = len(index)
        created.meta = {**node.meta, "shape": tuple(shape)}
        return created

    def value(self, node: fx.Node) -> fx.Node:
        return self.values[node]

    def reach(self, node: fx.Node) -> tuple[fx.Node, Tensor]:
        return self.values[node], self.positions(node)

    def gather(self, node: fx.Node, axis: int, want: Tensor) -> fx.Node:
        if node.meta.get("units") is None:
            return self._select(self.values[node], axis, want)
        index = find_positions(self.positions(node), want)
        picked = self._select(self.values[node], axis, index)
        if axis == node.meta["axis"]:  # the result may be sliced again
            units = repeated_units(node.meta["units"], self.copies)[index]
            if bool((units >= 0).any()):
                picked.meta.update(axis=axis, units=units)
        return picked

    def batch(self, factor: int) -> fx.Node:
        return batch_expression(self.graph, self.result.image, self.batches, factor)

    def _select(self, value: fx.Node, axis: int, index: Tensor) -> fx.Node:
        constant = add_constant(self.result, "index", index)
        created = self.graph.call_function(aten.index_select.default, (value, axis, constant))
        shape = list(value.meta["shape"])
        shape[axis] = len(index)
        inherited = {"per_level": False, "module": "", **value.meta}
        created.meta = {key: inherited[key] for key in ("dtype", "module", "per_level")}
        created.meta.update(shape=tuple(shape), static=False, axis=None, units=None, role=None)
        return created

    def _completed(self, node: fx.Node) -> fx.Node:
        """An output of the size that it had: zeros where units are gone. Of the copies of a unit the first leaves."""
        value = self.values[node]
        if not self.changed(node):
            return value
        positions, axis, units = self.positions(node), node.meta["axis"], value.meta["units"]
        places = torch.full((node.meta["shape"][axis],), len(positions))
        places[positions.flip(0)] = torch.arange(len(positions)).flip(0)
        rank, longer = len(node.meta["shape"]), torch.cat([units, units.new_tensor([-1])])
        padded = self.graph.call_function(aten.constant_pad_nd.default, (value, [0, 0] * (rank - 1 - axis) + [0, 1]))
        shape = list(value.meta["shape"])
        shape[axis] += 1
        padded.meta = {**value.meta, "role": None, "shape": tuple(shape), "units": longer}
        constant = add_constant(self.result, "index", places)
        whole = self.graph.call_function(aten.index_select.default, (padded, axis, constant))
        whole.meta = {**padded.meta, "shape": node.meta["shape"], "units": longer[places]}
        gone = places == len(positions)
        whole.meta["gone"] = gone | node.meta.get("gone", gone)  # zero in every subnet
        return whole

    # -- operators

    def _operator(self, node: fx.Node) -> fx.Node:
        if "batch" in node.meta:
            return batch_expression(self.graph, self.result.image, self.batches, node.meta["batch"])
        args, kwargs = self.arguments(node)
        created = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        created.meta = dict(node.meta)
        if node.meta.get("units") is not None:
            shape = list(node.meta["shape"])
            shape[node.meta["axis"]] = len(self.positions(node))
            created.meta.update(shape=tuple(shape), units=repeated_units(node.meta["units"], self.copies))
            if node.meta.get("role") == Role.TAPS:
                created.meta["positions"] = node.meta.get("positions", torch.arange(len(node.meta["units"])))[
                    self.positions(node)
                ]
        return created


def _fold_parameter_slices(programs: dict[bool, Program]) -> dict[str, ParameterSlice]:
    """Apply a slice to the parameter itself where all its uses agree; lower the others to `index_select`."""
    uses: dict[str, set[Any]] = {}
    for program in programs.values():
        for node in program.tensor_nodes():
            found = uses.setdefault(node.meta["tensor"], set())
            found.update(user.args[1] if user.target is take else None for user in node.users)
    slices = {name: ParameterSlice(next(iter(f))) for name, f in uses.items() if len(f) == 1 and None not in f}
    for program in programs.values():
        for node in [n for n in program.graph.nodes if n.target is take]:
            source: fx.Node = node.args[0]  # type: ignore[assignment]
            if source.meta.get("tensor") in slices:
                source.meta["shape"] = node.meta["shape"]
                source.meta.pop("value", None)
                node.replace_all_uses_with(source)
            else:
                node.replace_all_uses_with(_lowered(program, node))
            program.graph.erase_node(node)
        program.graph.lint()
    for name, piece in slices.items():
        for program in programs.values():
            if name in program.constants:
                program.constants[name] = piece.apply(program.constants[name])
    own = {name for p in programs.values() for name in p.constants}
    return {name: piece for name, piece in slices.items() if name not in own}


def _lowered(program: Program, node: fx.Node) -> fx.Node:
    value: fx.Node = node.args[0]  # type: ignore[assignment]
    for axis, index in node.args[1]:  # type: ignore[union-attr]
        constant = add_constant(program, "index", torch.tensor(index))
        with program.graph.inserting_before(node):
            shape = list(value.meta["shape"])
            shape[axis] = len(index)
            value = program.graph.call_function(aten.index_select.default, (value, axis, constant))
            value.meta = {**node.meta, "shape": tuple(shape)}
    return value
