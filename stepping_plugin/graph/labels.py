"""Unit labels on every tensor of a captured model (DESIGN: the channel graph).

Each non-static node carries a *label tensor*: one unit label per element of its output, for batch size 1, kept
compressed (size 1 along every axis on which the label does not vary). Data movement is executed on the label tensor
itself, convolutions and linears make fresh labels on their output channels, elementwise operators join the labels they
combine, contractions join the labels along the contracted axis. Passes repeat until nothing joins any more.

A value may instead be *per level*: it exists once per subnet and belongs to no unit (class scores, a mean over the
channels of levels <= s). `Labels.per_level` holds those nodes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ..errors import CaptureError
from .program import Program, call_arg, is_static, op_name, tensor_inputs
from .unionfind import PINNED, UnionFind

__all__ = ["Labels", "Pin", "Role", "compress", "labelled_axis", "propagate", "units_only"]

MAX_PASSES = 30


class Role:
    """How a node treats units; decides its masks, its MACs and how it is sliced. Nodes without a role move data."""

    CHANNELS = "channels"  # weight between input units and output units: masked
    GROUPED = "grouped"  # grouped convolution: a group is a unit, input and output together
    CARRIED = "carried"  # weight applied along another axis, once per unit (token mixing)
    HEAD = "head"  # last weight before scores leave the model: its result accumulates over the levels
    PREFIX_NORM = "prefix norm"  # statistics over the channels of levels <= s
    PREFIX_REDUCE = "prefix reduce"  # mean, max or norm over the channels of levels <= s: a value per level
    TAPS = "taps"  # one-channel convolution that slides over the channels (ECA)


@dataclass
class Pin:
    """Why units stay at level 1."""

    reason: str
    module: str
    operator: str
    channels: int = 0  # output channels of weights among them


@dataclass
class Weight:
    """Labels of one weight tensor, shared by all its call sites."""

    out: Tensor  # (O,) fresh labels of the output channels
    inputs: Tensor | None = None  # (I,) labels of the input channels of the first call site
    source: fx.Node | None = None  # what the first call site reads


@dataclass
class Labels:
    """Result of `propagate`. Nodes of all captured programs share one set of labels."""

    sets: UnionFind = field(default_factory=UnionFind)
    raw: dict[fx.Node, Tensor] = field(default_factory=dict)
    per_level: set[fx.Node] = field(default_factory=set)
    role: dict[fx.Node, str] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)
    without_rule: set[fx.Node] = field(default_factory=set)
    adopted: dict[fx.Node, Tensor] = field(default_factory=dict)
    softmaxes: set[fx.Node] = field(default_factory=set)  # over all units of a tensor, which makes them one

    @property
    def unknown(self) -> Counter:
        """Operators without a rule that read units -> number of times."""
        return Counter(op_name(node) for node in self.without_rule)

    def of(self, node: fx.Node) -> Tensor:
        """Compressed label tensor of a node (all `FREE` for static nodes), rank of the node's output."""
        if node not in self.raw:  # static, or a list of tensors that an operator without a rule returned
            return torch.zeros([1] * len(node.meta.get("shape", ())), dtype=torch.long)
        return compress(self.sets.find(self.raw[node]))

    def is_free(self, node: fx.Node) -> bool:
        """Whether no element belongs to a unit that may move."""
        return not bool((self.of(node) > PINNED).any())

    @property
    def pinned_channels(self) -> int:
        """Output channels of weights that stay at level 1."""
        return sum(int((self.sets.find(weight.out) == PINNED).sum()) for weight in self.weights.values())

    def weight(self, key: str, out_channels: int) -> Weight:
        """Labels of a weight, made on first use."""
        if key not in self.weights:
            self.weights[key] = Weight(self.sets.new(out_channels))
        return self.weights[key]

    def merge(self, labels: Tensor, axes: Iterable[int]) -> Tensor:
        """Join all labels along the given axes; those axes come back with size 1."""
        axes = [a % labels.dim() for a in axes]
        varying = [a for a in axes if labels.shape[a] > 1]
        if not varying:
            return labels
        kept = [d for d in range(labels.dim()) if d not in varying]
        rows = labels.permute(kept + varying).reshape(-1, math.prod(labels.shape[a] for a in varying))
        self.sets.union(rows, rows.max(1, keepdim=True)[0])
        return torch.amax(self.sets.find(labels), dim=varying, keepdim=True)

    def units_after_merge(self, labels: Tensor, axes: Iterable[int]) -> int:
        """Number of different units left if the labels were joined along the axes. Changes nothing."""
        trial = self.copy()
        return trial.units_in(trial.merge(labels, axes))

    def units_in(self, labels: Tensor) -> int:
        """Number of different units that may move among labels."""
        roots = self.sets.find(labels)
        return len(torch.unique(roots[roots > PINNED]))

    def join(self, labels: Iterable[Tensor], rank: int) -> Tensor:
        """Join labels position by position (broadcasting); `FREE` and `PINNED` take the label of their partner."""
        result: Tensor | None = None
        for label in labels:
            label = label.reshape([1] * (rank - label.dim()) + list(label.shape))
            if result is None:
                result = label
                continue
            a, b = torch.broadcast_tensors(result, label)
            self.sets.union(a, b)
            result = torch.maximum(self.sets.find(a), self.sets.find(b))
        assert result is not None
        return self.sets.find(result)

    def copy(self) -> Labels:
        """Labels with the same sets, to try what a join would do. Nodes and weights are left out."""
        trial = Labels(sets=UnionFind())
        trial.sets.parent = self.sets.parent.clone()
        return trial

    def tie(self, a: Tensor, b: Tensor, node: fx.Node) -> None:
        """Join the labels that two uses of one tensor give it; where only one gives a unit, it stays at level 1."""
        self.sets.union(a, b)
        a, b = torch.broadcast_tensors(self.sets.find(a), self.sets.find(b))
        alone = (a > PINNED) != (b > PINNED)
        if bool(alone.any()):
            self.pin(torch.maximum(a, b)[alone], node, "another use of the same tensor is at level 1")

    def adopt(self, node: fx.Node, labels: Tensor, axis: int) -> bool:
        """Give a first state (zeros, or a parameter for all images) the units as which later states are read.

        Args:
            node: what a layer reads that reads units elsewhere.
            labels: (C,) labels of those along `axis`.

        Returns:
            Whether the node is such a state and got labels that it did not have.
        """
        if op_name(node) == "cat" and call_arg(node, "dim", 0) % len(node.meta["shape"]) == axis:
            sizes = [piece.meta["shape"][axis] for piece in node.args[0]]  # type: ignore[union-attr]
            parts = zip(node.args[0], labels.split(sizes))  # type: ignore[arg-type]
            return any([self.adopt(piece, part, axis) for piece, part in parts])  # type: ignore[arg-type]
        fresh = op_name(node).startswith("new_") or (op_name(node) == "expand" and is_static(node.args[0]))
        if not fresh or not self.is_free(node) or not bool((self.sets.find(labels) > PINNED).any()):
            return False
        self.adopted[node] = labels.reshape([-1 if d == axis else 1 for d in range(len(node.meta["shape"]))])
        self.sets.version += 1
        return True

    def pin(self, labels: Tensor, node: fx.Node, reason: str) -> None:
        """Keep units at level 1, remembering why."""
        roots = torch.unique(self.sets.find(labels))
        outputs = [self.sets.find(weight.out) for weight in self.weights.values()]
        if self.sets.pin(labels):
            moved = roots[roots > PINNED]
            channels = sum(int(torch.isin(out, moved).sum()) for out in outputs)
            self.pins.append(Pin(reason, node.meta.get("module", ""), op_name(node), channels))


