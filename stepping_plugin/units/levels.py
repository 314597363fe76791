"""Budgets, and what any level vector must respect: the smallest subnet that exists.

`levels[unit]` is the number of the smallest subnet that contains the unit, 1..N, or N + 1 for a spare unit. A
budget is the number of MACs that a subnet may cost, the smaller subnets included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..errors import BudgetError, SteppingError
from .analysis import Analysis
from .macs import MacModel

__all__ = ["BUDGET_TEXT", "SUFFIX", "channel_levels", "check_budgets", "check_scores", "floor_macs",
           "locked_units", "parse_budgets", "pins_sentence"]  # fmt: skip

BUDGET_TEXT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|[kmgt])?(?:\s*macs?)?", re.IGNORECASE)
SUFFIX = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_FORMS = "a fraction such as 0.4, '40%', or MACs such as 300_000_000, '300M' or '1.2G'"


def parse_budgets(budgets: Iterable[Any], reference_macs: int, limit: int | None = None) -> list[int]:
    """Budgets as MACs.

    Args:
        budgets: ascending; floats in (0, 1] are fractions of `reference_macs`, integers are MACs, strings are
            either ("40%", "0.4", "300M", "1.2G", "500k", "1200000"). Kinds may be mixed.
        reference_macs: M_t, MACs of the original network.
        limit: the most MACs that a budget may allow; `reference_macs` by default. Give the MACs of the whole
            network where it is wider than the original, so that budgets in MACs above M_t can be met.

    Returns:
        MACs of subnets 1..N. A fraction is rounded down: no subnet costs more than was asked for.

    Raises:
        BudgetError: one error that lists everything that is wrong.
    """
    if isinstance(budgets, (str, bytes, Real)) or not isinstance(budgets, Iterable):
        raise BudgetError(
            f"budgets: got {budgets!r}, expected a list with one budget per subnet, such as [0.1, 0.3, 0.5]."
        )
    given = list(budgets)
    if not given:
        raise BudgetError("budgets: got an empty list, expected one budget per subnet, such as [0.1, 0.3, 0.5].")
    limit = max(reference_macs, limit or 0)
    problems: list[str] = []
    macs: list[int | None] = []
    for number, value in enumerate(given, start=1):
        parsed = _parse(value, reference_macs, limit)
        macs.append(parsed if isinstance(parsed, int) else None)
        if isinstance(parsed, str):
            problems.append(f"budget {number}: {parsed}")
    problems += _order_problems(given, macs)
    if problems:
        listed = problems[0] if len(problems) == 1 else "".join(f"\n  - {p}" for p in problems)
        raise BudgetError(f"budgets {given!r}: {listed}" + ("." if len(problems) == 1 else ""))
    return [m for m in macs if m is not None]


def _parse(value: Any, reference: int, limit: int) -> int | str:
    """MACs of one budget, or what is wrong with it."""
    if isinstance(value, str):
        match = BUDGET_TEXT.fullmatch(value.strip())
        if match is None:
            return f"cannot read {value!r}; expected {_FORMS}"
        number, suffix = Fraction(match[1]), (match[2] or "").lower()
        if suffix == "%":
            return _fraction(number / 100, value, reference)
        if not suffix and "." in match[1]:
            return _fraction(number, value, reference)
        return _absolute(math.floor(number * SUFFIX.get(suffix, 1)), value, limit)
    if isinstance(value, bool) or not isinstance(value, Real):
        return f"got {value!r} ({type(value).__name__}); expected {_FORMS}"
    if isinstance(value, Integral):
        return _absolute(int(value), value, limit)
    if not math.isfinite(value):
        return f"got {value!r}; expected {_FORMS}"
    return _fraction(Fraction(repr(float(value))), value, reference)  # repr: 0.3 is 3/10, not its nearest binary number


def _fraction(share: Fraction, value: Any, reference: int) -> int | str:
    if not 0 < share <= 1:
        return f"got {value!r}, a fraction must be above 0 and at most 1; write MACs as an integer or as '300M'"
    return (
        math.floor(share * reference) or f"got {value!r}, which is less than one of the {reference:,} MACs of the model"
    )


def _absolute(macs: int, value: Any, limit: int) -> int | str:
    if macs <= 0:
        return f"got {value!r}, a budget must be above 0"
    if macs == 1:
        return f"got {value!r}, which means one MAC; write 1.0 or '100%' for all MACs of the original network"
    if macs > limit:
        return f"got {value!r} = {macs:,} MACs, but the whole network costs {limit:,}"
    return macs


def _order_problems(given: list[Any], macs: list[int | None]) -> list[str]:
    """Neighbours (among the readable budgets) that do not ascend."""
    readable = [(number, m) for number, m in enumerate(macs, start=1) if m is not None]
    problems = []
    for (a, smaller), (b, larger) in pairwise(readable):
        if larger <= smaller:
            relation = "equal to" if larger == smaller else "below"
            problems.append(
                f"budget {b} ({given[b - 1]!r} = {larger:,} MACs) is {relation} budget {a} "
                f"({given[a - 1]!r} = {smaller:,} MACs); budgets must ascend"
            )
    return problems


# ---------------------------------------------------------------------------------------- smallest subnet


def check_scores(scores: Tensor, num_units: int) -> Tensor:
    """Scores as a float64 vector on the CPU.

    Raises:
        SteppingError: wrong shape, or values that are not finite.
    """
    scores = torch.as_tensor(scores).detach().to("cpu", torch.float64)
    if scores.shape != (num_units,):
        raise SteppingError(f"scores: got shape {tuple(scores.shape)}, expected ({num_units},), one score per unit.")
    if not bool(scores.isfinite().all()):
        raise SteppingError(
            f"scores: {int((~scores.isfinite()).sum())} of {num_units} are not finite, so they rank nothing. "
            "Scores from training become NaN when its loss does; lower the learning rate."
        )
    return scores


def locked_units(analysis: Analysis, scores: Tensor) -> Tensor:
    """Units that stay at level 1 so that subnet 1 has no empty layer, BoolTensor (num_units,).

    Of every anchor set the most important unit is locked. Sets are taken in order of size, and one that
    already holds a locked unit needs no other, so that few units are locked.

    Args:
        analysis: units of the model.
        scores: (num_units,) importance, higher is better.
    """
    scores = check_scores(scores, analysis.num_units)
    locked = torch.zeros(analysis.num_units, dtype=torch.bool)
    for anchor in sorted(analysis.anchors, key=len):
        if len(anchor) and not bool(locked[anchor].any()):
            locked[anchor[scores[anchor].argmax()]] = True
    return locked


def floor_macs(analysis: Analysis, macs_model: MacModel, locked: Tensor | None = None) -> int:
    """Smallest reachable MACs of subnet 1: what cannot move, and one unit of every anchor set.

    Args:
        analysis: units of the model.
        macs_model: its MACs.
        locked: BoolTensor (num_units,) from `locked_units`; any unit of each anchor set by default.
    """
    if locked is None:
        locked = locked_units(analysis, torch.zeros(analysis.num_units))
    return int(macs_model.subnet_macs(torch.where(locked, 1, 2), 1)[0])


def check_budgets(
    analysis: Analysis,
    macs_model: MacModel,
    budgets: Sequence[int],
    reference_macs: int,
    locked: Tensor | None = None,
) -> None:
    """Refuse budgets that no level vector can meet.

    Args:
        analysis: units of the model.
        macs_model: its MACs.
        budgets: MACs of subnets 1..N, from `parse_budgets`.
        reference_macs: M_t, for the percentages in the message.
        locked: see `floor_macs`.

    Raises:
        BudgetError: budget 1 is below the floor (which the message states), or there are more subnets than
            units.
    """
    if locked is None:
        locked = locked_units(analysis, torch.zeros(analysis.num_units))
    movable = analysis.num_units - int(locked.sum())
    if len(budgets) > movable + 1:
        raise BudgetError(
            f"budgets: {len(budgets)} subnets need at least {len(budgets) - 1} units that can move, but this "
            f"model has {movable} ({analysis.num_units} units, {int(locked.sum())} of which every subnet "
            f"needs). Use at most {movable + 1} budgets.{pins_sentence(analysis)}"
        )
    floor = floor_macs(analysis, macs_model, locked)
    if budgets[0] < floor:
        raise BudgetError(
            f"budget 1 is {budgets[0]:,} MACs ({budgets[0] / reference_macs:.2%} of the original), but the "
            f"smallest subnet of this model{_smallest(analysis)} costs {floor:,} MACs "
            f"({floor / reference_macs:.2%}). "
            f"Raise budget 1 to {_round_up(floor / reference_macs)} or more.{pins_sentence(analysis)}"
        )


def _smallest(analysis: Analysis) -> str:
    if analysis.pinned_channels:
        return f", in which {analysis.pinned_channels} of {analysis.channels} channels cannot be left out,"
    return ", with one unit in every layer,"


def pins_sentence(analysis: Analysis) -> str:
    """What keeps channels at level 1, as a sentence to follow a budget that cannot be met; empty if nothing does."""
    if not analysis.pinned_channels:
        return ""
    return (
        f" {analysis.pinned_channels} of {analysis.channels} channels stay at level 1: {analysis.why_pinned()}. "
        "stepping_plugin.inspect_model(model, example_inputs=images) lists all of them."
    )


def _round_up(fraction: float) -> str:
    return f"{math.ceil(fraction * 1000) / 10:g}%"


def channel_levels(levels: Tensor, units: Tensor) -> Tensor:
    """Level per channel from unit per channel; -1 (always available) is level 1."""
    return torch.cat([levels, levels.new_ones(1)])[units]  # a small subnet may have no unit at all
