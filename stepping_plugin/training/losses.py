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

Shapes: `scores` is Tensor[N, B, C], the class scores of all subnets (`SteppingNet.forward_all`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain

__all__ = ["SubnetLoss", "cross_entropy", "distillation"]


def cross_entropy(scores: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of every subnet.

    Args:
        scores: Tensor[N, B, C].
        target: classes, int64 Tensor[B], or class probabilities, Tensor[B, C] (mixup).
        smoothing: label smoothing, the share of the target spread over all classes.

    Returns:
        Tensor[N], in float32 or better.
    """
    subnets, batch, _ = scores.shape
    flat = _at_least_float32(scores).flatten(0, 1)
    if target.is_floating_point():
        target = target.to(flat.dtype)
    targets = target.repeat(subnets, *[1] * (target.dim() - 1))
    losses = F.cross_entropy(flat, targets, reduction="none", label_smoothing=smoothing)
    return losses.view(subnets, batch).mean(1)


def distillation(scores: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(teacher || subnet) of every subnet, mean over the batch; gradients flow into `scores` only.

    Args:
        scores: Tensor[N, B, C].
        teacher: class scores, Tensor[B, C].
        temperature: T divides both scores; T^2 keeps the size of the gradient.

    Returns:
        Tensor[N], in float32 or better.
    """
    student = F.log_softmax(_at_least_float32(scores) / temperature, -1)
    guide = F.log_softmax(_at_least_float32(teacher.detach()) / temperature, -1)
    divergence = F.kl_div(student, guide.expand_as(student), reduction="none", log_target=True)
    return divergence.sum(-1).mean(-1) * temperature**2


@dataclass(frozen=True)
class SubnetLoss:
    """L'_1 .. L'_N of Eq. 4. Called with `(scores, target, teacher_scores=None)`; returns Tensor[N].

    Without teacher scores (and without `from_largest`) it is the cross entropy alone, whatever gamma is.

    Args:
        gamma: weight of the cross entropy; 1 - gamma is that of the teacher.
        temperature: of the distillation.
        smoothing: of the labels; the teacher's scores are left as they are.
        weights: one factor per subnet; None: all 1.
        from_largest: the largest subnet teaches the others, itself learning from the labels alone (in-place
            distillation, https://arxiv.org/abs/1903.05134); no teacher is needed then.

    Raises:
        SteppingError: a value out of range, or shapes that do not go together.
    """

    gamma: float = 0.4
    temperature: float = 1.0
    smoothing: float = 0.0
    weights: Sequence[float] | None = None
    from_largest: bool = False

    def __post_init__(self) -> None:
        bounds = {
            "gamma": (0 <= self.gamma <= 1, "a number from 0 to 1"),
            "temperature": (self.temperature > 0, "a number above 0"),
            "smoothing": (0 <= self.smoothing < 1, "a number from 0 up to 1"),
        }
        for name, (fine, expected) in bounds.items():
            if not fine:
                raise SteppingError(explain("out of range", where=name, got=getattr(self, name), expected=expected))

    def __call__(self, scores: Tensor, target: Tensor, teacher_scores: Tensor | None = None) -> Tensor:
        losses = cross_entropy(scores, target, self.smoothing)
        if self.from_largest:
            if teacher_scores is not None:
                raise SteppingError("from_largest: the largest subnet is the teacher; pass no teacher scores.")
            shared = distillation(scores[:-1], scores[-1], self.temperature)
            losses = torch.cat([self.gamma * losses[:-1] + (1 - self.gamma) * shared, losses[-1:]])
        elif teacher_scores is not None:
            check_teacher(scores, teacher_scores)
            shared = distillation(scores, teacher_scores, self.temperature)
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


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
