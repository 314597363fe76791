"""Unstructured pruning during construction (paper III-A1): weights of negligible magnitude are set to 0.

A pruned weight is not removed: the iterations that follow train it like any other ("we do not remove these
weights permanently during pruning but allow them to update"), so it is free to grow again, and every round
decides anew. The
synapses of a unit that has moved are revived: the round after the move leaves them alone, and gives those
that were set to 0 before, and that training has not changed since, their old value back.

Dense kernels do not skip zeros: the pruned share is a number to report, not a saving. MACs count all live
synapses.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..graph.labels import Role
from ..graph.program import named_tensors
from ..nested.module import direct_weights, weight_layouts
from ..nested.net import NestedNet
from ..units.levels import channel_levels

__all__ = ["UnstructuredPruning"]


class UnstructuredPruning:
    """Rounds of pruning of one net.

    Attributes:
        pruned: what the last round set to 0, by weight name: places LongTensor (K, dimensions) and old
            values (K,).
        fraction: the share that those are of the weights of all live synapses.

    Args:
        net: its parameters are changed in place.
        threshold: weights of smaller magnitude are pruned; 0: none.
    """

    def __init__(self, net: NestedNet, threshold: float) -> None:
        self.net, self.threshold = net, threshold
        self.pruned: dict[str, tuple[Tensor, Tensor]] = {}
        self.fraction = 0.0

    @torch.no_grad()
    def round(self, moved: Tensor) -> None:
        """Revive the synapses of moved units, then prune all others that are live.

        Args:
            moved: BoolTensor (num_units,), units whose level changed since the last round.
        """
        if self.threshold == 0:
            return
        previous, self.pruned = self.pruned, {}
        count = total = 0
        for name, weight, live, fresh in self._weights(moved):
            if name in previous:
                _revive(weight, fresh, *previous[name])
            small = live & ~fresh & (weight.abs() < self.threshold)
            total += int(live.sum())
            if bool(small.any()):
                count += int(small.sum())
                self.pruned[name] = small.nonzero(), weight[small]
                weight.masked_fill_(small, 0)
        self.fraction = count / max(1, total)

    def _weights(self, moved: Tensor) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Name, weight, its live synapses, and those of moved units: masks of the weight's shape."""
        levels, n, tensors = self.net.levels, self.net.num_subnets, named_tensors(self.net.model)
        for name, outputs, inputs, transposed in self._synapses():
            weight = tensors[name]
            # The classifier has no levels: it belongs to every subnet and reads what that subnet has.
            row = torch.tensor([n]) if outputs is None else channel_levels(levels, outputs)
            live = (channel_levels(levels, inputs) <= row[:, None]) & (row <= n)[:, None]
            fresh = _at(moved, inputs).expand(len(row), -1)
            if outputs is not None:
                fresh = fresh | _at(moved, outputs)[:, None]
            live, fresh = (_like(weight, m.t() if transposed else m) for m in (live, fresh))
            yield name, weight, live, fresh

    def _synapses(self) -> Iterator[tuple[str, Tensor | None, Tensor, bool]]:
        """Per weight: name, output units (None: the classifier), input units, whether inputs come first."""
        analysis = self.net.analysis
        direct, layouts = direct_weights(analysis), weight_layouts(analysis)
        for name, (outputs, inputs) in sorted(analysis.weight_units.items()):
            if name in direct:
                yield name, outputs, inputs, layouts[name][1]
        heads = {x.weight: x.in_units for x in analysis.layers if x.role == Role.HEAD and x.weight is not None}
        for head, inputs in heads.items():
            yield head, None, inputs, False


def _at(units_mask: Tensor, units: Tensor) -> Tensor:
    return (units >= 0) & units_mask[units.clamp(min=0)]


def _like(weight: Tensor, mask: Tensor) -> Tensor:
    """A mask over the first two axes of a weight as one of all its elements."""
    return mask.reshape(*mask.shape, *[1] * (weight.dim() - 2)).expand_as(weight).to(weight.device)


def _revive(weight: Tensor, fresh: Tensor, places: Tensor, values: Tensor) -> None:
    where = tuple(places.to(weight.device).unbind(1))
    current = weight[where]
    revived = fresh[where] & (current == 0)
    weight[where] = torch.where(revived, values.to(weight), current)
