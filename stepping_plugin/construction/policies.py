"""Policies: which unit gets which level, in one shot from scores and budgets.

A policy differs from the others only in the levels that it proposes; budgets, landing and training are
shared, so that comparisons compare policies. To add one, write a function `Problem -> LandingResult` and
register it in `POLICIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import BudgetError, SteppingError, nearest
from ..levels import check_budgets, check_scores, locked_units
from ..macs import MacModel
from ..units import Analysis
from .counts import Array, CountModel, UnitClasses
from .landing import Band, LandingResult, Planner, find_plugs, land, result_of, settle

__all__ = ["POLICIES", "Problem", "assign", "needed_widening", "uniform_band", "uniform_levels"]

BAND = (0.8, 1.25)  # how far a width may be from the uniform one at the same budget
NEW = 0.5  # least new units of a width, relative to the uniform pattern: no width may be nearly a plug


@dataclass
class Problem:
    """What a policy decides about: see `assign`."""

    analysis: Analysis
    macs_model: MacModel
    budgets: list[int]
    scores: Tensor
    generator: torch.Generator
    relative_band: tuple[float, float] = BAND


def assign(
    analysis: Analysis,
    macs_model: MacModel,
    budgets: Sequence[int],
    scores: Tensor | None = None,
    policy: str = "steppingnet",
    generator: torch.Generator | None = None,
    relative_band: tuple[float, float] = BAND,
    reference_macs: int | None = None,
) -> LandingResult:
    """Levels for all units, so that every subnet meets its budget.

    Args:
        analysis: units of the model.
        macs_model: its MACs.
        budgets: MACs of subnets 1..N, from `levels.parse_budgets`.
        scores: (num_units,) importance, higher is better; needed by "steppingnet" only.
        policy: "steppingnet", "any-width" or "random".
        generator: for "random"; seed 0 by default.
        relative_band: for "steppingnet": least and most units of a width, relative to the uniform pattern.
        reference_macs: M_t, for percentages in messages; the whole network's MACs by default.

    Returns:
        Levels (units beyond the last budget are spare, N + 1), exact MACs, and a note for every subnet below
        99 % of its budget.

    Raises:
        BudgetError: budgets that cannot be met, or at which a subnet could not differ from the one before.
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
    result = POLICIES[policy](Problem(analysis, macs_model, budgets, scores, generator, relative_band))
    _refuse_plugs(analysis, budgets, result)
    return result


def _refuse_plugs(analysis: Analysis, budgets: list[int], result: LandingResult) -> None:
    plugs = find_plugs(analysis, result.levels, len(budgets))
    if not plugs:
        return
    plug = plugs[0]
    if not plug.groups:
        raise BudgetError(
            "Every channel that the classifier reads is pinned to level 1, so all subnets would give the "
            "same scores. Use one budget, or see the pins of this model (stepping inspect)."
        )
    raise BudgetError(
        f"Subnets {plug.subnet - 1} and {plug.subnet} would give the same scores: budget {plug.subnet} "
        f"({budgets[plug.subnet - 1]:,} MACs) leaves the classifier no new unit to read "
        f"({', '.join(plug.groups)}). Put these budgets further apart, or use fewer of them."
    )


# ------------------------------------------------------------------------------------------------- policies


