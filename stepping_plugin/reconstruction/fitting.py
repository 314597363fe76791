"""One fit: a layer, a norm or the classifier of a nested net is brought near the original's values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import SteppingError, explain
from ..graph.labels import Role
from ..graph.program import call_arg
from ..units.analysis import channel_axis, full_units
from ..units.levels import channel_levels
from .fits import LayerFit, NormFit
from .leastsquares import Moments, Solver
from .twins import Pair, Twins

__all__ = ["FittedLayer", "fit_layer", "fit_norm"]

SAMPLES = 20  # per unknown
LEAST = 1 << 14  # samples at least
ROUNDS = 3  # of a fit that a ReLU follows
FAINT = 1e-3  # branches with a smaller share of the largest factor are not made to carry what a sum lacks
FLOOR = 1e-3  # of the median factor of a norm: units that the norm nearly switches off are fitted behind it
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass
class FittedLayer:
    """One layer of a report.

    Attributes:
        r2: per level 1..N, the share of the variance of the original's values that the layer's units have, mean over
            units; None where there are none. What a ReLU would cut off does not count. The classifier has one value,
            for all subnets together.
        pictures, samples, unknowns: images and positions that were used; weights per unit.
        dead: channels of the original, in its own numbering, that are never above 0 before their ReLU.
        seconds: wall time.
    """

    name: str
    r2: list[float | None]
    samples: int
    unknowns: int
    dead: list[int] = field(default_factory=list)
    pictures: int = 0
    seconds: float = 0.0


# ------------------------------------------------------------------------------------------------- layers


def fit_layer(twins: Twins, fit: LayerFit, pairs: list[Pair], ridge: float, generator: torch.Generator) -> FittedLayer:
    """Fit a linear or convolution, and what follows it up to `fit.end`.

    Args:
        twins: the networks.
        fit: what to fit.
        pairs: batches, advanced as far as needed.
        ridge: see `reconstruct`.
        generator: chooses positions where there are more than needed.

    Raises:
        SteppingError: values overflow.
    """
    chain, windows = _Chain(twins, fit), fit.windows
    weight: Any = twins.tensors[fit.node.args[1].meta["tensor"]]  # type: ignore[union-attr]
    prior = weight.detach().reshape(windows.groups, windows.targets, -1).double() * chain.prior_factor
    moments = Moments(windows.groups, windows.inputs, windows.targets, chain.intercept, twins.like.device)
    samples, totals = _Samples(twins, fit, chain, pairs, generator), _Totals(fit.axis)
    for rows, aims, _ in samples.blocks(totals):
        moments.add(rows, aims)
    if not moments.finite:
        raise SteppingError(
            explain("not finite", where=fit.name, got="values that overflow", action="Check the original network.")
        )
    solvers = _solvers(twins, fit, moments, ridge)
    weights = _solve(solvers, prior)
    for _ in range(ROUNDS if fit.cut else 0):
        moments.replace(samples.cut(weights, moments.intercept(weights)))
        weights = _solve(solvers, prior)
    error = moments.error(weights).flatten() * chain.scale.square()
    chain.write(weight, weights, moments)
    return FittedLayer(
        fit.name,
        _r2(twins, fit, error, totals),
        moments.rows,
        windows.inputs,
        totals.dead(twins.inherited(fit.end)) if fit.cut else [],
    )


def _solvers(twins: Twins, fit: LayerFit, moments: Moments, ridge: float) -> list[tuple[Solver, Tensor]]:
    """Per level: least squares on the inputs that its targets may read, and those targets."""
    device = twins.like.device
    if fit.node.meta.get("role") != Role.CHANNELS:
        inputs, targets = (torch.arange(size, device=device) for size in (fit.windows.inputs, fit.windows.targets))
        return [(Solver(moments, inputs, ridge), targets)]
    source: Any = fit.node.args[0]
    read = channel_levels(twins.levels, full_units(source, channel_axis(source, fit.node))).to(device)
    outputs = twins.out_levels(fit).to(device)
    result = []
    for level in range(1, twins.n + 1):
        targets = (outputs == level).nonzero().flatten()
        inputs = (read <= level).repeat_interleave(fit.windows.inputs // len(read)).nonzero().flatten()
        if len(targets) and len(inputs):
            result.append((Solver(moments, inputs, ridge), targets))
    return result


def _solve(solvers: list[tuple[Solver, Tensor]], prior: Tensor) -> Tensor:
    """Weights (G, P, D), 0 at dead synapses; those of spare units stay as they are."""
    result = prior.clone()
    for solver, targets in solvers:
        result[:, targets] = 0
        result[:, targets[:, None], solver.inputs] = solver.solve(prior[:, targets[:, None], solver.inputs], targets)
    return result


def _r2(twins: Twins, fit: LayerFit | NormFit, error: Tensor, totals: _Totals) -> list[float | None]:
    """Per level, of the units whose values vary at all."""
    variance = totals.variance.cpu()
    r2 = 1 - error.cpu() / variance.clamp(min=1e-300)
    head = fit.node.meta.get("role") == Role.HEAD
    levels = twins.out_levels(fit)
    result: list[float | None] = []
    for level in [1] if head else range(1, twins.n + 1):
        own = (levels == level) & (variance > 0)
        result.append(float(r2[own].mean()) if bool(own.any()) else None)
    return result


class _Totals:
    """Mean, variance and maximum of a value per channel."""

    def __init__(self, axis: int) -> None:
        self.axis, self.rows = axis, 0
        self._sum: Any = 0
        self._square: Any = 0
        self.top: Any = float("-inf")

    def add(self, value: Tensor) -> None:
        rows = value.movedim(self.axis, -1).flatten(0, -2)
        self._sum = self._sum + rows.sum(0, dtype=torch.float64)
        self._square = self._square + rows.double().square().sum(0)
        self.top = rows.amax(0).clamp(min=self.top)
        self.rows += len(rows)

    @property
    def mean(self) -> Tensor:
        return self._sum / self.rows

    @property
    def square(self) -> Tensor:
        return self._square / self.rows

    @property
    def variance(self) -> Tensor:
        return (self.square - self.mean.square()).clamp(min=0)

    def dead(self, positions: Tensor | None) -> list[int]:
        """Channels that are never above 0, in the original's numbering."""
        channels = (self.top <= 0).nonzero().flatten()
        return sorted(set((channels if positions is None else positions[channels]).tolist()))


