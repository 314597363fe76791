"""Operators that exist only in nested networks (DESIGN section 4), in plain differentiable torch.

Shapes: `levels` is LongTensor (C,) with the level of every channel, 1..n, or n + 1 for spare channels, which no
subnet contains. A value *per level* is a list of n tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulate_head", "pick_levels", "prefix_norm", "prefix_reduce", "prefix_taps", "tap_neighbours"]


def prefix_norm(
    x: Tensor,
    levels: Tensor,
    n: int,
    axes: list[int],
    channel_axis: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
) -> Tensor:
    """Layer norm (or RMS norm) in which a channel of level s uses the statistics of the channels of level <= s.

    Sums per level are products with a membership matrix, and the normalisation is one multiply-add, so that the cost
    stays near that of an ordinary norm. Values are first shifted by the mean of the level-1 channels, which keeps
    mean square minus squared mean precise.

    Args:
        x: any shape; normalised over `axes`, which include `channel_axis`.
        levels: (C,).
        n: number of subnets.
        axes: non-negative normalised axes.
        channel_axis: the axis that carries the units.
        weight, bias: None, or C values, or broadcastable to x.
        eps: added to the variance.
        centred: False for RMS norm.
    """
    kind = x.dtype
    if kind in (torch.float16, torch.bfloat16):
        x = x.float()
    y = x.movedim(channel_axis, -1)
    others = [a if a < channel_axis else a - 1 for a in axes if a != channel_axis]
    members = (levels[:, None] == torch.arange(1, n + 1, device=levels.device)).to(y.dtype)  # (C, n), spare: none
    count = members.sum(0) * _spread(x, axes, channel_axis)
    reach = count.cumsum(0).clamp(min=1)

    def total(values: Tensor, of: Tensor) -> Tensor:
        summed = values @ of
        return summed.sum(others, keepdim=True) if others else summed

    if centred:
        y = y - total(y, members[:, :1]) / count[:1].clamp(min=1)
    squares = total(y.square(), members).cumsum(-1) / reach
    shift = total(y, members).cumsum(-1) / reach if centred else torch.zeros_like(squares)
    scale = torch.rsqrt(squares - shift.square() + eps)
    reads = torch.nn.functional.one_hot((levels - 1).clamp(max=n - 1), n).to(y.dtype).t()  # (n, C): whose statistics
    if weight is not None and weight.numel() == len(levels):
        reads, weight = reads * weight.flatten(), None
    offset = (-shift * scale) @ reads
    if weight is None and bias is not None and bias.numel() == len(levels):
        offset, bias = offset + bias.flatten(), None
    result = torch.addcmul(offset, y, scale @ reads).movedim(-1, channel_axis)
    if weight is not None:
        result = result * weight
    if bias is not None:
        result = result + bias
    return result if kind == result.dtype or torch.is_autocast_enabled(x.device.type) else result.to(kind)


def prefix_reduce(
    x: Tensor,
    levels: Tensor,
    n: int,
    kind: str,
    axes: list[int],
    channel_axis: int,
    keepdim: bool,
    correction: float = 0.0,
) -> list[Tensor]:
    """Mean, maximum, minimum, variance or L2 norm over the channels of levels <= s, for s = 1..n.

    Args:
        x: any shape.
        kind: "mean", "amax", "amin", "norm" or "var".
        axes: non-negative reduced axes, including `channel_axis`.
        keepdim: keep the reduced axes with size 1.
        correction: of the variance (1 = unbiased).
    """
    shape = [-1 if a == channel_axis else 1 for a in range(x.dim())]
    results = []
    for s in range(1, n + 1):
        inside = (levels <= s).view(shape)
        count = inside.sum() * _spread(x, axes, channel_axis)
        if kind in ("amax", "amin"):
            worst = torch.finfo(x.dtype).min if kind == "amax" else torch.finfo(x.dtype).max
            results.append(getattr(x.masked_fill(~inside, worst), kind)(axes, keepdim))
            continue
        kept = x * inside
        if kind == "mean":
            results.append(kept.sum(axes, keepdim) / count)
        elif kind == "norm":
            results.append(torch.linalg.vector_norm(kept, 2, axes, keepdim))
        else:
            mean = kept.sum(axes, True) / count
            squares = ((x - mean).square() * inside).sum(axes, keepdim)
            results.append(squares / (count - correction))
    return results


def _spread(x: Tensor, axes: list[int], channel_axis: int) -> int:
    """Number of elements per channel that a reduction runs over."""
    size = 1
    for a in axes:
        if a != channel_axis:
            size *= x.shape[a]
    return size


def pick_levels(per_level: list[Tensor], levels: Tensor, axis: int) -> Tensor:
    """A value per level, seen from the channels: position c along `axis` reads the value of its own level.

    Args:
        per_level: n tensors of one shape, with size 1 or C along `axis`.
        levels: (C,).
        axis: non-negative axis of the result that carries the units.
    """
    own = (levels - 1).clamp(max=len(per_level) - 1)
    if per_level[0].shape[axis] == 1:
        return torch.cat(per_level, axis).index_select(axis, own)
    shape = [-1 if a == axis else 1 for a in range(per_level[0].dim())]
    result = per_level[0]
    for s, value in enumerate(per_level[1:], start=1):
        result = torch.where((own == s).view(shape), value, result)
    return result


def accumulate_head(x: Tensor, levels: Tensor, n: int, channel_axis: int) -> Tensor:
    """Inputs of a classifier for all subnets, stacked: (n * B, ...), channels above level s set to 0 for subnet s."""
    shape = [1 if a != channel_axis else -1 for a in range(x.dim())]
    inside = torch.stack([(levels <= s).view(shape) for s in range(1, n + 1)])
    return (x.unsqueeze(0) * inside).flatten(0, 1)


def tap_neighbours(positions: Tensor, width: int) -> Tensor:
    """Which channels a one-channel convolution along the channels reads.

    Args:
        positions: (C,) position of every channel in the network before channels were removed.
        width: K, odd.

    Returns:
        LongTensor (C, K): index of the neighbour among the C channels; C where there is none (padding or removed).
    """
    offsets = torch.arange(width) - (width - 1) // 2
    wanted = positions[:, None] + offsets
    match = wanted[:, :, None] == positions
    return torch.where(match.any(-1), match.long().argmax(-1), len(positions))


def prefix_taps(x: Tensor, weight: Tensor, bias: Tensor | None, levels: Tensor, neighbours: Tensor) -> Tensor:
    """One-channel convolution along the channels (ECA): a channel reads neighbours of its own or a lower level.

    Args:
        x: (B, 1, C).
        weight: (1, 1, K).
        levels: (C,).
        neighbours: (C, K), see `tap_neighbours`.
    """
    values = torch.nn.functional.pad(x, (0, 1))[..., neighbours]  # (B, 1, C, K)
    live = torch.nn.functional.pad(levels, (0, 1))[neighbours] <= levels[:, None]
    result = (values * live) @ weight[0, 0]
    return result if bias is None else result + bias
