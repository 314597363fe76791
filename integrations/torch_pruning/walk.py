"""From layer to layer along the dependencies of torch-pruning's graph, all channels of a layer at once."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping

__all__ = ["IN", "LAYERS", "OUT", "Edge", "State", "Walk", "apply", "call"]

Ints = NDArray[np.int64]

OUT, IN = 0, 1  # sides, as in ToolkitCouplings.entries
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)

_EMPTY = np.empty(0, np.int64)
_OPERATORS = ("CONCAT", "SPLIT", "ELEMENTWISE", "RESHAPE", "UNBIND", "EXPAND", "SLICE", "OUTPUT")


@dataclass(frozen=True)
class Edge:
    """A dependency: index mappings to a neighbour, and those of the dependencies that lead back from it."""

    target: State
    there: list[Any]
    back: list[list[Any]]


@dataclass(eq=False)
class State:
    """What one pruning function of the toolkit touches at a node: its outputs, its inputs, or both, tied."""

    name: str
    module: Any
    sides: tuple[int, ...]
    width: int | None  # None: an operator between layers, which knows no width
    edges: list[Edge] = field(default_factory=list)

    def __str__(self) -> str:
        side = "" if len(self.sides) == 2 else (" out" if self.sides == (OUT,) else " in")
        return f"{self.name}{side} ({self.width})"


@dataclass(frozen=True)
class Pairs:
    """A relation: channel ``source[k]`` of the layer where a walk began is tied to ``index[k]`` here."""

    source: Ints
    index: Ints


class Walk:
    """Follows the dependencies from every layer to all layers that are reached through operators only.

    Operators are shared by layers that disagree about their width, so each layer walks for itself.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.finished = False
        self.names: list[str] = []
        self.layers: list[State] = []
        self.explored: set[State] = set()
        self.broken: dict[State, str] = {}  # layers whose walk failed, and why
        self.divergent: set[State] = set()  # operators at which a walk did not settle
        self.lopsided: set[State] = set()
        self.relations: dict[tuple[State, State], list[Pairs]] = defaultdict(list)
        self.reasons: list[str] = []

    def prepare(self, graph: Any) -> None:
        """Turns the toolkit's nodes and dependencies into states and edges."""
        states: dict[tuple[Any, Any], State] = {}
        for node in graph.module2node.values():
            for function, state in self._states_of(graph, node):
                states[node, function] = state
        ways: dict[tuple[State, State], list[list[Any]]] = defaultdict(list)
        for (node, function), state in states.items():
            for dependency in node.dependencies:
                neighbour = states.get((dependency.target, dependency.handler))
                if neighbour is not None and dependency.is_triggered_by(function):
                    ways[state, neighbour].append([m for m in dependency.index_mapping if m is not None])
        for (one, other), there in ways.items():
            one.edges += [Edge(other, mappings, ways.get((other, one), [])) for mappings in there]
        self.layers = [state for state in states.values() if state.width is not None]
        present = {state.module for state in self.layers if isinstance(state.module, LAYERS)}
        self.names = [name for name, module in graph.model.named_modules() if module in present]
        for name, module in graph.model.named_modules():
            if isinstance(module, LAYERS) and module not in graph.module2node:
                self.reasons.append(f"{name}: not in the toolkit's graph, its module is not called")

    def _states_of(self, graph: Any, node: Any) -> Iterator[tuple[Any, State]]:
        pruner, module = graph.get_pruner_of_module(node.module), node.module
        names = graph._param_to_name if node.type == ops.OPTYPE.PARAMETER else graph._module2name
        name = names.get(module, type(module).__name__)
        if node.type.name in _OPERATORS:
            out = into = None
        else:
            out, into = graph.get_out_channels(node), graph.get_in_channels(node)
        if pruner.prune_out_channels != pruner.prune_in_channels:
            yield pruner.prune_out_channels, State(name, module, (OUT,), out)
            yield pruner.prune_in_channels, State(name, module, (IN,), into)
        elif out == into:
            yield pruner.prune_out_channels, State(name, module, (OUT, IN), out)
        else:  # a convolution with one group per output counts as depthwise there, whatever its inputs
            self.reasons.append(f"{name}: the toolkit ties its {into} inputs to its {out} outputs one to one")

    def run(self) -> None:
        for layer in self.layers:
            if not self._explore(layer):
                return
            self.explored.add(layer)
        self.finished = True

    def _explore(self, origin: State) -> bool:
        """Relations of one layer, all its channels at once; False when the time is up."""
        channels = np.arange(origin.width or 0)
        bound = 8 * max(layer.width or 0 for layer in self.layers)
        reached: dict[State, _Reached] = defaultdict(_Reached)
        todo = [(origin, Pairs(channels, channels))]
        while todo:
            state, pairs = todo.pop()
            for edge in state.edges:
                if time.monotonic() > self.deadline:
                    return False
                try:
                    moved, lost = _follow(edge, pairs)
                except Exception as err:  # the toolkit's own arithmetic, such as a division by zero repeats
                    self.broken[origin] = f"an index mapping that raises {type(err).__name__}: {err}"
                    return True
                if lost:
                    self.lopsided.add(origin)
                if edge.target.width is not None:
                    self._record(origin, edge.target, moved)
                    continue
                if not moved.index.size:
                    continue
                if reached[edge.target].diverges(moved, bound):
                    self.divergent.add(edge.target)
                if edge.target in self.divergent:
                    self.broken[origin] = "indices that grow without end"
                    return True
                fresh, ties = reached[edge.target].add(moved)
                self._record(origin, origin, ties)
                if fresh.index.size:
                    todo.append((edge.target, fresh))
        return True

    def _record(self, origin: State, target: State, pairs: Pairs) -> None:
        known = self.relations[origin, target]
        again = any(pairs.source is old.source and pairs.index is old.index for old in known)
        if pairs.index.size and not again:  # again: a stream that reaches its reader by several ways
            known.append(pairs)

    # -- the verdict ------------------------------------------------------------------------------------

    def couplings(self) -> tuple[list[str], Ints, Ints]:
        """Names of the convolutions and linear layers, their channels, and the class of every channel."""
        offsets, total = {}, 0
        for layer in self.layers:
            offsets[layer] = total
            total += layer.width or 0
        left, right = [_EMPTY], [_EMPTY]
        for one, other, pairs in self._accepted():
            left.append(offsets[one] + pairs.source)
            right.append(offsets[other] + pairs.index)
        label = _components(total, np.concatenate(left), np.concatenate(right))
        position = {name: k for k, name in enumerate(self.names)}
        rows, labels = [np.empty((0, 3), np.int64)], [_EMPTY]
        for layer in self.layers:
            for side in layer.sides if isinstance(layer.module, LAYERS) else ():
                channels = np.arange(layer.width or 0)
                module = np.full_like(channels, position[layer.name])
                rows.append(np.stack([module, np.full_like(channels, side), channels], axis=1))
                labels.append(label[offsets[layer] + channels])
        table = np.concatenate(rows)
        order = np.lexsort((table[:, 2], table[:, 1], table[:, 0]))
        classes = np.unique(np.concatenate(labels)[order], return_inverse=True)[1]
        return self.names, table[order], classes

    def _accepted(self) -> list[tuple[State, State, Pairs]]:
        """Relations that both layers agree on; fills ``reasons`` with the others."""
        accepted: list[tuple[State, State, Pairs]] = []
        refused: list[tuple[str, State, State]] = []
        same: dict[State, State] = {}  # layers tied channel by channel, as a chain to a representative
        rank = {layer: k for k, layer in enumerate(self.layers)}
        for one, other in {tuple(sorted(pair, key=rank.__getitem__)) for pair in self.relations}:
            there, here = self.relations[one, other], self.relations[other, one]
            if not {one, other} <= self.explored or not there + here:
                continue
            if failure := self.broken.get(one) or self.broken.get(other):
                refused.append((failure, one, other))
            elif _outside(there, other) or _outside(here, one):
                refused.append(("indices outside a layer", one, other))
            elif not all(pairs.source is pairs.index for pairs in there + here):
                accepted += [(one, other, pairs) for pairs in there]
                accepted += [(other, one, pairs) for pairs in here]
            elif _last(same, one) is not _last(same, other):  # one to one, as everywhere in a residual stream
                same[_last(same, one)] = _last(same, other)
                channels = (there + here)[0]
                accepted.append((one, other, channels))
        self.reasons += _sentences(refused)
        if self.lopsided:
            layers = _some(self.lopsided)
            self.reasons.append(f"channels tied in one direction only, on the way from {layers}")
        return accepted


