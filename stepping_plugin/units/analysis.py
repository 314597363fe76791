"""Units: which channels of a model move together, and everything that is known about them.

`analyse` captures the model, labels the graph and writes on every node what the rest of the package reads:
`meta["axis"]` and `meta["units"]` (the axis that carries units and the unit index per position, -1 = always available),
`meta["per_level"]` (the value exists once per subnet) and `meta["role"]`.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from ..console.progress import track
from ..errors import CaptureError
from ..graph.capture import capture
from ..graph.demand import dead_ends
from ..graph.labels import Labels, Role, compress, labelled_axis, propagate, units_only
from ..graph.outputs import mark_heads
from ..graph.peephole import spell_out_softmaxes, split_readers_of_scores
from ..graph.program import Program, is_static, op_name, tensor_inputs
from ..graph.rules import rule_of
from ..graph.slicing import ParameterSlice, slice_programs
from ..graph.unionfind import PINNED
from ..graph.weights import weight_key, weight_sources

__all__ = ["Analysis", "Layer", "UnitGroup", "analyse", "assemble", "fingerprint", "restrict"]


@dataclass
class Layer:
    """One convolution, linear or matrix product of the eval graph (a call site).

    Attributes:
        name: module path, with `#k` appended for later call sites of the same module.
        weight: name of the weight parameter, None for products of two computed matrices.
        role: see `graph.labels.Role`; None means that it runs once, at level 1.
        out_units: (O,) unit per output channel; for a carried operator, unit per position of the carrying axis.
        in_units: (I,) unit per input channel; empty where only the output side matters.
        node: its node in the eval graph.
    """

    name: str
    weight: str | None
    role: str | None
    out_units: Tensor
    in_units: Tensor
    node: fx.Node


@dataclass
class UnitGroup:
    """Units made by the same weights: one width that construction decides about (a residual stream, a hidden layer)."""

    name: str
    weights: list[str]
    units: Tensor


@dataclass
class Analysis:
    """Units of a model and where they are.

    Attributes:
        num_units: number of units that may move; unit indices are 0..num_units-1 in network order.
        layers: call sites that cost MACs, in execution order.
        groups: partition of the units.
        anchors: sets of units of which at least one must stay at level 1, because a tensor consists of them.
        weight_units: weight name -> (unit per output channel, unit per input channel).
        param_units: parameter name -> (axis, unit per index of that axis) for norms, biases, scales, embeddings.
        dead_ends: BoolTensor (num_units,), units of which only pinned channels read anything. Above level 1 they would
            be paid for and do nothing, so they are in subnet 1 or in none.
        pins: (reason, module, operator) -> number of output channels that it keeps at level 1.
        unknown: operators without a label rule -> number of times.
        pinned_channels, channels: output channels that stay at level 1 by a pin, and all output channels.
    """

    programs: dict[bool, Program]
    image_size: tuple[int, ...]
    num_units: int
    layers: list[Layer]
    groups: list[UnitGroup]
    anchors: list[Tensor]
    weight_units: dict[str, tuple[Tensor, Tensor]]
    param_units: dict[str, tuple[int, Tensor]]
    dead_ends: Tensor
    pins: Counter = field(default_factory=Counter)
    unknown: Counter = field(default_factory=Counter)
    pinned_channels: int = 0
    channels: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def eval_program(self) -> Program:
        return self.programs[False]

    def why_pinned(self, most: int = 3) -> str:
        """What keeps the most channels at level 1: number of channels, operator, module and reason of each."""
        return _pin_list(self.pins, most)

    def __deepcopy__(self, memo: dict) -> Analysis:
        return self  # facts about a model, never changed: copies of a net share them


def analyse(model: nn.Module, image_size: tuple[int, ...], modes: tuple[bool, ...] = (False, True)) -> Analysis:
    """Capture a model and find its units.

    Args:
        model: takes images; not modified.
        image_size: (C, H, W).
        modes: which graphs to capture, False for eval, True for train.

    Raises:
        CaptureError: the model cannot be captured, or nothing in it can move.
    """
    start = time.perf_counter()
    programs = {
        training: capture(model, image_size, training)
        for training in track(modes, f"capture of {type(model).__name__}'s operators")
    }
    for program in programs.values():
        split_readers_of_scores(program, mark_heads(program))
    captured = time.perf_counter()
    labels = propagate(list(programs.values()), rule_of, _settle_parameters)
    if labels.softmaxes:
        programs, labels = _with_fewer_pins(programs, labels)
    analysis = _number(programs, labels, image_size)
    analysis.seconds = {"capture": captured - start, "units": time.perf_counter() - captured}
    if analysis.num_units == 0:
        raise CaptureError(_nothing_moves(analysis))
    return analysis


def _with_fewer_pins(programs: dict[bool, Program], labels: Labels) -> tuple[dict[bool, Program], Labels]:
    """The programs as they are, or with softmaxes over units spelt out if that lets more channels move."""
    spelt, other = programs, labels
    while other.softmaxes:  # one may hide another that reads the same units
        spelt = {training: spell_out_softmaxes(program, other.softmaxes) for training, program in spelt.items()}
        other = propagate(list(spelt.values()), rule_of, _settle_parameters)
    return (spelt, other) if other.pinned_channels < labels.pinned_channels else (programs, labels)


def _nothing_moves(analysis: Analysis) -> str:
    listed = _pin_list(analysis.pins, 5) or "there is no layer but the last one"
    return f"No unit of this model can move, so there is nothing to step. What keeps all channels at level 1: {listed}."


def _pin_list(pins: Counter, most: int) -> str:
    listed = [
        f"{count} channels by {operator or 'couplings'} in {module or 'the forward of the model'} ({reason})"
        for (reason, module, operator), count in pins.most_common(most)
    ]
    return "; ".join(listed) + ("; ..." if len(pins) > most else "")


def _number(programs: dict[bool, Program], labels: Labels, image_size: tuple[int, ...]) -> Analysis:
    """Give units their indices and write them on the nodes."""
    outputs = [labels.sets.find(weight.out) for weight in labels.weights.values()]
    roots = torch.cat(outputs) if outputs else torch.zeros(0, dtype=torch.long)
    free_roots = torch.unique(roots[roots != PINNED])
    index = torch.full((len(labels.sets.parent),), -1)
    index[free_roots] = torch.arange(len(free_roots))
    unit_of = lambda label: index[labels.sets.find(label)]  # noqa: E731
    for program in programs.values():
        for node in program.operators():
            _annotate(node, labels, unit_of)
    analysis = assemble(programs, len(free_roots), image_size)
    for pin in labels.pins:
        analysis.pins[(pin.reason, pin.module, pin.operator)] += pin.channels
    analysis.unknown = Counter(labels.unknown)
    analysis.pinned_channels, analysis.channels = int((roots == PINNED).sum()), len(roots)
    return analysis


def assemble(programs: dict[bool, Program], num_units: int, image_size: tuple[int, ...]) -> Analysis:
    """Everything that follows from programs whose nodes carry their units."""
    eval_program = programs.get(False) or next(iter(programs.values()))
    weight_units = _weight_units(programs)
    return Analysis(
        programs=programs,
        image_size=tuple(image_size),
        num_units=num_units,
        layers=list(_layers(eval_program)),
        groups=_groups(weight_units),
        anchors=_anchors(programs),
        weight_units=weight_units,
        param_units=_param_units(programs),
        dead_ends=dead_ends(programs.values(), num_units),
    )


def restrict(analysis: Analysis, copies: Tensor) -> tuple[Analysis, dict[str, ParameterSlice]]:
    """The analysis of the model with another number of copies of every unit, and how its tensors are made.

    Args:
        copies: LongTensor (num_units,); 0 removes a unit physically, see `graph.slicing`.
    """
    programs, slices = slice_programs(analysis.programs, copies)
    restricted = assemble(programs, int(copies.sum()), analysis.image_size)
    restricted.pins, restricted.unknown = analysis.pins, analysis.unknown
    restricted.pinned_channels, restricted.channels = analysis.pinned_channels, analysis.channels
    return restricted, slices


def fingerprint(analysis: Analysis) -> str:
    """Hash of the structure that levels refer to: image size, weights and their units."""
    digest = hashlib.sha256(repr((analysis.image_size, analysis.num_units)).encode())
    for name, (outputs, inputs) in sorted(analysis.weight_units.items()):
        digest.update(name.encode() + outputs.numpy().tobytes() + inputs.numpy().tobytes())
    return digest.hexdigest()


def _annotate(node: fx.Node, labels: Labels, unit_of: Callable[[Tensor], Tensor]) -> None:
    node.meta["per_level"] = node in labels.per_level
    node.meta["role"] = labels.role.get(node)
    node.meta.pop("head", None)  # which the role says now
    node.meta["axis"] = node.meta["units"] = None
    if node not in labels.raw:
        return
    label = units_only(labels.of(node))
    axis = labelled_axis(label)
    if axis is None:
        return
    units = unit_of(label.flatten())
    if bool((units >= 0).any()):
        node.meta["axis"], node.meta["units"] = axis, units


def full_units(node: fx.Node, axis: int) -> Tensor:
    """Unit per position along an axis of a node's output, -1 where always available."""
    if node.meta.get("axis") == axis:
        return node.meta["units"]
    return torch.full((node.meta["shape"][axis],), -1)


