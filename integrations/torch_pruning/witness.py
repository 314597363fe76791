"""Which channels move together, told by torch-pruning's dependency graph.

The toolkit knows couplings as dependencies between graph nodes: pruning index i of one layer forces pruning
of index ``mapping(i)`` of another. It offers them as groups, which are no reliable data: a group that covers
a whole layer keeps only the first of several root indices of a channel, and building one does not end on
some models. So the dependencies are followed here, from every layer through the operators between layers
(add, cat, view, ...) to the next layers, for all channels at once.

What contradicts itself is set aside: two layers of which one is sent to indices that the other does not
have, and channel pairs that hold in one direction only. The toolkit guesses shapes where it cannot see them,
and so its mistakes show (broadcast gates, attention biases, token mixing, cascaded split and cat). All other
couplings are reported as the toolkit has them, right or wrong. It knows none between the inputs and outputs
of a grouped convolution, and none between the channels of an attention head: those are rules of its pruner,
not of its graph.
DepGraph: Fang et al., https://arxiv.org/abs/2301.12900
"""

from __future__ import annotations

import copy
import ctypes
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch_pruning as tp
from numpy.typing import NDArray
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping

__all__ = ["ToolkitCouplings", "toolkit_couplings"]

Ints = NDArray[np.int64]
Result = TypeVar("Result")

OUT, IN = 0, 1  # sides, as in ToolkitCouplings.entries

_EMPTY = np.empty(0, np.int64)
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class ToolkitCouplings:
    """Channels of convolutions and linear layers, and the classes in which the toolkit moves them.

    Attributes:
        modules: names of the convolutions and linear layers in the graph, as in ``model.named_modules()``.
        entries: (K, 3) int64, one row per channel: index into ``modules``, side (0 output, 1 input), channel.
        classes: (K,) int64 class of every entry, 0, 1, ...; channels of one class are coupled.
        set_aside: couplings left out of ``classes`` and why, one sentence per layer.
        finished: False when the time ran out; ``classes`` then holds what was confirmed until then.
        seconds: time spent.
        error: why there is no (complete) account, None if there is.
    """

    modules: list[str]
    entries: Tensor
    classes: Tensor
    set_aside: list[str]
    finished: bool
    seconds: float
    error: str | None


def toolkit_couplings(
    model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], time_limit: float = 20.0
) -> ToolkitCouplings:
    """Asks torch-pruning which channels of ``model`` are coupled; never raises on what the toolkit does.

    The dependency graph is built on a copy (parameters shared, all requiring gradients, eval mode), in a
    thread of its own: the caller's grad mode, the model's training flags and frozen parameters do not
    matter, and code of the toolkit that does not end is stopped after ``time_limit`` seconds.

    Args:
        model: on any device, called as ``model(*example_inputs)``.
        example_inputs: what the model takes; a single tensor stands for one argument.
        time_limit: seconds for everything.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    start = time.monotonic()

    def work() -> _Walk:
        walk = _Walk(deadline=start + 0.95 * time_limit)  # ends by itself, with what it has
        twin = _traceable_copy(model)
        graph = tp.DependencyGraph()
        # forward_fn: left alone, the toolkit unpacks a tensor along its batch and retries after any error.
        graph.build_dependency(twin, example_inputs=inputs, forward_fn=lambda m, x: m(*x), verbose=False)
        walk.prepare(graph)
        walk.run()
        return walk

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        walk, error = _run_limited(work, time_limit)
    walk = walk or _Walk(deadline=start)  # nothing came back: no layers, no couplings
    modules, entries, classes = walk.couplings()
    if error is None and not walk.finished:
        error = f"not finished within {time_limit:g} s"
    return ToolkitCouplings(
        modules=modules,
        entries=entries,
        classes=classes,
        set_aside=walk.reasons,
        finished=error is None,
        seconds=time.monotonic() - start,
        error=error,
    )


# --------------------------------------------------------------------------------------------------------
# The copy and the clock
# --------------------------------------------------------------------------------------------------------


def _traceable_copy(model: nn.Module) -> nn.Module:
    """A copy on which autograd sees every parameter; parameters share their storage with the model's."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        data = parameter.detach()
        data = data.clone() if data.is_inference() else data
        memo[id(parameter)] = nn.Parameter(data, requires_grad=data.is_floating_point() or data.is_complex())
    for module in model.modules():
        for tensor in _tensors_in(vars(module)):  # cached results of an earlier forward cannot be deep-copied
            if id(tensor) not in memo and (not tensor.is_leaf or tensor.is_inference()):
                memo[id(tensor)] = tensor.detach().clone()
    # train() first: modules that cache for inference (LeViT's biases) drop it then; a cache hides its
    # parameters.
    return copy.deepcopy(model, memo).train().eval()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple, set)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


