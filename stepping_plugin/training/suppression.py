"""Weight-update suppression (paper III-A2) in one pass.

The paper trains the subnets one after the other; while subnet j is trained, the learning rate of a weight of
level s < j is multiplied by beta^(j - s), so that a weight of level s moves by

    -lr * sum_{j >= s} beta^(j - s) dL_j/dw                                              (*)

(a weight of level s does not occur in subnets j < s). One backward pass of `sum_j beta^(j - 1) L_j`, followed
by a multiplication of its gradient by beta^-(s - 1), gives exactly that sum for all weights at once.

The level of a weight is the level of its *output* unit: that is the first subnet that contains the synapse. A
bias, norm, depthwise filter or embedding has the level of its unit, a column of the classifier that of the
unit it reads, and whatever all units share (the classifier's bias, token mixing) is level 1. A dead synapse
has gradient 0 already.

Optimizers. (*) is exact for optimizers that are linear in the gradient, with or without momentum
(`mode="gradient"`; weight decay is not suppressed). Adam and its kin divide by the gradient's own size and so
undo a constant factor. For them `mode="step"` keeps the *direction* of (*), which such an optimizer respects,
and scales the *step* that it takes: p <- p_before + factor * (p_after - p_before), with the mean of the
factors in (*),

    factor(s) = sum_{j >= s} beta^(j - s) / (N - s + 1).

It is an approximation: the paper would let every L_j take a step of its own, whose lengths Adam would make
nearly equal; the mean factor is what remains of their sum. Decoupled weight decay is part of the step and
scaled with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.graph.labels import Role
from stepping_plugin.graph.program import named_tensors, op_name, tensor_inputs
from stepping_plugin.nested.module import direct_weights, weight_layouts
from stepping_plugin.nested.net import NestedNet
from stepping_plugin.units.levels import channel_levels

__all__ = ["Suppression", "parameter_units"]

MODES = ("auto", "gradient", "step")


class Suppression:
    """Suppression for any training loop:

        suppression = Suppression(net, beta=0.9, optimizer=optimizer)
        losses = criterion(net.forward_all(images), labels)     # Tensor[N]
        suppression.combine(losses).backward()
        suppression.scale_gradients()                           # once per optimizer step, before clipping
        with suppression.step():                                # scales the step, if needed
            optimizer.step()

    With gradient accumulation, DDP or a loss scaler call `scale_gradients` once, when the gradient is
    complete. Levels may change between steps (`net.set_levels`); the factors follow. `mode="step"` holds a
    copy of the parameters while the optimizer steps.

    The paper's sequential updates: backward of L_j alone, then `scale_gradients(j)` and `step(j)`.

    Args:
        net: its parameters must stay the same objects.
        beta: in (0, 1]; 1 suppresses nothing.
        mode: "gradient", "step", or "auto": by the optimizer.
        optimizer: needed by "auto" only.
    """

    def __init__(
        self,
        net: NestedNet,
        beta: float = 0.9,
        mode: str = "auto",
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if not 0 < beta <= 1:
            expected = "a number above 0, up to 1 (no suppression)"
            raise SteppingError(explain("out of range", where="beta", got=beta, expected=expected))
        if mode not in MODES or (mode == "auto" and optimizer is None):
            expected = 'mode "gradient" or "step", or mode "auto" with an optimizer'
            raise SteppingError(explain("cannot choose how to suppress", got=f"mode {mode!r}", expected=expected))
        self.net, self.beta = net, float(beta)
        self.mode = mode if optimizer is None or mode != "auto" else _suitable_mode(optimizer)
        units = parameter_units(net)
        self._parameters = [(p, units[name]) for name, p in net.model.named_parameters()]
        self._seen: tuple | None = None
        self._factors: dict[tuple[str, int | None], list[tuple[nn.Parameter, Tensor]]] = {}

    def combine(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The scalar to call `backward` on: sum_j beta^(j - 1) L_j."""
        stacked = losses if isinstance(losses, Tensor) else torch.stack(tuple(losses))
        powers = torch.arange(len(stacked), dtype=stacked.dtype, device=stacked.device)
        return (stacked * self.beta**powers).sum()

    @torch.no_grad()
    def scale_gradients(self, subnet: int | None = None) -> None:
        """Multiply the gradients by beta^-(s - 1); after backward of one loss L_j alone, by beta^(j - s).

        Args:
            subnet: j in the sequential form, None in the joint form.
        """
        if self.mode == "step" and subnet is not None:
            return  # the step's factor says it all
        scaled = [(p.grad, f) for p, f in self._scaled("gradient", subnet) if p.grad is not None]
        if scaled:
            gradients, factors = zip(*scaled)
            torch._foreach_mul_(gradients, factors)

    @contextmanager
    def step(self, subnet: int | None = None) -> Iterator[None]:
        """Around `optimizer.step()`: scale the step in mode "step"; in mode "gradient" do nothing."""
        scaled = self._scaled("step", subnet) if self.mode == "step" else []
        before = [p.detach().clone() for p, _ in scaled]
        yield
        with torch.no_grad():
            for (p, factor), old in zip(scaled, before):
                torch.lerp(old, p, factor, out=p)  # lerp: a factor of 1 changes no bit

    # --- Factors

    def _scaled(self, kind: str, subnet: int | None) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters with their factors, without those that are all 1; made anew when levels change."""
        if self.beta == 1 and (kind == "gradient" or subnet is None):
            return []
        levels = self.net.unit_levels
        if self._seen is None or self._seen[0] is not levels or self._seen[1] != levels._version:
            self._seen = (
                levels,
                levels._version,
            )  # `set_levels` writes in place, `net.to` replaces the buffer
            self._factors.clear()
        key = (kind, subnet)
        if key not in self._factors:
            assigned = self.net.levels.clamp(max=self.net.num_subnets)  # spare: gradient 0
            self._factors[key] = []
            for parameter, units in self._parameters:
                factor = self._factor(kind, channel_levels(assigned, units).double(), subnet)
                if bool((factor != 1).any()):
                    self._factors[key].append((parameter, factor.to(parameter)))
        return self._factors[key]

    def _factor(self, kind: str, level: Tensor, subnet: int | None) -> Tensor:
        """Factor per element from level per element, in float64."""
        if subnet is not None:
            inside = self.beta ** (subnet - level).clamp(min=0)
            return torch.where(level <= subnet, inside, 0.0) if kind == "step" else inside
        if kind == "gradient":
            return self.beta ** -(level - 1)
        reach = self.net.num_subnets - level + 1
        return torch.where(reach == 1, 1.0, (1 - self.beta**reach) / (1 - self.beta) / reach)


def _suitable_mode(optimizer: torch.optim.Optimizer) -> str:
    from timm.optim.sgdw import SGDW

    inner = getattr(optimizer, "_base_optimizer", optimizer)  # timm's Lookahead: linear in its inner steps
    return "gradient" if isinstance(inner, (torch.optim.SGD, SGDW)) else "step"


# --- Unit per parameter element ---


def parameter_units(net: NestedNet) -> dict[str, Tensor]:
    """Unit of every element of every parameter of `net.model`, -1 for level 1.

    Returns:
        LongTensors that broadcast to their parameters.
    """
    analysis, parameters = net.analysis, dict(net.model.named_parameters())
    known, layouts = dict(analysis.param_units), weight_layouts(analysis)
    for name in direct_weights(analysis):
        known[name] = (int(layouts[name][1]), analysis.weight_units[name][0])
    for layer in analysis.layers:
        if layer.role == Role.HEAD and layer.weight:
            known[layer.weight] = (1, layer.in_units)
    result = {}
    for name, (axis, units) in known.items():
        if name in parameters:
            result[name] = units.reshape([-1 if d == axis else 1 for d in range(parameters[name].dim())])
    unknown = {name: p for name, p in parameters.items() if name not in result}
    found = _units_by_gradient(net, unknown) if unknown else {}
    for name, parameter in unknown.items():
        result[name] = found.get(name, torch.full([1] * parameter.dim(), -1))
    return result


def _units_by_gradient(net: NestedNet, unknown: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Units of parameters that are transformed before they meet units.

    For example a resampled position embedding, or a class token repeated over the batch. An element has the
    unit of the one channel of the operand that depends on it.
    """
    net.complete()
    program = net.analysis.programs.get(True) or net.analysis.eval_program
    values = {**{k: v.detach() for k, v in named_tensors(net.model).items()}, **program.constants}
    found: dict[str, Tensor] = {}
    for node in program.operators():
        for operand in tensor_inputs(node):
            names, aligned = _parameters_behind(operand, set(unknown)), _alignment(node, operand)
            if names and aligned is not None:
                own, units = aligned
                for name, channel in _owners(operand, own, names, values).items():
                    owner = torch.where(channel >= 0, units[channel.clamp(min=0)], -1)
                    found[name] = torch.maximum(found[name], owner) if name in found else owner
    return found


