"""Numerical proof that the subnets of a net are nested.

Every parameter of the units above level i is replaced by noise. If subnets 1..i give the same class scores as before,
nothing in them depends on a unit that they do not contain, so their results can be reused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .errors import NestingError
from .graph.program import named_tensors
from .nested.module import channel_levels, direct_weights
from .net import SteppingNet

__all__ = ["VerifyReport", "verify"]

TOLERANCE = 1e-9  # relative, in float64


@dataclass
class VerifyReport:
    """What `verify` saw. All figures are relative to the largest class score.

    Attributes:
        leak: per subnet 1..N-1, the largest change of its scores when everything above it was replaced by noise.
        response: per subnet 1..N-1, how much the largest subnet changed by the same noise (0: nothing was above it).
        extract_error: per subnet 1..N, difference between the standalone subnet and the nested net.
        step_gain: per subnet 2..N, how much its scores differ from the next smaller subnet's.
        engine_error: per subnet, difference between the stepped engine and the nested net; empty if not checked.
    """

    leak: list[float] = field(default_factory=list)
    response: list[float] = field(default_factory=list)
    extract_error: list[float] = field(default_factory=list)
    step_gain: list[float] = field(default_factory=list)
    engine_error: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        show = lambda values: ", ".join(f"{v:.1e}" for v in values) or "-"  # noqa: E731
        lines = [
            f"nested: subnets change by {show(self.leak)} when all units above them become noise",
            f"  (the largest subnet changes by {show(self.response)})",
            f"standalone subnets differ by {show(self.extract_error)}",
            f"scores of consecutive subnets differ by {show(self.step_gain)}",
        ]
        if self.engine_error:
            lines.append(f"stepped engine differs by {show(self.engine_error)}")
        return "\n".join(lines)


def verify(net: SteppingNet, x: Tensor | None = None, *, engine: bool = True, seed: int = 0) -> VerifyReport:
    """Check on the net's own weights, in float64, that its subnets are nested and can be run on their own.

    Args:
        net: the net; not modified.
        x: images (B, C, H, W); two random ones if left out.
        engine: also compare the stepped engine.
        seed: of the noise and the random images.

    Raises:
        NestingError: subnet i depends on a unit of a higher level; names the first layer where it shows.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = copy.deepcopy(net).double().eval()
    device = exact.unit_levels.device
    if x is None:
        x = torch.randn(2, *net.analysis.image_size, generator=generator, dtype=torch.float64)
    x = x.to(device, torch.float64)
    report = VerifyReport()
    with torch.no_grad():
        scores = exact.forward_all(x)
        scale = float(scores.abs().max().clamp(min=1e-30))
        for i in range(1, net.num_subnets):
            noise = _noise_above(exact, i, generator)
            change = (_scores(exact, x, noise) - scores).abs().flatten(1).amax(1) / scale
            leak = float(change[:i].max())
            if not leak <= TOLERANCE:
                raise _leak_error(exact, noise, x, i, leak)
            report.leak.append(leak)
            report.response.append(float(change[-1]))
        for i in range(1, net.num_subnets + 1):
            error = float((exact.extract(i)(x) - scores[i - 1]).abs().max()) / scale
            if not error <= TOLERANCE:
                raise NestingError(
                    f"Subnet {i} extracted as a module differs from the nested net by {error:.1e}.", subnet=i
                )
            report.extract_error.append(error)
        report.step_gain = ((scores[1:] - scores[:-1]).abs().flatten(1).amax(1) / scale).tolist()
        if engine:
            report.engine_error = _engine_errors(exact, x, scores, scale)
    return report


def _engine_errors(net: SteppingNet, x: Tensor, scores: Tensor, scale: float) -> list[float]:
    errors = []
    for i, (stepped, expected) in enumerate(zip(net.deploy().steps(x), scores), start=1):
        errors.append(float((stepped - expected).abs().max()) / scale)
        if not errors[-1] <= TOLERANCE:
            raise NestingError(f"The engine's subnet {i} differs from the nested net by {errors[-1]:.1e}.", subnet=i)
    return errors


