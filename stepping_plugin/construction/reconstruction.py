"""Reconstruction: the parameters of a nested net in closed form, so that it comes near the original network.

A nested net lacks the synapses from larger to smaller subnets, and a network whose synapses are merely cut answers by
chance. Here every layer is fitted anew, in the order of execution and level by level: the value of a unit is to be as
near as possible to that of the original network's unit it descends from, given the inputs that the nesting rule allows,
which are the net's own values, already reconstructed (least squares on unlabelled images with a ridge towards the
present weights). Where a branch ends in a sum, as in residual networks, its last layer is fitted to what the sum still
lacks. The classifier, shared by all subnets, is fitted to the original's scores for all of them at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import SteppingError, explain
from ..graph.labels import Role
from ..graph.program import call_arg, copy_model, named_tensors, op_name
from ..net import SteppingNet
from ..nested.module import channel_levels
from ..units import Analysis, channel_axis, full_units
from ..witness import find_units
from .fits import FAINT, LayerFit, NormFit, plan
from .leastsquares import Moments
from .lockstep import Run, Walk, ancestors, inherited_positions, operands_first

__all__ = ["FittedLayer", "Reconstruction", "reconstruct"]

RIDGE = 1e-2
LIMIT = 2 << 30
SAMPLES = 20  # samples per unknown
LEAST = 1 << 14  # samples at least
BATCH = 32
PATIENCE = 5.0  # seconds of silence


@dataclass
class FittedLayer:
    """One layer of a report.

    Attributes:
        r2: per level 1..N, the share of the variance of the original's values that the layer's units have, mean over
            units; None where there are none. The classifier has one value, for all subnets together.
        pictures, samples, unknowns: images and positions that were used; weights per unit.
        dead: channels of the original, in its own numbering, that are never above 0 before their ReLU.
        seconds: wall time.
    """

    name: str
    r2: list[float | None]
    pictures: int
    samples: int
    unknowns: int
    dead: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Reconstruction:
    """What `reconstruct` did.

    Attributes:
        layers: in the order in which they were fitted.
        left_alone: layers that keep their parameters -> why.
        notes: what else is to be known.
        seconds: wall time.
    """

    layers: list[FittedLayer] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def dead(self) -> dict[str, list[int]]:
        """Layers with channels of the original that never fire on the images -> those channels."""
        return {layer.name: layer.dead for layer in self.layers if layer.dead}

    def __str__(self) -> str:
        show = lambda values: " ".join("   - " if v is None else f"{v:5.2f}" for v in values)  # noqa: E731
        lines = [f"{layer.name:40} R2 {show(layer.r2)}  {layer.seconds:5.1f} s" for layer in self.layers]
        lines += [f"{name:40} left alone: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join([*lines, *self.notes])


@torch.no_grad()
def reconstruct(
    net: SteppingNet,
    original: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    ridge: float = RIDGE,
    limit: int = LIMIT,
    say: Callable[[str], None] | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Fit the parameters of a nested net to the original network, without labels and without gradients.

    With all units at level 1 nothing changes but the statistics of batch norms, which become those of the images (and
    their affine parameters with them, so that the function stays).

    Args:
        net: the net; its parameters and batch norm statistics are overwritten, its levels, masks, dtype and device kept.
        original: the model that the net was made from, trained. Not modified.
        images: (P, C, H, W) of the net's image size; or batches of such, or of (images, labels), whose labels are not
            used. A few hundred to a few thousand, normalised as for training.
        ridge: pull towards the present weights, relative to the mean square of a layer's inputs.
        limit: bytes of values that may be kept between layers. Where all images do not fit, early layers use fewer.
        say: called with a line per layer once it has taken over 5 seconds.
        seed: of the choice of positions where there are more than needed.

    Raises:
        SteppingError: no images, images of another shape, values that are not finite, or another model.
    """
    if not ridge >= 0:
        raise SteppingError(explain("out of range", where="ridge", got=ridge, expected="a number from 0 up"))
    batches = list(_batches(images, net))
    return _Reconstructor(net, original, batches, ridge, limit, say, seed).run()


