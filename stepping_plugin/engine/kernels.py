"""The few functions, besides ATen operators, that step programs call. Plain tensors in and out.

A *prefix* is what a tensor holds up to the current level, ordered by level along its unit axis. A prefix
buffer has the width of all levels that will ever be read; every step writes its own part in place and reads a
narrow view.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "KERNELS", "begin_prefix", "channels_last", "extend_prefix", "first_norm", "linear", "merge_moments",
    "moments", "next_norm", "pointwise",
]  # fmt: skip


def channels_last(images: Tensor) -> Tensor:
    """Images (B, C, H, W) laid out as (B, H, W, C): convolutions run faster, pointwise ones are matrix
    products."""
    return images.contiguous(memory_format=torch.channels_last)


def is_channels_last(x: Tensor) -> bool:
    """Whether a tensor (B, C, H, W), or a range of its channels, is laid out as (B, H, W, C)."""
    return x.dim() == 4 and x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution with a 1x1 kernel. Reads a range of channels without copying it if the layout is channels
    last.

    Args:
        x: (B, C, H, W).
        weight: (O, C).
    """
    if not is_channels_last(x):
        return torch.nn.functional.conv2d(x, weight[:, :, None, None], bias)
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    return torch.nn.functional.linear(rows, weight, bias).view(batch, height, width, -1).permute(0, 3, 1, 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer on the last axis, as one matrix product even where x is a range of a wider tensor."""
    return torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def begin_prefix(first: Tensor, axis: int, width: int) -> Tensor:
    """A prefix buffer with room for `width` positions along `axis`, filled with those of level 1."""
    shape = list(first.shape)
    shape[axis] = width
    layout = torch.channels_last if axis == 1 and is_channels_last(first) else torch.contiguous_format
    buffer = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)
    buffer.narrow(axis, 0, first.shape[axis]).copy_(first)
    return buffer


def extend_prefix(buffer: Tensor, part: Tensor, axis: int, start: int) -> Tensor:
    """Write the positions of one level behind those of lower levels; returns the view of all that is there
    now."""
    count = part.shape[axis]
    buffer.narrow(axis, start, count).copy_(part)
    return buffer.narrow(axis, 0, start + count)


def moments(x: Tensor, axes: list[int], keepdim: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations over `axes`, in float32 at least."""
    x = _wide(x)
    count = math.prod(x.shape[a] for a in axes)
    if len(axes) == 1 and axes[0] == x.dim() - 1 and keepdim:  # much faster than var_mean on the CPU
        _, mean, scale = torch.native_layer_norm(x, [count], None, None, _TINY[x.dtype])
        return mean, (scale.pow(-2) - _TINY[x.dtype]) * count
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=keepdim)
    return mean, variance * count


_TINY = {torch.float32: 1e-12, torch.float64: 1e-30}


def merge_moments(
    mean: Tensor, squares: Tensor, count: int, new_mean: Tensor, new_squares: Tensor, new_count: int
) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of two groups of numbers together (Chan, Golub, LeVeque 1983)."""
    total = count + new_count
    gap = new_mean - mean
    merged = torch.add(squares + new_squares, gap.square(), alpha=count * new_count / total)
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
    if centred and axes == [x.dim() - 1] and x.dtype in _TINY:
        count = x.shape[-1]
        result, mean, scale = torch.native_layer_norm(x, [count], weight, bias, eps)
        return result, mean, (scale.pow(-2) - eps) * count
    wide = _wide(x)
    mean, squares = moments(wide, axes) if centred else _squares(wide, axes)
    return _normalise(x, mean, squares, axes, x.shape, weight, bias, eps, centred), mean, squares


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
    added = math.prod(x.shape[a] for a in axes)
    if centred:
        mean, squares = merge_moments(mean, squares, count, *moments(x, axes), added)
    else:
        squares = squares + _squares(_wide(x), axes)[1]
    return _apply(x, mean, squares, count + added, weight, bias, eps, centred), mean, squares


def _normalise(
    x: Tensor, mean: Tensor, squares: Tensor, axes: list[int], shape: torch.Size, weight: Tensor | None,
    bias: Tensor | None, eps: float, centred: bool,
) -> Tensor:  # fmt: skip
    return _apply(x, mean, squares, math.prod(shape[a] for a in axes), weight, bias, eps, centred)


def _apply(
    x: Tensor,
    mean: Tensor,
    squares: Tensor,
    count: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
) -> Tensor:
    scale = torch.rsqrt(torch.add(squares / count, eps))
    wide = _wide(x)
    result = torch.addcmul(-mean * scale, wide, scale) if centred else wide * scale
    if weight is not None:
        result = result * weight if bias is None else torch.addcmul(bias, result, weight)
    return result.to(x.dtype)


def _squares(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    squares = x.square().sum(axes, keepdim=True)
    return squares, squares


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


KERNELS = {
    f.__name__: f
    for f in (
        begin_prefix,
        channels_last,
        extend_prefix,
        first_norm,
        linear,
        merge_moments,
        moments,
        next_norm,
        pointwise,
    )
}
