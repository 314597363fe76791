"""The few functions, besides ATen operators, that step programs call: norms that grow by level.

Plain tensors in and out, made of ATen operators, so that they can be traced, exported and compiled. Statistics are
taken in two passes (mean, then deviations), which many short rows make faster than the fused operators.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["KERNELS", "first_norm", "merge_moments", "moments", "next_norm"]

_SHORT = 32  # rows below this length: the fused layer norm costs more than its parts


def moments(x: Tensor, axes: list[int], keepdim: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations over `axes`, in float32 at least."""
    x = _wide(x)
    mean = x.mean(axes, keepdim=True)
    squares = _squares(x - mean, axes, keepdim)
    return mean if keepdim else mean.squeeze(axes), squares


def merge_moments(
    mean: Tensor, squares: Tensor, count: int, new_mean: Tensor, new_squares: Tensor, new_count: int
) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of two groups of numbers together (Chan, Golub, LeVeque 1983)."""
    total = count + new_count
    gap = new_mean - mean
    merged = (squares + new_squares).addcmul_(gap, gap, value=count * new_count / total)
    return torch.add(mean, gap, alpha=new_count / total), merged


def first_norm(
    x: Tensor, axes: list[int], weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Prefix norm at level 1: normalised slice, mean and scale 1 / sqrt(variance + eps).

    Args:
        x: channels of level 1, any shape.
        axes: non-negative normalised axes.
        weight, bias: None or broadcastable to x.
        eps: added to the variance.
        centred: False for RMS norm, whose mean is 0 (returned as the scale, which has the shape).
    """
    width = x.shape[-1]
    if centred and axes == [x.dim() - 1] and width >= _SHORT and x.dtype in (torch.float32, torch.float64):
        return torch.native_layer_norm(x, [width], weight, bias, eps)
    wide, count = _wide(x), math.prod(x.shape[a] for a in axes)
    mean = wide.mean(axes, keepdim=True) if centred else None
    deviations = wide.clone() if mean is None else wide - mean
    scale = _squares(deviations, axes, True).mul_(1 / count).add_(eps).rsqrt_()
    return _scaled(deviations, scale, weight, bias).to(x.dtype), scale if mean is None else mean, scale


def next_norm(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    count: int,
    axes: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prefix norm at a higher level: the statistics of lower levels (over `count` numbers) are extended.

    The variance of both groups together is the mean of theirs and of the gap between their means (Chan, Golub,
    LeVeque 1983); eps stays inside, which costs no precision where it matters. See `first_norm` for arguments and
    results.
    """
    wide, added = _wide(x), math.prod(x.shape[a] for a in axes)
    total = count + added
    own = wide.mean(axes, keepdim=True) if centred else None
    deviations = wide.clone() if own is None else wide - own
    spread = _squares(deviations, axes, True).add_(added * eps)
    if own is not None:
        gap = own - mean
        spread.addcmul_(gap, gap, value=count * added / total)
        deviations.add_(gap, alpha=count / total)
        mean = torch.add(mean, gap, alpha=added / total)
    scale = spread.add_(scale.pow(-2), alpha=count).mul_(1 / total).rsqrt_()
    return _scaled(deviations, scale, weight, bias).to(x.dtype), mean if centred else scale, scale


def _scaled(deviations: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Works in place: a new tensor costs more than the arithmetic."""
    result = deviations.mul_(scale)
    if weight is None:
        return result if bias is None else result.add_(bias)
    return result.mul_(weight) if bias is None else torch.addcmul(bias, result, weight, out=result)


def _squares(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return torch.linalg.vector_norm(x, 2, axes, keepdim=keepdim).square_()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


KERNELS = {f.__name__: f for f in (first_norm, merge_moments, moments, next_norm)}
