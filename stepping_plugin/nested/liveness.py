"""Which units say anything: measured on pictures, on the captured nested graph of any model.

A unit speaks through what its readers take from it: the inputs of convolutions, linears and the classifier, behind
activations, pools and gates. A ReLU that never fires, a gate that never opens, a channel whose norm's factor is 0 give
their readers a constant, which a bias could give as well; no gradient brings a ReLU back that never fires. And a unit
whose readers all have lower levels is paid for, but not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.labels import Role
from ..graph.program import op_name
from ..units.analysis import channel_axis
from ..units.levels import channel_levels
from .functional import accumulate_head, leave
from .net import NestedNet

__all__ = ["FIRES", "Life", "Reading", "measure_life", "readings"]

FIRES = 0.01  # a unit that leaves its resting value more rarely is dead


@dataclass
class Life:
    """What the units do on some pictures, float64 (num_units,) each.

    Attributes:
        fires: share of pictures and positions at which the value that a reader sees is not at rest, that is not the
            least or the greatest that the channel takes (0 behind a ReLU); of the channel that does so most often. 1
            for units that no convolution, linear or classifier reads.
        carries: variance of what the unit adds to the sums of its readers, through live synapses, as a multiple of the
            mean over the units that the reader reads; of the reader that takes most. 0: nothing that counts reads it.
    """

    fires: Tensor
    carries: Tensor

    def alive(self, least: float = FIRES) -> Tensor:
        """Units that fire at more than this share of pictures and positions, BoolTensor (num_units,)."""
        return self.fires > least


@dataclass(frozen=True)
class Reading:
    """A place where units are read: `node` of the nested graph takes `source`, whose axis `axis` runs along `units`.

    Without a `weight`, they leave the model there.
    """

    node: fx.Node
    source: fx.Node
    weight: fx.Node | None
    axis: int
    units: Tensor


def readings(graph: fx.Graph) -> list[Reading]:
    """All convolutions, linears and classifiers of a nested graph that read units, and the outputs that are units.

    A grouped convolution is a part of the units that it reads.
    """
    found = []
    node: Any
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is leave:
            source = node.args[0]
            found.append(Reading(node, source, None, source.meta["axis"], source.meta["units"]))
            continue
        if node.target is accumulate_head:
            source, reader = node.args[0], next(iter(node.users))
        elif "source" in node.meta and node.meta["source"].meta.get("role") == Role.CHANNELS:
            source, reader = node.args[0], node
        else:
            continue
        units = source.meta.get("units")
        if units is not None and source.meta["axis"] == channel_axis(source.meta["source"], reader):
            found.append(Reading(reader, source, reader.args[1], source.meta["axis"], units))
    return found


@torch.no_grad()
def measure_life(
    net: NestedNet, batches: Iterable[Tensor], reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Life:
    """What the units of a net do on pictures, in eval mode, at the levels that the net has.

    Args:
        net: its parameters, buffers and mode are not changed.
        batches: images (B, C, H, W), a few hundred in all.
        reduce: mean of a tensor over all processes, each of which has pictures of its own.
    """
    graph = net._graphs[False]
    watch = _Watch(graph.module, readings(graph.module.graph))
    tensors = [t.detach() for t in net._tensors(graph, False)]
    for images in batches:
        watch.run(images, *tensors)
    levels, count = net.levels, net.analysis.num_units
    fires, carries = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    read = torch.zeros(count, dtype=torch.bool)
    for reading, record in zip(watch.readings, watch.records):
        movable = reading.units >= 0
        units = reading.units[movable]
        read[units] = True
        fires.scatter_reduce_(0, units, record.fires()[movable], "amax")
        taken = record.variance() * _strength(reading, record.weight)
        taken = taken * (channel_levels(levels, reading.units) <= net.num_subnets)
        unit_sum = torch.zeros(count, dtype=torch.float64).index_add_(0, units, taken[movable])
        mean = unit_sum[units.unique()].mean()
        if float(mean) > 0:
            carries = torch.maximum(carries, unit_sum / mean)
    device = net.unit_levels.device
    kind = torch.float32 if device.type == "mps" else torch.float64  # which knows no float64
    both = torch.stack([torch.where(read, fires, 1.0), carries]).to(device, kind)
    return Life(*reduce(both).double().cpu())


def _strength(reading: Reading, weight: Tensor) -> Tensor:
    """Sum of the squared live weights of every channel read, float64 (channels,)."""
    channels, transposed = len(reading.units), "transpose" in op_name(reading.node)
    if reading.weight is None:
        return torch.ones(channels, dtype=torch.float64)
    squares = weight.double().square()
    axis = 0 if transposed else 1
    if weight.dim() > axis and weight.shape[axis] == channels:
        return squares.movedim(axis, 0).flatten(1).sum(1).cpu()
    return torch.full((channels,), float(squares.mean()), dtype=torch.float64)  # groups: alike within the layer


class _Record:
    """Extremes, how often they are taken, and moments of every channel, over batches."""

    def __init__(self) -> None:
        self.count = 0
        self.weight = torch.empty(0)

    def add(self, x: Tensor, axis: int) -> None:
        x = x.movedim(axis, 0).flatten(1).cpu()
        low, high = x.amin(1), x.amax(1)
        at_low, at_high = (x == low[:, None]).sum(1), (x == high[:, None]).sum(1)
        total, squares = x.double().sum(1), x.double().square().sum(1)
        if self.count == 0:
            self.low, self.high, self.at_low, self.at_high = low, high, at_low, at_high
            self.total, self.squares = total, squares
        else:
            self.at_low = _at_extreme(self.low, low, self.at_low, at_low, low < self.low)
            self.at_high = _at_extreme(self.high, high, self.at_high, at_high, high > self.high)
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            self.total, self.squares = self.total + total, self.squares + squares
        self.count += x.shape[1]

    def fires(self) -> Tensor:
        return 1 - torch.maximum(self.at_low, self.at_high).double() / self.count

    def variance(self) -> Tensor:
        mean = self.total / self.count
        return (self.squares / self.count - mean.square()).clamp(min=0)


def _at_extreme(old: Tensor, new: Tensor, old_count: Tensor, new_count: Tensor, beaten: Tensor) -> Tensor:
    """How often the common extreme of two batches is taken."""
    return torch.where(beaten, new_count, old_count + torch.where(new == old, new_count, 0))


class _Watch(fx.Interpreter):
    """Runs a nested graph and records what readers read, and the masked weights that they read with."""

    def __init__(self, module: fx.GraphModule, where: list[Reading]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.readings, self.records = where, [_Record() for _ in where]
        self.at: dict[fx.Node, list[int]] = {}
        for number, reading in enumerate(where):
            self.at.setdefault(reading.node, []).append(number)

    def run_node(self, n: fx.Node) -> Any:
        for number in self.at.get(n, ()):
            reading, record = self.readings[number], self.records[number]
            record.add(self.env[reading.source], reading.axis)
            if reading.weight is not None:
                record.weight = self.env[reading.weight]
        return super().run_node(n)
