"""Accuracy of every subnet in one pass. Further metrics: `training.metrics`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn

from stepping_plugin.console.progress import track
from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.graph.structure import class_scores, map_tensors
from stepping_plugin.training.batches import check_target, checked_batch
from stepping_plugin.training.losses import cross_entropy

__all__ = ["AllScores", "check_labels", "evaluate"]


class AllScores(nn.Module):
    """Class scores (N, B, C), or what else a net returns, through `forward`, where DDP and torch.compile hook in.

    Nets of several subnets have a `forward_all`, as `SteppingNet` has; of plain models N is 1.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Any:
        forward_all = getattr(self.net, "forward_all", None)
        if forward_all is not None:
            return forward_all(images)
        scores = self.net(images)
        if not isinstance(scores, Tensor) or scores.dim() != 2:
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise SteppingError(explain("the model is no classifier", got=got, expected="class scores (B, C)"))
        return scores.unsqueeze(0)


@torch.no_grad()
def evaluate(
    net: nn.Module, loader: Iterable[tuple[Tensor, Any]], criterion: Callable[[Any, Any], Tensor] | None = None
) -> dict[str, list[float]]:
    """Accuracy (a share in [0, 1]) and mean cross entropy of every subnet, over all processes.

    Of pictures with any number of labels (floats (B, C) of zeros and ones) the answer is right when every label is, at
    a probability of one half, and the loss is the binary cross entropy.

    Args:
        net: a SteppingNet, or any classifier (N = 1); evaluated where it is, its mode is restored.
        loader: batches of (images, labels); in a distributed run, this process's share.
        criterion: of a net that does not return class scores: from the outputs of all subnets and the targets to their
            mean losses (N,). Then there is no accuracy.

    Returns:
        {"accuracy": [N floats], "loss": [N floats]}

    Raises:
        SteppingError: no batch, or a batch that does not fit the net.
    """
    first, mode, scores = next(net.parameters()), net.training, AllScores(net)
    kind = torch.float32 if first.device.type == "mps" else torch.float64
    sums: Tensor | None = None
    net.eval()
    try:
        for batch in track(loader, "evaluation"):
            images, labels = checked_batch(batch, free=criterion is not None)
            found = scores(images.to(first.device, first.dtype, non_blocking=True))
            labels = map_tensors(lambda t: t.to(first.device, non_blocking=True), labels)
            correct, loss = _judged(found, labels) if criterion is None else (None, criterion(found, labels))
            count = torch.full_like(loss, len(images), dtype=kind)
            counts = torch.stack([torch.zeros_like(count) if correct is None else correct, loss * len(images), count])
            sums = counts if sums is None else sums + counts
    finally:
        net.train(mode)
    if sums is None:
        raise SteppingError("the validation loader gives no batch. Check the data set, or leave val_loader out.")
    correct, loss, count = reduce(sums, "sum")
    result = {"accuracy": (correct / count).tolist(), "loss": (loss / count).tolist()}
    return result if criterion is None else {"loss": result["loss"]}


def _judged(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many answers (N, B, C) are right, and the mean loss of every subnet, (N,) each."""
    action = "Compute a metric of your own on net.forward_all(images)."
    scores = class_scores(outputs, "accuracy is that of class scores", "evaluation", action)
    check_target(labels, scores)
    if labels.dim() == 1:
        return (scores.argmax(-1) == labels).sum(1), cross_entropy(scores, labels)
    check_labels(labels)
    target = labels.to(scores.dtype).expand_as(scores)
    loss = F.binary_cross_entropy_with_logits(scores, target, reduction="none").mean((1, 2))
    return ((scores > 0) == (labels > 0)).all(-1).sum(1), loss


def check_labels(labels: Tensor) -> None:
    """Pictures are judged by what they show, not by probabilities (mixup).

    Raises:
        SteppingError: labels (B, C) other than 0 and 1.
    """
    if not bool(((labels == 0) | (labels == 1)).all()):
        got, expected = (
            f"values such as {labels[(labels != 0) & (labels != 1)][0].item():g}",
            "classes (B,), or 0 and 1",
        )
        raise SteppingError(explain("answers cannot be judged by these labels", got=got, expected=expected))
