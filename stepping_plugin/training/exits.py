"""Early exit as a decision: temperatures and thresholds from held-out pictures, and what they give on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.files.calibrated import calibrated_answers, combined, threshold_table
from stepping_plugin.files.metadata import CalibratedExit
from stepping_plugin.training.metrics import MOST_CLASSES, multiclass, named_classes
from stepping_plugin.training.predictions import Predictions
from stepping_plugin.training.targets import Target, parse_target
from stepping_plugin.training.thresholds import Bound, Problem, choose, exits

__all__ = ["ExitChoice", "choose_exit", "fit_temperature", "judge_exit", "step_changes"]

_COLDEST, _HOTTEST = 0.05, 20.0  # beyond them, probabilities are those of an argmax, or say nothing
_EXACT = 1e-9


@dataclass(frozen=True)
class ExitChoice:
    """What was chosen, and what it gives on the held-out pictures.

    Attributes:
        rule: for files and `predict`.
        target: that was asked for.
        goal: quality (a share) or cost (MACs, milliseconds) that the target means on those pictures.
        reached: the same of the rule, by cross-validation: every picture by thresholds that others chose.
        cost: mean MACs, or milliseconds, per picture.
        error: standard error of a quality, from the number of pictures that it is about.
    """

    rule: CalibratedExit
    target: Target
    goal: float
    reached: float
    cost: float
    error: float = 0.0

    def sentence(self) -> str:
        """The choice in words: met, or the best that can be had."""
        shown = _shown(self.target, self.reached)
        if not self.target.is_cost:
            shown = f"{shown} ± {100 * self.error:.1f}"
        if self.rule.met:
            return f"{self.target.text}: met on {self.rule.chosen_on} ({shown}, asked for {self._asked()})"
        return (
            f"{self.target.text}: cannot be met on {self.rule.chosen_on}; the best that can is {shown}, "
            f"asked for {self._asked()}"
        )

    def _asked(self) -> str:
        return _shown(self.target, self.goal)


def _shown(target: Target, value: float) -> str:
    if target.kind == "macs":
        return f"{value:,.0f} MACs"
    return f"{value:.3g} ms" if target.kind == "milliseconds" else f"{100 * value:.2f} %"


def choose_exit(
    held_out: Predictions,
    costs: Sequence[float],
    target: str | Target,
    *,
    original: Predictions | None = None,
    original_macs: float | None = None,
    classes: Sequence[str] | None = None,
    per_class: bool = False,
    combine: str = "last",
    chosen_on: str = "held-out pictures",
) -> ExitChoice:
    """Fit a temperature per subnet, then find thresholds that meet a target at the least cost, or cost at most that.

    Args:
        held_out: what the subnets say about pictures that nothing was trained on and nothing is judged by.
        costs: mean cost of stopping at subnets 1..N: MACs, for a target in milliseconds the time until then.
        target: see `targets.FORMS`.
        original: what the original says about the same pictures, where the target refers to it.
        original_macs: its MACs, where the target is a share of them.
        classes: their names, by default the numbers from 0.
        per_class: a threshold for every class that a subnet may answer, where it has answered it often enough.
        combine: "last", or "product": the answers of the subnets so far are combined, see `calibrated.combined`.
        chosen_on: the pictures, in words, for the file.

    Raises:
        SteppingError: a target that means nothing here, or pictures with any number of labels.
    """
    target = parse_target(target) if isinstance(target, str) else target
    names = _checked(held_out, target, classes, per_class, combine)
    answers = combined(held_out.scores, combine)
    temperatures = [fit_temperature(scores, held_out.labels) for scores in answers]
    best = [(z.double() / t).softmax(-1).max(-1) for z, t in zip(answers, temperatures)]  # one by one: they are large
    confidence, given = torch.stack([b.values for b in best]), torch.stack([b.indices for b in best])
    weights = target.weights(held_out, names)
    value = weights * target.right(given, held_out, original)
    each = torch.tensor(costs, dtype=torch.float64)
    problem = Problem(confidence, given, weights, value, each, len(names) if per_class else 1)
    goal = _goal(target, held_out, original, original_macs, names)
    bound = Bound(most_cost=goal) if target.is_cost else Bound(least_quality=goal)
    table, quality, cost = choose(problem, bound)
    met = cost <= goal * (1 + _EXACT) if target.is_cost else quality >= goal - _EXACT
    rule = CalibratedExit(
        combine="product" if combine == "product" else "last",
        temperatures=temperatures,
        thresholds=[_plain(row) for row in table],
        target=target.text,
        chosen_on=chosen_on,
        met=met,
    )
    error = (max(quality * (1 - quality), 0.0) * float(weights.square().sum())) ** 0.5
    return ExitChoice(rule, target, goal, cost if target.is_cost else quality, cost, error)


def _checked(
    found: Predictions, target: Target, classes: Sequence[str] | None, per_class: bool, combine: str
) -> list[str]:
    """The names of the classes.

    Raises:
        SteppingError: what cannot be.
    """
    if found.multi_label:
        raise SteppingError("early exit by confidence is for one class per picture; these pictures have any number.")
    if combine not in ("last", "product"):
        raise SteppingError(explain("cannot combine so", where="combine", got=combine, expected="last or product"))
    names = named_classes(classes, found.scores.shape[-1])
    if per_class and len(names) > MOST_CLASSES:
        action = "Leave it out: every class would have a handful of pictures to choose by."
        expected = f"at most {MOST_CLASSES} classes"
        raise SteppingError(
            explain("too many classes", where="per_class", got=len(names), expected=expected, action=action)
        )
    return names


def _goal(
    target: Target, found: Predictions, original: Predictions | None, macs: float | None, names: Sequence[str]
) -> float:
    if not target.is_cost:
        return target.goal(found, original, names)
    if not target.is_share:
        return target.amount
    if macs is None:
        raise SteppingError(explain("the original's MACs are not known", where=target.text))
    return target.amount * macs


def _plain(row: Tensor) -> list[float | None]:
    """One number where it holds for all classes."""
    values = [min(1.0, float(t)) if bool(t.isfinite()) else None for t in row]
    return values[:1] if len(set(values)) == 1 else values


def fit_temperature(scores: Tensor, labels: Tensor) -> float:
    """The temperature T at which softmax(scores / T) has the least cross entropy (https://arxiv.org/abs/1706.04599).

    Args:
        scores: (S, C).
        labels: int64 (S,).

    Returns:
        T, from 0.05 to 20. The cross entropy is convex in 1 / T: its slope is bisected.
    """
    scores = scores.double()
    own = scores.gather(1, labels[:, None])[:, 0]
    low, high = 1 / _HOTTEST, 1 / _COLDEST
    for _ in range(50):
        middle = (low * high) ** 0.5
        expected = ((scores * middle).softmax(-1) * scores).sum(-1)
        low, high = (low, middle) if float((expected - own).mean()) > 0 else (middle, high)
    return 1 / (low * high) ** 0.5


def judge_exit(
    choice: ExitChoice,
    test: Predictions,
    costs: Sequence[float],
    macs: Sequence[int],
    *,
    original: Predictions | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What a rule gives on pictures that it was not chosen by, as the report has it.

    Args:
        choice: from `choose_exit`.
        test: what the subnets say about these pictures.
        costs, original, classes: as there; the original on these pictures.
        macs: of subnets 1..N.

    Returns:
        target, quality (its name), is_cost (whether the target bounds a cost), met (on the held-out pictures), goal,
        held_out (reached there), test (reached here), macs (mean per picture), subnets (shares of the pictures that
        stop at them), temperatures, thresholds, combine, chosen_on, sentence, steps (see `step_changes`), metrics
        (`Metrics`).
    """
    rule, target, names = choice.rule, choice.target, named_classes(classes, test.scores.shape[-1])
    answers = calibrated_answers(test.scores, rule)
    confidence, given = answers.softmax(-1).max(-1)
    at = exits(confidence, given, threshold_table(rule.thresholds, len(names)))
    final = answers.gather(0, at[None, :, None].expand(1, *answers.shape[1:]))[0]
    right = target.right(final.argmax(-1), test, original)
    quality = float(target.weights(test, names) @ right.double())
    cost = float(torch.tensor(costs, dtype=torch.float64)[at].mean())
    return {
        "target": target.text,
        "quality": target.quality,
        "is_cost": target.is_cost,
        "met": rule.met,
        "goal": choice.goal,
        "held_out": choice.reached,
        "test": cost if target.is_cost else quality,
        "macs": float(torch.tensor(macs, dtype=torch.float64)[at].mean()),
        "cost": cost,
        "subnets": (torch.bincount(at, minlength=len(macs)) / len(at)).tolist(),
        "temperatures": rule.temperatures,
        "thresholds": rule.thresholds,
        "combine": rule.combine,
        "chosen_on": rule.chosen_on,
        "sentence": choice.sentence(),
        "steps": step_changes(answers, test.labels),
        "metrics": multiclass(final, test.labels, names).as_dict(),
    }


def step_changes(scores: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """What every step does to the answers.

    Args:
        scores: (N, S, C), of the answers of subnets 1..N.
        labels: int64 (S,).

    Returns:
        Per step: subnet (after it), better and worse: shares of the pictures whose answer turns right, and wrong.
    """
    right = scores.argmax(-1) == labels
    return [
        {
            "subnet": i + 1,
            "better": float((right[i] & ~right[i - 1]).double().mean()),
            "worse": float((right[i - 1] & ~right[i]).double().mean()),
        }
        for i in range(1, len(right))
    ]