Rule = Callable[[Labels, fx.Node], Tensor | None]


def compress(labels: Tensor) -> Tensor:
    """Size 1 along every axis on which the labels do not vary."""
    for axis in range(labels.dim()):
        if labels.shape[axis] > 1 and bool((labels == labels.narrow(axis, 0, 1)).all()):
            labels = labels.narrow(axis, 0, 1)
    return labels.contiguous()


def labelled_axis(labels: Tensor) -> int | None:
    """The one axis along which (compressed) labels vary, or None."""
    axes = [d for d in range(labels.dim()) if labels.shape[d] > 1]
    return axes[0] if axes else None


def propagate(
    programs: list[Program],
    rule_of: Callable[[fx.Node], Rule | None],
    tie: Callable[[Labels, list[fx.Node]], None] | None = None,
) -> Labels:
    """Label all nodes of the programs (train and eval graph of one model share units through their weights).

    Args:
        programs: captured graphs of one model, with their heads marked (`outputs.mark_heads`).
        rule_of: gives the label rule of a node's operator.
        tie: joins further labels whenever the rules have settled, called with the operator nodes.

    Raises:
        CaptureError: a defect of this package.
    """
    labels = Labels()
    nodes = [node for program in programs for node in program.operators()]
    labels.role = {node: Role.HEAD for node in nodes if node.meta.get("head")}
    for program in programs:
        labels.raw[program.image] = torch.zeros([1] * len(program.image.meta["shape"]), dtype=torch.long)
    for _ in range(MAX_PASSES):
        version = labels.sets.version
        for node in nodes:
            _label(labels, node, rule_of)
        if labels.sets.version == version:
            _one_axis_per_tensor(labels, nodes)
            _outputs_beside_batch(labels, programs)
        if labels.sets.version == version and tie:
            tie(labels, nodes)
        if labels.sets.version == version:
            return labels
    raise CaptureError(f"Labelling did not settle after {MAX_PASSES} passes; please report the model.")


