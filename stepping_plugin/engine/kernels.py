"""The few functions, besides ATen operators, that step programs call: prefixes and norms that grow by level.

Plain tensors in and out, made of ATen operators, so that they can be traced, exported and compiled. Statistics are
taken in two passes (mean, then deviations), which many short rows make faster than the fused operators.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["KERNELS", "extend", "first_norm", "merge_moments", "moments", "next_norm"]

_SHORT = 32  # rows below this length: the fused layer norm costs more than its parts


def extend(prefix: Tensor, part: Tensor, axis: int) -> Tensor:
    """What a tensor holds up to one level: the positions of lower levels, and behind them those of this level."""
    return torch.cat([prefix, part], axis)


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
    """Prefix norm at level 1: normalised slice, mean and sum of squared deviations (of squares for an RMS
    norm).

    Args:
        x: channels of level 1, any shape.
        axes: non-negative normalised axes.
        weight, bias: None or broadcastable to x.
        eps: added to the variance.
        centred: False for RMS norm.
    """
    count = math.prod(x.shape[a] for a in axes)
    if centred and axes == [x.dim() - 1] and count >= _SHORT and x.dtype in (torch.float32, torch.float64):
        result, mean, scale = torch.native_layer_norm(x, [count], weight, bias, eps)
        return result, mean, (scale.pow(-2) - eps) * count
    wide = _wide(x)
    mean = wide.mean(axes, keepdim=True) if centred else None
    deviations = wide.clone() if mean is None else wide - mean
    squares = _squares(deviations, axes, True)
    result = _scaled(deviations, squares, count, weight, bias, eps).to(x.dtype)
    return result, squares if mean is None else mean, squares


def next_norm(
    x: Tensor,
    mean: Tensor,
    squares: Tensor,
    count: int,
    axes: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prefix norm at a higher level: the statistics of lower levels (over `count` numbers) are extended.

    See `first_norm` for arguments and results.
    """
    wide, added = _wide(x), math.prod(x.shape[a] for a in axes)
    if centred:
        mean, squares = merge_moments(mean, squares, count, *moments(wide, axes), added)
        wide = wide - mean
    else:
        squares = squares + _squares(wide, axes, True)
        wide = wide.clone()
    return _scaled(wide, squares, count + added, weight, bias, eps).to(x.dtype), mean, squares


def _scaled(
    deviations: Tensor, squares: Tensor, count: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Works in place: a new tensor costs more than the arithmetic."""
    result = deviations.mul_(squares.mul(1 / count).add_(eps).rsqrt_())
    if weight is not None:
        result.mul_(weight)
    return result if bias is None else result.add_(bias)


def _squares(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return torch.linalg.vector_norm(x, 2, axes, keepdim=keepdim).square_()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


KERNELS = {f.__name__: f for f in (extend, first_norm, merge_moments, moments, next_norm)}
