"""Composite operators written out in elementary ones, so that the rules of those cover them.

A hidden channel of an LSTM reads the inputs and the hidden channels of its own or a lower level: both of its weights
are ordinary weights between units, and the four gates of a channel are one unit. The unrolled graph grows with the
number of time steps. An einsum is a product of two tensors with permuted axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["DECOMPOSITIONS"]


def lstm(
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten.lstm.input` in elementary operators.

    Args:
        x: (B, T, I) if `batch_first`, else (T, B, I).
        hx: hidden and cell state, (layers * directions, B, H) each.
        params: per layer and direction w_ih (4H, I), w_hh (4H, H) and, with biases, b_ih and b_hh (4H,).

    Returns:
        Outputs (B, T, directions * H) or (T, B, ...), last hidden and last cell states.
    """
    directions, each, time = 1 + bidirectional, 4 if has_biases else 2, int(batch_first)
    if len(params) != num_layers * directions * each:
        raise NotImplementedError("LSTM with proj_size")
    hidden, cells = [], []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            w_ih, w_hh, *biases = params[k * each : (k + 1) * each]
            b_ih, b_hh = biases or (None, None)
            result, h, c = _one_direction(x, hx[0][k], hx[1][k], w_ih, w_hh, b_ih, b_hh, time, bool(direction))
            outputs.append(result)
            hidden.append(h)
            cells.append(c)
        x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout, train)
    return x, torch.stack(hidden), torch.stack(cells)


def _one_direction(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    time: int,
    backwards: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    steps, size = x.shape[time], w_hh.shape[1]
    from_inputs = F.linear(x, w_ih, b_ih)
    # The initial state gets the units of the hidden channels from the tensors that it is added to.
    nothing = torch.zeros_like(from_inputs.select(time, 0)[..., :size])
    h, c = h + nothing, c + nothing
    outputs: list[Tensor] = []
    for t in reversed(range(steps)) if backwards else range(steps):
        gates = from_inputs.select(time, t) + F.linear(h, w_hh, b_hh)
        enter, forget, new, out = (gates[..., k * size : (k + 1) * size] for k in range(4))
        c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
        h = torch.sigmoid(out) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs[::-1] if backwards else outputs, time), h, c


def einsum(equation: str, operands: Sequence[Tensor], *, path: Any = None) -> Tensor:
    """`aten.einsum` of two operands as one `matmul`; anything else stays an einsum.

    Axes of the first operand alone stay axes of the product, so that units on one of them stay on it.
    """
    terms, _, result = equation.replace(" ", "").partition("->")
    if len(operands) != 2 or not result or any(len(set(t)) < len(t) or "." in t for t in (*terms.split(","), result)):
        return NotImplemented
    first, second = terms.split(",")
    shared = [k for k in first if k in second and k in result]
    summed = [k for k in first if k in second and k not in result]
    rows = [k for k in first if k not in second]
    columns = [k for k in second if k not in first]
    if not summed or any(k not in result for k in rows + columns):
        return NotImplemented
    size = {k: s for t, operand in zip((first, second), operands) for k, s in zip(t, operand.shape)}
    a = operands[0].permute([first.index(k) for k in shared + rows + summed])
    b = operands[1].permute([second.index(k) for k in shared + summed + columns])
    depth, width = math.prod(size[k] for k in summed), math.prod(size[k] for k in columns)
    if len(summed) > 1:
        a = a.reshape([size[k] for k in shared + rows] + [depth])
    if not rows:
        a = a.unsqueeze(-2)
    b = b.reshape([size[k] for k in shared] + [1] * (len(rows) - 1) + [depth, width])
    product = (a @ b).reshape([size[k] for k in shared + rows + columns])
    order = shared + rows + columns
    return product.permute([order.index(k) for k in result])


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """`aten.glu`: the first half of an axis, gated by the second. A value and its gate become one unit."""
    value, gate = x.chunk(2, dim)
    return value * torch.sigmoid(gate)


aten = torch.ops.aten
DECOMPOSITIONS: dict[Any, Callable] = {aten.lstm.input: lstm, aten.einsum.default: einsum, aten.glu.default: glu}