def _label(labels: Labels, node: fx.Node, rule_of: Callable[[fx.Node], Rule | None]) -> None:
    labels.per_level.discard(node)
    if labels.role.get(node) != Role.HEAD:  # of an earlier pass: what the operator reads may have become one per level
        labels.role.pop(node, None)
    if "shape" not in node.meta:
        _unknown(labels, node)
        return
    rule = rule_of(node)
    result = rule(labels, node) if rule else None
    if result is None:
        result = _unknown(labels, node)
    if node in labels.adopted:
        result = labels.join([result, labels.adopted[node]], len(node.meta["shape"]))
    if node in labels.per_level:
        result = torch.zeros([1] * len(node.meta["shape"]), dtype=torch.long)
    label = compress(labels.sets.find(result))
    if label.numel() == 1:  # every subnet that contains a consumer needs it
        labels.pin(label, node, "the whole tensor is one unit")
    labels.raw[node] = labels.sets.find(label)


def _unknown(labels: Labels, node: fx.Node) -> Tensor:
    """No rule: what the operator reads stays at level 1. Values per level may pass (evaluated once per level)."""
    inputs = [n for n in tensor_inputs(node) if not is_static(n)]
    for source in inputs:
        if not labels.is_free(source):
            labels.without_rule.add(node)
            labels.pin(labels.of(source), node, "no rule for this operator")
    if any(n in labels.per_level for n in inputs):
        labels.per_level.add(node)
    return torch.zeros([1] * len(node.meta.get("shape", ())), dtype=torch.long)


def _one_axis_per_tensor(labels: Labels, nodes: list[fx.Node]) -> None:
    """Labels may vary along one axis only; merge the axes that cost the fewest units."""
    for node in nodes:
        if node not in labels.raw:
            continue
        label = units_only(labels.of(node))
        varying = [d for d in range(label.dim()) if label.shape[d] > 1]
        if len(varying) > 1:
            best = max(varying, key=lambda k: labels.units_after_merge(label, [d for d in varying if d != k]))
            others = [d for d in varying if d != best]
            labels.merge(label, others)
            left = labels.sets.find(label)
            lowest, highest = left.amin(others), left.amax(others)
            labels.pin(highest[lowest != highest], node, "units and pinned channels lie across two axes")


def _outputs_beside_batch(labels: Labels, programs: list[Program]) -> None:
    """Units that leave a model stay at level 1 where they share an axis with the batch."""
    for node in (n for program in programs for n in program.outputs if n in labels.raw):
        axis = labelled_axis(units_only(labels.of(node)))
        if axis is not None and axis == node.meta.get("batch_axis"):
            labels.pin(labels.of(node), node, "an output with batch and units on one axis")


def units_only(labels: Tensor) -> Tensor:
    """Labels that tell units apart, but not why other elements belong to none."""
    return compress(labels.clamp(min=PINNED))
