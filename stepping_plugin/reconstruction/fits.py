"""What `reconstruct` fits: which parameters, to which values of the original network, with which sums."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from ..graph.labels import Role
from ..graph.program import Program, call_arg, is_static, op_name, tensor_inputs
from ..graph.weights import is_direct
from ..nested.build import NestedGraph
from ..units.analysis import channel_axis
from .leastsquares import Windows

__all__ = ["LayerFit", "NormFit", "plan"]

LARGEST = 8192  # unknowns of one target; the sums of their products take half a gigabyte

_NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_PASSING = ("dropout", "clone", "alias", "contiguous", "detach")


@dataclass
class LayerFit:
    """A linear or convolution, fitted so that what it leads to comes near the original's.

    Attributes:
        node: its node in the eval program of the net.
        calls: its nodes in the nested graph; several where the classifier runs once per subnet.
        windows: what it reads.
        norm: the batch norm behind it, whose statistics and affine parameters follow.
        scales: static factors per channel behind that.
        end: the node that is to come near the original's: the last of those, or a sum.
        other: the other summand.
    """

    name: str
    node: fx.Node
    calls: list[fx.Node]
    windows: Windows
    norm: fx.Node | None = None
    scales: list[fx.Node] = field(default_factory=list)
    end: fx.Node = None  # type: ignore[assignment]
    other: fx.Node | None = None

    @property
    def axis(self) -> int:
        """Of the channels of its output."""
        return channel_axis(self.node)

    @property
    def branch(self) -> fx.Node:
        """The summand of `end` that it leads to."""
        return next(n for n in self.end.all_input_nodes if n is not self.other)

    @property
    def cut(self) -> bool:
        """Whether nothing but ReLUs read `end`: what is below 0 does not matter."""
        return all(_cuts(user) for user in self.end.users)


@dataclass
class NormFit:
    """A norm that stands alone: its factor and shift per channel."""

    name: str
    node: fx.Node
    calls: list[fx.Node]

    other = None

    @property
    def end(self) -> fx.Node:
        return self.node

    @property
    def axis(self) -> int:
        """Of the channels."""
        by_channel = op_name(self.node) in ("batch_norm", "group_norm", "instance_norm")
        return 1 if by_channel else len(self.node.meta["shape"]) - 1

    @property
    def batch_norm(self) -> bool:
        return op_name(self.node) == "batch_norm"

    @property
    def shifts(self) -> bool:
        """Whether it has a shift besides its factor."""
        return op_name(self.node) != "rms_norm" and call_arg(self.node, "bias") is not None


def plan(program: Program, nested: NestedGraph) -> tuple[list[LayerFit | NormFit], dict[str, str]]:
    """Everything that can be fitted, and why the rest is left alone, by name.

    Args:
        program: eval program of the net.
        nested: its nested form.
    """
    return _Planner(program, nested).run()


class _Planner:
    def __init__(self, program: Program, nested: NestedGraph) -> None:
        self.program = program
        self.nested: dict[fx.Node, fx.Node] = {program.image: next(iter(nested.module.graph.nodes))}
        for node in nested.module.graph.nodes:
            if "source" in node.meta:
                self.nested[node.meta["source"]] = node
        self.fits: list[LayerFit | NormFit] = []
        self.left: dict[str, str] = {}
        self.seen: dict[str, int] = {}

    def run(self) -> tuple[list[LayerFit | NormFit], dict[str, str]]:
        for node in self.program.operators():
            name = op_name(node)
            if (name == "linear" or name.startswith("conv")) and is_static(node.args[1]):
                self._layer(node)
        absorbed = {fit.norm for fit in self.fits if isinstance(fit, LayerFit)}
        for node in self.program.operators():
            if op_name(node) in _NORMS and node not in absorbed:
                self._norm(node)
        self._one_branch_per_sum()
        return self.fits, self.left

    def _name(self, node: fx.Node) -> str:
        path = node.meta.get("module") or node.name
        self.seen[path] = self.seen.get(path, 0) + 1
        return path if self.seen[path] == 1 else f"{path}#{self.seen[path]}"

    # -- layers

    def _layer(self, node: fx.Node) -> None:
        name, windows = self._name(node), Windows(node)
        calls = self._calls(node)
        reason = self._obstacle(node, windows, calls)
        if reason:
            self.left[name] = reason
            return
        fit = LayerFit(name, node, calls, windows, end=node)
        if node.meta.get("role") != Role.HEAD:
            self._follow(fit)
        self.fits.append(fit)

    def _calls(self, node: fx.Node) -> list[fx.Node]:
        if node in self.nested:
            return [self.nested[node]]
        weight = self.nested.get(node.args[1])  # type: ignore[arg-type]
        return [u for u in weight.users if u.target == node.target] if weight is not None else []

    def _obstacle(self, node: fx.Node, windows: Windows, calls: list[fx.Node]) -> str | None:
        """Why a layer cannot be fitted."""
        weight: fx.Node = node.args[1]  # type: ignore[assignment]
        role = node.meta.get("role")
        if not windows.supported:
            return f"no reconstruction of {op_name(node)}"
        if not is_direct(weight) or not self._is_own(weight, shared=True):
            return "its weight is computed from parameters"
        if len(weight.users) > 1:
            return "its weight is used in several places"
        if role == Role.TAPS or (role == Role.CARRIED and not windows.linear):
            return "it slides along the units"
        if windows.inputs > LARGEST:
            return f"it reads {windows.inputs:,} values for each output, more than {LARGEST:,}"
        if _folded(node):
            return "units lie on the axis of the batch"
        if not calls or (len(calls) > 1 and role != Role.HEAD):
            return "it runs once per subnet"
        return None

    def _is_own(self, tensor: fx.Node | None, shared: bool = False) -> bool:
        """Whether a tensor is a parameter or buffer of the model that one operator uses."""
        if tensor is None or tensor.op != "placeholder" or tensor.meta["tensor"] in self.program.constants:
            return False
        return shared or len(tensor.users) == 1

    def _follow(self, fit: LayerFit) -> None:
        """Absorb what follows the layer, channel by channel, up to a sum."""
        while len(fit.end.users) == 1:
            user = next(iter(fit.end.users))
            if not _same_place(fit.end, user) or user not in self.nested:
                return
            name = op_name(user)
            operands = [n for n in tensor_inputs(user) if n is not fit.end]
            if name == "batch_norm" and fit.norm is None and not fit.scales and self._can_follow(user):
                fit.norm = user
            elif name == "mul.Tensor" and len(operands) == 1 and _per_channel(operands[0], fit.node, fit.axis):
                fit.scales.append(operands[0])
            elif name == "add.Tensor" and len(operands) == 1 and self._is_summand(operands[0], user):
                fit.end, fit.other = user, operands[0]
                return
            elif name not in _PASSING:
                return
            fit.end = user

    def _can_follow(self, norm: fx.Node) -> bool:
        own = [call_arg(norm, k) for k in ("weight", "bias", "running_mean", "running_var")]
        return all(self._is_own(tensor) for tensor in own)

    def _is_summand(self, operand: fx.Node, total: fx.Node) -> bool:
        alike = operand.meta.get("shape") == total.meta["shape"]
        return alike and not is_static(operand) and operand in self.nested and not total.kwargs

    def _one_branch_per_sum(self) -> None:
        """Of two layers that end in one sum, the one that reads more is fitted to what the other leaves."""
        best: dict[fx.Node, LayerFit] = {}
        for fit in self.fits:
            if isinstance(fit, LayerFit) and fit.other is not None:
                rival = best.get(fit.end)
                loser = fit if rival is not None and rival.windows.inputs >= fit.windows.inputs else rival
                if loser is not fit:
                    best[fit.end] = fit
                if loser is not None:
                    branch = next(n for n in tensor_inputs(loser.end) if n is not loser.other)
                    loser.end, loser.other = branch, None

    # -- norms

    def _norm(self, node: fx.Node) -> None:
        name = self._name(node)
        fit = NormFit(name, node, [self.nested[node]] if node in self.nested else [])
        weight, bias = call_arg(node, "weight"), call_arg(node, "bias") if op_name(node) != "rms_norm" else None
        if node.meta.get("per_level") or not fit.calls:
            self.left[name] = "it runs once per subnet"
        elif not self._is_own(weight) or (bias is not None and not self._is_own(bias)):
            self.left[name] = "it has no factor of its own"
        elif weight.meta["shape"] != (node.meta["shape"][fit.axis],) or _folded(node):
            self.left[name] = "its factor is not one per channel"
        elif op_name(node) == "batch_norm" and not self._can_follow(node):
            self.left[name] = "its statistics are not its own"
        else:
            self.fits.append(fit)


def _cuts(node: fx.Node) -> bool:
    """Whether an operator gives the same for everything below 0."""
    name = op_name(node)
    least = {"hardtanh": "min_val", "clamp_min": "min", "clamp": "min"}.get(name)
    return name in ("relu", "relu6") or (least is not None and call_arg(node, least) == 0)


def _folded(node: fx.Node) -> bool:
    axis = node.meta.get("axis")
    return axis is not None and (axis == 0 or axis == node.meta.get("batch_axis"))


def _same_place(node: fx.Node, user: fx.Node) -> bool:
    """Whether an operator's result has the shape and the units of its input."""
    keys = ("shape", "axis")
    if user.op != "call_function" or user.meta.get("per_level"):
        return False
    return all(node.meta.get(k) == user.meta.get(k) for k in keys)


def _per_channel(operand: fx.Node, node: fx.Node, axis: int) -> bool:
    shape, rank = operand.meta.get("shape", ()), len(node.meta["shape"])
    own = axis - rank + len(shape)
    width = shape[own] if 0 <= own < len(shape) else 1
    return is_static(operand) and shape != () and torch.Size(shape).numel() == width in (1, node.meta["shape"][axis])
