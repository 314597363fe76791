"""MACs by counting: units that no layer tells apart, and the exact cost of subnets from their numbers alone.

Units of one *class* have the same channels in the same layers, so that MACs depend only on how many of them
have which level. A network has a few dozen classes (one per width, or more where a concat or split treats a
layer's channels differently), which makes exact MACs and marginal costs a matter of microseconds, whatever
the number of units.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from torch import Tensor

from ..units.analysis import Analysis
from ..units.macs import MacModel

__all__ = ["CountModel", "UnitClasses"]

Array = np.ndarray


class UnitClasses:
    """Partition of the units into classes (interchangeable units) and widths (what a band holds for).

    Attributes:
        of_unit: (U,) class of every unit; classes are numbered by their first unit.
        size: (C,) units per class.
        group: (C,) index of the `Analysis.groups` that the class lies in, -1 for none.
        width: (C,) width of the class: the class itself, or all small classes of its group together.
        width_size: (W,) units per width.
        names: name of every width (its group's).
    """

    def __init__(self, analysis: Analysis, macs_model: MacModel, small: int = 1) -> None:
        """Classes with fewer than `small` units share one width with the other small ones of their group."""
        group_of_unit = np.full(analysis.num_units, -1)
        for index, group in enumerate(analysis.groups):
            group_of_unit[group.units.numpy()] = index
        self.of_unit = _refine(group_of_unit, analysis, macs_model)
        self.size = np.bincount(self.of_unit)
        first = np.unique(self.of_unit, return_index=True)[1]
        self.first_unit = first
        self.group = group_of_unit[first]
        own = self.size >= small
        key = np.where(own, np.arange(len(self.size)), len(self.size) + 1 + self.group)
        self.width = _by_first_use(np.unique(key, return_inverse=True)[1])
        self.width_size = np.bincount(self.width, self.size).astype(np.int64)
        width_group = np.zeros(len(self.width_size), dtype=np.int64)
        width_group[self.width] = self.group
        self.names = [analysis.groups[g].name if g >= 0 else "a layer" for g in width_group]

    def counts(self, levels: Array, columns: int) -> Array:
        """Units per class and level, (C, columns) with column s for level s."""
        size = len(self.size)
        return np.bincount(self.of_unit * columns + levels, minlength=size * columns).reshape(size, columns)


def _refine(labels: Array, analysis: Analysis, macs_model: MacModel) -> Array:
    """Split groups until the units of a class agree in unit cost, anchor sets and channels in every layer."""
    group_and_cost = np.stack([labels, macs_model.unit_cost.numpy(), macs_model.dead_ends.numpy()])
    labels = np.unique(group_and_cost, axis=1, return_inverse=True)[1].reshape(-1)
    unused = int(labels.max()) + 1
    layer, unit = macs_model.pair_layer.numpy(), macs_model.pair_unit.numpy()
    outs, ins = macs_model.pair_out.numpy(), macs_model.pair_in.numpy()
    bounds = np.searchsorted(layer, np.arange(len(macs_model.per_synapse) + 1))
    layers = [slice(start, stop) for start, stop in pairwise(bounds) if stop > start]
    members = [anchor.numpy() for anchor in analysis.anchors] + [unit[here] for here in layers]
    attributes = [np.zeros(len(anchor), dtype=np.int64) for anchor in analysis.anchors]
    attributes += [outs[here] * (int(ins[here].max()) + 1) + ins[here] for here in layers]
    for units, attribute in zip(members, attributes):
        # New labels by (label, attribute) for these units only: that sets them apart from the others.
        distinct, new = np.unique(labels[units] * (int(attribute.max()) + 1) + attribute, return_inverse=True)
        labels[units] = unused + new
        unused += len(distinct)
    return _by_first_use(labels)


def _by_first_use(labels: Array) -> Array:
    """Renumber labels in order of first occurrence."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


class CountModel:
    """`MacModel` over classes. Integers far below 2**53, so float64 is exact and has fast matrix products.

    Counts are arrays (C, columns) whose column s holds the units of level s; column 0 is empty. Dead ends (see
    `Analysis.dead_ends`) cost nothing above level 1.
    """

    def __init__(self, classes: UnitClasses, macs_model: MacModel) -> None:
        layers, size = len(macs_model.per_synapse), len(classes.size)
        self.out, self.inputs = np.zeros((layers, size)), np.zeros((layers, size))
        where = macs_model.pair_layer.numpy(), classes.of_unit[macs_model.pair_unit.numpy()]
        self.out[where], self.inputs[where] = macs_model.pair_out.numpy(), macs_model.pair_in.numpy()
        self.per_synapse = macs_model.per_synapse.numpy().astype(np.float64)
        self.free_out, self.free_in = macs_model.free_out.numpy(), macs_model.free_in.numpy()
        self.unit_cost = macs_model.unit_cost.numpy()[classes.first_unit].astype(np.float64)
        self.fixed, self.per_level = float(macs_model.fixed), float(macs_model.per_level)
        self.own = (self.per_synapse[:, None] * self.out * self.inputs).sum(0)  # synapses of a unit with itself
        self.dead = macs_model.dead_ends.numpy()[classes.first_unit]
        self._pairs: Array | None = None

    def macs(self, counts: Array, subnet: int) -> float:
        """MACs of one subnet, the smaller ones included. Counts may be fractional."""
        counts = self._useful(counts)
        out, inputs = self.out @ counts[:, 1 : subnet + 1], self.inputs @ counts[:, 1 : subnet + 1]
        out[:, 0] += self.free_out
        inputs[:, 0] += self.free_in
        synapses = (self.per_synapse[:, None] * out * inputs.cumsum(1)).sum()
        return float(
            synapses + self.unit_cost @ counts[:, 1 : subnet + 1].sum(1) + self.fixed + subnet * self.per_level
        )

    def _useful(self, counts: Array) -> Array:
        """Counts without the units that nothing can read at their level."""
        if not self.dead.any():
            return counts
        counts = counts.copy()
        counts[self.dead, 2:] = 0
        return counts

    def _partners(self, counts: Array, subnet: int) -> Array:
        """MACs between one more unit of a class at level `subnet` and what is there, (C,).

        It reads all levels up to its own and is read by its own level.
        """
        counts = self._useful(counts)
        read = self.inputs @ counts[:, 1 : subnet + 1].sum(1) + self.free_in
        reading = self.out @ counts[:, subnet] + (self.free_out if subnet == 1 else 0)
        return (self.per_synapse * read) @ self.out + (self.per_synapse * reading) @ self.inputs + self.unit_cost

    def added(self, counts: Array, subnet: int) -> Array:
        """MACs that subnet `subnet` gains by one unit of a higher level, per class (C,)."""
        return np.where(self.dead & (subnet > 1), 0.0, self._partners(counts, subnet) + self.own)

    def saved(self, counts: Array, subnet: int) -> Array:
        """MACs that subnet `subnet` loses if a unit of exactly its level leaves it, per class (C,)."""
        return np.where(self.dead & (subnet > 1), 0.0, self._partners(counts, subnet) - self.own)

    def pairs(self) -> Array:
        """MACs between a unit of class a and one of class b at the same level, both directions, (C, C)."""
        if self._pairs is None:
            one_way = self.out.T @ (self.per_synapse[:, None] * self.inputs)
            self._pairs = one_way + one_way.T
        return self._pairs


def to_array(values: Tensor) -> Array:
    """A tensor as a fresh array."""
    return np.array(values.detach().cpu().numpy())