class _Samples:
    """Inputs and targets of a layer, block by block, the same ones as often as asked for."""

    def __init__(
        self, twins: Twins, fit: LayerFit, chain: _Chain, pairs: list[Pair], generator: torch.Generator
    ) -> None:
        self.twins, self.fit, self.chain, self.pairs, self.generator = twins, fit, chain, pairs, generator
        self.chosen: list[Tensor | None] = []

    def blocks(self, totals: _Totals | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Inputs (rows, G, D), targets (rows, G, P), and the targets that stand for a 0 in front of a ReLU."""
        for number, pair in enumerate(self.pairs):
            self.twins.advance(self.fit, pair)
            aim = self.twins.aim(self.fit, pair)
            if totals is not None:
                totals.add(aim)
            wanted = [self.chain.target(aim, pair)]
            if self.fit.cut:
                wanted.append(self.chain.target(torch.zeros_like(aim), pair))
            for x in self.twins.inputs(self.fit, pair):
                tensors = [_repeated(t, len(x)) for t in wanted]
                kept = self._live(x)
                if kept is not None:
                    x, *tensors = (t.index_select(self.fit.node.meta["axis"], kept) for t in (x, *tensors))
                if number == len(self.chosen):
                    self.chosen.append(self._choose(tensors[0]))
                for rows, aims, *zero in self.fit.windows.blocks(x, tensors, self.chosen[number]):
                    yield rows, aims, zero[0] if zero else None

    def cut(self, weights: Tensor, intercept: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Targets of a ReLU: where the original is below 0, whatever the fit has below 0 is as good.

        Fitting to these again lowers the error behind the ReLU in every round (its square is majorised).
        """
        sign = self.chain.scale.sign().reshape(self.fit.windows.groups, -1)
        for rows, aims, zero in self.blocks():
            fitted = torch.einsum("rgd,gpd->rgp", rows, weights.to(rows.dtype)) + intercept.to(rows.dtype)
            s = sign.to(rows.dtype)
            assert zero is not None
            yield rows, torch.where(s * aims > s * zero, aims, s * torch.minimum(s * fitted, s * zero))

    def _live(self, x: Tensor) -> Tensor | None:
        """Positions without spare units, where a weight is applied along another axis than theirs."""
        node = self.fit.node
        if node.meta.get("role") != Role.CARRIED:
            return None
        return (channel_levels(self.twins.levels, node.meta["units"]) <= self.twins.n).nonzero().flatten().to(x.device)

    def _choose(self, target: Tensor) -> Tensor | None:
        wanted = max(LEAST, SAMPLES * self.fit.windows.inputs)
        positions = self.fit.windows.positions(target)
        share = wanted / (len(self.pairs) * len(self.fit.calls) * len(target))
        if share >= positions:
            return None
        count = min(positions, int(share) + 1)
        return torch.randperm(positions, generator=self.generator)[:count].to(target.device)


def _repeated(value: Tensor, batch: int) -> Tensor:
    """For all subnets, where a classifier takes its inputs one below the other."""
    return value if len(value) == batch else value.repeat(batch // len(value), *[1] * (value.dim() - 1))


class _Chain:
    """What lies between a layer and where its fit ends.

    end = scale * (product with the weights) + shift + other summand, per channel.
    """

    def __init__(self, twins: Twins, fit: LayerFit) -> None:
        self.twins, self.fit = twins, fit
        ones = torch.ones(fit.node.meta["shape"][fit.axis], dtype=torch.float64, device=twins.like.device)
        bias = call_arg(fit.node, "bias")
        own = bias is not None and bias.op == "placeholder" and len(bias.users) == 1
        self.bias = 0 * ones if bias is None else twins.constant(bias)
        self.own_bias = twins.tensors.get(bias.meta["tensor"]) if own else None
        self.intercept = self.own_bias is not None or fit.norm is not None
        multiplier = ones
        for node in fit.scales:
            multiplier = multiplier * twins.constant(node).flatten()
        self.faint = multiplier.abs() < FAINT * multiplier.abs().max()
        self.factor, self.offset, self.prior_factor = ones, self.bias, ones.new_ones(1, 1, 1)
        if fit.norm is not None:
            self._read_norm(fit.norm)
        multiplier = torch.where(multiplier == 0, 1, multiplier)
        self.scale, self.shift = multiplier * self.factor, multiplier * self.offset

    def _read_norm(self, norm: fx.Node) -> None:
        parameters, eps = self.twins.parameters(norm, *_BATCH_NORM), call_arg(norm, "eps")
        factor, self.offset = _norm_line(parameters, eps, self.bias)
        usual = factor.abs().median()
        if float(usual) == 0:  # a branch that starts at 0, as residual nets are initialised
            usual = (parameters[3].double() + eps).rsqrt().median()
        least = FLOOR * usual
        self.factor = torch.where(factor.abs() < least, least, factor)
        self.prior_factor = (factor / self.factor).reshape(self.fit.windows.groups, -1, 1)

    def target(self, aim: Tensor, pair: Pair) -> Tensor:
        """What the product with the weights is to be."""
        if self.fit.other is not None:
            aim = aim - self.twins.walk.value(pair[0], self.twins.nested[self.fit.other])
        shape = [-1 if d == self.fit.axis else 1 for d in range(aim.dim())]
        return (aim - self.shift.to(aim.dtype).reshape(shape)) / self.scale.to(aim.dtype).reshape(shape)

    def write(self, weight: Tensor, weights: Tensor, moments: Moments) -> None:
        """Parameters from weights (G, P, D)."""
        live = (self.twins.out_levels(self.fit) <= self.twins.n).to(weight.device) & ~self.faint
        rows = live.reshape(-1, *[1] * (weight.dim() - 1))
        weight.copy_(torch.where(rows, weights.reshape(weight.shape).to(weight.dtype), weight))
        extra = moments.intercept(weights).flatten()
        if self.fit.norm is not None:
            means = (weights @ moments.input_means[:, :, None]).flatten() + self.bias
            variance = ((weights @ moments.covariance) * weights).sum(2).flatten().clamp(min=0)
            offset = self.offset + self.factor * (extra - self.bias)
            _set_norm(self.twins, self.fit.norm, self.factor, offset, means, variance, live)
        elif self.own_bias is not None:
            self.own_bias.copy_(torch.where(live, self.bias + extra, self.own_bias.double()))


# ------------------------------------------------------------------------------------------------- norms


def _norm_line(parameters: list[Tensor], eps: float, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """A batch norm of x + bias in eval mode as factor * x + offset."""
    weight, shift, mean, variance = (p.double() for p in parameters)
    factor = weight / (variance + eps).sqrt()
    return factor, shift - factor * (mean - bias)


def _set_norm(
    twins: Twins, norm: fx.Node, factor: Tensor, offset: Tensor, mean: Tensor, variance: Tensor, live: Tensor
) -> None:
    """Make a batch norm x -> factor * x + offset, in eval mode and on batches with these statistics."""
    spread = (variance + call_arg(norm, "eps")).sqrt()
    values = (factor * spread, offset + factor * mean, mean, variance)
    for parameter, value in zip(twins.parameters(norm, *_BATCH_NORM), values):
        parameter.copy_(torch.where(live, value.to(parameter.dtype), parameter))


def fit_norm(twins: Twins, fit: NormFit, pairs: list[Pair], ridge: float) -> FittedLayer:
    """Fit factor and shift of a norm: y becomes gain * y + shift, with the ridge towards a gain of 1."""
    aims, own, source, product = _Totals(fit.axis), _Totals(fit.axis), _Totals(fit.axis), _Totals(fit.axis)
    for pair in pairs:
        twins.advance(fit, pair)
        aim, value = twins.aim(fit, pair), twins.walk.call(pair[0], fit.calls[0])
        for totals, tensor in ((aims, aim), (own, value), (product, aim.double() * value.double())):
            totals.add(tensor)
        if fit.batch_norm:
            source.add(twins.inputs(fit, pair)[0])
    centre = float(fit.shifts)
    spread = own.square - centre * own.mean.square()
    shared = product.mean - centre * own.mean * aims.mean
    gain = torch.where(spread > 0, (shared + ridge * spread) / (spread * (1 + ridge)).clamp(min=1e-300), 1)
    live = (twins.out_levels(fit) <= twins.n).to(gain.device)
    gain = torch.where(live, gain, 1)
    shift = torch.where(live, centre * (aims.mean - gain * own.mean), 0)
    error = aims.square - 2 * gain * product.mean + gain.square() * own.square
    error = error + shift.square() + 2 * shift * (gain * own.mean - aims.mean)
    if fit.batch_norm:
        factor, offset = _norm_line(twins.parameters(fit.node, *_BATCH_NORM), call_arg(fit.node, "eps"))
        _set_norm(twins, fit.node, gain * factor, gain * offset + shift, source.mean, source.variance, live)
    else:
        weight, *bias = twins.parameters(fit.node, "weight", *(["bias"] if fit.shifts else []))
        weight.copy_(weight.double() * gain)
        for parameter in bias:
            parameter.copy_(parameter.double() * gain + shift)
    return FittedLayer(fit.name, _r2(twins, fit, error.clamp(min=0), aims), aims.rows, 1 + fit.shifts)
