"""Policies: which unit gets which level, in one shot from scores and budgets.

A policy differs from the others only in the levels that it proposes; budgets, landing and training are
shared, so that comparisons compare policies. To add one, write a function `Problem -> LandingResult` and
register it in `POLICIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import SteppingError, nearest
from ..units.analysis import Analysis
from ..units.levels import check_budgets, check_scores, locked_units
from ..units.macs import MacModel
from .counts import Array, UnitClasses
from .distinct import land_apart
from .importance import discount_copies
from .landing import LandingResult, in_blocks, land, result_of, settle
from .planner import Planner
from .rounding import multiples
from .uniform import BAND, INCREMENTS, Band, needed_widening, positions, uniform_band, uniform_levels

__all__ = ["POLICIES", "Problem", "assign"]


@dataclass
class Problem:
    """What a policy decides about: see `assign`."""

    analysis: Analysis
    macs_model: MacModel
    budgets: list[int]
    scores: Tensor
    generator: torch.Generator
    relative_band: tuple[float, float] = BAND
    increments: tuple[float, float] | None = INCREMENTS
    copies: Tensor | None = None  # made by widening of every original unit, lying side by side
    multiples: Array | None = None  # units of each width that make a block


def assign(
    analysis: Analysis,
    macs_model: MacModel,
    budgets: Sequence[int],
    scores: Tensor | None = None,
    policy: str = "steppingnet",
    generator: torch.Generator | None = None,
    relative_band: tuple[float, float] = BAND,
    increments: tuple[float, float] | None = INCREMENTS,
    reference_macs: int | None = None,
    lineage: Sequence[Tensor] = (),
    round_to: int = 1,
) -> LandingResult:
    """Levels for all units, so that every subnet meets its budget.

    Args:
        analysis: units of the model.
        macs_model: its MACs.
        budgets: MACs of subnets 1..N, from `units.levels.parse_budgets`.
        scores: (num_units,) importance, higher is better; needed by "steppingnet" only.
        policy: "steppingnet", "any-width" or "random".
        generator: for "random"; seed 0 by default.
        relative_band: for "steppingnet": least and most units of a width, relative to the uniform pattern.
        increments: the same for the units that a level adds; None: free.
        reference_macs: M_t, for percentages in messages; the whole network's MACs by default.
        lineage: `net.lineage`; tells which units of a widened network are copies.
        round_to: channels that every level is to add in multiples of, see `rounding.multiples`.

    Returns:
        Levels (units beyond the last budget are spare, N + 1), exact MACs, and a note for every subnet below
        99 % of its budget. Subnets all differ: see `distinct.land_apart`.

    Raises:
        BudgetError: budgets that cannot be met, or under which no subnets exist that all differ.
        SteppingError: unknown policy, or scores that cannot be ranked.
    """
    if policy not in POLICIES:
        raise SteppingError(f"policy: got {policy!r}; {nearest(policy, POLICIES)}")
    if scores is None:
        if policy == "steppingnet":
            raise SteppingError("policy 'steppingnet' ranks units by importance: give scores, one per unit.")
        scores = torch.zeros(analysis.num_units)
    scores = check_scores(scores, analysis.num_units)
    budgets = [int(b) for b in budgets]
    check_budgets(analysis, macs_model, budgets, reference_macs or macs_model.total)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    copies = lineage[-1] if lineage else None
    state, reference = generator.get_state(), reference_macs or macs_model.total

    def attempt(blocks: Array) -> LandingResult:
        bounds = relative_band, increments
        problem = Problem(analysis, macs_model, budgets, scores, generator, *bounds, copies, blocks)

        def solve(targets: list[int]) -> LandingResult:
            return POLICIES[policy](replace(problem, budgets=targets, generator=generator.set_state(state)))

        return land_apart(solve, analysis, macs_model, budgets, reference)

    return in_blocks(multiples(analysis, macs_model, budgets, round_to), budgets, attempt)


# ------------------------------------------------------------------------------------------------- policies


def steppingnet(problem: Problem) -> LandingResult:
    """One shot of the construction flow: everything starts at level 1, and the least valuable units move on.

    For every subnet in ascending order: units leave by value (share of their group's importance per MAC
    saved) until the budget holds; second copies of a widened unit count for less. Each width stays within 0.8 to
    1.25 times the uniform one, and what a level adds to it within 0.5 to 1.5 times.
    """
    analysis, macs_model, budgets = problem.analysis, problem.macs_model, problem.budgets
    scores = problem.scores if problem.copies is None else discount_copies(problem.scores, problem.copies)
    locked = locked_units(analysis, scores)
    band = uniform_band(analysis, macs_model, budgets, problem.relative_band, problem.increments)
    start = torch.ones(analysis.num_units, dtype=torch.long)
    planner = Planner(analysis, macs_model, start, len(budgets), scores, locked, band, problem.multiples)
    notes: list[str] = []
    for subnet, budget in enumerate(budgets, start=1):
        if planner.macs(subnet) > budget:
            planner.narrow(subnet)
        notes += settle(planner, subnet, budget)
        _add_widening(notes, problem, subnet)
    return result_of(planner, analysis, macs_model, notes)


def any_width(problem: Problem) -> LandingResult:
    """The regular pattern: the first units of every width in subnet 1, the next ones in subnet 2, and so on.

    One width ratio per subnet, the largest one that the budget allows; single units then make up for
    rounding. Of a widened network every unit comes once before any second copy: copies at one level have equal
    gradients and would stay one unit for ever.
    """
    analysis, macs_model, budgets = problem.analysis, problem.macs_model, problem.budgets
    levels, shares = uniform_levels(analysis, macs_model, budgets, problem.multiples)
    classes = UnitClasses(analysis, macs_model, small=len(budgets))
    position, _ = positions(classes)
    prefix = torch.from_numpy(1 - position / classes.width_size[classes.width[classes.of_unit]])
    width = classes.width_size[:, None] * shares
    band = Band(
        np.floor(width).astype(np.int64),
        np.ceil(width).astype(np.int64),
        np.zeros(width.shape, dtype=np.int64),
        np.ceil(width).astype(np.int64),
    )
    locked = locked_units(analysis, prefix)
    result = land(analysis, macs_model, levels, budgets, prefix, locked, band, problem.multiples)
    _add_widening(result.notes, problem, len(budgets))
    return result if problem.copies is None else _copies_last(problem, problem.copies, result)


def _copies_last(problem: Problem, copies: Tensor, result: LandingResult) -> LandingResult:
    """The same levels for units of the same cost, first copies first."""
    number = torch.cat([torch.arange(int(c)) for c in copies]).numpy()
    kind = UnitClasses(problem.analysis, problem.macs_model).of_unit
    levels = result.levels.clone()
    there, here = np.lexsort((number, kind)), np.lexsort((result.levels.numpy(), kind))
    levels[torch.from_numpy(there)] = result.levels[torch.from_numpy(here)]
    return LandingResult(levels, result.macs, result.notes)


def random(problem: Problem) -> LandingResult:
    """As many units of every kind per subnet as any-width, but arbitrary ones."""
    result = any_width(problem)
    classes = UnitClasses(problem.analysis, problem.macs_model)
    shuffled = torch.randperm(problem.analysis.num_units, generator=problem.generator).numpy()
    by_class = np.argsort(classes.of_unit, kind="stable")
    target = shuffled[np.argsort(classes.of_unit[shuffled], kind="stable")]
    levels = result.levels.clone()
    levels[torch.from_numpy(target)] = result.levels[torch.from_numpy(by_class)]
    return LandingResult(levels, result.macs, result.notes)


POLICIES: dict[str, Callable[[Problem], LandingResult]] = {
    "steppingnet": steppingnet,
    "any-width": any_width,
    "random": random,
}


def _add_widening(notes: list[str], problem: Problem, subnet: int) -> None:
    """Say how much wider a network would have to be whose last subnet ran out of units."""
    if subnet != len(problem.budgets) or not notes or "all units are in it" not in notes[-1]:
        return
    factor = needed_widening(problem.analysis, problem.macs_model, problem.budgets)
    factor *= 1.03  # widths are whole numbers
    notes[-1] = notes[-1].removesuffix(".") + f" (by about {np.ceil(factor * 20) / 20:.2f} times)."
