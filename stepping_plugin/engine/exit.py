"""Rules that say when a sample's answer is good enough to stop stepping.

A rule takes class scores (B, classes) and returns a BoolTensor (B,), True = stop. Scores that are not numbers
never satisfy a shipped rule, so such a sample steps to the last subnet without disturbing the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SteppingError, explain, nearest
from ..files.calibrated import calibrated_answers, threshold_table
from ..files.metadata import CalibratedExit
from ..graph.structure import class_scores

__all__ = ["Decision", "ExitRule", "as_decision", "as_rule", "entropy", "margin", "max_probability", "stop_now", "wide"]

ExitRule = Callable[[Tensor], Tensor]


def max_probability(threshold: float) -> ExitRule:
    """Stop when the largest softmax probability is at least `threshold`, in [0, 1]."""
    threshold = _checked("max_prob", threshold, 0.0, 1.0)
    return lambda scores: wide(scores).softmax(-1).amax(-1) >= threshold


def margin(threshold: float) -> ExitRule:
    """Stop when the two largest softmax probabilities differ by at least `threshold`, in [0, 1]."""
    threshold = _checked("margin", threshold, 0.0, 1.0)

    def rule(scores: Tensor) -> Tensor:
        best = wide(scores).softmax(-1).topk(min(2, scores.shape[-1]), -1).values
        return best[..., 0] - (best[..., 1] if best.shape[-1] > 1 else 0) >= threshold

    return rule


def entropy(threshold: float) -> ExitRule:
    """Stop when the entropy of the softmax distribution, in nats, is at most `threshold`."""
    threshold = _checked("entropy", threshold, 0.0, math.inf)

    def rule(scores: Tensor) -> Tensor:
        logs = wide(scores).log_softmax(-1)
        return -(logs.exp() * logs).nan_to_num(nan=math.nan, posinf=0.0, neginf=0.0).sum(-1) <= threshold

    return rule


_RULES: dict[str, Callable[[float], ExitRule]] = {
    "max_prob": max_probability,
    "margin": margin,
    "entropy": entropy,
}


def as_rule(until: Any) -> ExitRule | None:
    """A rule from what `predict(until=...)` accepts.

    Args:
        until: None, a rule, or `{"max_prob": t}`, `{"margin": t}`, `{"entropy": t}`; of several entries any
            may stop.

    Raises:
        SteppingError: something else.
    """
    if until is None or callable(until):
        return until
    if not isinstance(until, Mapping) or not until:
        expected = 'a function of the outputs, or {"max_prob": t}, {"margin": t}, {"entropy": t}'
        raise SteppingError(explain("not a rule to stop by", where="until", got=until, expected=expected))
    for name in until:
        if name not in _RULES:
            raise SteppingError(explain(f"unknown rule {name!r}", where="until", action=nearest(name, _RULES)))
    rules = [_RULES[name](threshold) for name, threshold in until.items()]
    return lambda outputs: torch.stack([rule(_class_scores(outputs)) for rule in rules]).any(0)


def _class_scores(outputs: Any) -> Tensor:
    action = "Pass a function of the outputs that returns a BoolTensor (B,), True where a sample may stop."
    return class_scores(outputs, "rules that go by name are for class scores", "until", action, rank=2)


class Decision:
    """What `predict` asks after every step: what is the answer, and is it good enough.

    Args:
        rule: of the outputs of the last subnet that ran; None: never stop.
    """

    def __init__(self, rule: ExitRule | None) -> None:
        self.rule = rule

    @property
    def may_stop(self) -> bool:
        return self.rule is not None

    def answer(self, history: Sequence[Any]) -> Any:
        """Scores (B, classes), or other outputs, to answer by, from those of subnets 1..i."""
        return history[-1]

    def stop(self, history: Sequence[Any], samples: int) -> Tensor:
        """BoolTensor (B,): whose answer is good enough."""
        assert self.rule is not None
        return stop_now(self.rule, history[-1], samples)


class _Calibrated(Decision):
    """By the temperatures and thresholds of a net."""

    def __init__(self, chosen: CalibratedExit) -> None:
        self.chosen = chosen

    @property
    def may_stop(self) -> bool:
        return True

    def answer(self, history: Sequence[Any]) -> Tensor:
        return calibrated_answers(torch.stack([wide(_class_scores(scores)) for scores in history]), self.chosen)[-1]

    def stop(self, history: Sequence[Any], samples: int) -> Tensor:
        answer = self.answer(history)
        thresholds = threshold_table(self.chosen.thresholds, answer.shape[-1])[len(history) - 1].to(answer)
        confidence, given = answer.softmax(-1).max(-1)
        return confidence >= thresholds[given]


def as_decision(until: Any, chosen: CalibratedExit | None) -> Decision:
    """From what `predict(until=...)` accepts: as `as_rule`, and "calibrated" for what a net holds.

    Raises:
        SteppingError: something else, or a net that holds nothing.
    """
    if not isinstance(until, str):
        return Decision(as_rule(until))
    if until != "calibrated":
        raise SteppingError(explain("not a rule to stop by", where="until", got=until, expected="'calibrated'"))
    if chosen is None:
        raise SteppingError(
            "until='calibrated': this net holds no temperatures and thresholds. Choose them with `stepping thresholds "
            "RUN --target ...` or net.choose_exit(loader, ...), and deploy the net again."
        )
    return _Calibrated(chosen)


def stop_now(rule: ExitRule, outputs: Any, samples: int) -> Tensor:
    """Apply a rule to what a model returns and check what it says: BoolTensor (B,)."""
    result = rule(outputs)
    if not isinstance(result, Tensor) or result.dtype != torch.bool or result.shape != (samples,):
        got = f"{result.dtype} of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise SteppingError(
            explain(
                "the rule returned no decision per sample",
                where="until",
                got=got,
                expected=f"torch.bool of shape ({samples},)",
            )
        )
    return result


def wide(scores: Tensor) -> Tensor:
    """Scores in float32 at least."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def _checked(name: str, threshold: Any, low: float, high: float) -> float:
    valid = isinstance(threshold, (int, float)) and not isinstance(threshold, bool) and low <= threshold <= high
    if not valid:
        expected = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a number of at least {low:g}"
        raise SteppingError(explain("threshold out of range", where=name, got=threshold, expected=expected))
    return float(threshold)
