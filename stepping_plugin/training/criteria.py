"""What subnets learn from labels: cross entropy, binary cross entropy, focal loss, or a criterion of one's own.

A criterion takes the class scores of all subnets, (N, B, C), and gives the mean loss of each, (N,). What distillation
adds to it (Eq. 4): `losses.SubnetLoss`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepping_plugin.errors import SteppingError, explain, nearest
from stepping_plugin.graph.structure import class_scores, map_tensors, tensors_of

__all__ = ["CRITERIA", "Criterion", "OwnCriterion", "at_least_float32", "criterion_options", "cross_entropy",
           "named_criterion"]  # fmt: skip

OwnCriterion = Callable[[Any, Any], Tensor]  # scores (B, C) or other outputs, and targets -> one number
CRITERIA = ("cross_entropy", "binary", "focal")
_OF_LABELS_ALONE = (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)  # of torch: every class is a yes or no


@dataclass(frozen=True)
class Criterion:
    """Mean loss of every subnet. Called with scores (N, B, C) and a target; returns Tensor[N], float32 or better.

    Targets are classes, int64 (B,), or (B, C): class probabilities (mixup), for `binary` labels from 0 to 1. One's own
    criterion gets what the model returns, of one subnet and in its structure, and the targets as the loader gives them.

    Args:
        kind: `cross_entropy`; `binary`: sigmoid cross entropy per class, mean over classes, for pictures with any
            number of labels, or one-against-all of class labels as in https://arxiv.org/abs/2110.00476; `focal`: cross
            entropy times (1 - p)^focal_gamma, p the probability of the class (https://arxiv.org/abs/1708.02002); or a
            function of scores (B, C) and target that gives one number.
        smoothing: share of the target that is spread over all classes; of labels of a `binary` target, over yes and no.
        class_weights: one factor per class: of the loss of its pictures, as in `torch.nn.CrossEntropyLoss(weight=)`;
            with `binary`, of its column, as in `torch.nn.BCEWithLogitsLoss(weight=)`.
        focal_gamma: 0 is the cross entropy.

    Raises:
        SteppingError: an unknown name, values out of range, or targets that the criterion is not for.
    """

    kind: str | OwnCriterion = "cross_entropy"
    smoothing: float = 0.0
    class_weights: Sequence[float] | None = None
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.kind, str) and self.kind not in CRITERIA:
            action = f"{nearest(self.kind, CRITERIA)}; or pass a function of scores (B, C) and labels"
            raise SteppingError(explain("unknown criterion", where="criterion", got=self.kind, action=action))
        kind: object = self.kind
        if not isinstance(kind, str) and not callable(kind):
            expected = f"{', '.join(CRITERIA)}, or a function of scores (B, C) and labels"
            raise SteppingError(explain("no criterion", where="criterion", got=self.kind, expected=expected))
        self._check_numbers()

    def _check_numbers(self) -> None:
        if not 0 <= self.smoothing < 1:
            expected = "a number from 0 up to 1"
            raise SteppingError(explain("out of range", where="smoothing", got=self.smoothing, expected=expected))
        if not 0 <= self.focal_gamma <= 100:
            expected = "a number from 0 to 100"
            raise SteppingError(explain("out of range", where="focal_gamma", got=self.focal_gamma, expected=expected))
        weights = self.class_weights
        if weights is not None and not (min(weights, default=-1) >= 0 < sum(weights) < float("inf")):
            expected = "numbers from 0 up, at least one above 0"
            raise SteppingError(explain("out of range", where="class_weights", got=list(weights), expected=expected))
        if callable(self.kind) and (self.smoothing or weights is not None):
            raise SteppingError(
                "criterion: a criterion of your own gets the labels as they are; label smoothing and class weights are "
                "its own business. Set them there and leave them out here."
            )

    @property
    def is_binary(self) -> bool:
        """Whether every class is a yes or no of its own (sigmoid); otherwise the classes share 1 (softmax)."""
        if isinstance(self.kind, str):
            return self.kind == "binary"
        return isinstance(self.kind, _OF_LABELS_ALONE) or bool(getattr(self.kind, "multi_label", False))

    @property
    def name(self) -> str:
        """For logs and for the comparison of a run with its checkpoint."""
        if isinstance(self.kind, str):
            return self.kind
        owner = self.kind if hasattr(self.kind, "__qualname__") else type(self.kind)
        return f"{owner.__module__}.{owner.__qualname__}"

    def __call__(self, scores: Any, target: Any) -> Tensor:
        scores = map_tensors(at_least_float32, scores)
        if not isinstance(self.kind, str):
            subnets = range(len(tensors_of(scores)[0]))
            return torch.stack([self._own(map_tensors(itemgetter(s), scores), target) for s in subnets])
        action = "Pass criterion=, a function of what the model returns and the targets, that gives one number."
        scores = class_scores(scores, f"{self.kind} is for class scores", "criterion", action)
        weights = self._weights(scores)
        if self.kind == "binary":
            return _binary(scores, target, self.smoothing, weights)
        if target.is_floating_point():
            _check_probabilities(target)
        if self.kind == "focal":
            return _focal(scores, target, self.smoothing, weights, self.focal_gamma)
        return cross_entropy(scores, target, self.smoothing, weights)

    def _weights(self, scores: Tensor) -> Tensor | None:
        if self.class_weights is None:
            return None
        if len(self.class_weights) != scores.shape[-1]:
            got, expected = f"{len(self.class_weights)} numbers", f"{scores.shape[-1]}, one per class"
            raise SteppingError(explain("wrong number", where="class_weights", got=got, expected=expected))
        return scores.new_tensor(list(self.class_weights))

    def _own(self, scores: Any, target: Any) -> Tensor:
        assert not isinstance(self.kind, str)
        loss = self.kind(scores, target)
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point():
            return loss.reshape(())
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        action = "Let it average over the batch (reduction='mean')."
        raise SteppingError(
            explain("bad loss", where=self.name, got=got, expected="one number, a Tensor", action=action)
        )


def cross_entropy(scores: Tensor, target: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Mean cross entropy of every subnet.

    Args:
        scores: Tensor[N, B, C].
        target: classes, int64 Tensor[B], or class probabilities, Tensor[B, C] (mixup).
        smoothing: label smoothing, the share of the target spread over all classes.
        weights: Tensor[C]; the mean over class labels is then weighted, as torch's.

    Returns:
        Tensor[N], in float32 or better.
    """
    subnets, batch, _ = scores.shape
    flat = at_least_float32(scores).flatten(0, 1)
    if target.is_floating_point():
        target = target.to(flat.dtype)
    targets = target.repeat(subnets, *[1] * (target.dim() - 1))
    losses = F.cross_entropy(flat, targets, weights, reduction="none", label_smoothing=smoothing)
    return losses.view(subnets, batch).sum(1) / _count(target, weights)


def _count(target: Tensor, weights: Tensor | None) -> Tensor | int:
    """What a sum over the batch is divided by, for torch's weighted mean."""
    return len(target) if weights is None or target.is_floating_point() else weights[target].sum()


def _focal(scores: Tensor, target: Tensor, smoothing: float, weights: Tensor | None, gamma: float) -> Tensor:
    logs = scores.log_softmax(-1)
    classes = scores.shape[-1]
    shares = target.to(logs.dtype) if target.is_floating_point() else F.one_hot(target, classes).to(logs.dtype)
    shares = shares * (1 - smoothing) + smoothing / classes
    if weights is not None:
        shares = shares * weights
    rest = (-torch.expm1(logs)).clamp(min=torch.finfo(logs.dtype).tiny)  # 1 - p; its power has a gradient everywhere
    losses = -(shares * rest**gamma * logs).sum(-1)
    return losses.sum(1) / _count(target, weights)


def _binary(scores: Tensor, target: Tensor, smoothing: float, weights: Tensor | None) -> Tensor:
    if target.is_floating_point():
        low, high = torch.aminmax(target)
        if not bool((low >= 0) & (high <= 1)):
            got, expected = f"{low.item():g} to {high.item():g}", "from 0 (no) to 1 (yes)"
            raise SteppingError(explain("labels out of range", where="binary", got=got, expected=expected))
        target = target.to(scores.dtype) * (1 - smoothing) + smoothing / 2
    else:  # as timm's BinaryCrossEntropy
        classes = scores.shape[-1]
        target = F.one_hot(target, classes).to(scores.dtype) * (1 - smoothing) + smoothing / classes
    losses = F.binary_cross_entropy_with_logits(scores, target.expand_as(scores), weights, reduction="none")
    return losses.mean((1, 2))


def _check_probabilities(target: Tensor) -> None:
    """Pictures with several labels, given to a loss for one class per picture, would be learned wrongly in silence."""
    off = (target.sum(-1) - 1).abs().amax()
    if not bool(off < 1e-2):
        raise SteppingError(
            explain(
                "labels that are no class probabilities",
                got=f"a picture whose labels add up to {1 + (target.sum(-1) - 1)[0].item():g}",
                expected="1",
                action="For pictures with any number of labels take criterion='binary' (in recipes loss: binary).",
            )
        )


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ------------------------------------------------------------------------------------------------- by name


def named_criterion(name: str) -> str | OwnCriterion:
    """A name of `CRITERIA` as it is; a dotted path such as `my_losses.weighted` as what it names.

    Modules are also looked for in the current folder. Of a class, such as `torch.nn.MultiMarginLoss`, an instance is
    made.

    Raises:
        SteppingError: nothing of that name can be imported or called.
    """
    if name in CRITERIA:
        return name
    try:
        with _current_folder():
            found: Any = pkgutil.resolve_name(name)
            found = found() if isinstance(found, type) else found
    except Exception as error:  # code of others runs here
        reason = f"{type(error).__name__}: {error}"
        action = f"Name a function or class as package.module.name, or one of: {', '.join(CRITERIA)}."
        raise SteppingError(explain(f"cannot be imported ({reason})", where="loss", got=name, action=action)) from error
    if not callable(found):
        expected = "a function of scores (B, C) and labels"
        raise SteppingError(
            explain("no function", where="loss", got=f"{name}, {type(found).__name__}", expected=expected)
        )
    return found


def criterion_options(section: Any) -> dict[str, Any]:
    """Arguments of `fit` from a section of a recipe that says what is learned from labels."""
    return {"criterion": named_criterion(section.loss), "focal_gamma": section.focal_gamma}


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """The `stepping` command does not look there by itself, unlike `python -m`."""
    here = os.getcwd()
    sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
