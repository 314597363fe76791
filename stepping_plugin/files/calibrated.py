"""What the numbers of a `CalibratedExit` mean, as functions of the class scores of the subnets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .metadata import CalibratedExit

__all__ = ["calibrated_answers", "combined", "threshold_table"]


def combined(scores: Tensor, combine: str) -> Tensor:
    """Answers of subnets 1..N from their scores, both (N, S, C), float32 or better: one by one, or the product.

    The product is the weighted geometric mean of the probabilities of subnets 1..i with weights 1..i: later subnets
    count more, and a subnet that joins in changes the answer only where it is surer than those before.
    """
    if combine == "last":
        return scores
    weights = torch.arange(1, len(scores) + 1, dtype=scores.dtype, device=scores.device)[:, None, None]
    return (weights * scores.log_softmax(-1)).cumsum(0) / weights.cumsum(0)


def calibrated_answers(scores: Tensor, rule: CalibratedExit) -> Tensor:
    """Answers (i, S, C) of subnets 1..i, whose softmax is calibrated, from their scores (i, S, C)."""
    temperatures = scores.new_tensor(rule.temperatures[: len(scores)])
    return combined(scores, rule.combine) / temperatures[:, None, None]


def threshold_table(thresholds: Sequence[Sequence[float | None]], classes: int) -> Tensor:
    """Thresholds of subnets 1..N-1 per class, (N - 1, C); infinite where a subnet is never stopped at."""
    rows = [[math.inf if t is None else t for t in row] for row in thresholds]
    return torch.tensor([row * classes if len(row) == 1 else row for row in rows]).view(len(rows), classes)
