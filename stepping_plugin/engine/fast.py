"""Functions that running step programs call in place of ATen operators: constants bound, layout and kernel chosen.

Images are laid out as (B, H, W, C), so that a convolution with a 1x1 kernel is a matrix product. In float32 on the
CPU convolutions and large products go to oneDNN; elsewhere the same functions call ATen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

__all__ = [
    "ACTIVATIONS", "Activation", "add_into", "channels_last", "convolution", "in_place", "joined_linear",
    "joined_pointwise", "linear", "multiply_into", "pointwise",
]  # fmt: skip

Function = Callable[..., Any]
aten = torch.ops.aten

_MANY_ROWS = 768  # oneDNN starts a product more slowly than BLAS (12 us), and then runs it faster

# Activations: operator -> (oneDNN's name or None, in-place form). oneDNN's relu, hardtanh and hardsigmoid turn NaN
# into a number, so they are not used: a broken image must not get a plausible answer.
ACTIVATIONS: dict[Any, tuple[str | None, Function]] = {
    aten.gelu.default: ("gelu", aten.gelu_.default),
    aten.hardsigmoid.default: (None, aten.hardsigmoid_.default),
    aten.hardswish.default: ("hardswish", aten.hardswish_.default),
    aten.hardtanh.default: (None, aten.hardtanh_.default),
    aten.leaky_relu.default: (None, aten.leaky_relu_.default),
    aten.relu.default: (None, torch.relu_),
    aten.sigmoid.default: ("sigmoid", torch.sigmoid_),
    aten.silu.default: ("swish", aten.silu_.default),
    aten.tanh.default: ("tanh", torch.tanh_),
}


class Activation:
    """An activation behind a kernel.

    Args:
        target: a key of `ACTIVATIONS`.
        args, kwargs: of its call, without the input.
    """

    def __init__(self, target: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        self.name, self._function = ACTIVATIONS[target]
        self._args, self._kwargs = args, kwargs or {}
        self.algorithm = self._kwargs.get("approximate", "none") if self.name == "gelu" else ""

    def __call__(self, x: Tensor) -> Tensor:
        """In place."""
        return self._function(x, *self._args, **self._kwargs)


def _split(activation: Activation | None) -> tuple[str, str, Function | None]:
    """What oneDNN applies itself (name and algorithm), and what is left to do."""
    if activation is not None and activation.name is not None:
        return activation.name, activation.algorithm, None
    return "none", "", activation


def in_place(activation: Activation) -> Function:
    """An activation of a tensor that is not needed any more."""

    def activate(x: Tensor) -> Tensor:
        return activation(x)

    return activate


def channels_last(images: Tensor) -> Tensor:
    """Images (B, C, H, W) laid out as (B, H, W, C)."""
    return images.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------- products


def _rows(weight: Tensor, bias: Tensor | None, activation: Activation | None, one_dnn: bool) -> Function:
    """Linear layer of rows (M, K) -> (M, N) with a weight (N, K)."""
    columns, after = weight.t(), activation

    def blas(x: Tensor) -> Tensor:
        y = torch.mm(x, columns) if bias is None else torch.addmm(bias, x, columns)
        return y if after is None else after(y)

    if not one_dnn:
        return blas
    product = torch.ops.mkldnn._linear_pointwise.default._op
    name, algorithm, rest = _split(activation)
    nothing: list[float] = []

    def rows(x: Tensor) -> Tensor:
        if x.shape[0] < _MANY_ROWS:
            return blas(x)
        y = product(x, weight, bias, name, nothing, algorithm)
        return y if rest is None else rest(y)

    return rows


def _joined_rows(weight: Tensor, bias: Tensor | None, activation: Activation | None, one_dnn: bool) -> Function:
    """`_rows` of two tensors side by side, (M, K - k) and (M, k), without putting them together."""
    parts: list[tuple[Function, Tensor]] = []  # made when k is known

    def rows(x: Tensor, added: Tensor) -> Tensor:
        if not parts:
            first = _rows(weight[:, : x.shape[1]].contiguous(), bias, None, one_dnn)
            parts.append((first, weight[:, x.shape[1] :].contiguous().t()))
        first, columns = parts[0]
        y = first(x).addmm_(added, columns)
        return y if activation is None else activation(y)

    return rows


def linear(weight: Tensor, bias: Tensor | None, activation: Activation | None, one_dnn: bool) -> Function:
    """Linear layer on the last axis."""
    rows, (outputs, inputs) = _rows(weight, bias, activation, one_dnn), weight.shape

    def linear(x: Tensor) -> Tensor:
        if x.dim() == 2:
            return rows(x)
        return rows(x.reshape(-1, inputs)).view(*x.shape[:-1], outputs)

    return linear


def joined_linear(weight: Tensor, bias: Tensor | None, activation: Activation | None, one_dnn: bool) -> Function:
    """Linear layer of two tensors side by side on the last axis."""
    rows = _joined_rows(weight, bias, activation, one_dnn)

    def linear(x: Tensor, added: Tensor) -> Tensor:
        y = rows(x.reshape(-1, x.shape[-1]), added.reshape(-1, added.shape[-1]))
        return y.view(*x.shape[:-1], weight.shape[0])

    return linear


def pointwise(weight: Tensor, bias: Tensor | None, activation: Activation | None, one_dnn: bool) -> Function:
    """Convolution with a 1x1 kernel, given as a weight (N, K)."""
    rows, (outputs, inputs) = _rows(weight, bias, activation, one_dnn), weight.shape

    def pointwise(x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        y = rows(x.permute(0, 2, 3, 1).reshape(-1, inputs))
        return y.view(batch, height, width, outputs).permute(0, 3, 1, 2)

    return pointwise


def joined_pointwise(weight: Tensor, bias: Tensor | None, activation: Activation | None, one_dnn: bool) -> Function:
    """Convolution with a 1x1 kernel of two images, one channel behind the other."""
    joined = joined_linear(weight, bias, activation, one_dnn)

    def pointwise(x: Tensor, added: Tensor) -> Tensor:
        return joined(x.permute(0, 2, 3, 1), added.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return pointwise


# ------------------------------------------------------------------------------------------------- convolutions


def convolution(
    weight: Tensor, bias: Tensor | None, activation: Activation | None, one_dnn: bool,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Function:  # fmt: skip
    """Two-dimensional convolution. oneDNN gets its weight packed when the size of the images is known."""
    if not one_dnn:
        ordered, after = weight.contiguous(memory_format=torch.channels_last), activation

        def aten_convolution(x: Tensor) -> Tensor:
            y = torch.conv2d(x, ordered, bias, stride, padding, dilation, groups)
            return y if after is None else after(y)

        return aten_convolution
    product, pack = (
        torch.ops.mkldnn._convolution_pointwise.default._op,
        torch.ops.mkldnn._reorder_convolution_weight.default._op,
    )
    name, algorithm, rest = _split(activation)
    nothing: list[float] = []
    packed: list[Tensor] = []

    def one_dnn_convolution(x: Tensor) -> Tensor:
        if not packed:
            packed.append(pack(weight, padding, stride, dilation, groups, list(x.shape)))
        y = product(x, packed[0], bias, padding, stride, dilation, groups, name, nothing, algorithm)
        return y if rest is None else rest(y)

    return one_dnn_convolution


# ------------------------------------------------------------------------------------------------- elementwise


def _fits(x: Tensor, other: Tensor) -> bool:
    """Whether x may hold the result of an elementwise operator of both."""
    if x.dtype != other.dtype:
        return False
    if x.shape == other.shape:
        return True
    return x.dim() >= other.dim() and all(o in (1, s) for o, s in zip(other.shape[::-1], x.shape[::-1]))


def add_into(x: Tensor, other: Tensor) -> Tensor:
    """x + other; x is not needed any more."""
    return x.add_(other) if _fits(x, other) else torch.add(x, other)


def multiply_into(x: Tensor, other: Tensor) -> Tensor:
    """x * other; x is not needed any more."""
    return x.mul_(other) if _fits(x, other) else torch.mul(x, other)


# ------------------------------------------------------------------------------------------------- counting


def _product_flops(x: tuple, weight: tuple, *_: Any, out_shape: tuple, **__: Any) -> int:
    """Of oneDNN's linear layers and convolutions: every result is a sum over one row of the weight."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _accumulating_flops(y: tuple, x: tuple, *_: Any, out_shape: tuple, **__: Any) -> int:
    return 2 * math.prod(out_shape) * x[-1]


def _teach_flop_counter() -> None:
    """`torch.utils.flop_counter` overlooks these operators; with formulas for them it counts all a session executes."""
    formulas: dict[Any, Any] = {aten.addmm_: _accumulating_flops}
    if torch.backends.mkldnn.is_available():
        one_dnn = torch.ops.mkldnn
        formulas |= dict.fromkeys((one_dnn._linear_pointwise, one_dnn._convolution_pointwise), _product_flops)
    for operator, formula in formulas.items():
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)


_teach_flop_counter()
