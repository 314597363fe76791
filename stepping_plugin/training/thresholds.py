"""Thresholds of early exit for a target, chosen on held-out pictures.

A picture that stops at exit i gains value[i, s] and costs cost[i]; both add up over pictures. With a price of the cost,
the best threshold of one exit, the others fixed, is exact: of the pictures that get there, in order of falling
confidence, stop the prefix that gains most. Sweeps over the exits for a row of prices give candidates, sweeps under
the bound itself use up what is left.

What was chosen looks better on the pictures that it was chosen by than on others, the more so the more thresholds there
are. So every choice is judged by cross-validation, and made with as much to spare as that shows to be needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Bound", "Problem", "choose", "exits"]

SWEEPS, PRICES, FOLDS, TRIALS = 4, 20, 5, 4
FEWEST = 20  # pictures that a threshold of its own for a class is chosen by
_SLACK = 1e-12


@dataclass(frozen=True)
class Problem:
    """S pictures and N exits.

    Attributes:
        confidence: (N, S), calibrated.
        answers: classes (N, S), of every exit.
        weight: float64 (S,), what a right answer is worth; they add up to 1.
        value: float64 (N, S), gained by stopping: `weight` or nothing. The quality is its sum over pictures.
        cost: float64 (N,), ascending.
        classes: C, where every class is to have thresholds of its own; else 1.
        shared: whether all exits are to have the same threshold.
    """

    confidence: Tensor
    answers: Tensor
    weight: Tensor
    value: Tensor
    cost: Tensor
    classes: int = 1
    shared: bool = False

    @property
    def cells(self) -> Tensor:
        """Which threshold holds for a picture at an exit, (N, S)."""
        return self.answers if self.classes > 1 else torch.zeros_like(self.answers)

    def outcome(self, thresholds: Tensor) -> tuple[float, float]:
        """Quality and mean cost of thresholds (N - 1, classes)."""
        at = exits(self.confidence, self.cells, thresholds)
        return float(self.value.gather(0, at[None]).sum()), float(self.cost[at].mean())

    def part(self, pictures: Tensor) -> Problem:
        """Some of the pictures, the weights as they are."""
        return replace(
            self,
            confidence=self.confidence[:, pictures],
            answers=self.answers[:, pictures],
            weight=self.weight[pictures],
            value=self.value[:, pictures],
        )


@dataclass(frozen=True)
class Bound:
    """What is asked for: at least this quality at the least cost, or at most this mean cost at the greatest quality."""

    least_quality: float | None = None
    most_cost: float | None = None

    def missing(self, quality: float, cost: float) -> float:
        """By how much an outcome is on the wrong side; negative: to spare."""
        if self.least_quality is not None:
            return self.least_quality - quality
        assert self.most_cost is not None
        return cost - self.most_cost

    def rank(self, quality: float, cost: float) -> tuple[float, float]:
        """Less is better: first what is missing, then what is wanted."""
        missing = self.missing(quality, cost)
        scale = 1.0 if self.most_cost is None else self.most_cost
        return (missing if missing > _SLACK * scale else 0.0, cost if self.most_cost is None else -quality)

    def tightened(self, by: float) -> Bound:
        if self.least_quality is not None:
            return Bound(least_quality=self.least_quality + by)
        assert self.most_cost is not None
        return Bound(most_cost=max(self.most_cost - by, 0.0))

    def of_share(self, share: float) -> Bound:
        """For pictures that have this share of all weights."""
        return self if self.least_quality is None else Bound(least_quality=self.least_quality * share)


def exits(confidence: Tensor, cells: Tensor, thresholds: Tensor) -> Tensor:
    """The exit, 0..N-1, of every picture: LongTensor (S,)."""
    sure = torch.ones_like(confidence, dtype=torch.bool)
    for i, row in enumerate(thresholds):
        sure[i] = confidence[i] >= row[cells[i]]
    return sure.int().argmax(0)


def choose(problem: Problem, bound: Bound) -> tuple[Tensor, float, float]:
    """Thresholds for a bound, chosen with so much to spare that cross-validation meets it.

    Args:
        problem: held-out pictures.
        bound: what is asked for.

    Returns:
        Thresholds (N - 1, classes), infinite where an exit is not used; quality and mean cost by cross-validation.
        Where nothing meets the bound, the thresholds of greatest quality, or of least cost.
    """
    single = replace(problem, classes=1)
    forms = (
        [problem, single, replace(single, shared=True)]
        if problem.classes > 1
        else [single, replace(single, shared=True)]
    )
    found = []
    for form in forms:  # the fewer thresholds, the less they promise too much
        thresholds, quality, cost = _tested(form, bound)
        found.append((thresholds.expand(-1, problem.classes).clone(), quality, cost))
    for i in range(len(problem.cost)):  # all stop at one subnet: nothing is chosen that could be chosen too well
        thresholds = _never(problem)
        thresholds[i:] = 0
        found.append((thresholds, *problem.outcome(thresholds)))
    return min(found, key=lambda entry: bound.rank(*entry[1:]))


def _tested(problem: Problem, bound: Bound) -> tuple[Tensor, float, float]:
    """Thresholds, quality and cost as of `choose`, for a bound that is tightened until cross-validation meets it."""
    asked, tried = bound, []
    for _ in range(TRIALS):
        quality, cost = _cross_validated(problem, asked)
        tried.append((bound.rank(quality, cost), asked, quality, cost))
        missing = bound.missing(quality, cost)
        if missing <= 0:
            break
        asked = asked.tightened(1.25 * missing * len(tried))
    _, asked, quality, cost = min(tried, key=lambda entry: entry[0])
    return _fitted(problem, asked), quality, cost


def _cross_validated(problem: Problem, bound: Bound) -> tuple[float, float]:
    """Quality and mean cost where every picture is judged by thresholds that were chosen by others."""
    pictures = len(problem.weight)
    fold = torch.randperm(pictures, generator=torch.Generator().manual_seed(0)) % FOLDS
    quality = cost = 0.0
    for k in range(FOLDS):
        others, own = problem.part(fold != k), problem.part(fold == k)
        if not len(own.weight) or not len(others.weight):
            continue
        found = own.outcome(_fitted(others, bound.of_share(float(others.weight.sum()))))
        quality, cost = quality + found[0], cost + found[1] * len(own.weight) / pictures
    return quality, cost


def _fitted(problem: Problem, bound: Bound) -> Tensor:
    """The best thresholds for these very pictures."""

    def rank(thresholds: Tensor) -> tuple[float, float]:
        return bound.rank(*problem.outcome(thresholds))

    best = min(_candidates(problem), key=rank)
    if problem.shared:
        return best
    for _ in range(SWEEPS):
        improved = _bounded_sweep(problem, best.clone(), bound)
        if rank(improved) >= rank(best):
            break
        best = improved
    return best


def _never(problem: Problem) -> Tensor:
    return torch.full((len(problem.cost) - 1, problem.classes), math.inf, dtype=torch.float64)


def _candidates(problem: Problem) -> Iterator[Tensor]:
    """Thresholds for a row of prices, and one for all exits."""
    never = _never(problem)
    yield never
    always = never.clone()
    always[0] = 0
    yield always
    steps = torch.linspace(0, 1, 5 * PRICES if problem.shared else PRICES, dtype=torch.float64)
    seen = problem.confidence[:-1].flatten().double()
    for threshold in seen.quantile(steps) if 0 < len(seen) < 2**24 else steps:  # torch's quantile takes no more
        yield torch.full_like(never, float(threshold))
    if problem.shared:
        return
    scale = float(problem.value.sum(1).max()) / max(float(problem.cost[-1] - problem.cost[0]), 1e-300)
    for price in torch.logspace(-4, 2, PRICES, dtype=torch.float64):
        yield _priced(problem, never.clone(), float(price) * scale)


def _priced(problem: Problem, thresholds: Tensor, price: float) -> Tensor:
    """Sweeps at a price per unit of mean cost, until nothing changes."""
    net = problem.value - price * problem.cost[:, None] / problem.value.shape[1]
    for _ in range(SWEEPS):
        before = thresholds.clone()
        for i in reversed(range(len(thresholds))):
            for cell, (order, going) in _reaching(problem, thresholds, i).items():
                gains = (net[i, order] - net.gather(0, going[None])[0, order]).cumsum(0)
                gains[~_cuts(problem.confidence[i, order])] = -math.inf
                best = int(gains.argmax()) if len(gains) and float(gains.max()) > 0 else -1
                _set(problem, thresholds, i, cell, order, best)
        if torch.equal(before, thresholds):
            break
    return thresholds


def _bounded_sweep(problem: Problem, thresholds: Tensor, bound: Bound) -> Tensor:
    """Every exit's best threshold under the bound, the others fixed."""
    pictures = problem.value.shape[1]
    for i in range(len(thresholds)):
        for cell, (order, going) in _reaching(problem, thresholds, i).items():
            _set(problem, thresholds, i, cell, order, -1)
            quality, cost = problem.outcome(thresholds)
            later = problem.value.gather(0, going[None])[0, order]
            zero = torch.zeros(1, dtype=torch.float64)
            qualities = torch.cat([zero, (problem.value[i, order] - later).cumsum(0)]) + quality
            costs = torch.cat([zero, (problem.cost[i] - problem.cost[going[order]]).cumsum(0)]) / pictures + cost
            allowed = torch.cat([torch.ones(1, dtype=torch.bool), _cuts(problem.confidence[i, order])])
            if bound.least_quality is not None:
                wanted = torch.where(allowed & (qualities >= bound.least_quality - _SLACK), -costs, -math.inf)
                rest = torch.where(allowed, qualities, -math.inf)
            else:
                assert bound.most_cost is not None
                wanted = torch.where(allowed & (costs <= bound.most_cost * (1 + _SLACK)), qualities, -math.inf)
                rest = torch.where(allowed, -costs, -math.inf)
            best = wanted if bool(wanted.isfinite().any()) else rest
            _set(problem, thresholds, i, cell, order, int(best.argmax()) - 1)
    return thresholds


