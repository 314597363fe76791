"""Budgets that lie so close together that a coarse net has no widths in between.

A subnet differs from the one before if the classifier reads a unit of its own, and that unit costs MACs. Where two
budgets are closer than that, the smaller subnet is made narrower than its budget allows, and says so; the larger one
gets the unit. Only budgets under which no set of different subnets exists are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..errors import BudgetError
from ..units.analysis import Analysis
from ..units.levels import locked_units, pins_sentence
from ..units.macs import MacModel
from .counts import Array, CountModel, UnitClasses, to_array
from .landing import LandingResult
from .plugs import find_plugs, head_units

__all__ = ["check_distinct", "land_apart"]

TRIES = 8  # landings per subnet, each with a smaller subnet narrower than before


class _Readable:
    """Units that the classifier reads and that may move, and what they cost."""

    def __init__(self, analysis: Analysis, macs_model: MacModel, n: int) -> None:
        self.n, self.analysis = n, analysis
        self.classes = UnitClasses(analysis, macs_model)
        self.model = CountModel(self.classes, macs_model)
        self.mask = to_array(head_units(analysis) & ~analysis.dead_ends)

    def cheapest(self, levels: Array, subnet: int) -> tuple[int, int] | None:
        """(unit of a level above `subnet`, MACs that it adds there)."""
        units = np.flatnonzero(self.mask & (levels > subnet))
        if not len(units):
            return None
        added = self.model.added(self.classes.counts(levels, self.n + 2), subnet)[self.classes.of_unit[units]]
        best = int(np.argmin(added))
        return int(units[best]), round(float(added[best]))

    def narrowest(self) -> list[int]:
        """MACs of the narrowest subnets 1..n that differ; fewer than n where too few units may move.

        Subnet 1 has what cannot be left out, every other one a unit more.
        """
        locked = to_array(locked_units(self.analysis, torch.zeros(self.analysis.num_units)))
        levels = np.where(locked, 1, self.n + 1)
        macs = [self._macs(levels, 1)]
        for subnet in range(2, self.n + 1):
            found = self.cheapest(levels, subnet)
            if found is None:
                break
            levels[found[0]] = subnet
            macs.append(self._macs(levels, subnet))
        return macs

    def _macs(self, levels: Array, subnet: int) -> int:
        return round(self.model.macs(self.classes.counts(levels, self.n + 2), subnet))


def check_distinct(analysis: Analysis, macs_model: MacModel, budgets: Sequence[int], reference_macs: int) -> None:
    """Refuse budgets under which no subnets exist that all differ, before anything is trained.

    Args:
        analysis: units of the model.
        macs_model: its MACs.
        budgets: MACs of subnets 1..N, ascending, the first above the floor.
        reference_macs: M_t, for the percentages in the message.

    Raises:
        BudgetError: names the subnets that would be the same, and the least budgets.
    """
    _narrowest(_Readable(analysis, macs_model, len(budgets)), budgets, reference_macs)


def _narrowest(readable: _Readable, budgets: Sequence[int], reference_macs: int) -> list[int]:
    """`_Readable.narrowest`, below the budgets; see `check_distinct`."""
    analysis, macs = readable.analysis, readable.narrowest()
    if len(macs) < len(budgets):
        raise BudgetError(
            f"{analysis.layers[-1].name}: the classifier reads {len(macs) - 1} units that may leave subnet 1, too few "
            f"for {len(budgets)} subnets that all differ. Use at most {len(macs)} budgets.{pins_sentence(analysis)}"
        )
    for subnet, (budget, least) in enumerate(zip(budgets, macs), start=1):
        if budget < least:
            raise _too_close(analysis, subnet, budget, macs, reference_macs)
    return macs


def _too_close(analysis: Analysis, subnet: int, budget: int, macs: Sequence[int], reference_macs: int) -> BudgetError:
    listed = ", ".join(f"{m:,} ({math.ceil(1000 * m / reference_macs) / 10:g}%)" for m in macs)
    return BudgetError(
        f"Subnets {subnet - 1} and {subnet} would give the same scores: budget {subnet} ({budget:,} MACs) leaves the "
        f"classifier no new unit to read. The narrowest subnets of this model that differ cost {listed} MACs. Raise "
        f"the budgets above these, or use fewer of them.{pins_sentence(analysis)}"
    )


def land_apart(
    solve: Callable[[list[int]], LandingResult],
    analysis: Analysis,
    macs_model: MacModel,
    budgets: Sequence[int],
    reference_macs: int,
) -> LandingResult:
    """Land on budgets, or below some of them where the subnets would not all differ otherwise.

    Args:
        solve: levels under the budgets that it is given; asked again with smaller ones.
        analysis: units of the model.
        macs_model: its MACs.
        budgets: MACs of subnets 1..N, ascending.
        reference_macs: M_t, for the percentages in messages.

    Returns:
        Levels whose subnets all differ, with a note for every subnet that is narrower than its budget allows.

    Raises:
        BudgetError: no such levels were found, or `solve` finds none.
    """
    n, targets = len(budgets), [int(b) for b in budgets]
    result = solve(list(targets))
    plugs = find_plugs(analysis, result.levels, n)
    if not plugs:
        return result
    readable = _Readable(analysis, macs_model, n)
    narrowest = _narrowest(readable, targets, reference_macs)
    for _ in range(TRIES * n):
        subnet = plugs[0].subnet
        if not _make_room(readable, result, targets, narrowest, subnet):
            break
        result = solve(list(targets))
        plugs = find_plugs(analysis, result.levels, n)
        if not plugs:
            return LandingResult(result.levels, result.macs, _notes(result, targets, budgets))
    raise _too_close(analysis, subnet, int(budgets[subnet - 1]), narrowest, reference_macs)


def _make_room(
    readable: _Readable, result: LandingResult, targets: list[int], narrowest: Sequence[int], subnet: int
) -> bool:
    """Lower the target of the subnet before, so that one unit more fits into this one; False if it is the least."""
    before, levels = subnet - 2, to_array(result.levels)
    found = readable.cheapest(levels, subnet)
    room = targets[before + 1] - (found[1] if found else 0)
    target = max(min(result.macs[before] - 1, room), narrowest[before])
    if target >= targets[before]:  # not even that helps: the narrowest subnets of all
        if targets[: subnet - 1] == list(narrowest[: subnet - 1]):
            return False
        targets[: subnet - 1] = narrowest[: subnet - 1]
        return True
    targets[: subnet - 1] = [min(t, target) for t in targets[: subnet - 1]]
    return True


def _notes(result: LandingResult, targets: Sequence[int], budgets: Sequence[int]) -> list[str]:
    lowered = [i for i, (target, budget) in enumerate(zip(targets, budgets), start=1) if target < budget]
    own = [note for note in result.notes if not note.startswith(tuple(f"subnet {i} costs " for i in lowered))]
    return own + [
        f"subnet {i} costs {result.macs[i - 1] / budgets[i - 1]:.1%} of its budget: if it were wider, budget {i + 1} "
        f"would leave subnet {i + 1} no unit of its own that the classifier reads"
        for i in lowered
    ]