_PRODUCTS = {"matmul", "bmm", "scaled_dot_product_attention"}


def channel_axis(tensor: fx.Node, operator: fx.Node | None = None) -> int:
    """Axis of a tensor that a convolution (1) or linear (last) takes or makes as channels."""
    return len(tensor.meta["shape"]) - 1 if op_name(operator or tensor) == "linear" else 1


def _weight_units(programs: dict[bool, Program]) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for program in programs.values():
        for node in program.operators():
            if node.meta.get("role") == Role.CHANNELS:
                source: fx.Node = node.args[0]
                pair = full_units(node, channel_axis(node)), full_units(source, channel_axis(source, node))
                found.setdefault(weight_key(node.args[1]), pair)
    return found


def _layers(program: Program) -> Iterator[Layer]:
    seen: Counter = Counter()
    nothing = torch.zeros(0, dtype=torch.long)
    for node in program.operators():
        role, name = node.meta.get("role"), op_name(node)
        weighted = name == "linear" or name.startswith("conv")
        if not weighted and name not in _PRODUCTS:
            continue
        path = node.meta.get("module") or name
        seen[path] += 1
        label = path if seen[path] == 1 else f"{path}#{seen[path]}"
        weight = weight_key(node.args[1]) if weighted and is_static(node.args[1]) else None
        outputs = node.meta["units"] if node.meta["units"] is not None else nothing
        inputs = nothing
        beside = role == Role.GROUPED and node.meta["axis"] != 1  # heads folded into the batch, each with all groups
        if role in (Role.CHANNELS, Role.GROUPED, Role.HEAD) and not beside:
            source: fx.Node = node.args[0]
            outputs = full_units(node, channel_axis(node))
            inputs = full_units(source, channel_axis(source, node))
        yield Layer(label, weight, role, outputs, inputs, node)


