"""Ridge regression from sums: many targets on the same inputs, some of which a target may not read.

The sums are taken block by block in float64, so that memory depends on the number of inputs and targets, not on the
number of samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..graph.program import call_arg, op_name

__all__ = ["Moments", "Solver", "Windows"]

BLOCK = 1 << 24  # numbers of one block of inputs
TINY = 1e-10  # ridge, relative, that keeps a singular system solvable


class Moments:
    """First and second moments of inputs and targets.

    Args:
        groups: G, systems side by side (groups of a convolution).
        inputs: D, inputs of one system.
        targets: P, targets of one system.
        centred: an intercept is fitted, too: moments are taken around the means.
    """

    def __init__(self, groups: int, inputs: int, targets: int, centred: bool, device: torch.device) -> None:
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)  # noqa: E731
        self.rows, self.centred = 0, centred
        self._xx, self._xt, self._tt = (
            zeros(groups, inputs, inputs),
            zeros(groups, inputs, targets),
            zeros(groups, targets),
        )
        self._x, self._t = zeros(groups, inputs), zeros(groups, targets)

    def add(self, x: Tensor, t: Tensor) -> None:
        """Add samples: inputs (rows, G, D) and targets (rows, G, P).

        Products of one block are taken in the precision of x, and their sums in float64.
        """
        x = x.movedim(1, 0)
        self._xx += x.transpose(1, 2) @ x
        self._x += x.sum(1, dtype=torch.float64)
        self.rows += x.shape[1]
        self._add_targets(x, t.movedim(1, 0).to(x.dtype))

    def replace(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Other targets for the same samples, given as to `add`."""
        for sums in (self._xt, self._tt, self._t):
            sums.zero_()
        for x, t in pairs:
            self._add_targets(x.movedim(1, 0), t.movedim(1, 0).to(x.dtype))

    def _add_targets(self, x: Tensor, t: Tensor) -> None:
        self._xt += x.transpose(1, 2) @ t
        self._tt += t.square().sum(1, dtype=torch.float64)
        self._t += t.sum(1, dtype=torch.float64)

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return all(bool(s.isfinite().all()) for s in (self._xx.diagonal(dim1=1, dim2=2), self._tt, self._xt))

    @property
    def input_means(self) -> Tensor:
        """(G, D)."""
        return self._x / self.rows

    @property
    def target_means(self) -> Tensor:
        """(G, P)."""
        return self._t / self.rows

    @property
    def covariance(self) -> Tensor:
        """Of the inputs, (G, D, D)."""
        means = self.input_means
        return self._xx / self.rows - means[:, :, None] * means[:, None, :]

    def system(self, inputs: Tensor) -> Tensor:
        """Matrix of the normal equations for some inputs, (G, d, d)."""
        matrix = self._xx[:, inputs[:, None], inputs] / self.rows
        if self.centred:
            means = self.input_means[:, inputs]
            matrix -= means[:, :, None] * means[:, None, :]
        return matrix

    def right_side(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Right side of the normal equations, (G, d, p)."""
        right = self._xt[:, inputs[:, None], targets] / self.rows
        if self.centred:
            right -= self.input_means[:, inputs, None] * self.target_means[:, None, targets]
        return right

    def intercept(self, weights: Tensor) -> Tensor:
        """(G, P) for weights (G, P, D); 0 where none is fitted."""
        predicted = (weights @ self.input_means[:, :, None]).squeeze(2)
        return self.target_means - predicted if self.centred else torch.zeros_like(predicted)

    def error(self, weights: Tensor) -> Tensor:
        """Mean square error of every target (G, P), of weights (G, P, D) and their intercept."""
        fit = (weights @ self._xx * weights).sum(2) - 2 * (weights * self._xt.transpose(1, 2)).sum(2)
        return ((fit + self._tt) / self.rows - self.intercept(weights).square()).clamp(min=0)


class Solver:
    """Least squares on some inputs, factorised once, for targets that may be replaced.

    Args:
        moments: the sums.
        inputs: LongTensor (d,), which inputs may be read.
        ridge: pull towards the prior, relative to the mean square of those inputs.
    """

    def __init__(self, moments: Moments, inputs: Tensor, ridge: float) -> None:
        self.moments, self.inputs = moments, inputs
        system = moments.system(inputs)
        size = system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float64).tiny)
        system.diagonal(dim1=1, dim2=2).add_(max(ridge, TINY) * size[:, None])
        self.factor, failed = torch.linalg.cholesky_ex(system)
        self.inverse = _pseudo_inverse(system) if bool(failed.any()) else None

    def solve(self, prior: Tensor, targets: Tensor) -> Tensor:
        """Weights (G, p, d) that minimise error + ridge * squared distance from the prior (G, p, d).

        Args:
            prior: weights to stay near.
            targets: LongTensor (p,), indices.
        """
        prior = prior.transpose(1, 2).double()
        rest = self.moments.right_side(self.inputs, targets) - self.moments.system(self.inputs) @ prior
        step = torch.cholesky_solve(rest, self.factor) if self.inverse is None else self.inverse @ rest
        return (prior + step).transpose(1, 2)


def _pseudo_inverse(system: Tensor) -> Tensor:
    """For a matrix that rounding has made indefinite."""
    values, vectors = torch.linalg.eigh(system)
    kept = values > values.amax(1, keepdim=True) * TINY
    inverse = torch.where(kept, 1 / values.clamp(min=torch.finfo(torch.float64).tiny), 0)
    return (vectors * inverse[:, None, :]) @ vectors.transpose(1, 2)


class Windows:
    """What a linear or convolution reads for each of its outputs, as rows of a matrix.

    Args:
        node: the operator.
    """

    def __init__(self, node: fx.Node) -> None:
        name = op_name(node)
        self.linear = name == "linear"
        weight: tuple[int, ...] = node.args[1].meta["shape"]  # type: ignore[union-attr]
        self.groups = 1 if self.linear else call_arg(node, "groups", 1)
        self.inputs = weight[1]
        for size in weight[2:]:
            self.inputs *= size
        self.targets = weight[0] // self.groups
        self.supported = self.linear or name in ("conv1d", "conv2d", "conv1d.padding", "conv2d.padding")
        if self.supported and not self.linear:
            rank = len(weight) - 2
            self.kernel = _pair(list(weight[2:]), 1)
            self.stride = _pair(_spread(call_arg(node, "stride"), rank), 1)
            self.dilation = _pair(_spread(call_arg(node, "dilation"), rank), 1)
            self.padding = _padding(call_arg(node, "padding"), rank, self.kernel, self.dilation)

    def positions(self, target: Tensor) -> int:
        """Samples in one image of an output."""
        return target.shape[1:-1].numel() if self.linear else target.shape[2:].numel()

    def blocks(self, x: Tensor, targets: list[Tensor], chosen: Tensor | None = None) -> Iterator[list[Tensor]]:
        """Inputs (rows, G, D) and values that belong to outputs (rows, G, P), some samples at a time.

        Args:
            x: input of the operator.
            targets: of the shape of its output.
            chosen: positions of every image to take; all by default.
        """
        step = max(1, BLOCK // max(1, self.positions(targets[0]) * self.groups * self.inputs))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            rows = [self._rows(x[part]), *(self._targets(t[part]) for t in targets)]
            if chosen is not None:
                rows = [r.index_select(1, chosen) for r in rows]
            yield [r.reshape(-1, self.groups, r.shape[-1] // self.groups) for r in rows]

    def _rows(self, x: Tensor) -> Tensor:
        """(B, positions, G * D)."""
        if self.linear:
            return x.reshape(len(x), -1, self.inputs)
        x = x.unsqueeze(2) if x.dim() == 3 else x
        x = F.pad(x, self.padding)
        return F.unfold(x, tuple(self.kernel), dilation=tuple(self.dilation), stride=tuple(self.stride)).transpose(1, 2)

    def _targets(self, target: Tensor) -> Tensor:
        """(B, positions, G * P)."""
        if self.linear:
            return target.reshape(len(target), -1, target.shape[-1])
        return target.flatten(2).transpose(1, 2)


def _spread(value: list[int], rank: int) -> list[int]:
    return list(value) * rank if len(value) == 1 else list(value)


def _pair(value: list[int], filling: int) -> list[int]:
    return [filling] * (2 - len(value)) + list(value)


def _padding(given: str | list[int], rank: int, kernel: list[int], dilation: list[int]) -> list[int]:
    """Amounts for `torch.nn.functional.pad`: left, right, top, bottom."""
    if isinstance(given, str):
        total = [d * (k - 1) if given == "same" else 0 for k, d in zip(kernel, dilation)]
        pairs = [(t // 2, t - t // 2) for t in total]
    else:
        pairs = [(p, p) for p in _pair(_spread(given, rank), 0)]
    return [*pairs[1], *pairs[0]]
