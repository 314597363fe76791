"""One step program: a plain graph that computes the slices of one level from the caches of lower levels.

Every operator of the eval program is emitted once per level, on the positions of that level. A weight between
units reads the *prefix* of its input: the slices that lower levels left in caches, and that of this level. Caches
are named; a step program lists which ones it takes and which new ones it returns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..graph.labels import Role
from ..graph.program import call_arg, is_static, op_name
from ..graph.rules import reduced_axes
from ..units.macs import dense_macs
from . import kernels
from .plan import Plan, norm_options, normalised_axes, spread
from .step import IMAGE, StepGraph, output_names

__all__ = ["IMAGE", "StepProgram", "emit_steps", "output_names"]

aten = torch.ops.aten
PRODUCTS = {"matmul", "bmm", "scaled_dot_product_attention"}


@dataclass
class StepProgram:
    """One step.

    Attributes:
        level: s; the step leads from subnet s - 1 to subnet s.
        module: `module(*[caches[name] for name in inputs])` returns one tensor per entry of `outputs`. Step 1
            takes the cache "image"; every step returns the outputs of subnet s, called by `output_names`.
        inputs, outputs: names of caches.
        macs: multiply-accumulates that the program executes per sample.
        released: caches that no later step reads.
    """

    level: int
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int
    released: tuple[str, ...] = ()


def emit_steps(plan: Plan) -> tuple[list[StepProgram], dict[str, fx.Node]]:
    """All step programs, and the node behind every cache."""
    programs: list[StepProgram] = []
    wanted: dict[str, int] = {}  # cache name -> last level that reads it
    sources: dict[str, fx.Node] = {}
    for level in range(plan.num_subnets, 0, -1):
        step = _Step(plan, level, wanted)
        program = step.run()
        sources.update(step.sources)
        for name in program.outputs:
            if name not in program.inputs:
                wanted.pop(name, None)
        for name in program.inputs:
            wanted.setdefault(name, level)
        released = [name for name in program.inputs if wanted[name] == level]
        stay = output_names(plan.program.structure.count)
        programs.append(replace(program, released=tuple(name for name in released if name not in stay)))
    return programs[::-1], sources


class _Step(StepGraph):
    def run(self) -> StepProgram:
        for node in self.plan.program.graph.nodes:
            if (
                node.op == "call_function"
                and not is_static(node)
                and "batch" not in node.meta
                and self.plan.is_new(node, self.level)
            ):
                self.values[node] = self._operator(node)
                self._count_macs(node)
        self._keep_wanted()
        outputs = {name: self._leaving(n, name) for name, n in zip(self.output_names, self.plan.program.outputs)}
        outputs |= {k: v for k, v in self.made.items() if k in self.wanted and k not in outputs}
        self.graph.output(tuple(outputs.values()))
        self.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
        used = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        for name in [n for n, _ in self.root.named_buffers() if n not in used]:
            delattr(self.root, name)
        for name, node in list(self.caches.items()):
            if not node.users:
                self.graph.erase_node(node)
                del self.caches[name]
        macs = sum(node.meta.get("macs", 0) for node in self.graph.nodes)
        return StepProgram(self.level, fx.GraphModule(self.root, self.graph), tuple(self.caches), tuple(outputs), macs)

    def _leaving(self, node: fx.Node, name: str) -> fx.Node:
        """An output of this subnet; of units that leave the model, those of higher levels are 0."""
        self.sources[name] = node
        if is_static(node):
            return self.static(node)  # type: ignore[return-value]
        units, axis = node.meta.get("units"), node.meta.get("axis")
        if units is None or node.meta.get("per_level"):
            return self.value(node)
        own = self.positions(node)
        if len(own) == len(units):
            return self.value(node)
        if self.level > 1 and not len(own):
            return self.cache(name, node)
        if self.level > 1:
            before = self.cache(name, node)
        else:
            sizes = [
                self.batch(size) if d == node.meta["batch_axis"] else size for d, size in enumerate(node.meta["shape"])
            ]
            before = self.call(aten.new_zeros.default, self.value(node), sizes)
        return self.call(aten.index_copy.default, before, axis, self._index(own), self.value(node))

    def _keep_wanted(self) -> None:
        """Keep what this level computes and later steps read."""
        for node in self.plan.program.graph.nodes:
            name = self.part_name(node, self.level)
            if name in self.wanted and not is_static(node) and self._is_available(node):
                self.keep(name, self.value(node), node)
            size = self.plan.patch_size(node)
            if self.level == 1 and f"{self.plan.program.image.name}.patches{size}" in self.wanted:
                self._patches(size)

    def _count_macs(self, node: fx.Node) -> None:
        """Note the MACs of this level on the node that executes them; what turns out dead is dropped with its
        node."""
        name, source = op_name(node), node.args[0] if node.args else None
        if not (name == "linear" or name.startswith("conv") or name in PRODUCTS):
            return
        macs, role, level = dense_macs(node), node.meta.get("role"), self.level
        has_units = source.meta.get("units") is not None  # type: ignore[union-attr]
        if role in (Role.CHANNELS, Role.HEAD) and has_units:
            inputs = self.plan.positions(source, level) if role == Role.HEAD else self.reach_positions(source)  # type: ignore[arg-type]
            macs = macs * len(inputs) // len(source.meta["units"])  # type: ignore[union-attr]
            if not len(inputs):
                return
        elif role == Role.HEAD and not self.plan.is_new(source, level):  # type: ignore[arg-type]
            return
        if node.meta.get("units") is not None:
            macs = macs * len(self.positions(node)) // len(node.meta["units"])
        self.values[node].meta["macs"] = macs

    # -- operators

    def _operator(self, node: fx.Node) -> fx.Node:
        role, source = node.meta.get("role"), node.args[0] if node.args else None
        if self.plan.patch_size(node):
            return self._patch_product(node)
        if role == Role.HEAD:
            return self._head(node)
        if role == Role.PREFIX_REDUCE:
            return self._prefix_reduce(node)
        if role == Role.PREFIX_NORM and source.meta.get("units") is not None:  # type: ignore[union-attr]
            return self._prefix_norm(node)
        if role == Role.TAPS and node.meta["units"] is not None:
            return self._taps(node)
        if node.meta.get("units") is not None and self.level > 1 and op_name(node) in ("pad", "constant_pad_nd"):
            return self._pad_beside_units(node)
        return self._general(node)

    def _general(self, node: fx.Node) -> fx.Node:
        args, kwargs = self.arguments(node)
        if node in self.values:
            return self.values[node]
        return self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def _patch_product(self, node: fx.Node) -> fx.Node:
        """A convolution that cuts the images into large squares: a linear layer on those, which are laid out once."""
        size = self.plan.patch_size(node)
        weight = self.plan.static(node.args[1]).flatten(1).index_select(0, self.positions(node).to(self.plan.device))  # type: ignore[arg-type]
        bias = self.static(call_arg(node, "bias"), (0, self.positions(node)))
        rows = self.call(aten.linear.default, self._patches(size), self.tensor(weight, (node, "patches")), bias)
        shape = [self.batch(1), len(weight), *node.meta["shape"][2:]]
        return self.call(aten.reshape.default, self.call(aten.permute.default, rows, [0, 2, 1]), shape)

    def _patches(self, size: int) -> fx.Node:
        """The images as (B, squares, C * size * size)."""
        image = self.plan.program.image
        name = f"{image.name}.patches{size}"
        if self.level > 1:
            return self.cache(name, image)
        if name not in self.made:
            channels, height, width = image.meta["shape"][1:]
            cut = [self.batch(1), channels, height // size, size, width // size, size]
            squares = self.call(aten.reshape.default, self.value(image), cut)
            squares = self.call(aten.permute.default, squares, [0, 2, 4, 1, 3, 5])
            flat = [self.batch(1), cut[2] * cut[4], channels * size * size]
            self.keep(name, self.call(aten.reshape.default, squares, flat), image)
        return self.made[name]

    def _picked(self, node: fx.Node) -> tuple[tuple, dict]:
        """Slices, indices and rolls along the unit axis are replaced by the picked tensor."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        value = self.gather(source, source.meta["axis"], self.picked(node))
        if op_name(node) == "select.int":
            value = self.call(aten.squeeze.dim, value, source.meta["axis"])
        self.values[node] = value
        return (), {}

    def _concatenated(self, node: fx.Node, name: str) -> tuple:
        dim = call_arg(node, "dim", 0) % len(node.meta["shape"])
        if name != "cat" or dim != node.meta["axis"]:
            return super()._concatenated(node, name)
        pieces, offset, own = [], 0, self.positions(node)
        for piece in node.args[0]:  # type: ignore[union-attr]
            end = offset + piece.meta["shape"][dim]  # type: ignore[union-attr]
            want = own[(own >= offset) & (own < end)] - offset
            if len(want):
                pieces.append(self.at(piece, dim, want))  # type: ignore[arg-type]
            offset = end
        if len(pieces) == 1:
            self.values[node] = pieces[0]
        return (pieces, *node.args[1:])

    def _pad_beside_units(self, node: fx.Node) -> fx.Node:
        """Padding along the unit axis belongs to level 1; higher levels pad the other axes only."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        amounts, place = list(node.args[1]), 2 * (len(node.meta["shape"]) - 1 - node.meta["axis"])  # type: ignore[arg-type]
        amounts[place : place + 2] = [0, 0][: len(amounts[place : place + 2])]
        if not any(amounts):
            return self.value(source)
        return self.call(node.target, self.value(source), amounts, *node.args[2:], **node.kwargs)

    def _head(self, node: fx.Node) -> fx.Node:
        """Class scores accumulate: those of lower levels, and what the channels of this level add."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        leaving = dict(zip(self.plan.program.outputs, self.output_names))
        name = leaving.get(node, f"{node.name}.sum")
        if source.meta.get("per_level"):
            return self._general(node)
        if not self.plan.is_new(source, self.level):
            return self.cache(name, node)
        value, weight, bias, *rest = (*self._head_arguments(node), *node.args[3:])
        result = self.graph.call_function(node.target, (value, weight, bias, *rest))  # type: ignore[arg-type]
        if self.level > 1:
            result = self.call(aten.add.Tensor, self.cache(name, node), result)
        self.keep(name, result, node)
        return result

    def _head_arguments(self, node: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
        source, weight = node.args[:2]
        own = self.positions(source) if source.meta.get("units") is not None else None  # type: ignore[union-attr,arg-type]
        bias = self.static(call_arg(node, "bias")) if self.level == 1 else None
        inputs_at = 0 if "transpose" in op_name(node) else 1
        return self.value(source), self.static(weight, None if own is None else (inputs_at, own)), bias  # type: ignore[arg-type]

    def _prefix_norm(self, node: fx.Node) -> fx.Node:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        own, axes = self.positions(node), normalised_axes(node)
        weight, bias, eps, centred = norm_options(node)
        affine = [self._channel_shaped(p, node, own) for p in (weight, bias)]
        if self.level == 1 and affine == [None, None] and op_name(node) == "layer_norm":
            affine = self._neutral(node, len(own))
        value, names = self.value(source), (f"{node.name}.mean", f"{node.name}.scale")
        if self.level == 1:
            several = self.call(kernels.first_norm, value, axes, *affine, eps, centred)
        else:
            before = [self.cache(name, source) for name in names]
            count = len(self.plan.prefix_positions(source, self.level - 1)) * spread(source, axes)
            several = self.call(kernels.next_norm, value, *before, count, axes, *affine, eps, centred)
        result, *statistics = self.unpack(several, 3)
        for name, statistic in zip(names, statistics, strict=True):
            self.keep(name, statistic, source)
        return result

    def _neutral(self, node: fx.Node, width: int) -> list[fx.Node | None]:
        """Weight and bias that change nothing: PyTorch's layer norm is slow without them."""
        options = {"dtype": self.plan.dtype, "device": self.plan.device}
        return [self.tensor(torch.full((width,), x, **options), ("neutral", x, width)) for x in (1.0, 0.0)]

    def _channel_shaped(self, parameter: fx.Node | None, node: fx.Node, own: Tensor) -> fx.Node | None:
        """Weight or bias of a prefix norm at the channels of this level."""
        if parameter is None:
            return None
        rank, axis = len(node.meta["shape"]), node.meta["axis"]
        value = self.plan.static(parameter)
        if op_name(node) == "group_norm":
            value = value.reshape([-1] + [1] * (rank - 2))
        inner = axis - (rank - value.dim())
        return self.tensor(value.index_select(inner, own.to(value.device)), (parameter, node, "affine"))

    def _prefix_reduce(self, node: fx.Node) -> fx.Node:
        """Mean, maximum, norm or variance over the channels up to this level: partial results are kept."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        if source.meta.get("units") is None:
            return self._general(node) if self.level == 1 else self._unchanged(node)
        kind, axes = op_name(node), reduced_axes(node)
        keepdim = len(node.meta["shape"]) == len(source.meta["shape"])
        reduce = {"mean.dim": self._sum, "sum.dim_IntList": self._sum, "amax": self._extreme, "amin": self._extreme,
                  "linalg_vector_norm": self._sum, "var.correction": self._variance}[kind]  # fmt: skip
        return reduce(node, source, axes, keepdim)

    def _unchanged(self, node: fx.Node) -> fx.Node:
        return self.cache(node.name, node)

    def _count(self, source: fx.Node, axes: list[int], level: int) -> int:
        return len(self.plan.prefix_positions(source, level)) * spread(source, axes)

    def _sum(self, node: fx.Node, source: fx.Node, axes: list[int], keepdim: bool) -> fx.Node:
        name, is_norm = f"{node.name}.total", op_name(node) == "linalg_vector_norm"
        if self.plan.is_new(source, self.level):
            value = self.value(source)
            total = self.call(
                aten.sum.dim_IntList,
                self.call(aten.square.default, value) if is_norm else value,
                axes,
                keepdim,
            )
            if self.level > 1:
                total = self.call(aten.add.Tensor, self.cache(name, node), total)
            self.keep(name, total, node)
        else:
            total = self.cache(name, node)
        if is_norm:
            return self.call(aten.sqrt.default, total)
        if op_name(node) == "sum.dim_IntList":
            return total
        return self.call(aten.div.Scalar, total, self._count(source, axes, self.level))

    def _extreme(self, node: fx.Node, source: fx.Node, axes: list[int], keepdim: bool) -> fx.Node:
        name = f"{node.name}.extreme"
        if not self.plan.is_new(source, self.level):
            return self.cache(name, node)
        value = self.graph.call_function(node.target, (self.value(source), axes, keepdim))  # type: ignore[arg-type]
        if self.level > 1:
            larger = aten.maximum.default if op_name(node) == "amax" else aten.minimum.default
            value = self.call(larger, self.cache(name, node), value)
        self.keep(name, value, node)
        return value

    def _variance(self, node: fx.Node, source: fx.Node, axes: list[int], keepdim: bool) -> fx.Node:
        names = f"{node.name}.mean", f"{node.name}.squares"
        before = [self.cache(name, node) for name in names] if self.level > 1 else []
        if self.plan.is_new(source, self.level):
            both = self.unpack(self.call(kernels.moments, self.value(source), axes, keepdim), 2)
            if before:
                count = self._count(source, axes, self.level - 1)
                added = self._count(source, axes, self.level) - count
                both = self.unpack(self.call(kernels.merge_moments, *before, count, *both, added), 2)
            for name, part in zip(names, both, strict=True):
                self.keep(name, part, node)
        else:
            both = before
        correction = call_arg(node, "correction", 1)
        count = self._count(source, axes, self.level) - (1 if correction is None else correction)
        return self.call(aten.div.Scalar, both[1], count)

    def _taps(self, node: fx.Node) -> fx.Node:
        """One-channel convolution along the channels (ECA): neighbours of this or a lower level, zero for
        others."""
        weight: fx.Node = node.args[1]  # type: ignore[assignment]
        width, own = weight.meta["shape"][-1], self.positions(node)
        value, reach = self.reach(node.args[0])  # type: ignore[arg-type]
        places = node.meta.get("positions", torch.arange(len(node.meta["units"])))
        have = {int(places[old]): k for k, old in enumerate(reach.tolist())}
        wanted = places[own][:, None] + torch.arange(width) - (width - 1) // 2
        index = torch.tensor([have.get(p, len(reach)) for p in wanted.flatten().tolist()])
        spaced = self.call(
            aten.index_select.default,
            self.call(aten.constant_pad_nd.default, value, [0, 1]),
            2,
            self._index(index),
        )
        bias = self.static(call_arg(node, "bias"))
        return self.call(aten.conv1d.default, spaced, self.static(weight), bias, [width])