class _TimeUp(BaseException):
    """Raised inside the working thread; not an Exception, so that few handlers stop it."""


def _run_limited(
    work: Callable[[], Result], limit: float, grace: float = 2.0
) -> tuple[Result | None, str | None]:
    """Result of ``work`` and what went wrong, after at most ``limit`` seconds (plus ``grace`` to stop)."""
    outcome: list[tuple[Result | None, str | None]] = []

    def target() -> None:
        try:
            try:
                with torch.enable_grad():
                    outcome.append((work(), None))
            except Exception as err:
                outcome.append((None, f"torch-pruning failed with {type(err).__name__}: {err}"))
        except _TimeUp:
            pass

    thread = threading.Thread(target=target, name="torch-pruning", daemon=True)
    thread.start()
    thread.join(limit)
    late = time.monotonic() + grace
    while thread.is_alive() and time.monotonic() < late:
        ident = ctypes.c_ulong(thread.ident or 0)  # again and again: bare except clauses swallow it
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_TimeUp))
        thread.join(0.1)
    return outcome[0] if outcome else (None, f"stopped after {limit:g} s")


# --------------------------------------------------------------------------------------------------------
# The walk
# --------------------------------------------------------------------------------------------------------

_OPERATORS = ("CONCAT", "SPLIT", "ELEMENTWISE", "RESHAPE", "UNBIND", "EXPAND", "SLICE", "OUTPUT")


@dataclass(eq=False)
class _State:
    """What one pruning function of the toolkit touches at a node: its outputs, its inputs, or both, tied."""

    name: str
    module: Any
    sides: tuple[int, ...]
    width: int | None  # None: an operator between layers, which knows no width
    edges: list[tuple[_State, list[Any]]] = field(default_factory=list)  # neighbour, mappings on the way

    def __str__(self) -> str:
        side = "" if len(self.sides) == 2 else (" out" if self.sides == (OUT,) else " in")
        return f"{self.name}{side} ({self.width})"


@dataclass(frozen=True)
class _Pairs:
    """A relation: channel ``source[k]`` of the layer where a walk began is tied to ``index[k]`` here."""

    source: Ints
    index: Ints

    def keys(self) -> Ints:
        return (self.source << 32) + self.index

    def same(self, other: _Pairs) -> bool:
        return self.source is other.source and self.index is other.index