def _groups(weight_units: dict[str, tuple[Tensor, Tensor]]) -> list[UnitGroup]:
    makers: dict[int, list[str]] = {}
    for name, (outputs, _) in weight_units.items():
        for unit in torch.unique(outputs).tolist():
            if unit >= 0:
                makers.setdefault(unit, []).append(name)
    members: dict[tuple[str, ...], list[int]] = {}
    for unit, names in sorted(makers.items()):
        members.setdefault(tuple(names), []).append(unit)
    return [
        UnitGroup(names[0].removesuffix(".weight"), list(names), torch.tensor(units))
        for names, units in members.items()
    ]


def _anchors(programs: dict[bool, Program]) -> list[Tensor]:
    """Minimal unit sets that make up whole tensors."""
    sets: set[tuple[int, ...]] = set()
    for program in programs.values():
        for node in program.operators():
            units = node.meta["units"]
            if units is not None and bool((units >= 0).all()):
                sets.add(tuple(torch.unique(units).tolist()))
    return [torch.tensor(s) for s in sorted(sets, key=lambda s: (len(s), s))]


# ------------------------------------------------------------------------------------------------- parameters


def _static_operands(node: fx.Node, axis: int) -> Iterator[tuple[fx.Node, int]]:
    """Static tensors whose elements belong to the units along `axis` of a node, with the operand's axis for them.

    Weights between units are left out: their elements belong to a pair of units.
    """
    name, role, rank = op_name(node), node.meta.get("role"), len(node.meta["shape"])
    for operand in (n for n in tensor_inputs(node) if is_static(n)):
        shape = operand.meta.get("shape", ())
        own = axis - (rank - len(shape))
        if name in ("batch_norm", "instance_norm", "group_norm", "prelu") and operand is not node.args[0]:
            own = 0 if axis == 1 else -1
        elif name == "linear" or name.startswith("conv"):
            if axis != channel_axis(node) or role in (Role.CARRIED, Role.TAPS):
                continue
            if operand is node.args[1] and role != Role.GROUPED:
                continue
            own = 0
        if 0 <= own < len(shape) and shape[own] > 1:
            yield operand, own