class _Reached:
    """Which channel of the origin came first to every index of an operator."""

    def __init__(self) -> None:
        self.owner = _EMPTY
        self.arrivals = 0

    def diverges(self, pairs: Pairs, bound: int) -> bool:
        """Mappings that feed on each other do not end (the toolkit itself does not come back from them).

        An operator is hardly wider than the layers around it, and is reached with news once per branch.
        """
        return self.arrivals > 16 or not 0 <= pairs.index.min() <= pairs.index.max() < bound

    def add(self, pairs: Pairs) -> tuple[Pairs, Pairs]:
        """The pairs at indices that nobody reached before, and ties of channels that meet at an index."""
        source, index = pairs.source, pairs.index
        missing = int(index.max()) + 1 - self.owner.size
        if missing > 0:
            self.owner = np.concatenate([self.owner, np.full(missing, -1)])
        free = np.flatnonzero(self.owner[index] < 0)
        new = free[np.unique(index[free], return_index=True)[1]]  # of several, the first
        self.owner[index[new]] = source[new]
        self.arrivals += bool(new.size)
        met = self.owner[index] != source
        fresh = pairs if new.size == index.size else Pairs(source[new], index[new])
        return fresh, Pairs(self.owner[index[met]], source[met])


# -- index mappings -------------------------------------------------------------------------------------


