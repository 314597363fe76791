"""What makes people doubt a net: subnets that answer like a constant, like each other, or far worse than the original.

Accuracy alone hides all three. The texts say on how many pictures, and what to do next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..console.progress import track
from ..training.evaluation import AllScores

__all__ = ["answers_to", "doubts", "like_a_constant"]

ALIKE = 0.01  # share of the answers below which a subnet does not differ from the one before
FAR, FAR_BELOW_HALF = (
    0.05,
    0.2,
)  # accuracy below the original's: of subnets from half of its MACs up, and of smaller ones
AS_GOOD = 0.005  # accuracy below the original's that is no difference


@torch.no_grad()
def answers_to(net: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Classes that subnets 1..N (N = 1 for any other classifier) answer, LongTensor (N, S), and the labels (S,).

    In a distributed run every process gets those of all.
    """
    first, mode, scores = next(net.parameters()), net.training, AllScores(net)
    found, labels = [], []
    net.eval()
    try:
        for images, target in track(loader, "evaluation"):
            found.append(scores(images.to(first.device, first.dtype)).argmax(-1).cpu())
            labels.append(target.cpu())
    finally:
        net.train(mode)
    shares = gather_object([(torch.cat(found, 1), torch.cat(labels))])
    return torch.cat([a for a, _ in shares], 1), torch.cat([t for _, t in shares])


def like_a_constant(answers: Tensor, labels: Tensor) -> list[int]:
    """Subnets 1..N that are right no more often than the most frequent class is, within two standard errors."""
    rate, pictures = _majority(labels), len(labels)
    limit = rate + 2 * math.sqrt(rate * (1 - rate) / pictures)
    right = (answers == labels).double().mean(1)
    return [i for i, accuracy in enumerate(right.tolist(), start=1) if accuracy <= limit]


def _majority(labels: Tensor) -> float:
    return torch.bincount(labels).max().item() / len(labels)


def doubts(
    answers: Tensor, labels: Tensor, shares: Sequence[float], reference: float | None, *, retrained: bool = True
) -> list[str]:
    """One text per kind of doubt.

    Args:
        answers: of subnets 1..N, LongTensor (N, S).
        labels: LongTensor (S,).
        shares: MACs of the subnets as shares of the original's.
        reference: accuracy of the original, None where there is none.
        retrained: False: just constructed, when only constant answers are out of the ordinary.
    """
    texts = [_constant(answers, labels, retrained)]
    if retrained:
        texts += [*_alike(answers, labels, reference), _far_below(answers, labels, shares, reference)]
    return [text for text in texts if text]


def _constant(answers: Tensor, labels: Tensor, retrained: bool) -> str:
    subnets = like_a_constant(answers, labels)
    if not subnets:
        return ""
    rate, class_ = _majority(labels), int(torch.bincount(labels).argmax())
    same = ", ".join(f"{torch.bincount(answers[i - 1]).max().item() / len(labels):.0%}" for i in subnets)
    text = (
        f"{'' if retrained else 'after construction, '}{_subnets(subnets)} at the majority-class rate: right no more "
        f"often than always answering class {class_} ({rate:.1%} of {len(labels):,} pictures); {same} of the answers "
        "are one and the same class. "
    )
    if retrained:
        return text + (
            "Train longer or at another rate (retrain.epochs, retrain.lr), look at the classes one by one, and raise "
            "the budgets if that does not help."
        )
    return text + (
        "Retraining has to bring everything back: if it does not, raise construction.iterations or "
        "construction.batches, lower construction.lr, or retrain for longer."
    )


def _alike(answers: Tensor, labels: Tensor, reference: float | None) -> list[str]:
    texts, pictures = [], len(labels)
    right = (answers == labels).sum(1).tolist()
    for i in range(1, len(answers)):
        changed = int((answers[i] != answers[i - 1]).sum())
        if changed >= ALIKE * pictures:
            continue
        gained = right[i] - right[i - 1]
        text = (
            f"subnet {i + 1} hardly differs from subnet {i}: {changed} of {pictures:,} answers are others, "
            f"{abs(gained)} {'more' if gained >= 0 else 'fewer'} are right. "
        )
        if reference is not None and right[i - 1] / pictures >= reference - AS_GOOD:
            text += f"Subnet {i} is as good as the original: stop there, or use lower budgets."
        else:
            text += "Put these budgets further apart, train longer (retrain.epochs), or use fewer budgets."
        texts.append(text)
    return texts


def _far_below(answers: Tensor, labels: Tensor, shares: Sequence[float], reference: float | None) -> str:
    if reference is None:
        return ""
    gaps = [reference - a for a in (answers == labels).double().mean(1).tolist()]
    far = [
        i
        for i, (gap, share) in enumerate(zip(gaps, shares), start=1)
        if gap > (FAR if share >= 0.5 else FAR_BELOW_HALF)
    ]
    if not far:
        return ""
    points = ", ".join(f"{100 * gaps[i - 1]:.1f}" for i in far)
    return (
        f"{_subnets(far)} far below the original, by {points} points of accuracy on {len(labels):,} pictures. Train "
        "longer (retrain.epochs, construction.iterations) or at another rate (retrain.lr), or raise the budgets."
    )


def _subnets(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers))
    return f"subnet {listed} is" if len(numbers) == 1 else f"subnets {listed} are"
