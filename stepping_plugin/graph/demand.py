"""Which parts of the tensors of a labelled program some output depends on.

A unit of level s is of use only if something of level s or above reads it. `needed_levels` says, for one level vector,
which level's share of every tensor the step programs of the engine have to compute, so that MACs can be charged for
exactly those. `dead_ends` finds units that no level vector can make useful above level 1, because everything that reads
them is pinned there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, fx

from .labels import Role
from .operands import PICKS, picked_positions, touches_units
from .program import Program, call_arg, is_static, op_name, tensor_inputs

__all__ = ["dead_ends", "needed_levels"]


def needed_levels(program: Program, levels: Tensor, n: int) -> dict[fx.Node, set[int]]:
    """Per tensor of the program the levels whose share of it some output of subnets 1..n depends on.

    Args:
        program: annotated (`units.analyse`).
        levels: LongTensor (num_units,), 1..n, or n + 1 for spare units.
        n: number of subnets.
    """
    return _Demand(levels, n).of(program)


class _Demand:
    def __init__(self, levels: Tensor, n: int) -> None:
        self.levels, self.n = torch.cat([levels, levels.new_ones(1)]), n
        self.needed: dict[fx.Node, set[int]] = {}

    def of(self, program: Program) -> dict[fx.Node, set[int]]:
        for output in program.outputs:
            self._need(output, range(1, self.n + 1))
        for node in reversed(list(program.operators())):
            if self.needed.get(node):
                self._spread(node)
        return self.needed

    def _present(self, node: fx.Node) -> set[int]:
        """Levels that have a share of a tensor."""
        if node.meta.get("per_level"):
            return set(range(1, self.n + 1))
        if node.meta.get("units") is None:
            return {1}
        return {s for s in self._levels_of(node).unique().tolist() if s <= self.n}

    def _levels_of(self, node: fx.Node) -> Tensor:
        return self.levels[node.meta["units"]]

    def _need(self, node: fx.Node, levels: Iterable[int]) -> None:
        self.needed.setdefault(node, set()).update(self._present(node).intersection(levels))

    def _spread(self, node: fx.Node) -> None:
        """Pass a node's needs on to what it reads."""
        role, source = node.meta.get("role"), node.args[0] if node.args else None
        upto = range(1, max(self.needed[node]) + 1)
        accumulates = role == Role.PREFIX_REDUCE or (role == Role.HEAD and not source.meta.get("per_level"))  # type: ignore[union-attr]
        if accumulates or role == Role.PREFIX_NORM:  # what lower levels left is part of the result
            self._need(node, upto)
        if accumulates or role in (Role.CHANNELS, Role.TAPS):
            self._need(source, upto if _has_units(source) else {1})  # type: ignore[arg-type]
            return
        for operand in (o for o in tensor_inputs(node) if not is_static(o)):
            if not _has_units(operand):
                self._need(operand, self.needed[node] if operand.meta.get("per_level") else {1})
                continue
            for level in sorted(self.needed[node]):
                want = self._positions(node, operand, level)
                elsewhere = want is not None and bool((self._levels_of(operand)[want] != level).any())
                self._need(operand, range(1, level + 1) if elsewhere else {level})

    def _positions(self, node: fx.Node, operand: fx.Node, level: int) -> Tensor | None:
        """Positions along the operand's unit axis that a node reads for its share of a level, where they may differ."""
        own = (self._levels_of(node) == level).nonzero().flatten() if _has_units(node) else None
        if op_name(node) in PICKS and operand is node.args[0] and touches_units(node):
            order = picked_positions(node)
            return order if own is None or op_name(node) == "select.int" else order[own]
        if own is None:
            return None
        dim = call_arg(node, "dim", 0) % len(node.meta["shape"]) if op_name(node) == "cat" else -1
        if dim == node.meta["axis"]:
            return _in_piece(node, operand, own, dim)
        same = len(operand.meta["units"]) == len(node.meta["units"])
        return own if same and op_name(node) not in PICKS else None


def _in_piece(node: fx.Node, operand: fx.Node, own: Tensor, dim: int) -> Tensor:
    """Positions inside one piece of a concatenation."""
    found, offset = [own[:0]], 0
    for piece in node.args[0]:  # type: ignore[union-attr]
        size = piece.meta["shape"][dim]  # type: ignore[union-attr]
        if piece is operand:
            found.append(own[(own >= offset) & (own < offset + size)] - offset)
        offset += size
    return torch.cat(found)


def _has_units(node: fx.Node) -> bool:
    return node.meta.get("units") is not None and not node.meta.get("per_level")


# ------------------------------------------------------------------------------------------------- dead ends


def dead_ends(programs: Iterable[Program], num_units: int) -> Tensor:
    """Units that are of use at level 1 only: all that reads them, directly or behind other such units, is pinned there.

    Returns:
        BoolTensor (num_units,).
    """
    useful = torch.zeros(num_units, dtype=torch.bool)
    for program in programs:
        for units in _useful(program, num_units):
            useful |= units
    return ~useful


def _useful(program: Program, num_units: int) -> Iterator[Tensor]:
    """Per node the units of it that something above level 1 reads."""
    nothing = torch.zeros(num_units, dtype=torch.bool)
    wanted: dict[fx.Node, Tensor] = {output: ~nothing for output in program.outputs}
    for node in reversed(list(program.operators())):
        own = wanted.get(node)
        role = node.meta.get("role")
        movable = node.meta.get("per_level") or _has_units(node)
        if own is None or not movable:  # a pinned tensor reads level 1
            continue
        if _has_units(node):
            own = own & _members(node, num_units)
            yield own
            if not bool(own.any()):
                continue
        mixes = role in (Role.CHANNELS, Role.TAPS, Role.PREFIX_NORM, Role.PREFIX_REDUCE, Role.HEAD)
        for operand in (o for o in tensor_inputs(node) if not is_static(o)):
            everything = operand.meta.get("per_level") or (mixes and operand is node.args[0])
            read = ~nothing if everything else own
            wanted[operand] = wanted.get(operand, nothing) | read


def _members(node: fx.Node, num_units: int) -> Tensor:
    units = node.meta["units"]
    found = torch.zeros(num_units, dtype=torch.bool)
    found[units[units >= 0]] = True
    return found