def _follow(edge: Edge, pairs: Pairs) -> tuple[Pairs, bool]:
    """Pairs at the other end of an edge: those from which a way leads back; and whether there were others."""
    if not edge.there and [] in edge.back:
        return pairs, False
    position, index = _images(edge.there, pairs.index)
    mutual = np.zeros(index.size, bool)
    for mappings in edge.back:
        returned, origin = _images(mappings, index)
        mutual[returned[origin == pairs.index[position[returned]]]] = True
    return Pairs(pairs.source[position[mutual]], index[mutual]), not mutual.all()


def _images(mappings: list[Any], index: Ints) -> tuple[Ints, Ints]:
    """Images of ``index`` under mappings in turn, each with the position in ``index`` that it came from."""
    position = np.arange(index.size)
    for mapping in mappings:
        kept, index = apply(mapping, index)
        position = position[kept]
    return position, index


def apply(mapping: Any, index: Ints) -> tuple[Ints, Ints]:
    """A mapping of the toolkit on many indices: positions in ``index``, and the images of those."""
    every = np.arange(index.size)
    if isinstance(mapping, index_mapping._FlattenIndexMapping):
        stride = mapping._stride
        if mapping.reverse:
            return every, index // stride
        return np.repeat(every, stride), (index[:, None] * stride + np.arange(stride)).ravel()
    if isinstance(mapping, (index_mapping._ConcatIndexMapping, index_mapping._SplitIndexMapping)):
        low, high = mapping.offset
        if mapping.reverse == isinstance(mapping, index_mapping._SplitIndexMapping):
            return every, index + low
        inside = every[(index >= low) & (index < high)]
        return inside, index[inside] - low
    if isinstance(mapping, index_mapping._SliceIndexMapping):
        if mapping.reverse:
            return every, index * mapping.step + mapping.start
        low, high, step = mapping.start, min(mapping.end, 2**62), mapping.step
        inside = every[(index >= low) & (index < high) & ((index - low) % step == 0)]
        return inside, (index[inside] - low) // step
    return call(mapping, index)


def call(mapping: Any, index: Ints) -> tuple[Ints, Ints]:
    """The toolkit's own code: it carries a root index along, which tells what every image came from."""
    given = [_HybridIndex(idx=int(i), root_idx=k) for k, i in enumerate(index)]
    images = mapping(given)
    position = [image.root_idx for image in images]
    if None in position:  # lost: images pair up by position, or are asked for one by one
        if len(images) == len(given):
            position = list(range(len(given)))
        else:
            images = [mapping([one]) for one in given]
            position = [k for k, some in enumerate(images) for _ in some]
            images = [image for some in images for image in some]
    return np.array(position, np.int64), np.array([image.idx for image in images], np.int64)


# -- relations ------------------------------------------------------------------------------------------


def _last(chain: dict[State, State], layer: State) -> State:
    while layer in chain:
        layer = chain[layer]
    return layer


def _outside(parts: list[Pairs], layer: State) -> bool:
    found = [pairs.index for pairs in parts if pairs.index.size]
    return any(index.min() < 0 or index.max() >= (layer.width or 0) for index in found)


def _components(count: int, left: Ints, right: Ints) -> Ints:
    """Smallest member of every element's connected component, by label propagation and pointer jumping."""
    label = np.arange(count)
    while True:
        low = np.minimum(label[left], label[right])
        new = label.copy()
        np.minimum.at(new, label[left], low)
        np.minimum.at(new, label[right], low)
        while not np.array_equal(new, new[new]):
            new = new[new]
        if np.array_equal(new, label):
            return label
        label = new


def _sentences(refused: list[tuple[str, State, State]]) -> list[str]:
    """One sentence per layer and kind: each refused pair is told under the layer that has most of them."""
    counts: dict[State, int] = defaultdict(int)
    for _, one, other in refused:
        counts[one] += 1
        counts[other] += 1
    told: dict[tuple[str, State], list[State]] = defaultdict(list)
    for kind, one, other in refused:
        first, second = sorted((one, other), key=lambda layer: (-counts[layer], str(layer)))
        told[kind, first].append(second)
    return sorted(f"{layer}: {kind}, against {_some(others)}" for (kind, layer), others in told.items())


def _some(layers: Iterable[State]) -> str:
    names = sorted(str(layer) for layer in layers)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
