"""Prefix norm: forward against one ordinary norm per level, gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepping_plugin.nested.norm import prefix_norm

N, C = 4, 12
LEVELS = torch.tensor([1, 3, 1, 4, 5, 2, 2, 1, 4, 3, 5, 1])  # 5: spare
CASES = {  # shape, normalised axes, channel axis, shape of the affine parameters
    "layer norm": ((2, 5, C), [2], 2, (C,)),
    "channels first": ((2, C, 3, 4), [1], 1, (C, 1, 1)),
    "one group": ((2, C, 3, 4), [1, 2, 3], 1, (C, 1, 1)),
    "affine per position": ((2, 3, C), [1, 2], 2, (3, C)),
}


def case(name: str, affine: bool, centred: bool) -> tuple[Tensor, list[int], int, Tensor | None, Tensor | None]:
    shape, axes, channel_axis, parameters = CASES[name]
    x = torch.randn(shape, dtype=torch.float64) + 3
    weight = torch.randn(parameters, dtype=torch.float64) if affine else None
    bias = torch.randn(parameters, dtype=torch.float64) if affine and centred else None
    return x, axes, channel_axis, weight, bias


def one_norm_per_level(x: Tensor, axes, channel_axis, weight, bias, centred) -> Tensor:
    """A channel of level l from the norm over the channels of levels <= l; spare ones read level N."""
    result = torch.zeros_like(x)
    for level in range(1, N + 1):
        members = (level >= LEVELS).nonzero().flatten()
        inside = x.index_select(channel_axis, members)
        mean = inside.mean(axes, keepdim=True) if centred else torch.zeros(())
        variance = (inside - mean).square().mean(axes, keepdim=True)
        own = (LEVELS.clamp(max=N) == level).view([-1 if a == channel_axis else 1 for a in range(x.dim())])
        result = torch.where(own, (x - mean) / torch.sqrt(variance + 1e-5), result)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "rms"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_every_level_has_a_norm_of_its_own(name, affine, centred):
    x, axes, channel_axis, weight, bias = case(name, affine, centred)
    expected = one_norm_per_level(x, axes, channel_axis, weight, bias, centred)
    given = (LEVELS, N, axes, channel_axis, weight, bias, 1e-5, centred)
    torch.testing.assert_close(prefix_norm(x, *given), expected, rtol=0, atol=1e-12)
    with_gradient = prefix_norm(x.requires_grad_(), *given)  # another code path
    torch.testing.assert_close(with_gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "rms"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_finite_differences(name, affine, centred):
    x, axes, channel_axis, weight, bias = case(name, affine, centred)
    tensors = [t.requires_grad_() for t in (x, weight, bias) if t is not None]

    def function(*given: Tensor) -> Tensor:
        parameters = [*given[1:], None, None][:2]
        return prefix_norm(given[0], LEVELS, N, axes, channel_axis, *parameters, 1e-5, centred)

    assert torch.autograd.gradcheck(function, tensors)


def test_half_precision_is_computed_in_float32():
    x, axes, channel_axis, weight, bias = case("layer norm", True, True)
    x, weight, bias = x.float() * 30, weight.float(), bias.float()
    given = (LEVELS, N, axes, channel_axis)
    rounded = x.bfloat16()
    expected = prefix_norm(rounded.float(), *given, weight, bias, 1e-5)
    half = prefix_norm(rounded, *given, weight.bfloat16(), bias.bfloat16(), 1e-5)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)
    with torch.autocast("cpu"):  # keeps float32, as torch's own layer norm does there
        mixed = prefix_norm(x, *given, weight, bias, 1e-5)
    torch.testing.assert_close(mixed, prefix_norm(x, *given, weight, bias, 1e-5), rtol=0, atol=0)
