"""Operators that exist only in nested networks, in plain differentiable torch. Layer norm: `norm.prefix_norm`.

Shapes: `levels` is LongTensor (C,) with the level of every channel, 1..n, or n + 1 for spare channels, which no
subnet contains. A value *per level* is a list of n tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "accumulate_head",
    "leave",
    "pick_levels",
    "prefix_reduce",
    "prefix_taps",
    "shared_batch_norm",
    "tap_neighbours",
]


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
    """Mean, sum, maximum, minimum, variance or L2 norm over the channels of levels <= s, for s = 1..n.

    Args:
        x: any shape.
        kind: "mean", "sum", "amax", "amin", "norm" or "var".
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
        if kind in ("mean", "sum"):
            total = kept.sum(axes, keepdim)
            results.append(total / count if kind == "mean" else total)
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


def shared_batch_norm(
    per_level: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> list[Tensor]:
    """Batch norm of a value per level, with one pair of running statistics for all levels.

    They move once, by the mean of what the levels would move them by; a move per level would be n moves of one step,
    and those of the original where all levels are alike would be missed.

    Args:
        per_level: n tensors (B, C, ...), each normalised by its own statistics.
        running_mean, running_var: (C,), updated in place.
        training, momentum, eps, cudnn_enabled: as in ATen's batch_norm.
    """
    results, moved = [], []
    for x in per_level:
        mean, var = running_mean.clone(), running_var.clone()
        results.append(torch.batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn_enabled))
        moved.append((mean, var))
    running_mean.copy_(torch.stack([mean for mean, _ in moved]).mean(0))
    running_var.copy_(torch.stack([var for _, var in moved]).mean(0))
    return results


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


def leave(x: Tensor, levels: Tensor, n: int, channel_axis: int) -> Tensor:
    """Units as an output of all subnets, (n, ...): channels above level s are 0 in subnet s, even where not finite."""
    shape = [1 if a != channel_axis else -1 for a in range(x.dim())]
    inside = torch.stack([(levels <= s).view(shape) for s in range(1, n + 1)])
    return torch.where(inside, x, x.new_zeros(()))


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
