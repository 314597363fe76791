"""What early exit is to reach, in words, such as `accuracy >= 98 % of the original` or `macs <= 30 %`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain, nearest
from stepping_plugin.training.predictions import Predictions

__all__ = ["FORMS", "Target", "parse_target"]

FORMS = (
    "accuracy >= 98 % of the original", "balanced accuracy >= 90 %", "recall of CLASS >= 95 % of subnet 4",
    "agreement with subnet 4 >= 99 %", "macs <= 30 %", "macs <= 12M", "milliseconds <= 20",
)  # fmt: skip
_NUMBER = r"(?P<amount>\d+(?:\.\d+)?)"
_NET = r"the original|the largest subnet|subnet \d+"
_QUALITY = re.compile(
    rf"(?P<what>accuracy|balanced accuracy|recall of (?P<label>.+?)|agreement with (?P<other>{_NET}))"
    rf"\s*(?:>=|≥|at least)\s*{_NUMBER}\s*%(?:\s+of\s+(?P<of>{_NET}))?",
    re.IGNORECASE,
)
_COST = re.compile(
    rf"(?:average\s+)?(?P<what>macs|milliseconds|ms)\s*(?:<=|≤|at most)\s*{_NUMBER}\s*(?P<unit>%|[kmg])?", re.IGNORECASE
)
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Target:
    """A bound on a quality from below, or on a cost from above.

    Attributes:
        text: as it was asked for.
        kind: `accuracy`, `balanced accuracy`, `recall`, `agreement`; `macs`, `milliseconds`.
        amount: a share in [0, 1]; MACs or a share of the original's (`is_share`); milliseconds.
        reference: what the amount is a share of: None, the number of a subnet, 0 (the original) or -1 (the largest
            subnet).
        other: whom to agree with: the same numbers.
        label: name of the class of a recall.
    """

    text: str
    kind: str
    amount: float
    reference: int | None = None
    other: int | None = None
    label: str | None = None
    is_share: bool = False

    @property
    def is_cost(self) -> bool:
        """Whether it bounds MACs or time, and the accuracy is to be as high as that allows."""
        return self.kind in ("macs", "milliseconds")

    @property
    def quality(self) -> str:
        """The quality in words; of a bound on costs the accuracy."""
        return "accuracy" if self.is_cost else re.split(">=|≥|at least", self.text, flags=re.IGNORECASE)[0].strip()

    def weights(self, found: Predictions, classes: Sequence[str]) -> Tensor:
        """What a right answer to every picture is worth, float64 (S,): their sum is the quality of a perfect net.

        Raises:
            SteppingError: no picture of the class.
        """
        labels, total = found.labels, len(found)
        if self.kind == "recall":
            self.check(len(found.scores), classes, has_original=True)
            wanted = labels == classes.index(str(self.label))
            if not bool(wanted.any()):
                raise SteppingError(explain("no picture of the class to choose or judge by", where=str(self.label)))
            return wanted.double() / wanted.sum()
        if self.kind == "balanced accuracy":
            counts = torch.bincount(labels, minlength=len(classes)).double()
            return 1 / (counts[labels] * (counts > 0).sum())
        return torch.full((total,), 1 / total, dtype=torch.float64)

    def right(self, answers: Tensor, found: Predictions, original: Predictions | None) -> Tensor:
        """Which answers, classes (..., S), are right: those of the labels, or of whom they are to agree with."""
        if self.kind != "agreement":
            return answers == found.labels
        return answers == self._net(self.other, found, original).argmax(-1)

    def goal(self, found: Predictions, original: Predictions | None, classes: Sequence[str]) -> float:
        """The quality that is asked for on these pictures."""
        if self.reference is None:
            return self.amount
        answers = self._net(self.reference, found, original).argmax(-1)
        return self.amount * float(self.weights(found, classes) @ (answers == found.labels).double())

    def check(self, subnets: int, classes: Sequence[str] | None, has_original: bool) -> None:
        """What can be said before there are pictures.

        Raises:
            SteppingError: it refers to a subnet, a class or an original that there is not.
        """
        for number in (self.reference, self.other):
            if number == 0 and not has_original:
                action = "Name the largest subnet instead."
                raise SteppingError(explain("the original network is not at hand", where=self.text, action=action))
            if number is not None and number > subnets:
                raise SteppingError(explain("no such subnet", where=self.text, expected=f"1 to {subnets}"))
        if self.label is not None and classes is not None and self.label not in classes:
            action = nearest(self.label, classes)
            raise SteppingError(explain("no such class", where="target", got=self.label, action=action))

    def _net(self, number: int | None, found: Predictions, original: Predictions | None) -> Tensor:
        """Scores (S, C) of the original (0), of the largest subnet (-1) or of a subnet."""
        self.check(len(found.scores), None, original is not None)
        if number == 0:
            assert original is not None
            return original.scores[0]
        assert number is not None
        return found.scores[number - 1 if number > 0 else -1]


def parse_target(text: str) -> Target:
    """Read a target.

    Raises:
        SteppingError: none of the `FORMS`, or a share above 100 %.
    """
    words = " ".join(str(text).split())
    quality, cost = _QUALITY.fullmatch(words), _COST.fullmatch(words)
    if quality is not None:
        share = float(quality["amount"]) / 100
        if share > 1 and not quality["of"]:
            raise SteppingError(explain("more than 100 %", where="target", got=words))
        what = quality["what"].lower().split(" of ")[0].split(" with ")[0]
        if what == "agreement" and quality["of"]:
            raise SteppingError(explain("an agreement is a share already", where="target", got=words))
        return Target(words, what, share, _number(quality["of"]), _number(quality["other"]), quality["label"])
    if cost is None:
        expected = "; ".join(FORMS)
        raise SteppingError(explain("not a target", where="target", got=words, expected=f"for example {expected}"))
    amount, unit, kind = float(cost["amount"]), cost["unit"], cost["what"].lower()
    if kind != "macs":
        if unit:
            raise SteppingError(explain("milliseconds have no unit", where="target", got=words))
        return Target(words, "milliseconds", amount)
    scale = 0.01 if unit == "%" else _UNITS.get((unit or "").lower(), 1.0)
    return Target(words, "macs", amount * scale, is_share=unit == "%")


def _number(name: str | None) -> int | None:
    if name is None:
        return None
    last = name.lower().split()[-1]
    return {"original": 0, "subnet": -1}[last] if not last.isdigit() else int(last)
