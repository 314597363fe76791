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
    options = has_biases, num_layers, dropout, train, bidirectional, batch_first
    x, (hidden, cells) = _recurrent(_lstm_cell, 4, x, list(hx), params, *options)
    return x, hidden, cells


def recurrent(cell: Cell, gates: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """`aten.gru.input` and `aten.rnn_*.input` in elementary operators: arguments of `lstm`, with one state."""

    def unrolled(x: Tensor, hx: Tensor, params: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
        x, (hidden,) = _recurrent(cell, gates, x, [hx], params, *options)
        return x, hidden

    return unrolled


# One time step: input gates, state (hidden first), the recurrent layer -> new state.
Cell = Callable[[Tensor, list[Tensor], Callable[[Tensor], Tensor]], list[Tensor]]


def _lstm_cell(x: Tensor, state: list[Tensor], layer: Callable[[Tensor], Tensor]) -> list[Tensor]:
    h, c = state
    enter, forget, new, out = _gates(x + layer(h), 4)
    c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
    return [torch.sigmoid(out) * torch.tanh(c), c]


def _gru_cell(x: Tensor, state: list[Tensor], layer: Callable[[Tensor], Tensor]) -> list[Tensor]:
    (h,) = state
    reset, update, new = _gates(x, 3)
    own_reset, own_update, own_new = _gates(layer(h), 3)
    kept = torch.sigmoid(update + own_update)
    candidate = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
    return [(1 - kept) * candidate + kept * h]


def _tanh_cell(x: Tensor, state: list[Tensor], layer: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [torch.tanh(x + layer(state[0]))]


def _relu_cell(x: Tensor, state: list[Tensor], layer: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [torch.relu(x + layer(state[0]))]


def _gates(x: Tensor, count: int) -> list[Tensor]:
    size = x.shape[-1] // count
    return [x[..., k * size : (k + 1) * size] for k in range(count)]


def _recurrent(
    cell: Cell, gates: int, x: Tensor, states: list[Tensor], params: Sequence[Tensor], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """All layers and directions of a recurrent network: outputs, and per kind of state the last ones, stacked."""
    directions, each, time = 1 + bidirectional, 4 if has_biases else 2, int(batch_first)
    if len(params) != num_layers * directions * each:
        raise NotImplementedError("LSTM with proj_size")
    last: list[list[Tensor]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            weights = params[k * each : (k + 1) * each]
            result, state = _one_direction(cell, gates, x, [s[k] for s in states], weights, time, bool(direction))
            outputs.append(result)
            last.append(state)
        x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout, train)
    return x, [torch.stack(kind) for kind in zip(*last)]


def _one_direction(
    cell: Cell, gates: int, x: Tensor, state: list[Tensor], weights: Sequence[Tensor], time: int, backwards: bool
) -> tuple[Tensor, list[Tensor]]:
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    steps = x.shape[time]
    from_inputs = F.linear(x, w_ih, b_ih)
    # The initial state gets the units of the hidden channels from the tensors that it is added to.
    nothing = torch.zeros_like(_gates(from_inputs.select(time, 0), gates)[0])
    state = [s + nothing for s in state]
    outputs: list[Tensor] = []
    for t in reversed(range(steps)) if backwards else range(steps):
        state = cell(from_inputs.select(time, t), state, lambda h: F.linear(h, w_hh, b_hh))
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs, time), state


def single_step(cell: Cell, gates: int) -> Callable[..., Any]:
    """`aten.lstm_cell`, `aten.gru_cell`, `aten.rnn_*_cell`: one time step (B, I) with the state of the user's loop."""

    def step(
        x: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        from_inputs = F.linear(x, w_ih, b_ih)
        nothing = torch.zeros_like(_gates(from_inputs, gates)[0])
        state = [s + nothing for s in ([hx] if isinstance(hx, Tensor) else hx)]
        result = cell(from_inputs, state, lambda h: F.linear(h, w_hh, b_hh))
        return result[0] if isinstance(hx, Tensor) else tuple(result)

    return step


def einsum(equation: str, operands: Sequence[Tensor], *, path: Any = None) -> Tensor:
    """`aten.einsum` of two operands as one `matmul`; anything else stays an einsum.

    Axes of the first operand alone stay axes of the product, so that units on one of them stay on it.
    """
    terms, _, result = equation.replace(" ", "").partition("->")
    if len(operands) == 1 and result and "." not in equation and len(set(terms)) == len(terms):
        summed = [k for k, letter in enumerate(terms) if letter not in result]
        kept = [letter for letter in terms if letter in result]
        total = operands[0].sum(summed) if summed else operands[0]
        return total.permute([kept.index(letter) for letter in result])
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
    b = b.reshape([size[k] for k in shared] + [1] * (len(rows) - 1 if shared else 0) + [depth, width])
    product = (a @ b).reshape([size[k] for k in shared + rows + columns])
    order = shared + rows + columns
    return product.permute([order.index(k) for k in result])


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """`aten.glu`: the first half of an axis, gated by the second. A value and its gate become one unit."""
    value, gate = x.chunk(2, dim)
    return value * torch.sigmoid(gate)


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`aten.addmm` and `aten.baddbmm`: a product and a sum."""
    product = a @ b if alpha == 1 else (a @ b) * alpha
    return product + (bias if beta == 1 else bias * beta)


def bilinear(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`aten.bilinear`: a linear layer (..., I) -> (..., O, J), and its product with b (..., J)."""
    outputs, first, second = weight.shape
    rows = a @ weight.permute(1, 0, 2).reshape(first, outputs * second)
    result = (rows.reshape([*rows.shape[:-1], outputs, second]) @ b.unsqueeze(-1)).squeeze(-1)
    return result if bias is None else result + bias


def slice_scatter(
    x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """`aten.slice_scatter`, an assignment to a slice: what lies before it, the new values, what lies behind."""
    if step != 1:
        return NotImplemented
    first, last, _ = slice(start, end).indices(x.shape[dim])
    pieces = [x.narrow(dim, 0, first), source, x.narrow(dim, last, x.shape[dim] - last)]
    return torch.cat([p for p in pieces if p.shape[dim]], dim)


def select_scatter(x: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    """`aten.select_scatter`, an assignment to one place of an axis."""
    place = index % x.shape[dim]
    return slice_scatter(x, source.unsqueeze(dim), dim, place, place + 1)


def variance(x: Tensor, dim: Sequence[int] | None, unbiased: bool = True, keepdim: bool = False) -> Tensor:
    """`aten.var.dim` in the form that has a rule."""
    return torch.var(x, dim, correction=int(unbiased), keepdim=keepdim)


def deviation(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    """`aten.std.correction`: the root of a variance."""
    return torch.var(x, dim, correction=1 if correction is None else correction, keepdim=keepdim).sqrt()


def vector_norm(
    x: Tensor,
    ord: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`aten.linalg_vector_norm` as a sum or an extreme; the L2 norm has a rule of its own."""
    if ord in (0, 2) or dtype is not None:
        return NotImplemented
    axes = list(range(x.dim())) if dim is None else list(dim)
    size = x.abs()
    if math.isinf(ord):
        return size.amax(axes, keepdim) if ord > 0 else size.amin(axes, keepdim)
    return size.sum(axes, keepdim) if ord == 1 else size.pow(ord).sum(axes, keepdim).pow(1 / ord)


def logsumexp(x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    """`aten.logsumexp`: a maximum, which is taken out for precision, and a sum."""
    largest = x.amax(dim, True)
    total = (x - largest).exp().sum(dim, True).log() + largest
    return total if keepdim else total.squeeze(dim)


aten = torch.ops.aten
DECOMPOSITIONS: dict[Any, Callable] = {
    aten.addmm.default: addmm,
    aten.baddbmm.default: addmm,
    aten.bilinear.default: bilinear,
    aten.einsum.default: einsum,
    aten.glu.default: glu,
    aten.gru.input: recurrent(_gru_cell, 3),
    aten.gru_cell.default: single_step(_gru_cell, 3),
    aten.linalg_vector_norm.default: vector_norm,
    aten.logsumexp.default: logsumexp,
    aten.lstm.input: lstm,
    aten.lstm_cell.default: single_step(_lstm_cell, 4),
    aten.max.other: torch.maximum,
    aten.min.other: torch.minimum,
    aten.mm.default: torch.matmul,
    aten.rnn_relu.input: recurrent(_relu_cell, 1),
    aten.rnn_relu_cell.default: single_step(_relu_cell, 1),
    aten.rnn_tanh.input: recurrent(_tanh_cell, 1),
    aten.rnn_tanh_cell.default: single_step(_tanh_cell, 1),
    aten.select_scatter.default: select_scatter,
    aten.slice_scatter.default: slice_scatter,
    aten.std.correction: deviation,
    aten.std.dim: lambda x, dim, unbiased=True, keepdim=False: variance(x, dim, unbiased, keepdim).sqrt(),
    aten.var.dim: variance,
}
