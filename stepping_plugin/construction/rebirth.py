"""New weights for dead units, so that every level has something to say and can learn.

A unit that never fires gets no gradient: whatever its level pays for it is lost for good. It is born again: the
directions of its incoming weights are drawn anew, over live synapses; their length and the bias are set on pictures, so
that its value before the activation varies about 0 as much as that of the other units of its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.labels import Role
from ..graph.program import call_arg, named_tensors, op_name
from ..graph.weights import weight_key
from ..nested.liveness import Life, measure_life
from ..nested.module import direct_weights, weight_layouts
from ..nested.net import NestedNet

__all__ = ["can_be_reborn", "give_birth", "revive"]

Reduce = Callable[[Tensor], Tensor]
TRIES = 5  # new weights in one layer change what the next one reads


def revive(
    net: NestedNet, pictures: Sequence[Tensor], seed: int = 0, reduce: Reduce = lambda tensor: tensor
) -> tuple[Life, list[str]]:
    """Bring every dead unit of the subnets back to life, if its weights allow that.

    Args:
        net: changed in place: incoming weights, biases and batch norms of dead units.
        pictures: batches of images (B, C, H, W), a few hundred in all.
        seed: of the new weights.
        reduce: mean of a tensor over all processes.

    Returns:
        What the units do afterwards, and notes.
    """
    generator = torch.Generator().manual_seed(seed)
    able, inside = can_be_reborn(net), net.levels <= net.num_subnets
    reborn = torch.zeros_like(able)
    for _ in range(TRIES):
        life = measure_life(net, pictures, reduce)
        dead = able & inside & ~life.alive()
        if not bool(dead.any()):
            break
        give_birth(net, dead, pictures[0], generator, reduce)
        reborn |= dead
    else:
        life = measure_life(net, pictures, reduce)
    return life, _notes(net, reborn, inside & ~life.alive())


def _notes(net: NestedNet, reborn: Tensor, dead: Tensor) -> list[str]:
    texts = []
    for units, fate in ((reborn & ~dead, "never fired and got new weights"), (dead, "never fired and stayed so")):
        names = [g.name for g in net.analysis.groups if bool(units[g.units].any())]
        if names:
            count = int(units.sum())
            texts.append(f"{count} unit{'s' * (count > 1)} of {', '.join(names)} {fate}")
    return texts


def can_be_reborn(net: NestedNet) -> Tensor:
    """Units whose incoming weights are parameters as they are, BoolTensor (num_units,)."""
    made, direct = torch.zeros(net.analysis.num_units, dtype=torch.bool), direct_weights(net.analysis)
    other = torch.zeros_like(made)
    for name, (outputs, _) in net.analysis.weight_units.items():
        (made if name in direct else other)[outputs[outputs >= 0]] = True
    return made & ~other


@torch.no_grad()
def give_birth(
    net: NestedNet, units: Tensor, pictures: Tensor, generator: torch.Generator, reduce: Reduce = lambda tensor: tensor
) -> None:
    """Draw the incoming weights of units anew and fit them to pictures.

    Args:
        net: changed in place.
        units: BoolTensor (num_units,), some of `can_be_reborn`.
        pictures: (B, C, H, W).
        generator: of the directions.
        reduce: mean of a tensor over all processes, each of which has as many pictures.
    """
    tensors, layouts = named_tensors(net.model), weight_layouts(net.analysis)
    for name in sorted(direct_weights(net.analysis)):
        rows = _at(units, net.analysis.weight_units[name][0])
        if bool(rows.any()):
            weight, live = tensors[name], net.live_mask(name, net.levels)
            if layouts[name][1]:
                weight, live = weight.transpose(0, 1), live.transpose(0, 1)
            drawn = torch.randn(weight[rows].shape, generator=generator, dtype=torch.float64)
            weight[rows.to(weight.device)] = drawn.to(weight) * live[rows].to(weight)
    graph = net._graphs[False]
    _Fitting(net, units, reduce).run(pictures, *net._tensors(graph, False))


def _at(chosen: Tensor, units: Tensor) -> Tensor:
    return (units >= 0) & chosen[units.clamp(min=0)]


class _Fitting(fx.Interpreter):
    """Runs the nested graph in eval mode; fits the chosen units of every layer and norm to what these read."""

    def __init__(self, net: NestedNet, units: Tensor, reduce: Reduce) -> None:
        super().__init__(net._graphs[False].module)
        self.chosen, self.reduce, self.tensors = units, reduce, named_tensors(net.model)
        self.transposed = {weight: layout[1] for weight, layout in weight_layouts(net.analysis).items()}
        self.fitted: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        units = n.meta.get("units")
        if n.op != "call_function" or units is None:
            return super().run_node(n)
        channels = _at(self.chosen, units)
        if not bool(channels.any()):
            return super().run_node(n)
        if op_name(n) == "batch_norm":
            self._fit_norm(n, channels)
        elif "source" in n.meta and n.meta["source"].meta.get("role") == Role.CHANNELS:
            name = weight_key(n.meta["source"].args[1])
            if name in self.transposed and name not in self.fitted:
                self.fitted.add(name)
                self._fit_weight(n, name, channels)
        return super().run_node(n)

    def _fit_norm(self, n: fx.Node, channels: Tensor) -> None:
        """Statistics of what the norm reads; the mean factor of the other channels, and no shift."""
        values: list[Any] = [None if a is None else self.env[a] for a in n.args[:5]]  # type: ignore[index]
        x, weight, bias, mean, variance = values
        channels = channels.to(x.device)
        if mean is not None:
            read_mean, read_variance = self._moments(x[:, channels], 1)
            mean[channels], variance[channels] = read_mean.to(mean), read_variance.to(variance)
        if weight is not None:
            weight[channels] = weight[~channels].abs().mean() if bool((~channels).any()) else 1.0
        if bias is not None:
            bias[channels] = 0.0

    def _fit_weight(self, n: fx.Node, name: str, channels: Tensor) -> None:
        """As much spread as the layer's other channels have on average, about 0."""
        weight, masked, bias = self.tensors[name], self.env[n.all_input_nodes[1]], call_arg(n, "bias")
        mean, variance = self._moments(super().run_node(n), n.meta["axis"])
        channels, spread = channels.to(mean.device), variance.sqrt()
        usual = spread[~channels].mean() if bool((~channels).any()) else 1.0
        factor = (usual / spread[channels].clamp(min=1e-12)).to(weight)
        for tensor in {id(t): t for t in (weight, masked)}.values():
            rows = tensor.transpose(0, 1) if self.transposed[name] else tensor
            rows[channels] *= factor.reshape(-1, *[1] * (rows.dim() - 1))
        if isinstance(bias, fx.Node) and bias.op == "placeholder":
            value = self.env[bias]
            value[channels] = factor * (value[channels] - mean[channels].to(value))

    def _moments(self, values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of every channel over the pictures of all processes."""
        flat = values.movedim(axis, 0).flatten(1)
        flat = flat if flat.device.type == "mps" else flat.double()
        mean, squares = self.reduce(torch.stack([flat.mean(1), flat.square().mean(1)]))
        return mean, (squares - mean.square()).clamp(min=0)