def _batches(images: Any, net: SteppingNet) -> Iterator[Tensor]:
    """Images in the net's dtype and on its device, some at a time."""
    reference = next(net.model.parameters())
    empty = True
    for item in [images] if isinstance(images, Tensor) else images:
        batch = item[0] if isinstance(item, (tuple, list)) and item else item
        size = net.analysis.image_size
        if not isinstance(batch, Tensor) or batch.dim() != 4 or tuple(batch.shape[1:]) != size:
            got = str(tuple(batch.shape)) if isinstance(batch, Tensor) else type(batch).__name__
            expected = f"images (B, {', '.join(map(str, size))}), or batches of them, with or without labels"
            raise SteppingError(explain("wrong shape", where="images", got=got, expected=expected))
        if not batch.is_floating_point() or not bool(batch.isfinite().all()):
            got = str(batch.dtype) if not batch.is_floating_point() else "values that are not finite"
            raise SteppingError(
                explain("cannot be used", where="images", got=got, expected="floats, normalised as for training")
            )
        for part in batch.split(BATCH):
            if len(part):
                empty = False
                yield part.to(reference.device, reference.dtype)
    if empty:
        raise SteppingError(explain("there are none", where="images", expected="at least one image"))


class _Reconstructor:
    def __init__(
        self,
        net: SteppingNet,
        original: nn.Module,
        batches: list[Tensor],
        ridge: float,
        limit: int,
        say: Callable[[str], None] | None,
        seed: int,
    ) -> None:
        self.net, self.ridge, self.limit, self.say = net, ridge, limit, say
        self.tensors = named_tensors(net.model)
        self.levels, self.n = net.levels, net.num_subnets
        self.device = batches[0].device
        self.generator = torch.Generator().manual_seed(seed)
        self.report = Reconstruction()
        program, graph = net.analysis.eval_program, net._graphs[False]
        fits, self.report.left_alone = plan(program, graph)
        analysis, self.origin = self._original(original)
        self.walk = self._nested_walk(fits)
        self.source = self._original_walk(original, analysis)
        self.fits = sorted(fits, key=lambda fit: max(self.walk.place[c] for c in fit.calls))
        self.source.kept = {self.origin[fit.end] for fit in self.fits}
        self.batches = batches
        self.runs = [(self.walk.start(b), self.source.start(b)) for b in batches]
        self._positions: dict[fx.Node, Tensor] = {}

    # -- the two networks

    def _original(self, original: nn.Module) -> tuple[Analysis, dict[fx.Node, fx.Node]]:
        """Analysis of the original, and its node behind every node of the net's program."""
        program = self.net.analysis.eval_program
        if self.net.lineage:
            analysis = find_units(copy_model(original), self.net.analysis.image_size)
            return analysis, ancestors(analysis, self.net.lineage, program)
        return self.net.analysis, {node: node for node in program.graph.nodes}

    def _original_walk(self, original: nn.Module, analysis: Analysis) -> Walk:
        program, tensors = analysis.eval_program, named_tensors(original)
        like = self.batches_like()

        def read(node: fx.Node) -> Tensor:
            name = node.meta["tensor"]
            tensor = program.constants[name] if name in program.constants else tensors.get(name)
            if tensor is None or tuple(tensor.shape) != tuple(node.meta["shape"]):
                got = "nothing" if tensor is None else str(tuple(tensor.shape))
                raise SteppingError(
                    explain(
                        "not the network that the net was made from",
                        where=f"original.{name}",
                        got=got,
                        expected=str(tuple(node.meta["shape"])),
                    )
                )
            tensor = tensor.detach().to(like.device)
            return tensor.to(like.dtype) if tensor.is_floating_point() else tensor

        return Walk(list(program.graph.nodes), program.image, read)

    def batches_like(self) -> Tensor:
        return next(self.net.model.parameters())

    def _nested_walk(self, fits: list[LayerFit | NormFit]) -> Walk:
        graph = self.net._graphs[False]
        nodes = list(graph.module.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        names = dict(zip(inputs[1:], graph.inputs))
        self.nested = {inputs[0].meta.get("source", self.net.analysis.eval_program.image): inputs[0]}
        for node in nodes:
            if "source" in node.meta:
                self.nested[node.meta["source"]] = node
        last = {self.nested[f.end]: self.nested[_branch(f)] for f in fits if f.other is not None}
        output: Any = nodes[-1].args[0]

        def read(node: fx.Node) -> Tensor:
            module, attribute = self.net._slot(*names[node], False)
            return getattr(module, attribute).detach()

        return Walk(operands_first(output[0], last), inputs[0], read)

    # -- the loop

    def run(self) -> Reconstruction:
        start = time.perf_counter()
        allowed = self._pictures_allowed()
        for number, (fit, pictures) in enumerate(zip(self.fits, allowed), start=1):
            begun = time.perf_counter()
            active, count = [], 0
            for run, batch in zip(self.runs, self.batches):
                if active and count + len(batch) > pictures:
                    break
                active.append(run)
                count += len(batch)
            layer = self._fit_layer(fit, active) if isinstance(fit, LayerFit) else self._fit_norm(fit, active)
            self.walk.renew()
            if not any(self.origin[f.end] is self.origin[fit.end] for f in self.fits[number:]):
                self.source.release([original for _, original in self.runs], self.origin[fit.end])
            layer.pictures, layer.seconds = count, time.perf_counter() - begun
            self.report.layers.append(layer)
            if self.say and time.perf_counter() - start > PATIENCE:
                r2 = " ".join("-" if v is None else f"{v:.2f}" for v in layer.r2)
                self.say(f"reconstruct {number}/{len(self.fits)} {fit.name}: R2 {r2}")
        self._add_notes()
        self.report.seconds = time.perf_counter() - start
        return self.report

    def _pictures_allowed(self) -> list[int]:
        """Pictures whose values may be kept at every layer, found by one small batch that goes ahead."""
        probe = self.batches[0][:2]
        nested, original = self.walk.start(probe), self.source.start(probe)
        needed = []
        kept = set(self.source.kept)
        for k, fit in enumerate(self.fits):
            self._advance(fit, nested, original)
            needed.append(nested.size() + original.size())
            if not any(self.origin[f.end] is self.origin[fit.end] for f in self.fits[k + 1 :]):
                self.source.release([original], self.origin[fit.end])
        self.source.kept = kept
        largest, allowed = 1, []
        for size in reversed(needed):
            largest = max(largest, size)
            allowed.append(max(1, self.limit * len(probe) // largest))
        return allowed[::-1]

    def _advance(self, fit: LayerFit | NormFit, nested: Run, original: Run) -> None:
        """Up to where everything is there that a fit reads."""
        if len(fit.calls) == 1:
            self.walk.advance(nested, self.walk.place[fit.calls[0]])
        else:
            self.walk.kept.update(c.args[0] for c in fit.calls)  # type: ignore[misc]
            self.walk.advance(nested, max(self.walk.place[c] for c in fit.calls))
        self.source.advance(original, self.source.place[self.origin[fit.end]] + 1)

    def _target(self, fit: LayerFit | NormFit, original: Run) -> Tensor:
        """The original's values where the fit ends, at the positions that the net's descend from."""
        value = original.values[self.origin[fit.end]]
        return value if fit.end.meta["units"] is None else value.index_select(fit.end.meta["axis"], self._inherited(fit.end))

    def _inherited(self, node: fx.Node) -> Tensor:
        if node not in self._positions:
            units = self.origin[node].meta["units"]
            self._positions[node] = inherited_positions(units, self.net.lineage if units is not node.meta["units"] else ()).to(self.device)
        return self._positions[node]

    def _param(self, node: fx.Node, name: str) -> Tensor | None:
        """Parameter or buffer of an operator."""
        found = call_arg(node, name)
        return None if found is None else self.tensors[found.meta["tensor"]]

    # -- layers

    def _fit_layer(self, fit: LayerFit, runs: list[tuple[Run, Run]]) -> FittedLayer:
        chain = _Chain(self, fit)
        windows = fit.windows
        weight = self.tensors[fit.node.args[1].meta["tensor"]]  # type: ignore[union-attr]
        moments = Moments(windows.groups, windows.inputs, windows.targets, chain.intercept, self.device)
        wanted = max(LEAST, SAMPLES * windows.inputs)
        totals = _Totals(fit)
        for nested, original in runs:
            self._advance(fit, nested, original)
            aim = self._target(fit, original)
            totals.add(aim)
            for call in fit.calls:
                x = self.walk.value(nested, call.args[0])  # type: ignore[arg-type]
                target = chain.target(aim, nested)
                target = target.repeat(len(x) // len(target), *[1] * (target.dim() - 1)) if len(x) != len(target) else target
                x, target = self._live(fit, x, target)
                chosen = self._choose(fit, target, wanted, len(runs))
                for rows, aims in windows.blocks(x, target, chosen):
                    moments.add(rows, aims)
        if not moments.finite:
            raise SteppingError(
                explain("not finite", where=fit.name, got="values that overflow", action="Check the original network.")
            )
        weights = self._solve(fit, moments, weight.detach().reshape(windows.groups, windows.targets, -1).double() * chain.prior_factor)
        intercept = moments.intercept(weights) if chain.intercept else None
        error = moments.error(weights, intercept).flatten()
        chain.write(weight, weights, intercept, moments)
        levels = self._out_levels(fit)
        r2 = 1 - error * chain.scale.square() / totals.variance(fit.axis).clamp(min=1e-30)
        dead = totals.dead(self.origin[fit.end], self._inherited(fit.end) if fit.end.meta["units"] is not None else None)
        return FittedLayer(fit.name, _per_level(r2, totals, levels, self.n, fit), 0, moments.rows, windows.inputs, dead)

    def _live(self, fit: LayerFit, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Without the positions of spare units, where a weight is applied along another axis than theirs."""
        axis = fit.node.meta["axis"]
        if axis is None or axis == fit.axis or fit.node.meta.get("role") == Role.HEAD:
            return x, target
        kept = (channel_levels(self.levels, fit.node.meta["units"]) <= self.n).nonzero().flatten().to(x.device)
        return x.index_select(axis, kept), target.index_select(axis, kept)

    def _choose(self, fit: LayerFit, target: Tensor, wanted: int, runs: int) -> Tensor | None:
        positions = target.shape[1:-1].numel() if fit.windows.linear else target.shape[2:].numel()
        share = wanted / (runs * len(fit.calls) * len(target))
        if share >= positions:
            return None
        count = max(1, round(share + 0.5))
        return torch.randperm(positions, generator=self.generator)[:count].to(self.device)

    def _out_levels(self, fit: LayerFit | NormFit) -> Tensor:
        if fit.node.meta.get("role") == Role.HEAD:
            return torch.ones(fit.node.meta["shape"][fit.axis], dtype=torch.long)
        return channel_levels(self.levels, full_units(fit.node, fit.axis))

    def _solve(self, fit: LayerFit, moments: Moments, prior: Tensor) -> Tensor:
        """Weights (G, P, D), 0 at dead synapses; those of spare units stay as they are."""
        everything = torch.arange(fit.windows.inputs, device=self.device)
        if fit.node.meta.get("role") != Role.CHANNELS:
            return moments.solve(prior, self.ridge, everything, torch.arange(fit.windows.targets, device=self.device))
        source: Any = fit.node.args[0]
        inputs = channel_levels(self.levels, full_units(source, channel_axis(source, fit.node)))
        outputs = self._out_levels(fit)
        taps = fit.windows.inputs // len(inputs)
        result = prior.clone()
        for level in range(1, self.n + 1):
            rows = (outputs == level).nonzero().flatten().to(self.device)
            read = (inputs <= level).repeat_interleave(taps).nonzero().flatten().to(self.device)
            if len(rows) and len(read):
                result[:, rows] = 0
                solved = moments.solve(prior[:, rows[:, None], read], self.ridge, read, rows)
                result[:, rows[:, None], read] = solved
        return result

    # -- norms

    def _fit_norm(self, fit: NormFit, runs: list[tuple[Run, Run]]) -> FittedLayer:
        """y -> g * y + h per channel, by least squares with the ridge towards g = 1."""
        axis, totals, own, source, product, rows = fit.axis, _Totals(fit), _Totals(fit), _Totals(fit), 0, 0
        for nested, original in runs:
            self._advance(fit, nested, original)
            aim, value = self._target(fit, original), self.walk.call(nested, fit.calls[0])
            totals.add(aim)
            own.add(value)
            if op_name(fit.node) == "batch_norm":
                source.add(self.walk.value(nested, fit.calls[0].args[0]))  # type: ignore[arg-type]
            product = product + _sum(aim.double() * value.double(), axis)
            rows += value.numel() // value.shape[axis]
        weight, bias = self._param(fit.node, "weight"), self._param(fit.node, "bias") if op_name(fit.node) != "rms_norm" else None
        variance = own.variance(axis) if bias is not None else own.square
        shared = product / rows - own.mean * totals.mean if bias is not None else product / rows
        gain = torch.where(variance > 0, (shared + self.ridge * variance) / (variance * (1 + self.ridge)).clamp(min=1e-300), 1)
        shift = totals.mean - gain * own.mean if bias is not None else torch.zeros_like(gain)
        error = totals.square - 2 * (gain * product / rows + shift * totals.mean) + gain.square() * own.square
        error = error + shift.square() + 2 * gain * shift * own.mean
        levels = self._out_levels(fit)
        live = (levels <= self.n).to(self.device)
        gain, shift = torch.where(live, gain, 1), torch.where(live, shift, 0)
        if op_name(fit.node) == "batch_norm":
            self._renorm(fit, source, gain, shift)
        else:
            assert weight is not None
            weight.copy_(weight.double() * gain)
            if bias is not None:
                bias.copy_(bias.double() * gain + shift)
        r2 = 1 - error.clamp(min=0) / totals.variance(axis).clamp(min=1e-30)
        return FittedLayer(fit.name, _per_level(r2, totals, levels, self.n, fit), 0, rows, 2, [])

    def _renorm(self, fit: NormFit, source: _Totals, gain: Tensor, shift: Tensor) -> None:
        weight, bias, mean, variance = (self._param(fit.node, k) for k in ("weight", "bias", "running_mean", "running_var"))
        eps = call_arg(fit.node, "eps")
        factor = weight.double() / (variance.double() + eps).sqrt()
        offset = bias.double() - factor * mean.double()
        _set_norm([weight, bias, mean, variance], eps, gain * factor, gain * offset + shift, source.mean, source.variance(1))

    def _add_notes(self) -> None:
        few = [layer.name for layer in self.report.layers if layer.samples < layer.unknowns]
        if few:
            self.report.notes.append(
                f"{len(few)} layers have fewer samples than unknowns, so the ridge decides: {', '.join(few[:4])}"
                f"{', ...' if len(few) > 4 else ''}. More images would help."
            )
        total = sum(map(len, self.batches))
        fewer = [layer for layer in self.report.layers if layer.pictures < total]
        if fewer:
            least = min(layer.pictures for layer in fewer)
            self.report.notes.append(
                f"{len(fewer)} layers use fewer than the {total} images, {least} at least, so that values kept between "
                f"layers take no more than {self.limit >> 20} MiB."
            )


def _branch(fit: LayerFit | NormFit) -> fx.Node:
    return next(n for n in fit.end.all_input_nodes if n is not fit.other)


def _sum(value: Tensor, axis: int) -> Tensor:
    return value.sum([d for d in range(value.dim()) if d != axis], dtype=torch.float64)


def _set_norm(parameters: list[Any], eps: float, factor: Tensor, offset: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Make a batch norm x -> factor * x + offset, in eval mode and on batches with these statistics."""
    weight, bias, running_mean, running_var = parameters
    running_mean.copy_(mean)
    running_var.copy_(variance)
    weight.copy_(factor * (variance + eps).sqrt())
    bias.copy_(offset + factor * mean)


class _Totals:
    """Mean, variance and maximum of a value per channel."""

    def __init__(self, fit: LayerFit | NormFit) -> None:
        self.axis, self.rows, self._sum, self._square, self.top = fit.axis, 0, 0, 0, None

    def add(self, value: Tensor) -> None:
        others = [d for d in range(value.dim()) if d != self.axis]
        self._sum = self._sum + _sum(value, self.axis)
        self._square = self._square + _sum(value.double().square(), self.axis)
        top = value.amax(others) if others else value
        self.top = top if self.top is None else torch.maximum(self.top, top)
        self.rows += value.numel() // value.shape[self.axis]

    @property
    def mean(self) -> Tensor:
        return self._sum / self.rows

    @property
    def square(self) -> Tensor:
        return self._square / self.rows

    def variance(self, axis: int) -> Tensor:
        return (self.square - self.mean.square()).clamp(min=0)

    def dead(self, node: fx.Node, positions: Tensor | None) -> list[int]:
        """Channels that are never above 0, if only a ReLU reads them; in the original's numbering."""
        if not node.users or not all(op_name(u) in ("relu", "relu6", "clamp_min", "hardtanh") for u in node.users):
            return []
        if node.meta.get("axis") not in (None, self.axis):
            return []
        channels = (self.top <= 0).nonzero().flatten()
        return sorted(set((channels if positions is None else positions[channels]).tolist()))


def _per_level(r2: Tensor, totals: _Totals, levels: Tensor, n: int, fit: LayerFit | NormFit) -> list[float | None]:
    alive = (totals.variance(fit.axis) > 0).cpu()
    if fit.node.meta.get("role") == Role.HEAD:
        return [float(r2.cpu()[alive].mean())] if bool(alive.any()) else [None]
    result: list[float | None] = []
    for level in range(1, n + 1):
        own = (levels == level) & alive
        result.append(float(r2.cpu()[own].mean()) if bool(own.any()) else None)
    return result


class _Chain:
    """What lies between a layer and where its fit ends: end = scale * (layer without bias) + shift + other."""

    def __init__(self, job: _Reconstructor, fit: LayerFit) -> None:
        self.job, self.fit = job, fit
        width = fit.node.meta["shape"][fit.axis]
        ones = torch.ones(width, dtype=torch.float64, device=job.device)
        self.bias = call_arg(fit.node, "bias")
        own = self.bias is not None and self.bias.op == "placeholder" and len(self.bias.users) == 1
        self.fixed = job.walk.static(job.nested[self.bias]).double() if self.bias is not None else 0 * ones
        self.own_bias = job.tensors.get(self.bias.meta["tensor"]) if own else None
        self.intercept = self.own_bias is not None or fit.norm is not None
        self.multiplier = ones
        for node in fit.scales:
            self.multiplier = self.multiplier * job.walk.static(job.nested[node]).double().flatten()
        self.factor, self.offset, self.prior_factor = ones, 0 * ones, 1.0
        if fit.norm is not None:
            self._read_norm(fit.norm)
        size = self.multiplier.abs()
        self.faint = size < FAINT * size.max()
        self.multiplier = torch.where(size > 0, self.multiplier, 1)
        self.scale = self.multiplier * self.factor

    def _read_norm(self, norm: fx.Node) -> None:
        weight, bias, mean, variance = (
            self.job._param(norm, k).double() for k in ("weight", "bias", "running_mean", "running_var")  # type: ignore[union-attr]
        )
        factor = weight / (variance + call_arg(norm, "eps")).sqrt()
        least = 1e-3 * factor.abs().median().clamp(min=1e-30)
        self.factor = torch.where(factor.abs() < least, least, factor)
        self.prior_factor = (factor / self.factor).reshape(self.fit.windows.groups, -1, 1)
        self.offset = bias - factor * (mean - self.fixed)

    def target(self, aim: Tensor, nested: Run) -> Tensor:
        """What the layer's product with its weights is to be."""
        if self.fit.other is not None:
            aim = aim - self.job.walk.value(nested, self.job.nested[self.fit.other])
        shape = [-1 if d == self.fit.axis else 1 for d in range(aim.dim())]
        shift = self.multiplier * self.offset
        if self.fit.norm is None:
            shift = shift + self.multiplier * self.fixed
        return (aim - shift.to(aim.dtype).reshape(shape)) / self.scale.to(aim.dtype).reshape(shape)

    def write(self, weight: Tensor, weights: Tensor, intercept: Tensor | None, moments: Moments) -> None:
        """Parameters from weights (G, P, D) and intercepts (G, P)."""
        levels = self.job._out_levels(self.fit)
        live = (levels <= self.job.n).to(self.job.device) & ~self.faint
        kept = live.reshape(-1, *[1] * (weight.dim() - 1))
        weight.copy_(torch.where(kept, weights.reshape(weight.shape).to(weight.dtype), weight))
        if intercept is None:
            return
        extra = intercept.flatten()
        if self.fit.norm is None:
            assert self.own_bias is not None
            self.own_bias.copy_(torch.where(live, self.fixed + extra, self.own_bias.double()))
            return
        means = (weights @ moments.input_means[:, :, None]).flatten()
        variance = ((weights @ moments.covariance) * weights).sum(2).flatten().clamp(min=0)
        old = [self.job._param(self.fit.norm, k) for k in ("weight", "bias", "running_mean", "running_var")]
        new = [torch.empty_like(p, dtype=torch.float64) for p in old]
        offset = self.offset + self.factor * (extra - self.fixed)
        _set_norm(new, call_arg(self.fit.norm, "eps"), self.factor, offset, means + self.fixed, variance)
        for parameter, value in zip(old, new):
            parameter.copy_(torch.where(live, value.to(parameter.dtype), parameter))
