"""Losses of all subnets from one forward pass (paper III-B, Eq. 4).

Eq. 4 with its sign put right:

    L'_i = gamma * CE_i + (1 - gamma) * T^2 * KL(teacher || subnet_i)

As printed, the second term is sum_k Y_k log(Y_k^pre / Y_k) = -KL(subnet_i || teacher): minimising it would
push a subnet *away* from the teacher. The text asks for the opposite ("the smaller the difference ..., the
more similar results"), so the divergence has a positive sign here. Its direction is the usual one of
distillation, teacher first: its gradient is that of a cross entropy with the teacher's probabilities as soft
labels, and a subnet pays for every class that the teacher considers and the subnet rules out.

timm's `LogitDistillationTask` has the same divergence:

    task_loss_weight * CE + distill_loss_weight * T^2 * KL(teacher || student)

`gamma` is its `task_loss_weight` with `distill_loss_weight` left out (its complementary mode), that is
`task_loss_weight=gamma, distill_loss_weight=1 - gamma`. timm's temperature is 4.0 by default, the paper has
none (1).

CE is the cross entropy, or another criterion (`training.criteria`); gamma, the temperature and the subnets' weights
mean the same with each. Label smoothing and class weights belong to the first term alone: the teacher is followed as it
is. Where every class is a yes or no of its own (`binary`), so it is for the teacher: KL is then that of C Bernoulli
variables, averaged over classes as the criterion is.

Shapes: `scores` is Tensor[N, B, C], the class scores of all subnets (`SteppingNet.forward_all`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.graph.structure import class_scores
from stepping_plugin.training.criteria import Criterion, OwnCriterion, at_least_float32, cross_entropy

__all__ = ["SubnetLoss", "binary_distillation", "cross_entropy", "distillation"]


def distillation(scores: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(teacher || subnet) of every subnet, mean over the batch; gradients flow into `scores` only.

    Args:
        scores: Tensor[N, B, C].
        teacher: class scores, Tensor[B, C].
        temperature: T divides both scores; T^2 keeps the size of the gradient.

    Returns:
        Tensor[N], in float32 or better.
    """
    student = F.log_softmax(at_least_float32(scores) / temperature, -1)
    guide = F.log_softmax(at_least_float32(teacher.detach()) / temperature, -1)
    divergence = F.kl_div(student, guide.expand_as(student), reduction="none", log_target=True)
    return divergence.sum(-1).mean(-1) * temperature**2


def binary_distillation(scores: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(teacher || subnet) where every class is a yes or no of its own; mean over classes and batch.

    Arguments and result: as of `distillation`.
    """
    student = at_least_float32(scores) / temperature
    guide = at_least_float32(teacher.detach()) / temperature
    shares = guide.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(guide, shares, reduction="none")
    cross = F.binary_cross_entropy_with_logits(student, shares.expand_as(student), reduction="none")
    return (cross - entropy).mean((1, 2)) * temperature**2


@dataclass(frozen=True)
class SubnetLoss:
    """L'_1 .. L'_N of Eq. 4. Called with `(scores, target, teacher_scores=None)`; returns Tensor[N].

    Without teacher scores (and without `from_largest`) it is the criterion alone, whatever gamma is.

    Args:
        gamma: weight of the criterion; 1 - gamma is that of the teacher.
        temperature: of the distillation.
        smoothing: of the labels; the teacher's scores are left as they are.
        weights: one factor per subnet; None: all 1.
        from_largest: the largest subnet teaches the others, itself learning from the labels alone (in-place
            distillation, https://arxiv.org/abs/1903.05134); no teacher is needed then.
        criterion, class_weights, focal_gamma: see `criteria.Criterion`.

    Raises:
        SteppingError: a value out of range, or shapes that do not go together.
    """

    gamma: float = 0.4
    temperature: float = 1.0
    smoothing: float = 0.0
    weights: Sequence[float] | None = None
    from_largest: bool = False
    criterion: str | OwnCriterion = "cross_entropy"
    class_weights: Sequence[float] | None = None
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        bounds = {
            "gamma": (0 <= self.gamma <= 1, "a number from 0 to 1"),
            "temperature": (self.temperature > 0, "a number above 0"),
        }
        for name, (fine, expected) in bounds.items():
            if not fine:
                raise SteppingError(explain("out of range", where=name, got=getattr(self, name), expected=expected))
        self.of_labels  # noqa: B018 (whose values are checked)

    @property
    def of_labels(self) -> Criterion:
        """The first term of Eq. 4."""
        return Criterion(self.criterion, self.smoothing, self.class_weights, self.focal_gamma)

    def settings(self) -> dict[str, Any]:
        """What a continued run must have in common with its beginning; a criterion of one's own by its name."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "criterion": self.of_labels.name}

    def __call__(self, scores: Any, target: Any, teacher_scores: Any = None) -> Tensor:
        of_labels = self.of_labels
        losses = of_labels(scores, target)
        follow = binary_distillation if of_labels.is_binary else distillation
        if self.from_largest or teacher_scores is not None:
            action = "Let a criterion of your own hold the teacher, and call it there."
            scores = class_scores(scores, "distillation (Eq. 4) is for class scores", "teacher", action)
        if self.from_largest:
            if teacher_scores is not None:
                raise SteppingError("from_largest: the largest subnet is the teacher; pass no teacher scores.")
            shared = follow(scores[:-1], scores[-1], self.temperature)
            losses = torch.cat([self.gamma * losses[:-1] + (1 - self.gamma) * shared, losses[-1:]])
        elif teacher_scores is not None:
            check_teacher(scores, teacher_scores)
            shared = follow(scores, teacher_scores, self.temperature)
            losses = self.gamma * losses + (1 - self.gamma) * shared
        if self.weights is None:
            return losses
        if len(self.weights) != len(losses):
            expected = f"{len(losses)} numbers"
            raise SteppingError(explain("wrong number of subnet weights", got=list(self.weights), expected=expected))
        return losses * losses.new_tensor(self.weights)


def check_teacher(scores: Tensor, teacher_scores: Tensor) -> None:
    """A teacher must score the same images (B, ...) and the same classes (..., C)."""
    if teacher_scores.shape == scores.shape[1:]:
        return
    raise SteppingError(
        explain(
            "the teacher's scores do not fit the net's",
            got=f"shape {tuple(teacher_scores.shape)}",
            expected=f"{tuple(scores.shape[1:])} (images, classes)",
            action="Take a teacher with the same classes, for example timm.create_model(..., num_classes="
            f"{scores.shape[-1]}) trained on this data.",
        )
    )