def _parameters_behind(operand: fx.Node, names: set[str]) -> set[str]:
    """Those of the named parameters that a value is made of, if it is made without the image."""
    seen: set[fx.Node] = set()
    pending = [operand]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" and "tensor" not in node.meta:
            return set()
        pending.extend(tensor_inputs(node))
    return {n.meta["tensor"] for n in seen if n.op == "placeholder"} & names


def _alignment(node: fx.Node, operand: fx.Node) -> tuple[int, Tensor] | None:
    """Axis of an operand that runs along units, and these: of a node's output, or of what the classifier reads."""
    shape, units, name = operand.meta.get("shape", ()), node.meta["units"], op_name(node)
    if node.meta.get("role") == Role.HEAD and operand is node.args[1]:
        read: Tensor | None = node.args[0].meta["units"]  # type: ignore[union-attr]
        return None if read is None or shape[1] != len(read) else (1, read)
    if units is None or node.meta.get("role") in (Role.CARRIED, Role.TAPS):
        return None
    if name == "linear" or name.startswith("conv"):
        own = 1 if "transpose" in name and len(shape) > 1 else 0
    elif name in ("batch_norm", "group_norm"):
        own = 0
    else:
        own = node.meta["axis"] - len(node.meta["shape"]) + len(shape)
    return (own, units) if 0 <= own < len(shape) and shape[own] == len(units) else None


