"""Arguments of operators whose tensors hold only some positions of their unit axis.

Shared by every rewrite of a labelled program that computes part of it: standalone subnets and compaction
(`graph.slicing`: some units, some twice) and the step programs of the engine (`engine.emit`: the units of one
level). A subclass says which positions a tensor has and where to read others; this class says what every
operator needs.

Data movement needs no index arithmetic: the elements of a tensor are enumerated in row-major order before and
    after a view, so a view of the positions left is what is left of the view.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from .labels import Role
from .program import call_arg, is_static, op_name, tensor_inputs
from .registry import is_pointwise

__all__ = ["Operands", "find_positions", "groups_argument", "picked_positions", "touches_units"]

VIEWS = ("reshape", "view", "expand", "flatten.using_ints", "unflatten.int")
PICKS = ("slice.Tensor", "select.int", "index.Tensor", "index_select", "roll", "flip", "narrow")
FACTORIES = ("new_empty", "new_zeros", "new_ones", "new_full")
_BROADCASTING = {
    "add.Tensor", "addcdiv", "addcmul", "atan2", "clamp.Tensor", "clamp_max.Tensor", "clamp_min.Tensor",
    "div.Tensor", "div.Tensor_mode", "fmod.Tensor",
    "lerp.Scalar", "lerp.Tensor", "masked_fill.Scalar", "maximum", "minimum", "mul.Tensor",
    "pow.Tensor_Tensor", "scaled_dot_product_attention", "sub.Tensor", "where.self",
}  # fmt: skip


class Operands(ABC):
    """What the operators of a program take after its tensors lost positions."""

    # -- what a subclass decides

    @abstractmethod
    def value(self, node: fx.Node) -> fx.Node:
        """The tensor of a node at `positions(node)`."""

    @abstractmethod
    def positions(self, node: fx.Node) -> Tensor:
        """Old positions along the unit axis of a node that its tensor consists of, LongTensor."""

    @abstractmethod
    def reach(self, node: fx.Node) -> tuple[fx.Node, Tensor]:
        """What a weight between units reads of its input: a tensor and the old positions in it, in order."""

    @abstractmethod
    def gather(self, node: fx.Node, axis: int, want: Tensor) -> fx.Node:
        """A computed tensor at other old positions of an axis than `positions(node)`."""

    @abstractmethod
    def static(self, node: fx.Node | None, *wanted: tuple[int, Tensor] | None) -> fx.Node | None:
        """A static tensor at given positions: (axis, positions) pairs; None entries are skipped."""

    @abstractmethod
    def batch(self, factor: int) -> fx.Node:
        """Integer node: factor * batch size."""

    # -- operands

    def changed(self, node: Any) -> bool:
        """Whether the tensor is not simply the old one."""
        if not isinstance(node, fx.Node) or node.meta.get("units") is None:
            return False
        positions = self.positions(node)
        return len(positions) != len(node.meta["units"]) or not torch.equal(positions, torch.arange(len(positions)))

    def any_value(self, node: fx.Node) -> fx.Node:
        """An operand as it is: computed, static or an integer."""
        if "batch" in node.meta:
            return self.batch(node.meta["batch"])
        return self.static(node) if is_static(node) else self.value(node)  # type: ignore[return-value]

    def at(self, operand: fx.Node, axis: int, want: Tensor) -> fx.Node:
        """An operand at given old positions of an axis."""
        if is_static(operand):
            return self.static(operand, (axis, want))  # type: ignore[return-value]
        if operand.meta.get("units") is not None and torch.equal(self.positions(operand), want):
            return self.value(operand)
        return self.gather(operand, axis, want)

    def aligned(self, operand: fx.Node, node: fx.Node) -> fx.Node:
        """An operand that meets the unit axis of `node` by broadcasting, at the positions of `node`."""
        if "batch" in operand.meta or not self.changed(node):
            return self.any_value(operand)
        axis = node.meta["axis"] - len(node.meta["shape"]) + len(operand.meta["shape"])
        if axis < 0 or operand.meta["shape"][axis] == 1:
            return self.any_value(operand)
        return self.at(operand, axis, self.positions(node))

    # -- operators

    def arguments(self, node: fx.Node) -> tuple[tuple, dict]:
        """Arguments and keyword arguments with which a node's operator computes its `positions`."""
        name = op_name(node)
        sliced = [n for n in tensor_inputs(node) if self.changed(n)]
        if is_static(node) or not (sliced or self.changed(node)):
            return self._plain(node)
        if name == "linear" or name.startswith("conv"):
            return self._weighted(node), {}
        if name in ("batch_norm", "instance_norm"):
            return self._batch_norm(node)
        if name in ("layer_norm", "rms_norm", "group_norm") and self.changed(node):
            return self._norm(node, name), {}
        if name in VIEWS:
            return self._sized(node, name)
        if name in FACTORIES:
            return (self.any_value(node.args[0]), self._sizes(node, list(node.args[1])), *node.args[2:]), {  # type: ignore[arg-type]
                **node.kwargs
            }
        if name in PICKS and sliced and touches_units(node):
            return self._picked(node)
        if name in ("matmul", "bmm"):
            return tuple(self._product_operand(a, node) for a in node.args[:2]), {}  # type: ignore[arg-type]
        if name in ("cat", "stack") and self.changed(node):
            return self._concatenated(node, name), dict(node.kwargs)
        if name == "prelu":
            return self._prelu(node), {}
        if name in _BROADCASTING or is_pointwise(node):
            return self._mapped(node, lambda n: self.aligned(n, node))
        return self._plain(node)

    def _mapped(self, node: fx.Node, function: Callable[[fx.Node], fx.Node]) -> tuple[tuple, dict]:
        return fx.node.map_arg((node.args, dict(node.kwargs)), function)

    def _plain(self, node: fx.Node) -> tuple[tuple, dict]:
        return self._mapped(node, self.any_value)

    def _product_operand(self, operand: fx.Node, node: fx.Node) -> fx.Node:
        """Units of a matrix product lie on a leading axis (heads), or on an axis that one operand alone has."""
        axis, rank = node.meta["axis"], len(node.meta["shape"])
        if axis is None or (axis >= rank - 2 and operand is not node.args[0 if axis == rank - 2 else 1]):
            return self.any_value(operand)
        return self.aligned(operand, node)

    # -- weights

    def _weighted(self, node: fx.Node) -> tuple:
        role, name = node.meta["role"], op_name(node)
        if role == Role.GROUPED:
            return self._grouped(node)
        x, weight, bias, rest = _weighted_arguments(node)
        if role not in (Role.CHANNELS, Role.HEAD):
            return (self.any_value(x), self.any_value(weight), self.static(bias), *rest)
        axis = len(x.meta["shape"]) - 1 if name == "linear" else 1
        outputs_at, inputs_at = (1, 0) if "transpose" in name else (0, 1)
        out = self.positions(node) if node.meta["units"] is not None else None
        between = x.meta.get("units") is not None and x.meta["axis"] == axis
        value, into = self.reach(x) if between else (self.any_value(x), None)
        columns = None if into is None else (inputs_at, into)
        rows = None if out is None else (outputs_at, out)
        return (value, self.static(weight, rows, columns), self.static(bias, rows and (0, rows[1])), *rest)

    def _grouped(self, node: fx.Node) -> tuple:
        """Grouped convolution: a unit is made of whole groups, of all their inputs and outputs."""
        x, weight, bias, rest = _weighted_arguments(node)
        if not self.changed(node):
            return (self.any_value(x), self.any_value(weight), self.static(bias), *rest)
        if node.meta["axis"] != 1:  # heads folded into the batch
            return (self.aligned(x, node), self.any_value(weight), self.static(bias), *rest)
        kept, outputs = self.positions(node), len(node.meta["units"])
        place = groups_argument(node)
        groups = rest[place]
        per_group, inputs = outputs // groups, x.meta["shape"][1] // groups
        rest[place] = groups * len(kept) // outputs
        members = (kept.view(-1, per_group)[:, :1] // per_group * inputs + torch.arange(inputs)).flatten()
        rows = members if "transpose" in op_name(node) else kept
        return (self.at(x, 1, members), self.static(weight, (0, rows)), self.static(bias, (0, kept)), *rest)

    def _prelu(self, node: fx.Node) -> tuple:
        """The slopes belong to axis 1, not to the last one as broadcasting would have it."""
        x, weight = node.args
        per_channel = node.meta["axis"] == 1 and weight.meta["shape"] != (1,)
        return self.aligned(x, node), self.static(weight, (0, self.positions(node)) if per_channel else None)

    # -- norms

    def _batch_norm(self, node: fx.Node) -> tuple[tuple, dict]:
        x, *parameters = node.args[:5]
        if not self.changed(node) or node.meta["axis"] != 1:
            return self._plain(node)
        kept = self.positions(node)
        at = [self.static(p, (0, kept)) for p in parameters]  # type: ignore[arg-type]
        return (self.at(x, 1, kept), *at, *node.args[5:]), {}  # type: ignore[arg-type]

    def _norm(self, node: fx.Node, name: str) -> tuple:
        axis, rank, kept = node.meta["axis"], len(node.meta["shape"]), self.positions(node)
        args = list(node.args)
        args[0] = self.value(args[0])  # type: ignore[arg-type]
        if name == "group_norm":
            args[1] = args[1] if args[1] == 1 else args[1] * len(kept) // len(node.meta["units"])  # type: ignore[operator]
            where: tuple[int, Tensor] | None = (0, kept)
        else:
            inner = axis - (rank - len(args[1]))  # type: ignore[arg-type]
            where = (inner, kept) if inner >= 0 else None
            if where is not None:
                args[1] = [len(kept) if d == inner else s for d, s in enumerate(args[1])]  # type: ignore[arg-type]
        for k in (2, 3):
            if k < len(args) and isinstance(args[k], fx.Node):
                args[k] = self.static(args[k], where)  # type: ignore[arg-type]
        return tuple(args)

    # -- data movement

    def _sized(self, node: fx.Node, name: str) -> tuple[tuple, dict]:
        """Views with explicit sizes: the size of the unit axis is the number of positions left."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        if name == "flatten.using_ints":
            return (self.any_value(source), *node.args[1:]), {}
        sizes = list(node.args[1]) if name != "unflatten.int" else list(node.meta["shape"])  # type: ignore[arg-type]
        sizes = self._sizes(node, sizes)
        value = self.any_value(source)
        if name == "expand" and source.meta.get("units") is None and self.changed(node):
            value = self.aligned(source, node)
        return (value, sizes), {}

    def _sizes(self, node: fx.Node, sizes: list[Any]) -> list[Any]:
        """Sizes of a result with as many positions along its unit axis as are left."""
        axis = node.meta["axis"]
        if axis is not None and not (op_name(node) == "expand" and sizes[axis] == -1):
            count, entry = len(self.positions(node)), sizes[axis]
            sizes[axis] = (
                self.batch(count) if isinstance(entry, fx.Node) else count
            )  # batch and units may share an axis
        return [
            self.batch(s.meta["batch"]) if isinstance(s, fx.Node) and s in node.all_input_nodes else s for s in sizes
        ]

    def _picked(self, node: fx.Node) -> tuple[tuple, dict]:
        """slice, index, roll, ... along the unit axis: the picked tensor, and arguments that pass it on
        unchanged."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        axis, want = source.meta["axis"], self.picked(node)
        return _pass_on(node, self.gather(source, axis, want), len(want), axis)

    def picked(self, node: fx.Node) -> Tensor:
        """Old positions of its input that a picking operator takes along the unit axis."""
        order = picked_positions(node)
        if op_name(node) == "select.int" or node.meta["units"] is None:
            return order
        return order[self.positions(node)]

    def _concatenated(self, node: fx.Node, name: str) -> tuple:
        dim = call_arg(node, "dim", 0) % len(node.meta["shape"])
        pieces: Any = node.args[0]
        if name == "cat" and dim == node.meta["axis"]:
            return ([self.any_value(piece) for piece in pieces], *node.args[1:])
        want = self.positions(node)
        axis = node.meta["axis"] - (name == "stack" and dim < node.meta["axis"])
        alone = lambda piece: piece.meta["shape"][axis] == 1 and len(node.meta["units"]) > 1  # noqa: E731
        return ([self.any_value(p) if alone(p) else self.at(p, axis, want) for p in pieces], *node.args[1:])


def _weighted_arguments(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, list[Any]]:
    """Input, weight, bias and the arguments after the bias, of a linear or convolution."""
    x: Any = node.args[0]
    weight: Any = node.args[1]
    return x, weight, call_arg(node, "bias"), list(node.args[3:])


def groups_argument(node: fx.Node) -> int:
    """Place of `groups` among the arguments of a convolution that follow the bias."""
    return [a.name for a in node.target._schema.arguments].index("groups") - 3  # type: ignore[union-attr]


def find_positions(have: Tensor, want: Tensor) -> Tensor:
    """Places of the wanted old positions among those that are there; duplicates are taken in turn."""
    places: dict[int, list[int]] = {}
    for place, old in enumerate(have.tolist()):
        places.setdefault(old, []).append(place)
    met: dict[int, int] = {}
    result = []
    for old in want.tolist():
        choices = places[old]
        result.append(choices[met.get(old, 0) % len(choices)])
        met[old] = met.get(old, 0) + 1
    return torch.tensor(result, dtype=torch.long)


def touches_units(node: fx.Node) -> bool:
    """Whether a picking operator works along the unit axis of its input."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    name, rank, axis = op_name(node), len(source.meta["shape"]), source.meta.get("axis")
    if axis is None:
        return False
    if name == "index.Tensor":
        return axis < len(node.args[1]) and node.args[1][axis] is not None  # type: ignore[arg-type,index]
    if name in ("roll", "flip"):
        dims = call_arg(node, "dims")
        return axis in [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    return call_arg(node, "dim", 0) % rank == axis


def picked_positions(node: fx.Node) -> Tensor:
    """Old positions that slice, select, index, roll or flip take along the unit axis, in order."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    name, size = op_name(node), len(source.meta["units"])
    order = torch.arange(size)
    if name == "select.int":
        return torch.tensor([int(node.args[2]) % size])  # type: ignore[arg-type]
    if name == "slice.Tensor":
        start, end, step = (call_arg(node, k, d) for k, d in (("start", None), ("end", None), ("step", 1)))
        return order[slice(start, end, step)]
    if name == "narrow":
        return order[call_arg(node, "start") :][: call_arg(node, "length")]
    if name == "roll":
        dims = [d % len(source.meta["shape"]) for d in call_arg(node, "dims")]
        return order.roll(call_arg(node, "shifts")[dims.index(source.meta["axis"])])
    if name == "flip":
        return order.flip(0)
    index = node.args[2] if name == "index_select" else next(i for i in node.args[1] if i is not None)  # type: ignore[union-attr]
    return order[index.meta["value"].flatten()]  # type: ignore[union-attr]


def _pass_on(node: fx.Node, value: fx.Node, size: int, axis: int) -> tuple[tuple, dict]:
    """Arguments with which the operator passes an already picked value on unchanged."""
    name = op_name(node)
    if name == "select.int":
        return (value, axis, 0), {}
    if name in ("slice.Tensor", "narrow"):
        return (value, axis, 0, size), {}
    if name == "roll":
        return (value, [0], [axis]), {}
    if name == "flip":
        return (value, []), {}
    if name == "index_select":
        return (value.args[0], axis, value.args[2]), {}
    return (value.args[0], [None] * axis + [value.args[2]]), {}