class _Walk:
    """Follows the dependencies from every layer to all layers that are reached through operators only."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.finished = False
        self.stride = 1  # most positions per channel where a map is flattened
        self.names: list[str] = []
        self.layers: list[_State] = []
        self.explored: set[_State] = set()
        self.runaways: set[_State] = set()
        self.divergent: set[_State] = set()  # operators at which a walk did not settle
        self.raised: dict[str, set[_State]] = defaultdict(set)
        self.relations: dict[tuple[_State, _State], list[_Pairs]] = defaultdict(list)
        self.reasons: list[str] = []

    def prepare(self, graph: Any) -> None:
        """Turns the toolkit's nodes and dependencies into states and edges."""
        states: dict[tuple[Any, Any], _State] = {}
        for node in graph.module2node.values():
            for function, state in self._states_of(graph, node):
                states[node, function] = state
        for (node, function), state in states.items():
            for dependency in node.dependencies:
                neighbour = states.get((dependency.target, dependency.handler))
                if neighbour is not None and dependency.is_triggered_by(function):
                    state.edges.append((neighbour, [m for m in dependency.index_mapping if m is not None]))
        mappings = [m for state in states.values() for _, way in state.edges for m in way]
        self.stride = max([getattr(m, "_stride", 1) for m in mappings], default=1)
        self.layers = [state for state in states.values() if state.width is not None]
        present = {state.module for state in self.layers if isinstance(state.module, _LAYERS)}
        self.names = [name for name, module in graph.model.named_modules() if module in present]
        for name, module in graph.model.named_modules():
            if isinstance(module, _LAYERS) and module not in graph.module2node:
                self.reasons.append(f"{name}: not in the toolkit's graph, its module is not called")

    def _states_of(self, graph: Any, node: Any) -> Iterator[tuple[Any, _State]]:
        pruner, module = graph.get_pruner_of_module(node.module), node.module
        names = graph._param_to_name if node.type == ops.OPTYPE.PARAMETER else graph._module2name
        name = names.get(module, type(module).__name__)
        if node.type.name in _OPERATORS:
            out = into = None
        else:
            out, into = graph.get_out_channels(node), graph.get_in_channels(node)
        if pruner.prune_out_channels != pruner.prune_in_channels:
            yield pruner.prune_out_channels, _State(name, module, (OUT,), out)
            yield pruner.prune_in_channels, _State(name, module, (IN,), into)
        elif out == into:
            yield pruner.prune_out_channels, _State(name, module, (OUT, IN), out)
        else:  # a convolution with one group per output counts as depthwise there, whatever its inputs
            self.reasons.append(f"{name}: the toolkit ties its {into} inputs to its {out} outputs one to one")

    def run(self) -> None:
        for layer in self.layers:
            if not self._explore(layer):
                return
            self.explored.add(layer)
        self.finished = True

    def _explore(self, origin: _State) -> bool:
        """Relations of one layer, all its channels at once; False when the time is up."""
        channels = np.arange(origin.width or 0)
        widest = max(layer.width or 0 for layer in self.layers)
        seen: dict[_State, _Seen] = defaultdict(_Seen)
        todo = [(origin, _Pairs(channels, channels))]
        while todo:
            state, pairs = todo.pop()
            for neighbour, mappings in state.edges:
                if time.monotonic() > self.deadline:
                    return False
                try:
                    there = _follow(mappings, pairs)
                except Exception as err:  # the toolkit's own arithmetic, such as a division by zero repeats
                    self.raised[f"{type(err).__name__}: {err}"].add(origin)
                    continue
                if neighbour.width is not None:
                    if not any(there.same(known) for known in self.relations[origin, neighbour]):
                        self.relations[origin, neighbour].append(there)
                    continue
                fresh = seen[neighbour].add(there)
                if seen[neighbour].diverges(widest, self.stride):
                    self.divergent.add(neighbour)
                if neighbour in self.divergent and there.index.size:
                    self.runaways.add(origin)
                    return True
                if fresh.index.size:
                    todo.append((neighbour, fresh))
        return True

    # -- the verdict ------------------------------------------------------------------------------------

    def couplings(self) -> tuple[list[str], Tensor, Tensor]:
        """Names of the convolutions and linear layers, their channels, and the class of every channel."""
        offsets, total = {}, 0
        for layer in self.layers:
            offsets[layer] = total
            total += layer.width or 0
        left, right = [], []
        for (one, other), pairs in self._confirmed().items():
            left.append(offsets[one] + pairs.source)
            right.append(offsets[other] + pairs.index)
        label = _components(total, np.concatenate([*left, _EMPTY]), np.concatenate([*right, _EMPTY]))
        position = {name: k for k, name in enumerate(self.names)}
        rows, labels = [np.empty((0, 3), np.int64)], [_EMPTY]
        for layer in self.layers:
            for side in layer.sides if isinstance(layer.module, _LAYERS) else ():
                channels = np.arange(layer.width or 0)
                module = np.full_like(channels, position[layer.name])
                rows.append(np.stack([module, np.full_like(channels, side), channels], axis=1))
                labels.append(label[offsets[layer] + channels])
        table = np.concatenate(rows)
        order = np.lexsort((table[:, 2], table[:, 1], table[:, 0]))
        classes = np.unique(np.concatenate(labels)[order], return_inverse=True)[1]
        return self.names, torch.from_numpy(table[order]), torch.from_numpy(classes)

    def _confirmed(self) -> dict[tuple[_State, _State], _Pairs]:
        """Relations that both layers agree on; fills ``reasons`` with the others."""
        agreed: dict[tuple[_State, _State], _Pairs] = {}
        same: dict[_State, _State] = {}  # layers tied channel by channel, as a chain to a representative
        refused: list[tuple[str, _State, _State]] = []
        rank = {layer: k for k, layer in enumerate(self.layers)}
        for one, other in {tuple(sorted(pair, key=rank.__getitem__)) for pair in self.relations}:
            if not {one, other} <= self.explored:
                continue
            there, here = self.relations[one, other], self.relations[other, one]
            if {one, other} & self.runaways:
                refused.append(("indices that grow without end", one, other))
            elif _outside(there, other) or _outside(here, one):
                refused.append(("indices outside a layer", one, other))
            elif _one_to_one(there) and _one_to_one(here):
                first, second = _last(same, one), _last(same, other)
                if first is not second:
                    same[first] = second
                    agreed[one, other] = there[0]
            else:
                forth, back = _merge(there), _merge(here)
                mutual = np.intersect1d(forth.keys(), _Pairs(back.index, back.source).keys())
                if not mutual.size == forth.index.size == back.index.size:
                    refused.append(("channels tied in one direction only", one, other))
                agreed[one, other] = _Pairs(mutual >> 32, mutual & 0xFFFFFFFF)
        self.reasons += _sentences(refused)
        for error, origins in sorted(self.raised.items()):
            self.reasons.append(f"an index mapping raised {error}, on the way from {_some(origins)}")
        return agreed


