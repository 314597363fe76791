"""Layer norm over nested channels: a channel of level s uses the statistics of the channels of level <= s.

With r_s, m_s the inverse deviation and mean of the N_s values of level <= s, a channel k of level l becomes

    y_k = w_k (x_k - m_l) r_l + b_k.

Sums per level are products with a membership matrix of n columns and the rest is multiply-add, so that the cost stays
near that of an ordinary norm. The gradient is written out: with g_k the gradient of y_k times w_k, G_s the sum of g_k
and H_s the sum of g_k (x_k - m_s) over the channels of level s, for a channel of level l

    dx_k = g_k r_l - A_l - x_k B_l,    B_l = sum_{s >= l} r_s^3 H_s / N_s,
                                       A_l = sum_{s >= l} r_s G_s / N_s - m_s r_s^3 H_s / N_s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, one_hot

__all__ = ["prefix_norm"]


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
    """Layer norm (or RMS norm) with one set of statistics per level.

    Args:
        x: any shape; normalised over `axes`, which include `channel_axis`. Half precision is computed in float32.
        levels: LongTensor (C,), 1..n, or n + 1 for spare channels, which no subnet contains.
        n: number of subnets.
        axes: non-negative normalised axes.
        channel_axis: the axis that carries the units.
        weight, bias: None, or C values, or broadcastable to x.
        eps: added to the variance.
        centred: False for RMS norm.
    """
    kind = x.dtype
    half = kind in (torch.float16, torch.bfloat16)
    mixed = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False):  # sums of squares need float32
        values = (x.float() if half else x).movedim(channel_axis, -1)
        others = [a if a < channel_axis else a - 1 for a in axes if a != channel_axis]
        per_level = _PerLevel.of(values, levels, n, others, eps, centred)
        own_weight, own_bias = _per_channel(weight, values), _per_channel(bias, values)
        if weight is not None and own_weight is None:
            own_bias = None  # a weight per channel and position comes before the bias
        needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        normalise = _PrefixNorm.apply if needs_gradient else _normalise
        result = normalise(values, own_weight, own_bias, per_level)[0].movedim(-1, channel_axis)
        if weight is not None and own_weight is None:
            result = result * weight
        if bias is not None and own_bias is None:
            result = result + bias
    return result.to(kind) if half and not mixed else result


def _per_channel(parameter: Tensor | None, values: Tensor) -> Tensor | None:
    """A parameter as one value per channel, if that is what it is."""
    if parameter is None or parameter.numel() != values.shape[-1]:
        return None
    return parameter.flatten().to(values.dtype)


@dataclass(frozen=True)
class _PerLevel:
    """How channels, the last axis, and levels look at each other.

    Attributes:
        members: (n, C), 1 where channel k is of level s; spare channels have none.
        readers: (n, C), 1 where channel k reads the statistics of level s; spare channels read those of n.
        counts: (n,), N_s.
        others: normalised axes besides the channels.
    """

    members: Tensor
    readers: Tensor
    counts: Tensor
    others: list[int]
    eps: float
    centred: bool

    @classmethod
    def of(cls, values: Tensor, levels: Tensor, n: int, others: list[int], eps: float, centred: bool) -> _PerLevel:
        members = (torch.arange(1, n + 1, device=levels.device)[:, None] == levels).to(values.dtype)
        readers = one_hot((levels - 1).clamp(max=n - 1), n).t().to(values.dtype).contiguous()
        spread = 1
        for axis in others:
            spread = spread * values.shape[axis]
        counts = (members.sum(1).cumsum(0) * spread).clamp(min=1)
        return cls(members, readers, counts, others, eps, centred)

    def total(self, values: Tensor, of: Tensor) -> Tensor:
        """Sums over the channels of every row of `of` (r, C) and the other normalised axes: (..., r)."""
        return linear(values.sum(self.others, keepdim=True) if self.others else values, of)

    def statistics(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """x is first shifted by the mean of its level-1 channels, which keeps mean square minus squared mean precise.

        Returns:
            That mean (..., 1), r_s (..., n) and m_s - mean (..., n); the means are None for RMS norm.
        """
        base = shift = None
        if self.centred:
            base = self.total(x, self.members[:1]) / self.counts[:1]
            x = x - base
            shift = self.total(x, self.members).cumsum(-1) / self.counts
        variance = self.total(x.square(), self.members).cumsum(-1) / self.counts
        if shift is not None:
            variance = variance - shift.square()
        return base, torch.rsqrt(variance + self.eps), shift


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, per_level: _PerLevel
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The norm over the last axis, and the statistics it used. In place where it can: memory is what it waits for."""
    base, scale, shift = per_level.statistics(x)
    reads = per_level.readers if weight is None else per_level.readers * weight
    result = _expand(scale, reads, x)
    if base is None or shift is None:
        result = result.mul_(x)
    else:
        result = _add_expanded(result.mul_(x - base), -shift * scale, reads)
    return (result if bias is None else result.add_(bias)), base, scale, shift


def _expand(per_level: Tensor, matrix: Tensor, like: Tensor) -> Tensor:
    """A value per level (..., n) times matrix (n, C), in a new tensor of the shape of `like`."""
    # products with few columns are fast if the matrix is transposed for them
    return linear(per_level, matrix.t().contiguous()).expand_as(like).contiguous()


def _add_expanded(target: Tensor, per_level: Tensor, matrix: Tensor) -> Tensor:
    """Add a value per level (..., n) times matrix (n, C) to target, in place."""
    if per_level.shape[:-1] == target.shape[:-1] and target.is_contiguous():
        rows = target.view(-1, target.shape[-1])
        rows.addmm_(per_level.reshape(-1, per_level.shape[-1]), matrix)
        return target
    return target.add_(linear(per_level, matrix.t().contiguous()))


class _PrefixNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, per_level: _PerLevel) -> tuple[Tensor]:
        result, *statistics = _normalise(x, weight, bias, per_level)
        ctx.save_for_backward(x, weight, *statistics)
        ctx.per_level = per_level
        return (result,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, base, scale, shift = ctx.saved_tensors
        per_level: _PerLevel = ctx.per_level
        y = x if base is None else x - base
        product = gradient * y
        reads = per_level.readers if weight is None else per_level.readers * weight
        sums = per_level.total(product, reads)  # H_s
        offset = None
        if shift is not None:
            plain = per_level.total(gradient, reads)  # G_s
            sums = sums - shift * plain
        slope = scale**3 * sums / per_level.counts
        if shift is not None:
            offset = _from_above(scale * plain / per_level.counts - shift * slope)
        own = _expand(scale, per_level.readers, x)  # r_l per channel
        of_weight = of_bias = None
        if ctx.needs_input_grad[1] and weight is not None:
            terms = product.mul_(own)
            if shift is not None:
                means = _expand(shift * scale, per_level.readers, x)
                terms = terms.addcmul_(gradient, means, value=-1)
            of_weight = terms.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.flatten(0, -2).sum(0)
        of_x = (own if weight is None else own.mul_(weight)).mul_(gradient)
        if offset is not None:
            of_x = _add_expanded(of_x, -offset, per_level.members)
        of_x = of_x.addcmul_(y, _expand(_from_above(slope), per_level.members, x), value=-1)
        return of_x, of_weight, of_bias, None


def _from_above(values: Tensor) -> Tensor:
    """Sums over the levels s >= l: (..., n)."""
    return values.flip(-1).cumsum(-1).flip(-1)
