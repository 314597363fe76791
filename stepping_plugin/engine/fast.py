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
    "ACTIVATIONS", "Activation", "add_into", "channels_last", "convolution", "in_place", "linear", "multiply_into",
    "pointwise",
]  # fmt: skip

Function = Callable[..., Any]
aten = torch.ops.aten

# oneDNN starts a product more slowly than BLAS (12 us) and runs it faster, with the activation most of all.
_MANY_MACS, _MANY_MACS_ACTIVE = 5_000_000, 2_000_000
_FEW_OUTPUTS, _MANY_ROWS = 16, 768  # BLAS is slow at long and narrow results
_MANY_NUMBERS = 750_000  # putting more than 3 MB together costs more than several products that are added

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
    product, pack = torch.ops.mkldnn._linear_pointwise.default._op, torch.ops.mkldnn._reorder_linear_weight.default._op
    name, algorithm, rest = _split(activation)
    few_rows = (_MANY_MACS if rest is activation else _MANY_MACS_ACTIVE) // max(1, weight.numel())
    if len(weight) < _FEW_OUTPUTS:
        few_rows = min(few_rows, _MANY_ROWS)
    nothing: list[float] = []
    packed: list[Tensor] = []

    def rows(x: Tensor) -> Tensor:
        if x.shape[0] < few_rows:
            return blas(x)
        if not packed:
            packed.append(pack(weight, len(x)))
        y = product(x, packed[0], bias, name, nothing, algorithm)
        return y if rest is None else rest(y)

    return rows


def _sum_of_products(weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Function:
    """`_rows` of tensors side by side, (M, k1), (M, k2), ..., in float32 on the CPU, that are not put together."""
    divided: list[list[Tensor]] = []  # when the widths are known

    def rows(parts: list[Tensor]) -> Tensor:
        if not divided:
            divided.append([w.contiguous() for w in weight.split([x.shape[1] for x in parts], 1)])
        first, *further = divided[0]
        y = torch.ops.mkldnn._linear_pointwise.default._op(parts[0], first, bias, "none", [], "")
        for x, w in zip(parts[1:], further, strict=True):
            if len(w) <= w.shape[1]:
                y = torch.ops.mkldnn._linear_pointwise.binary._op(x, y, w, None, "add")
            else:  # BLAS adds to wide results in place
                y.addmm_(x, w.t())
        return y if activation is None else activation(y)

    return rows


def _of_rows(
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    one_dnn: bool,
    pieces: int,
    axis: int,
    flat: Callable[[Tensor, int], Tensor],
    unflat: Callable[[Tensor, Tensor], Tensor],
) -> Function:
    """A linear layer on one axis, of one tensor or of `pieces` side by side on it.

    Args:
        axis: of the channels.
        flat: (x, K) -> rows (M, K).
        unflat: (rows (M, N), x) -> the result, of x's shape but for the channels.
    """
    rows, inputs = _rows(weight, bias, activation, one_dnn), weight.shape[1]
    apart = _sum_of_products(weight, bias, activation)

    def single(x: Tensor) -> Tensor:
        return unflat(rows(flat(x, inputs)), x)

    def joined(*parts: Tensor) -> Tensor:
        if not one_dnn or sum(map(Tensor.numel, parts)) < _MANY_NUMBERS:
            return single(torch.cat(parts, axis))
        return unflat(apart([flat(x, x.shape[axis]) for x in parts]), parts[0])

    return single if pieces == 1 else joined


def linear(
    weight: Tensor, bias: Tensor | None, activation: Activation | None, one_dnn: bool, pieces: int = 1
) -> Function:
    """Linear layer on the last axis, of one tensor or of `pieces` side by side."""
    outputs = len(weight)

    def flat(x: Tensor, inputs: int) -> Tensor:
        return x if x.dim() == 2 else x.reshape(-1, inputs)

    def unflat(y: Tensor, x: Tensor) -> Tensor:
        return y if x.dim() == 2 else y.view(*x.shape[:-1], outputs)

    return _of_rows(weight, bias, activation, one_dnn, pieces, -1, flat, unflat)


def pointwise(
    weight: Tensor, bias: Tensor | None, activation: Activation | None, one_dnn: bool, pieces: int = 1
) -> Function:
    """Convolution with a 1x1 kernel, given as a weight (N, K), of one image or of `pieces` channel behind channel."""
    outputs = len(weight)

    def flat(x: Tensor, inputs: int) -> Tensor:
        return x.permute(0, 2, 3, 1).reshape(-1, inputs)

    def unflat(y: Tensor, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        return y.view(batch, height, width, outputs).permute(0, 3, 1, 2)

    return _of_rows(weight, bias, activation, one_dnn, pieces, 1, flat, unflat)


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


def _linear_flops(x: tuple, *_: Any, out_shape: tuple, **__: Any) -> int:
    return 2 * math.prod(out_shape) * x[-1]


def _convolution_flops(x: tuple, weight: tuple, *_: Any, out_shape: tuple, **__: Any) -> int:
    """Every result is a sum over one row of the weight."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _accumulating_flops(y: tuple, x: tuple, *_: Any, out_shape: tuple, **__: Any) -> int:
    return 2 * math.prod(out_shape) * x[-1]


def _teach_flop_counter() -> None:
    """`torch.utils.flop_counter` overlooks these operators; with formulas for them it counts all a session executes."""
    formulas: dict[Any, Any] = {aten.addmm_: _accumulating_flops}
    if torch.backends.mkldnn.is_available():
        one_dnn = torch.ops.mkldnn
        formulas |= {one_dnn._linear_pointwise: _linear_flops, one_dnn._convolution_pointwise: _convolution_flops}
    for operator, formula in formulas.items():
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)


_teach_flop_counter()
