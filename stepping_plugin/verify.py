"""Numerical proof that the subnets of a net are nested.

Everything that the operators read of parameters and buffers on behalf of units above level i is replaced by noise. If
subnets 1..i give the same outputs as before, nothing in them depends on a unit that they do not contain, so their
results can be reused. The noise is put where operators that see images read their operands (`ownership`), so it reaches
every element whatever view, slice, transpose or arithmetic lies between it and the parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .console.progress import track
from .engine import compile_engine
from .errors import NestingError, expect
from .graph.modes import ordinary_mode
from .graph.program import is_static, random_operators
from .graph.structure import tensors_of
from .nested.net import NestedNet
from .units.levels import channel_levels
from .units.ownership import NEVER, first_readers

__all__ = ["VerifyReport", "verify"]

TOLERANCE = 1e-9  # relative, in float64


@dataclass
class VerifyReport:
    """What `verify` saw. All figures are relative to the largest class score; of several outputs, each relative to its
    own largest number, the worst.

    Attributes:
        leak: per subnet 1..N-1, the largest change of its scores when everything above it was replaced by noise.
        response: per subnet 1..N-1, how much the largest subnet changed by the same noise (0: nothing was above it).
        extract_error: per subnet 1..N, difference between the standalone subnet and the nested net.
        step_gain: per subnet 2..N, how much its scores differ from the next smaller subnet's.
        engine_error: per subnet, difference between the stepped engine and the nested net; empty if not checked.
        notes: what could not be checked, and why. A net that draws random numbers in eval mode (Monte Carlo dropout)
            draws the same ones in all runs of the nesting check; standalone subnets and steps draw others, so
            `extract_error` and `engine_error` are empty.
    """

    leak: list[float] = field(default_factory=list)
    response: list[float] = field(default_factory=list)
    extract_error: list[float] = field(default_factory=list)
    step_gain: list[float] = field(default_factory=list)
    engine_error: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


@ordinary_mode
def verify(net: NestedNet, x: Tensor | None = None, *, engine: bool = True, seed: int = 0) -> VerifyReport:
    """Check on the net's own weights, in float64, that its subnets are nested and can be run on their own.

    Args:
        net: the net; not modified.
        x: images (B, C, H, W); two random ones if left out.
        engine: also compare the stepped engine.
        seed: of the noise and the random images.

    Raises:
        NestingError: subnet i depends on a unit of a higher level; names the first layer where it shows.
    """
    expect(net, NestedNet, "net", "a SteppingNet", "apply_steppingnet(model, budgets) makes one.")
    generator = torch.Generator().manual_seed(seed)
    exact = copy.deepcopy(net).double().eval()
    device = exact.unit_levels.device
    if x is None:
        x = torch.randn(2, *net.analysis.image_size, generator=generator, dtype=torch.float64)
    x = x.to(device, torch.float64)
    report = VerifyReport()
    with torch.no_grad():
        scores = _Outputs(_drawing(seed, exact.forward_all, x))
        report.step_gain = scores.gains().tolist()
        apart = float(scores.apart(_drawing(seed, exact.forward_all, x)).max())
        if not apart <= TOLERANCE:  # nothing can be compared
            report.notes.append(
                f"two runs on the same images and random numbers differ by {apart:.1e}, so nothing was checked"
            )
            return report
        _check_nesting(exact, x, scores, seed, report)
        if drawn := _random_parts(exact, x, scores, seed):
            report.notes.append(f"the net is random in eval mode ({drawn}): standalone subnets and engine not compared")
            return report
        report.extract_error = _extract_errors(exact, x, scores)
        if engine:
            report.engine_error = _engine_errors(exact, x, scores)
    return report


class _Outputs:
    """What all subnets returned, to compare other runs with.

    Args:
        result: of `forward_all`.
    """

    def __init__(self, result: Any) -> None:
        self.tensors = [t.double() for t in tensors_of(result)]
        self.scales = [float(t.abs().max().clamp(min=1e-30)) if t.numel() else 1.0 for t in self.tensors]

    def apart(self, result: Any, subnet: int | None = None) -> Tensor:
        """How far another run is apart, per subnet, (N,); `subnet` (1..N): of that alone, (1,)."""
        others = [t.double() if subnet is None else t.double()[None] for t in tensors_of(result)]
        own = self.tensors if subnet is None else [t[subnet - 1 : subnet] for t in self.tensors]
        return self._worst([a - b for a, b in zip(others, own, strict=True)])

    def gains(self) -> Tensor:
        """How far every subnet is apart from the one before, (N - 1,)."""
        return self._worst([t[1:] - t[:-1] for t in self.tensors])

    def _worst(self, gaps: list[Tensor]) -> Tensor:
        return torch.stack([_largest(gap) / scale for gap, scale in zip(gaps, self.scales)]).amax(0)


def _largest(gap: Tensor) -> Tensor:
    """The largest number of every subnet, (N,)."""
    return gap.abs().reshape(len(gap), -1).amax(1) if gap.numel() else gap.new_zeros(len(gap))


def _drawing(seed: int, function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function that draws the random numbers of a seed; the generators stay as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return function(*args)


def _random_parts(net: NestedNet, x: Tensor, scores: _Outputs, seed: int) -> str:
    """What makes a net random; empty if other random numbers give the same outputs."""
    apart = float(scores.apart(_drawing(seed + 1, net.forward_all, x)).max())
    drawn = random_operators(net.analysis.eval_program)
    return ", ".join(drawn) if apart > TOLERANCE and drawn else ""


def _check_nesting(net: NestedNet, x: Tensor, scores: _Outputs, seed: int, report: VerifyReport) -> None:
    first = first_readers(net.analysis, net.levels)
    for i in track(range(1, net.num_subnets), "verification of the nesting"):
        noisy = _Noisy(net, first, i, seed)
        change = scores.apart(_drawing(seed, noisy.outputs, x))
        leak = float(change[:i].max())
        if not leak <= TOLERANCE:
            raise _leak_error(noisy, x, i, leak, seed)
        report.leak.append(leak)
        report.response.append(float(change[-1]))


def _extract_errors(net: NestedNet, x: Tensor, scores: _Outputs) -> list[float]:
    errors = []
    for i in track(range(1, net.num_subnets + 1), "verification of the extracted subnets"):
        errors.append(float(scores.apart(net.extract(i)(x), i)))
        if not errors[-1] <= TOLERANCE:
            raise NestingError(
                f"Subnet {i} extracted as a module differs from the nested net by {errors[-1]:.1e}.", subnet=i
            )
    return errors


def _engine_errors(net: NestedNet, x: Tensor, scores: _Outputs) -> list[float]:
    errors = []
    for i, stepped in enumerate(compile_engine(net).steps(x), start=1):
        errors.append(float(scores.apart(stepped, i)))
        if not errors[-1] <= TOLERANCE:
            raise NestingError(f"The engine's subnet {i} differs from the nested net by {errors[-1]:.1e}.", subnet=i)
    return errors


class _Noisy(fx.Interpreter):
    """Runs the nested eval graph of a net with noise in place of all elements that no subnet up to a level may read.

    Args:
        net: the net.
        first: result of `first_readers`.
        level: elements with a first reader above it are noise; with `NEVER` the graph runs as it is.
        seed: of the noise.
    """

    def __init__(self, net: NestedNet, first: dict[fx.Node, Tensor], level: int, seed: int) -> None:
        super().__init__(net._graphs[False].module)
        self.net, self.first, self.level = net, first, level
        self.generator = torch.Generator().manual_seed(seed)
        self.noisy: dict[fx.Node, Tensor] = {}
        self.seen: dict[str, Tensor] | None = None

    def outputs(self, x: Tensor) -> list[Tensor]:
        """What all subnets return, (N, ...) each."""
        graph = self.net._graphs[False]
        return list(self.run(x, *self.net._tensors(graph, False))[: graph.structure.count])

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple, dict]:
        """Operators that need no image get the parameters themselves, the others what is noise above the level."""
        read = self.env.__getitem__ if is_static(n.meta.get("source")) else self._operand
        return fx.node.map_arg((n.args, dict(n.kwargs)), read)

    def _operand(self, n: fx.Node) -> Any:
        source = n.meta.get("source")
        first = self.first.get(source) if source is not None else None
        if first is None or not self.env[n].is_floating_point():
            return self.env[n]
        if n not in self.noisy:
            higher = (first > self.level).to(self.env[n].device)
            noise = torch.where(higher, _noise(self.env[n], self.generator), self.env[n])
            self.noisy[n] = self.env[n].clone().copy_(noise)  # strides as before, so that sums round as before
        return self.noisy[n]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.seen is not None and isinstance(result, Tensor) and n.op == "call_function":
            self.seen[n.name] = result
        return result


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of the tensor's own magnitude, so that deep nets do not overflow; positive for vectors (variances)."""
    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    if tensor.dim() > 1:
        noise *= torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
    magnitude = float(tensor.abs().mean()) or 1.0
    return (noise * magnitude).to(tensor)


