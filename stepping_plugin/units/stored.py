"""The analysis of a model for inference as JSON and tensors, so that a file need not be captured and labelled again.

Stored is the eval program with what is known about its nodes. Everything else of an `Analysis` follows from it
(`analysis.assemble`), or is not stored at all.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import SteppingError
from ..files.graphs import checked, decode_call, encode_call, plain_name, read_dtype
from ..files.headers import StoredAnalysis
from ..graph.program import Program, is_static
from ..graph.structure import Structure
from .analysis import Analysis, assemble, fingerprint

__all__ = ["code_of", "pack_analysis", "unpack_analysis"]

_PLAIN = ("module", "batch_axis", "batch", "axis", "role", "per_level")  # of a node's facts, JSON as they are
_KNOWN = {*_PLAIN, "shape", "dtype", "static", "units", "positions", "tensor", "value", "code"}
_LARGEST = 2**31  # numbers of one value per picture


def code_of(model: nn.Module) -> str:
    """Hash of the modules of a model and of the arguments that they print; weights do not matter."""
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(model)).encode()).hexdigest()


def pack_analysis(analysis: Analysis, model: nn.Module) -> tuple[StoredAnalysis, dict[str, Tensor]] | None:
    """The eval program and the tensors that it needs beside the model's; None if it would not come back as it is.

    That is the case where operators have no form in files, and where the train program knows units that eval does not.
    """
    if False not in analysis.programs:
        return None
    writer = _Writer(analysis.eval_program)
    try:
        stored = StoredAnalysis(
            nodes=writer.nodes(),
            constants=writer.constants,
            mutations=analysis.eval_program.mutations,
            structure=analysis.eval_program.structure.described(),
            num_units=analysis.num_units,
            pins=[[*what, count] for what, count in analysis.pins.items()],
            unknown=dict(analysis.unknown),
            pinned_channels=analysis.pinned_channels,
            channels=analysis.channels,
            code=code_of(model),
        )
    except SteppingError:
        return None
    again = unpack_analysis(stored, writer.tensors, analysis.image_size)
    return (stored, writer.tensors) if _same(again, analysis) else None


def _same(one: Analysis, other: Analysis) -> bool:
    """Whether all that levels refer to is equal."""
    if one.eval_program.structure != other.eval_program.structure:  # classes of the model's code
        return False
    groups = [[(g.name, g.weights, g.units.tolist()) for g in a.groups] for a in (one, other)]
    anchors = [[units.tolist() for units in a.anchors] for a in (one, other)]
    ends = torch.equal(one.dead_ends, other.dead_ends)
    return fingerprint(one) == fingerprint(other) and groups[0] == groups[1] and anchors[0] == anchors[1] and ends


class _Writer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.tensors: dict[str, Tensor] = {}
        self._added: dict[int, int] = {}
        self.constants = {name: self._add(value) for name, value in program.constants.items()}
        self._units: dict[tuple[int, ...], int] = {}

    def nodes(self) -> list[dict[str, Any]]:
        numbers: dict[fx.Node, int] = {}
        entries: list[dict[str, Any]] = []
        for node in self.program.graph.nodes:
            if node.op == "output":
                entries.append({"output": [numbers[n] for n in node.args[0]]})
                break
            numbers[node] = len(numbers)
            entry = self._facts(node)
            if node.op == "call_function":
                entry.update(encode_call(node, numbers))
            elif node.op != "placeholder":
                raise SteppingError(f"a node of kind {node.op} has no form in a file")
            entries.append(entry)
        return entries

    def _facts(self, node: fx.Node) -> dict[str, Any]:
        meta = node.meta
        if unknown := meta.keys() - _KNOWN:
            raise SteppingError(f"{sorted(unknown)} of a node have no form in a file")
        entry = {k: meta[k] for k in _PLAIN if meta.get(k) is not None and meta[k] is not False and meta[k] != ""}
        if "shape" in meta:
            entry["shape"], entry["dtype"] = list(meta["shape"]), plain_name(meta["dtype"])
        if is_static(node):
            entry["static"] = True
        entry.update({key: self._shared(meta[key]) for key in ("units", "positions") if meta.get(key) is not None})
        if node.op == "placeholder" and node is not self.program.image:
            entry["tensor"] = meta["tensor"]
        if "value" in meta and node.users:
            entry["value"] = self._add(meta["value"])
        return entry

    def _shared(self, units: Tensor) -> int:
        key = tuple(units.tolist())
        if key not in self._units:
            self._units[key] = self._add(units.int())
        return self._units[key]

    def _add(self, value: Tensor) -> int:
        if id(value) not in self._added:
            self._added[id(value)] = len(self.tensors)
            self.tensors[f"analysis.{len(self.tensors)}"] = value  # which also keeps the id from being used again
        return self._added[id(value)]


def unpack_analysis(stored: StoredAnalysis, tensors: Mapping[str, Tensor], image_size: tuple[int, ...]) -> Analysis:
    """What `pack_analysis` packed.

    Raises:
        CheckpointError, or one of `files.graphs.DAMAGE`: it is damaged.
    """
    analysis = assemble({False: _Reader(stored, tensors).program()}, stored.num_units, tuple(image_size))
    analysis.pins = Counter({tuple(what): checked(count, int) for *what, count in stored.pins})
    analysis.unknown = Counter(stored.unknown)
    analysis.pinned_channels, analysis.channels = stored.pinned_channels, stored.channels
    return analysis


class _Reader:
    def __init__(self, stored: StoredAnalysis, tensors: Mapping[str, Tensor]) -> None:
        self.stored, self.tensors = stored, tensors
        self.graph, self.nodes = fx.Graph(), list[fx.Node]()
        self.constants = {name: self._tensor(k) for name, k in stored.constants.items()}
        self.image: fx.Node | None = None

    def program(self) -> Program:
        for entry in self.stored.nodes:
            if "output" in entry:
                self.graph.output(tuple(self.nodes[checked(k, int)] for k in entry["output"]))
                break
            self.nodes.append(self._node(entry))
        if self.image is None:
            raise ValueError("no images")
        self.graph.lint()
        structure, mutations = Structure.from_description(self.stored.structure), list(self.stored.mutations)
        if len(self.graph.output_node().args[0]) != structure.count + len(mutations):
            raise ValueError("results that do not fit their structure")
        return Program(self.graph, self.image, False, self.constants, mutations, structure=structure)

    def _node(self, entry: Mapping[str, Any]) -> fx.Node:
        if "target" in entry:
            node = self.graph.call_function(*decode_call(entry, self.nodes, torch.device("cpu")))
        else:
            node = self.graph.placeholder(f"input_{len(self.nodes)}")
            self.image = self.image or node
        node.meta = self._facts(entry, node)
        return node

    def _facts(self, entry: Mapping[str, Any], node: fx.Node) -> dict[str, Any]:
        meta: dict[str, Any] = {"static": entry.get("static") is True}
        if "batch" in entry:
            return {**meta, "batch": checked(entry["batch"], int)}
        shape = tuple(checked(size, int) for size in entry["shape"])
        if math.prod(shape) > _LARGEST:
            raise ValueError(f"a value of {shape}")
        meta.update(
            shape=shape, dtype=read_dtype(entry["dtype"]), module=checked(entry.get("module", ""), str), code=""
        )
        meta["batch_axis"] = entry.get("batch_axis")
        if node.op == "placeholder":
            if node is not self.image:
                meta["tensor"] = checked(entry["tensor"], str)
        elif not meta["static"]:
            meta.update(role=entry.get("role"), per_level=entry.get("per_level") is True)
            meta.update(axis=entry.get("axis"), units=None)
        if "value" in entry:
            meta["value"] = self._tensor(entry["value"])
        for key in ("units", "positions"):
            if key in entry:
                meta[key] = self._tensor(entry[key]).long()
        if meta.get("units") is not None:
            self._check_units(meta)
        return meta

    def _tensor(self, number: Any) -> Tensor:
        return self.tensors[f"analysis.{checked(number, int)}"]

    def _check_units(self, meta: Mapping[str, Any]) -> None:
        units = meta["units"]
        fits = units.shape == (meta["shape"][checked(meta["axis"], int)],)
        if not fits or not -1 <= int(units.min()) <= int(units.max()) < self.stored.num_units:
            raise ValueError("units that do not fit their tensor")