def _settle_parameters(labels: Labels, nodes: list[fx.Node]) -> None:
    """What parameters with several uses demand of the units."""
    _tie_shared_parameters(labels, nodes)
    _pin_weights_of_mixed_use(labels, nodes)


def _pin_weights_of_mixed_use(labels: Labels, nodes: list[fx.Node]) -> None:
    """A weight between units that is also used in another way cannot be masked for one of its uses only."""
    between: dict[str, list[fx.Node]] = {}
    mixed: set[str] = set()
    for node in nodes:
        masked = node.args[1] if labels.role.get(node) == Role.CHANNELS else None
        for operand in (n for n in tensor_inputs(node) if is_static(n)):
            if operand is masked:
                for name in weight_sources(operand):
                    between.setdefault(name, []).append(node)
            elif node in labels.per_level and op_name(operand) == "slice.Tensor":
                continue  # the columns that read scores, of a layer that reads features with the others
            elif len(operand.meta.get("shape", ())) > 1:
                mixed |= weight_sources(operand)
    for key in mixed & between.keys():
        for node in between[key]:
            for tensor in (node, node.args[0]):
                labels.pin(labels.of(tensor), node, "its weight is used in another way, too")


def _tie_shared_parameters(labels: Labels, nodes: list[fx.Node]) -> None:
    """A parameter that several call sites use belongs to the same units at all of them."""
    first: dict[tuple[str, int], Tensor] = {}
    for node in nodes:
        axis = labelled_axis(units_only(labels.of(node))) if node in labels.raw else None
        if axis is None:
            continue
        node.meta["role"] = labels.role.get(node)
        for operand, own in _static_operands(node, axis):
            if operand.op == "placeholder" and operand.meta["dtype"].is_floating_point and len(operand.users) > 1:
                label = units_only(labels.of(node)).flatten()
                if len(label) == operand.meta["shape"][own]:
                    labels.tie(label, first.setdefault((operand.meta["tensor"], own), label), node)


def _param_units(programs: dict[bool, Program]) -> dict[str, tuple[int, Tensor]]:
    """Units of parameters that are not weights between units: an element belongs to the unit it is combined with."""
    found: dict[str, Tensor] = {}
    for program in programs.values():
        for node in program.operators():
            if node.meta["units"] is None:
                continue
            for operand, axis in _static_operands(node, node.meta["axis"]):
                if operand.meta["shape"][axis] == len(node.meta["units"]):
                    _assign(found, operand, axis, node.meta["units"])
    result = {}
    for name, units in found.items():
        axis = labelled_axis(compress(units))
        if axis is not None:
            result[name] = (axis, units.movedim(axis, 0).reshape(units.shape[axis], -1)[:, 0])
    return result


def _assign(found: dict[str, Tensor], operand: fx.Node, axis: int, units: Tensor) -> None:
    elements = _element_positions(operand)
    if elements is None:
        return
    name, shape, positions = elements
    owners = found.setdefault(name, torch.full(shape, -1))
    spread = units.reshape([-1 if d == axis else 1 for d in range(positions.dim())]).expand(positions.shape)
    owners.view(-1)[positions.flatten()] = spread.flatten()


def _element_positions(operand: fx.Node) -> tuple[str, tuple[int, ...], Tensor] | None:
    """Which elements of which parameter an operand consists of, if it only moves them around."""
    chain, node = [], operand
    while node.op != "placeholder":
        sources = [s for s in tensor_inputs(node) if "value" not in s.meta]
        if len(sources) != 1 or op_name(node) not in _MOVING:
            return None
        chain.append(node)
        node = sources[0]
    if "value" in node.meta:
        return None
    shape = node.meta["shape"]
    positions = torch.arange(math.prod(shape)).reshape(shape)
    for step in reversed(chain):
        args, kwargs = fx.node.map_arg((step.args, dict(step.kwargs)), lambda n, p=positions: n.meta.get("value", p))
        positions = step.target(*args, **kwargs)
    return node.meta["tensor"], shape, positions


_MOVING = {
    "reshape", "permute", "transpose.int", "t", "unsqueeze", "squeeze.dim", "squeeze.dims", "expand", "slice.Tensor",
    "select.int", "index.Tensor", "index_select", "clone", "alias", "detach",
}  # fmt: skip