def _owners(operand: fx.Node, axis: int, names: set[str], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Channel of the operand that each parameter element feeds, -1 where it feeds none or several.

    With random weights R, the gradient of sum(R * channel * operand) over that of sum(R * operand) is the
    channel's number for an element that feeds one channel only, and no whole number, for two draws of R,
    otherwise.
    """
    leaves = {name: values[name].cpu().double().requires_grad_() for name in sorted(names)}
    value = _evaluate(operand, {**values, **leaves}, {})
    number = torch.arange(value.shape[axis], dtype=value.dtype)
    number = number.reshape([-1 if d == axis else 1 for d in range(value.dim())])
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(2):
        random = torch.rand(value.shape, generator=generator, dtype=value.dtype) + 0.5
        sums = [(random * w * value).sum() for w in (number, torch.ones_like(number))]
        above, below = (torch.autograd.grad(s, list(leaves.values()), retain_graph=True) for s in sums)
        ratios.append([a / b for a, b in zip(above, below)])
    result = {}
    for name, first, second in zip(leaves, *ratios):
        channel = first.round()
        sure = ((first - channel).abs() < 0.02) & ((second - channel).abs() < 0.02)  # False for 0 / 0
        result[name] = torch.where(sure, channel, -1).long()
    return result


def _evaluate(node: fx.Node, tensors: dict[str, Tensor], memo: dict[fx.Node, Tensor | int]) -> Tensor:
    """Value of a node that does not depend on the image's content, for a batch of one."""
    if node not in memo:
        if "batch" in node.meta:
            memo[node] = int(node.meta["batch"])
        elif node.op == "placeholder":
            tensor = tensors[node.meta["tensor"]].cpu()
            memo[node] = tensor.double() if tensor.is_floating_point() else tensor
        else:
            given = (node.args, dict(node.kwargs))
            args, kwargs = fx.node.map_arg(given, lambda n: _evaluate(n, tensors, memo))
            memo[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return memo[node]  # type: ignore[return-value]