def steppingnet(problem: Problem) -> LandingResult:
    """One shot of the construction flow: everything starts at level 1, and the least valuable units move on.

    For every subnet in ascending order: units leave by value (share of their group's importance per MAC
    saved) until the budget holds. Each width stays within 0.8 to 1.25 times the uniform one, and gets new
    units in every subnet.
    """
    analysis, macs_model, budgets = problem.analysis, problem.macs_model, problem.budgets
    locked = locked_units(analysis, problem.scores)
    band = uniform_band(analysis, macs_model, budgets, problem.relative_band)
    start = torch.ones(analysis.num_units, dtype=torch.long)
    planner = Planner(analysis, macs_model, start, len(budgets), problem.scores, locked, band)
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
    rounding.
    """
    analysis, macs_model, budgets = problem.analysis, problem.macs_model, problem.budgets
    levels, shares = uniform_levels(analysis, macs_model, budgets)
    classes = UnitClasses(analysis, macs_model, small=len(budgets))
    position, _ = _positions(classes)
    prefix = torch.from_numpy(1 - position / classes.width_size[classes.width[classes.of_unit]])
    width = classes.width_size[:, None] * shares
    band = Band(
        np.floor(width).astype(np.int64),
        np.ceil(width).astype(np.int64),
        np.zeros(width.shape, dtype=np.int64),
    )
    result = land(analysis, macs_model, levels, budgets, prefix, locked_units(analysis, prefix), band)
    _add_widening(result.notes, problem, len(budgets))
    return result


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


# ----------------------------------------------------------------------------------------- uniform widths


def uniform_levels(analysis: Analysis, macs_model: MacModel, budgets: Sequence[int]) -> tuple[Tensor, Array]:
    """The prefix pattern at or just below the budgets.

    Returns:
        levels: LongTensor (num_units,).
        shares: (N,) share of every width in subnets 1..N, the largest ones that the budgets allow.
    """
    pattern = _Prefix(analysis, macs_model, len(budgets))
    shares = [pattern.grow(subnet, budget) for subnet, budget in enumerate(budgets, start=1)]
    return torch.from_numpy(pattern.levels), np.array(shares)


class _Prefix:
    """Levels in network order: subnet after subnet takes the next units of every width."""

    def __init__(self, analysis: Analysis, macs_model: MacModel, n: int) -> None:
        self.n = n
        self.classes = UnitClasses(analysis, macs_model, small=n)
        self.model = CountModel(self.classes, macs_model)
        first = -torch.arange(analysis.num_units, dtype=torch.float64)
        locked = locked_units(analysis, first).numpy()
        self.position, self.width = _positions(self.classes, locked)
        self.size = self.classes.width_size
        self.locked_count = np.bincount(self.width[locked], minlength=len(self.size))
        self.levels = np.full(analysis.num_units, n + 1)
        self.taken = np.zeros_like(self.size)

    def grow(self, subnet: int, budget: int) -> float:
        """Give the subnet the largest share of every width that its budget allows; returns the share."""
        new = self._macs(subnet, self._units(subnet, 0.0, True)) <= budget
        low, high = 0.0, 1.0
        if self._macs(subnet, self._units(subnet, 1.0, new)) <= budget:
            low = 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            fits = self._macs(subnet, self._units(subnet, middle, new)) <= budget
            low, high = (middle, high) if fits else (low, middle)
        units = self._units(subnet, low, new)
        self.levels = self._levels(subnet, units)
        self.taken = units
        return low

    def _units(self, subnet: int, share: float, new: bool) -> Array:
        """Units per width at a share; with `new`, large widths get at least one new unit in every subnet."""
        each = int(new) * (self.size >= self.n)
        lower = np.maximum(np.maximum(self.taken + each, self.locked_count), int(new))
        upper = self.size - (self.n - subnet) * each
        return np.maximum(np.minimum(np.floor(share * self.size + 0.5).astype(np.int64), upper), lower)

    def _levels(self, subnet: int, units: Array) -> Array:
        new = (self.levels > self.n) & (self.position < units[self.width])
        return np.where(new, subnet, self.levels)

    def _macs(self, subnet: int, units: Array) -> float:
        return self.model.macs(self.classes.counts(self._levels(subnet, units), self.n + 2), subnet)


def _positions(classes: UnitClasses, first: Array | None = None) -> tuple[Array, Array]:
    """Position of every unit in its width, 0, 1, ... in network order, and its width.

    Units of the mask `first` come before the others.
    """
    width = classes.width[classes.of_unit]
    later = np.zeros_like(width) if first is None else ~first
    order = np.lexsort((later, width))
    starts = np.concatenate([[0], np.cumsum(classes.width_size)])
    position = np.empty(len(width), dtype=np.int64)
    position[order] = np.arange(len(width)) - starts[width[order]]
    return position, width


def uniform_band(
    analysis: Analysis, macs_model: MacModel, budgets: Sequence[int], relative: tuple[float, float] = BAND
) -> Band:
    """Bounds on every width: `relative` times its units in the uniform pattern, rounded outwards."""
    shares = uniform_levels(analysis, macs_model, budgets)[1]
    width = UnitClasses(analysis, macs_model, small=len(budgets)).width_size[:, None] * shares
    lower, upper = np.floor(relative[0] * width), np.ceil(relative[1] * width)
    new = np.floor(NEW * np.diff(width, axis=1, prepend=0))
    return Band(
        np.maximum(lower, 1).astype(np.int64), np.maximum(upper, 1).astype(np.int64), new.astype(np.int64)
    )


def needed_widening(analysis: Analysis, macs_model: MacModel, budgets: Sequence[int]) -> float:
    """How many times as wide the network would have to be to use the last budget up, at least 1.

    A nested network costs less than a dense one of the same widths: synapses from larger to smaller subnets
    are missing.
    """
    classes = UnitClasses(analysis, macs_model)
    model = CountModel(classes, macs_model)
    counts = np.zeros((len(classes.size), len(budgets) + 1))
    share = 0.0
    for subnet, budget in enumerate(budgets, start=1):
        low, high = share, 64.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            counts[:, subnet] = (middle - share) * classes.size
            low, high = (middle, high) if model.macs(counts, subnet) <= budget else (low, middle)
        counts[:, subnet] = (low - share) * classes.size
        share = low
    return max(1.0, share)


def _add_widening(notes: list[str], problem: Problem, subnet: int) -> None:
    """Say how much wider a network would have to be whose last subnet ran out of units."""
    if subnet != len(problem.budgets) or not notes or "all units are in it" not in notes[-1]:
        return
    factor = needed_widening(problem.analysis, problem.macs_model, problem.budgets)
    notes[-1] = notes[-1].removesuffix(".") + f" (by about {np.ceil(factor * 20) / 20:.2f} times)."
