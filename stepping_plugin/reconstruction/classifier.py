"""The classifier that all subnets share, by the original's class probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .fits import LayerFit
from .twins import Pair, Twins

__all__ = ["fit_classifier"]

PULL = 1e-2  # towards the weights it starts from, relative to the mean square of the features
STEPS = 60


def fit_classifier(twins: Twins, fit: LayerFit, pairs: list[Pair]) -> None:
    """Minimise the sum over subnets of KL(original || subnet) in the classifier's weights: convex, by L-BFGS.

    Least squares on the scores spend themselves on large negative ones, which decide nothing. The weights it starts
    from hold them in place, so that a few hundred images are enough. Only for linear classifiers whose outputs are the
    class scores.

    Args:
        twins: the networks.
        fit: the classifier.
        pairs: batches.
    """
    if not fit.windows.linear or fit.node.meta["shape"].__len__() != 2:
        return
    weight: Any = twins.tensors[fit.node.args[1].meta["tensor"]]  # type: ignore[union-attr]
    bias: Any = next(iter(twins.parameters(fit.node, "bias")), None)
    features, wanted = _gather(twins, fit, pairs)
    start = [p.detach().double() for p in (weight, bias) if p is not None]
    size = PULL * features.square().mean()
    with torch.enable_grad():
        found = [p.clone().requires_grad_() for p in start]
        search = torch.optim.LBFGS(
            found, max_iter=STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=1e-12
        )

        def loss() -> Tensor:
            search.zero_grad()
            scores = F.linear(features, *found)
            value = F.kl_div(scores.log_softmax(-1), wanted, reduction="sum", log_target=True) / wanted.shape[-2]
            value = value + size * sum((f - s).square().sum() for f, s in zip(found, start))
            value.backward()
            return value

        search.step(loss)
    if all(bool(f.isfinite().all()) for f in found):
        for parameter, value in zip((weight, bias), found):
            parameter.copy_(value.detach())


def _gather(twins: Twins, fit: LayerFit, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Inputs of all subnets (N, P, D) and the original's logarithmic probabilities (N, P, classes), float64."""
    features, wanted = [], []
    for pair in pairs:
        twins.advance(fit, pair)
        scores = twins.aim(fit, pair)
        per_subnet = [x.double().unflatten(0, (-1, len(scores))) for x in twins.inputs(fit, pair)]
        features.append(torch.cat(per_subnet))
        wanted.append(scores.double().log_softmax(-1).expand(len(features[-1]), -1, -1))
    return torch.cat(features, 1), torch.cat(wanted, 1)