class _Seen:
    """Pairs that have reached an operator."""

    def __init__(self) -> None:
        self.arrived: list[_Pairs] = []
        self.keys = _EMPTY
        self.widest = 0

    def diverges(self, width: int, stride: int) -> bool:
        """Mappings that feed on each other do not end (the toolkit itself does not come back from them).

        An operator is hardly wider than the layers around it, meets few channels per index (q, k and v: 3; all
        positions of a channel, where maps are flattened) and is reached with news once per branch.
        """
        return len(self.arrived) > 32 or self.widest > 8 * width or self.keys.size > 8 * width * stride

    def add(self, pairs: _Pairs) -> _Pairs:
        """The part of ``pairs`` that is new."""
        if any(pairs.same(known) for known in self.arrived):  # the way back, and most of a residual stream
            return _Pairs(_EMPTY, _EMPTY)
        keys = pairs.keys()
        new = ~np.isin(keys, self.keys)
        if not new.any():
            return _Pairs(_EMPTY, _EMPTY)
        self.arrived.append(pairs)
        self.keys = np.concatenate([self.keys, keys[new]])
        self.widest = max(self.widest, int(np.abs(pairs.index).max()))
        return pairs if new.all() else _Pairs(pairs.source[new], pairs.index[new])


# -- index mappings -------------------------------------------------------------------------------------


def _follow(mappings: Iterable[Any], pairs: _Pairs) -> _Pairs:
    for mapping in mappings:
        position, index = _apply(mapping, pairs.index)
        pairs = _Pairs(pairs.source[position], index)
    return pairs


def _apply(mapping: Any, index: Ints) -> tuple[Ints, Ints]:
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
    return _call(mapping, index)


def _call(mapping: Any, index: Ints) -> tuple[Ints, Ints]:
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


def _merge(parts: list[_Pairs]) -> _Pairs:
    keys = np.unique(np.concatenate([_EMPTY, *(pairs.keys() for pairs in parts)]))
    return _Pairs(keys >> 32, keys & 0xFFFFFFFF)


def _one_to_one(parts: list[_Pairs]) -> bool:
    """Channel c to index c and nothing else; ``source is index`` survives operators without a mapping."""
    return len(parts) == 1 and parts[0].source is parts[0].index


def _last(chain: dict[_State, _State], layer: _State) -> _State:
    while layer in chain:
        layer = chain[layer]
    return layer


def _outside(parts: list[_Pairs], layer: _State) -> bool:
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


def _sentences(refused: list[tuple[str, _State, _State]]) -> list[str]:
    """One sentence per layer and kind: each refused pair is told under the layer that has most of them."""
    counts: dict[_State, int] = defaultdict(int)
    for _, one, other in refused:
        counts[one] += 1
        counts[other] += 1
    told: dict[tuple[str, _State], list[_State]] = defaultdict(list)
    for kind, one, other in refused:
        first, second = sorted((one, other), key=lambda layer: (-counts[layer], str(layer)))
        told[kind, first].append(second)
    return sorted(f"{layer}: {kind}, against {_some(others)}" for (kind, layer), others in told.items())


def _some(layers: Iterable[_State]) -> str:
    names = sorted(str(layer) for layer in layers)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
