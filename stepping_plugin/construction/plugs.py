"""Subnets that cannot differ from the one before, and units that their own subnet has nothing from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.labels import Role
from ..units.analysis import Analysis

__all__ = ["Plug", "cut_off_groups", "find_plugs", "head_units"]


@dataclass
class Plug:
    """Subnet `subnet` gives the scores of the one before: the classifier reads none of its new units.

    `groups` are the groups that the classifier reads, where a unit of this level is missing.
    """

    subnet: int
    groups: list[str]


def head_units(analysis: Analysis) -> Tensor:
    """Units that leave the model, or whose values the scores that do read directly, BoolTensor (num_units,).

    The latter is what enters the part of the graph that is evaluated once per subnet: inputs of the classifier, and
    of statistics over channels that lead to it.
    """
    read = torch.zeros(analysis.num_units, dtype=torch.bool)
    program = analysis.eval_program
    pending, seen = program.outputs, set(program.outputs)
    while pending:
        node = pending.pop()
        units = node.meta.get("units")
        if node.meta.get("per_level"):
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            pending.extend(new)
        elif units is not None:
            read[units[units >= 0]] = True
    return read


def find_plugs(analysis: Analysis, levels: Tensor, n: int, alive: Tensor | None = None) -> list[Plug]:
    """Subnets 2..n that cannot differ from the one before: the classifier reads no unit of their level.

    A unit of level i is read by units of levels >= i only (nesting rule), so what is new in subnet i reaches
    the class scores through a classifier input of exactly level i; if there is one, the scores differ.

    Args:
        alive: BoolTensor (num_units,), units that are not constant (`liveness.Life.alive`); None: all.
    """
    head = head_units(analysis)
    if alive is not None:
        head &= alive
    read = [g.name for g in analysis.groups if bool(head[g.units].any())]
    return [Plug(i, read) for i in range(2, n + 1) if not bool((head & (levels == i)).any())]


def cut_off_groups(analysis: Analysis, levels: Tensor, n: int) -> dict[int, list[str]]:
    """Groups with units that their own subnet pays for without using them, per level.

    Where a layer got no unit of level i, units of level i before it are not read in subnet i. They are not
    lost (larger subnets may read them), but subnet i has nothing from them.
    """
    head = head_units(analysis)
    pairs = [(x.out_units, x.in_units) for x in analysis.layers if x.role == Role.CHANNELS][::-1]
    found: dict[int, list[str]] = {}
    for level in range(2, n + 1):
        own = levels == level
        used, before = head & own, -1
        while int(used.sum()) != before:
            before = int(used.sum())
            for outputs, inputs in pairs:
                if bool(used[outputs[outputs >= 0]].any()):
                    used[inputs[inputs >= 0]] = True
            used &= own
        names = [g.name for g in analysis.groups if bool((own & ~used)[g.units].any())]
        if names:
            found[level] = names
    return found
