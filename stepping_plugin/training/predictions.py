"""What the subnets say about a whole set: the scores that metrics, temperatures and thresholds are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.graph.structure import class_scores
from stepping_plugin.training.batches import check_target, checked_batch
from stepping_plugin.training.evaluation import AllScores, check_labels

__all__ = ["Predictions", "predict_all", "predictions_of"]

LARGEST = 2**28  # scores that are kept, 1 GiB; ImageNet's 50,000 pictures, 1000 classes and 5 subnets fit


@dataclass(frozen=True)
class Predictions:
    """Class scores of N subnets for S labelled pictures, on the CPU.

    Attributes:
        scores: float32 or better, (N, S, C).
        labels: int64 (S,); or (S, C) of zeros and ones, where a picture shows any number of classes.
        every: pictures of the set per picture here: 1, or more where the scores of all would not fit into memory.
    """

    scores: Tensor
    labels: Tensor
    every: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, pictures: slice) -> Predictions:
        return Predictions(self.scores[:, pictures], self.labels[pictures], self.every)

    @property
    def multi_label(self) -> bool:
        """Whether a picture shows any number of classes."""
        return self.labels.dim() == 2


def predictions_of(net: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> Predictions:
    """All subnets of a SteppingNet, or any classifier (N = 1), in eval mode; see `predict_all`."""
    first, mode, scores = next(net.parameters()), net.training, AllScores(net)
    net.eval()
    try:
        with torch.no_grad():
            return predict_all(lambda images: scores(images.to(first.device, first.dtype)), loader)
    finally:
        net.train(mode)


def predict_all(scores_of: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]]) -> Predictions:
    """Go through a loader once; in a distributed run every process gets the pictures of all.

    Args:
        scores_of: from images (B, C, H, W) to class scores (N, B, classes).
        loader: batches of (images, labels); one with a length if the scores of all its pictures exceed `LARGEST`.

    Raises:
        SteppingError: no batch, one that does not fit the net, or scores that are no numbers.
    """
    scores: list[Tensor] = []
    labels: list[Tensor] = []
    every, seen = 1, 0
    for images, target in map(checked_batch, loader):
        action = "Compute a metric of your own on net.forward_all(images)."
        found = (
            class_scores(scores_of(images), "these metrics are for class scores", "evaluation", action).detach().cpu()
        )
        found, target = found.float() if found.dtype in (torch.float16, torch.bfloat16) else found, target.cpu()
        check_target(target, found)
        if target.dim() == 2:
            check_labels(target)
        if not scores:
            every = max(1, -(-found.numel() * _length(loader) // LARGEST))
        kept = torch.arange(-seen % every, len(target), every)
        seen += len(target)
        scores.append(found[:, kept])
        labels.append(target[kept])
    if not scores:
        raise SteppingError(explain("no pictures to judge by", where="loader", expected="batches of (images, labels)"))
    shares = gather_object([(torch.cat(scores, 1), torch.cat(labels))])
    result = Predictions(torch.cat([s for s, _ in shares], 1), torch.cat([k for _, k in shares]), every)
    if not bool(result.scores.isfinite().all()):
        action = "Training has diverged, or half precision overflows: go back to an earlier net, or take float32."
        raise SteppingError(explain("class scores that are no numbers", action=action))
    return result


def _length(loader: Iterable[tuple[Tensor, Tensor]]) -> int:
    return len(loader) if isinstance(loader, Sized) else 1
