"""Tables of a comparison in Markdown, from results alone. Accuracies are in percent, MACs and times in % of the
original.

Spread is the standard deviation over seeds (n - 1); a difference is paired: of the same seed, then mean and spread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev

from .results import Answer, Result
from .studies import REFERENCE, STUDIES

__all__ = ["VIEWS", "Group", "accuracy_table", "arrival_table", "changes_table", "cost_table", "difference_table",
           "failures", "markdown", "spread"]  # fmt: skip

VIEWS = {"alone": "each subnet alone", "executed": "at equal executed MACs"}


class Group:
    """The results of one variant, over seeds.

    Args:
        results: of one recipe and variant, all done, in order of seeds.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = list(results)
        self.name, self.first = results[0].variant, results[0]
        labels = {v.name: v.label or v.name for variants in STUDIES.values() for v in variants}
        self.label = labels.get(self.name, self.name)
        self.seeds = [r.seed for r in results]

    def answers(self, view: str) -> list[list[Answer]]:
        """Per seed, per budget."""
        return [getattr(r, view) for r in self.results]

    def accuracies(self, view: str) -> list[list[float]]:
        """Per budget, per seed, in percent."""
        return [[100 * a.accuracy for a in column] for column in zip(*self.answers(view))]

    def means(self, view: str) -> list[float]:
        """Mean over the budgets, per seed."""
        return [mean(column) for column in zip(*self.accuracies(view))]

    def average(self, value: Callable[[Result], float]) -> float:
        return mean(value(r) for r in self.results)


def spread(values: Sequence[float], digits: int = 2, sign: bool = False) -> str:
    """Mean, and standard deviation where there are several: 84.46 ± 0.21."""
    shown = f"{mean(values):{'+' if sign else ''}.{digits}f}"
    return f"{shown} ± {stdev(values):.{digits}f}" if len(values) > 1 else shown


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; numbers to the right."""
    marks = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, marks, *rows])


def accuracy_table(groups: Sequence[Group], view: str) -> str:
    """Accuracy per budget, mean over the budgets, and the mean's paired difference to SteppingNet."""
    budgets = _budget_shares(groups[0])
    reference = next((g for g in groups if g.name == REFERENCE), None)
    rows = []
    for group in groups:
        cells = [spread(column) for column in group.accuracies(view)]
        rows.append([group.label, *cells, spread(group.means(view)), _difference(group, reference, view),
                     str(len(group.seeds))])  # fmt: skip
    return markdown(["method", *budgets, "mean", "mean, minus SteppingNet", "seeds"], rows)


def _budget_shares(group: Group) -> list[str]:
    reference = group.first.reference.macs
    return [f"{100 * a.budget / reference:.0f} %" for a in group.first.alone]


def _difference(group: Group, reference: Group | None, view: str) -> str:
    if reference is None or group is reference:
        return ""
    return _paired(group, group.means(view), reference, reference.means(view))


def _paired(group: Group, own: Sequence[float], reference: Group, theirs: Sequence[float]) -> str:
    """Difference of two numbers per seed, over the seeds that both groups have."""
    known = dict(zip(reference.seeds, theirs))
    pairs = [value - known[seed] for seed, value in zip(group.seeds, own) if seed in known]
    return spread(pairs, sign=True) if pairs else ""


def difference_table(groups: Sequence[Group], view: str) -> str:
    """Accuracy minus SteppingNet's at every budget, paired by seed; empty without SteppingNet or other methods."""
    reference = next((g for g in groups if g.name == REFERENCE), None)
    others = [g for g in groups if g is not reference]
    if reference is None or not others:
        return ""
    theirs = reference.accuracies(view)
    rows = [
        [g.label, *[_paired(g, own, reference, ref) for own, ref in zip(g.accuracies(view), theirs)]] for g in others
    ]
    return markdown(["minus SteppingNet", *_budget_shares(reference)], rows)


def cost_table(groups: Sequence[Group]) -> str:
    """Numbers to store and cost of training, for both views."""
    rows = []
    for group in groups:
        cells = []
        for view in VIEWS:
            cells.append(f"{group.average(lambda r, v=view: r.stored[v] / r.reference.numbers):.2f}")  # type: ignore[misc]
        for view in VIEWS:
            cells.append(f"{group.average(lambda r, v=view: _training_cost(r, v)):.1f}")  # type: ignore[misc]
        steps = ", ".join(f"{p.step:.2f}" for p in group.first.training["alone"])
        networks = sum(p.networks for p in group.first.training["alone"][-1:])
        rows.append([group.label, *cells, str(networks), steps])
    header = ["method", "stored, alone", "stored, executed", "training, alone", "training, executed", "networks",
              "step / plain step"]  # fmt: skip
    return markdown(header, rows)


def _training_cost(result: Result, view: str) -> float:
    """In trainings of the original."""
    return sum(p.cost for p in result.training[view]) / result.reference.updates


def arrival_table(groups: Sequence[Group]) -> str:
    """MACs (and CPU time, batches of 1 and 32) until an accuracy is reached, when budgets arrive one after the other.

    With reuse a budget is a step up, without it the net of the next budget starts anew.
    """
    original = groups[0].average(lambda r: 100 * r.reference.accuracy)
    targets = [original - points for points in (5, 3, 2, 1)]
    rows = [[group.label, *[_spent(group, target) for target in targets]] for group in groups]
    return markdown(["method", *[f"{target:.1f} %" for target in targets]], rows)


def _spent(group: Group, target: float) -> str:
    """MACs and times until the mean accuracy reaches the target, in % of one run of the original."""
    macs, times = 0.0, dict.fromkeys(group.first.latency, 0.0)
    for i, column in enumerate(group.accuracies("alone")):
        share = group.average(lambda r, i=i: r.alone[i].macs / r.reference.macs)  # type: ignore[misc]
        macs = share if group.first.reuse else macs + share
        for size in times:
            times[size] += group.average(lambda r, i=i, size=size: r.latency[size].steps[i])  # type: ignore[misc]
        if mean(column) >= target:
            return f"{100 * macs:.0f} ({', '.join(f'{100 * t:.0f}' for t in times.values())})"
    return "not reached"


def changes_table(groups: Sequence[Group]) -> str:
    """What a change of the budget costs in the middle of an inference, in MACs, % of the original."""
    rows = []
    for group in groups:
        r = group.first
        shares = [a.macs / r.reference.macs for a in r.alone]
        ups = [b - a if r.reuse else b for a, b in itertools.pairwise(shares)]
        total = shares[-1] if r.reuse else sum(shares)
        down = "0: the smaller subnet's scores are at hand" if r.reuse else "the smaller net, if it has not run yet"
        rows.append([group.label, ", ".join(f"{100 * u:.0f}" for u in ups), f"{100 * total:.0f}", down])
    return markdown(["method", "each step up", "all budgets in turn", "a step down costs"], rows)


def failures(results: Iterable[Result]) -> str:
    """Methods that could not do it, and why."""
    reasons = {(r.variant, r.reason or "") for r in results if r.status == "failed"}
    return "\n".join(f"- {variant}: {reason}" for variant, reason in sorted(reasons))