def _noise_above(net: SteppingNet, level: int, generator: torch.Generator) -> dict[int, Tensor]:
    """By id of a tensor: the tensor with noise in place of all elements of units above a level, dead ones included."""
    noisy: dict[int, Tensor] = {}
    for tensor, higher in _elements_above(net, named_tensors(net.model), level):
        current = noisy.get(id(tensor), tensor)
        noisy[id(tensor)] = torch.where(higher.to(tensor.device), _noise(tensor, generator), current)
    return noisy


def _inputs(net: SteppingNet, replaced: dict[int, Tensor]) -> list[Tensor]:
    return [replaced.get(id(t), t) for t in net._tensors(net._graphs[False], False)]


def _scores(net: SteppingNet, x: Tensor, replaced: dict[int, Tensor]) -> Tensor:
    """Class scores of all subnets (N, B, classes) with some of the net's tensors replaced."""
    return net._graphs[False].module(x, *_inputs(net, replaced))[0]


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of the tensor's own magnitude, so that deep nets do not overflow; positive for vectors (variances)."""
    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    if tensor.dim() > 1:
        noise *= torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
    magnitude = float(tensor.abs().mean()) or 1.0
    return (noise * magnitude).to(tensor)


def _elements_above(net: SteppingNet, tensors: dict[str, Tensor], level: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors with a boolean mask (broadcastable) of the elements that only subnets above `level` may use."""
    levels, direct = net.levels, direct_weights(net.analysis)
    for name, (out_units, in_units) in net.analysis.weight_units.items():
        tensor = tensors.get(name)
        shape, transposed = net._layouts[name]
        if tensor is None or tensor.shape != torch.Size(shape):
            continue
        rows = (channel_levels(levels, out_units) > level)[:, None]
        columns = (channel_levels(levels, in_units) > level)[None, :]
        # a standardised weight mixes its whole row, dead synapses included: there only whole rows are noise
        higher = rows | columns if name in direct else rows.expand(-1, len(in_units))
        higher = higher.t() if transposed else higher
        yield tensor, higher.reshape([*higher.shape] + [1] * (len(shape) - 2))
    for name, (axis, units) in net.analysis.param_units.items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.is_floating_point():
            higher = channel_levels(levels, units) > level
            yield tensor, higher.reshape([-1 if d == axis else 1 for d in range(tensor.dim())])


def _leak_error(net: SteppingNet, noise: dict[int, Tensor], x: Tensor, subnet: int, leak: float) -> NestingError:
    layer = _first_difference(net, noise, x, subnet) or "the classifier"
    return NestingError(
        f"{layer}: subnet {subnet} is not nested; its class scores change by {leak:.1e} (relative) when the units "
        "above it become noise. A synapse or a statistic leads from a larger subnet into it. If the net was made by "
        "apply_steppingnet and not changed by hand, please report the model.",
        layer,
        subnet,
    )


def _first_difference(net: SteppingNet, noise: dict[int, Tensor], x: Tensor, subnet: int) -> str | None:
    """Module path of the first value of level <= subnet that the noise changes."""
    before, after = _record(net, x, {}), _record(net, x, noise)
    for node in net._graphs[False].module.graph.nodes:
        units, axis = node.meta.get("units"), node.meta.get("axis")
        if units is None or node.name not in before:
            continue
        kept = (channel_levels(net.levels, units) <= subnet).nonzero().flatten().to(x.device)
        a, b = before[node.name], after[node.name]
        if a.dim() > axis and a.shape[axis] == len(units):
            a, b = a.index_select(axis, kept), b.index_select(axis, kept)
            if not torch.allclose(a, b, rtol=TOLERANCE, atol=1e-12):
                return node.meta.get("module") or node.name
    return None


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the result of every operator."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op == "call_function":
            self.seen[n.name] = result
        return result


def _record(net: SteppingNet, x: Tensor, replaced: dict[int, Tensor]) -> dict[str, Tensor]:
    recorder = _Recorder(net._graphs[False].module)
    recorder.run(x, *_inputs(net, replaced))
    return recorder.seen