def _leak_error(noisy: _Noisy, x: Tensor, subnet: int, leak: float, seed: int) -> NestingError:
    layer = _first_difference(noisy, x, subnet, seed) or "the outputs"
    return NestingError(
        f"{layer}: subnet {subnet} is not nested; its outputs change by {leak:.1e} (relative) when the units "
        "above it become noise. A synapse or a statistic leads from a larger subnet into it. If the net was made by "
        "apply_steppingnet and not changed by hand, please report the model.",
        layer,
        subnet,
    )


def _first_difference(noisy: _Noisy, x: Tensor, subnet: int, seed: int) -> str | None:
    """Module path of the first value of level <= subnet that the noise changes."""
    plain = _Noisy(noisy.net, {}, NEVER, 0)
    before, after = _record(plain, x, seed), _record(noisy, x, seed)
    for node in noisy.net._graphs[False].module.graph.nodes:
        units, axis = node.meta.get("units"), node.meta.get("axis")
        if units is None or node.name not in before:
            continue
        kept = (channel_levels(noisy.net.levels, units) <= subnet).nonzero().flatten().to(x.device)
        a, b = before[node.name], after[node.name]
        if a.dim() > axis and a.shape[axis] == len(units):
            a, b = a.index_select(axis, kept), b.index_select(axis, kept)
            if not torch.allclose(a, b, rtol=TOLERANCE, atol=1e-12):
                return node.meta.get("module") or node.name
    return None


def _record(interpreter: _Noisy, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Results of all operators by name."""
    interpreter.seen = {}
    _drawing(seed, interpreter.outputs, x)
    return interpreter.seen
