"""The early-exit curve: accuracy against average MACs when every sample stops at the subnet that is sure enough.

`engine.predict(x, until={"max_prob": t})` spends few MACs on easy samples. The curve tells what each threshold t gives
on average: thresholds are chosen on held-out data, for a row of average MACs, and judged on other data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..training.predictions import Predictions

__all__ = ["Answers", "early_exit_curve"]


@dataclass(frozen=True)
class Answers:
    """What the subnets say about S labelled samples.

    Attributes:
        confidence: floats (N, S), the largest softmax probability.
        correct: BoolTensor (N, S).
    """

    confidence: Tensor
    correct: Tensor

    @classmethod
    def of(cls, found: Predictions) -> Answers:
        """From class scores."""
        return cls(found.scores.softmax(-1).amax(-1), found.scores.argmax(-1) == found.labels)

    def exits(self, threshold: float) -> Tensor:
        """The subnet, 0..N-1, at which every sample stops by `max_prob`: LongTensor (S,)."""
        sure = self.confidence >= threshold
        sure[-1] = True
        return sure.int().argmax(0)

    def average_macs(self, threshold: float, macs: Tensor) -> float:
        return macs[self.exits(threshold)].mean().item()


def early_exit_curve(held_out: Answers, test: Answers, macs: Sequence[int], points: int = 9) -> list[dict[str, Any]]:
    """Thresholds for a row of average MACs from subnet 1's to subnet N's, and what they give.

    Args:
        held_out: samples on which the thresholds are chosen: each is the largest one that keeps their average MACs at
            or below its aim.
        test: samples on which the thresholds are judged.
        macs: MACs of subnets 1..N, each with the smaller ones.
        points: how many thresholds, at least 2.

    Returns:
        Per threshold: threshold, macs (average per sample of `test`), accuracy, subnets (share of the samples that
        stop at subnets 1..N).
    """
    costs = torch.tensor(macs, dtype=torch.float64)
    candidates = torch.cat([held_out.confidence.new_zeros(1), held_out.confidence[:-1].flatten().unique()])
    rows = []
    for aim in torch.linspace(costs[0].item(), costs[-1].item(), points, dtype=torch.float64).tolist():
        low, high = 0, len(candidates) - 1  # average MACs grow with the threshold
        while low < high:
            middle = (low + high + 1) // 2
            fits = held_out.average_macs(candidates[middle].item(), costs) <= aim * (1 + 1e-12)
            low, high = (middle, high) if fits else (low, middle - 1)
        rows.append(_judged(candidates[low].item(), test, costs))
    return rows


def _judged(threshold: float, test: Answers, costs: Tensor) -> dict[str, Any]:
    exits = test.exits(threshold)
    return {
        "threshold": threshold,
        "macs": costs[exits].mean().item(),
        "accuracy": test.correct.gather(0, exits[None]).double().mean().item(),
        "subnets": (torch.bincount(exits, minlength=len(costs)) / len(exits)).tolist(),
    }