def _reaching(problem: Problem, thresholds: Tensor, i: int) -> dict[int | None, tuple[Tensor, Tensor]]:
    """Pictures that get to exit i in order of falling confidence, by threshold, and where all would stop after it.

    Classes with few pictures share a threshold, key None.
    """
    cells, confidence = problem.cells, problem.confidence
    earlier = exits(confidence[: i + 1], cells[: i + 1], thresholds[:i]) == i
    going = exits(confidence[i + 1 :], cells[i + 1 :], thresholds[i + 1 :]) + i + 1
    order = confidence[i].argsort(descending=True, stable=True)
    order = order[earlier[order]]
    if problem.classes == 1:
        return {0: (order, going)}
    own = cells[i, order]
    counts = torch.bincount(cells[i], minlength=problem.classes)  # of all pictures: the same classes in every sweep
    few = counts < FEWEST
    parts: dict[int | None, tuple[Tensor, Tensor]] = {None: (order[few[own]], going)}
    for c in (~few).nonzero().flatten().tolist():
        parts[c] = (order[own == c], going)
    return parts


def _cuts(confidence: Tensor) -> Tensor:
    """After which pictures, in order of falling confidence, a threshold can cut: not between equal ones."""
    return torch.cat([confidence[:-1] > confidence[1:], torch.ones(min(1, len(confidence)), dtype=torch.bool)])


def _set(problem: Problem, thresholds: Tensor, i: int, cell: int | None, order: Tensor, last: int) -> None:
    """Stop the pictures up to `last` in the order; -1: none."""
    if last < 0:
        value = math.inf
    else:
        found = problem.confidence[i, order].double()
        below = found[last + 1] if last + 1 < len(found) else 0.98 * found[last]
        value = float((found[last] + below) / 2)
    if cell is None:
        counts = torch.bincount(problem.cells[i], minlength=problem.classes)
        thresholds[i, counts < FEWEST] = value
    else:
        thresholds[i, cell] = value
