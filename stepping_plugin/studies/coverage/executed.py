"""MACs that an engine executes, counted on what runs, and those that class scores depend on, found by gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...engine import Engine
from ...graph.labels import Role
from ...graph.program import op_name
from ...net import SteppingNet
from ...units.analysis import Layer
from ...units.levels import channel_levels
from ...units.macs import dense_macs

__all__ = ["executed_macs", "reached_macs"]


def executed_macs(engine: Engine, image: Tensor) -> list[int]:
    """MACs that a session executes up to each subnet, by torch's FLOP counter.

    Args:
        image: one (1, C, H, W); there are models whose cost grows faster than the batch.
    """
    counted = []
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for _ in engine.steps(image):
            counted.append(counter.get_total_flops() // 2)
    return counted


def reached_macs(net: SteppingNet, images: Tensor) -> list[int]:
    """MACs per sample, up to each subnet, of channels that some class score of some subnet has a gradient for.

    An oracle that knows nothing of step programs: an engine may leave out the other channels and must compute these.
    It is a lower bound: layers that are evaluated once per subnet are left out but for the classifier.

    Args:
        images: at least two; for one image torch 2.14 has been seen to give the input of a batch norm in eval mode the
            gradients of other channels.
    """
    layers = {layer.node: layer for layer in net.analysis.layers}
    probing = _Probing(net._graphs[False].module, set(layers))
    with torch.enable_grad():
        scores = probing.run(images, *net._tensors(net._graphs[False], False))[0]
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0), dtype=scores.dtype)
    probes = list(probing.probes.values())
    gradients = torch.autograd.grad((scores * weights).sum(), probes, allow_unused=True)
    found = dict(zip(probing.probes, gradients))
    added = torch.zeros(net.num_subnets + 1, dtype=torch.long)
    for node, layer in layers.items():
        added += _macs_per_level(net, layer, found.get(node), node in found)
    return added[1:].cumsum(0).tolist()


class _Probing(fx.Interpreter):
    """Adds zeros to the results of layers, to get gradients of."""

    def __init__(self, module: fx.GraphModule, layers: set[fx.Node]) -> None:
        super().__init__(module)
        self.layers, self.probes = layers, dict[fx.Node, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and op_name(n) in _SATURATING and result.is_floating_point():
            result = self.fetch_args_kwargs_from_env(n)[0][0] * 0.5  # a channel may be zero for these images only
        source = n.meta.get("source")
        if source in self.layers and n.op == "call_function":
            self.probes[source] = torch.zeros_like(result, requires_grad=True)
            result = result + self.probes[source]
        return result


_SATURATING = {"relu", "relu6", "hardtanh", "hardsigmoid", "hardswish", "clamp", "clamp_min", "clamp_max"}


def _macs_per_level(net: SteppingNet, layer: Layer, gradient: Tensor | None, seen: bool) -> Tensor:
    """MACs of a layer that scores depend on, LongTensor (N + 1,), by level.

    Args:
        gradient: of its result, None if no score depends on it.
        seen: whether it was probed.
    """
    node, macs, n = layer.node, dense_macs(layer.node), net.num_subnets
    result = torch.zeros(n + 1, dtype=torch.long)
    source: Any = node.args[0]
    if node.meta.get("per_level"):
        if layer.role == Role.HEAD and not source.meta.get("per_level") and len(layer.in_units):
            own = channel_levels(net.levels, layer.in_units)
            return torch.bincount(own, minlength=n + 2)[: n + 1] * (macs // len(own))
        return result
    units, axis = node.meta["units"], node.meta["axis"]
    if seen and gradient is None:
        return result
    if units is None:
        result[1] = (
            macs if layer.role != Role.CHANNELS else _live(net, layer, macs, torch.ones(len(layer.out_units)))[1]
        )
        return result
    needed = torch.ones(len(units))
    if gradient is not None:
        reached = (gradient.movedim(axis, 0).flatten(1) != 0).any(1).cpu()
        needed = reached.reshape(-1, len(units)).any(0)  # images outermost in an axis of images and heads
    if layer.role == Role.CHANNELS:
        return _live(net, layer, macs, needed)
    own = channel_levels(net.levels, units)
    return torch.bincount(own, needed.double(), minlength=n + 2)[: n + 1].long() * (macs // len(units))


def _live(net: SteppingNet, layer: Layer, macs: int, needed: Tensor) -> Tensor:
    """Live synapses of the needed output channels, times their cost, by level (N + 1,)."""
    rows, columns = (channel_levels(net.levels, u) for u in (layer.out_units, layer.in_units))
    per_synapse = macs // (len(rows) * len(columns))
    live = (columns[None, :] <= rows[:, None]).sum(1) * needed
    return (
        torch.bincount(rows, live.double(), minlength=net.num_subnets + 2)[: net.num_subnets + 1].long() * per_synapse
    )
