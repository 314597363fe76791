"""Engines as files: one safetensors file with the constants of all step programs and their graphs as JSON.

Nothing in the file is executed: `files.graphs` says what a graph may call. Names that end up in generated code are made
or checked here, never taken over as they are.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import CheckpointError, SteppingError
from ..files.graphs import DAMAGE, checked, decode, decode_call, encode, encode_call, plain_name, read_dtype
from ..files.headers import EngineHeader, Probe, validated
from ..files.probe import compare_outputs, probe_images, probe_names, quiet
from ..graph.describe import draws
from ..graph.device import usable_device
from ..graph.structure import Structure
from ..tensorfile import ENGINE, checked_path, not_finite, pack_header, read_file, write_tensors
from .emit import IMAGE, StepProgram, output_names
from .kernels import KERNELS
from .plan import BatchAxis
from .program_set import ProgramSet

__all__ = ["pack_engine", "read_engine", "save_engine", "unpack_engine"]

# 2 has a cache per level, and norms keep other statistics; 3 has checksums and a probe. `_OLDEST` can still be read.
VERSION, _OLDEST = 3, 2
_PROBE = Probe(seed=1, batch=1)
_CONSTANT = re.compile(r"t\d+")


# ------------------------------------------------------------------------------------------------- writing


def save_engine(engine: ProgramSet, path: str | os.PathLike[str]) -> None:
    """Write an engine atomically: the file at `path` is the old one or the complete new one.

    Raises:
        SteppingError: a step program calls an operator that engine files cannot name.
    """
    path = checked_path(path)
    tensors: dict[str, Tensor] = {}
    programs = [_describe(program, tensors) for program in engine.programs]
    if broken := not_finite(tensors):
        raise SteppingError(
            f"{broken}: the engine is not saved: its weights are not finite numbers. Training has diverged; go back to "
            "an earlier net."
        )
    scores = _probe_scores(engine, _PROBE)
    tensors.update(zip(probe_names(engine.structure.count), scores or ()))
    header = {
        "format": ENGINE,
        "version": VERSION,
        "image_size": list(engine.image_size),
        "dtype": plain_name(engine.dtype),
        "macs": list(engine.macs),
        "cache_axes": {name: None if axis is None else list(axis) for name, axis in engine.cache_axes.items()},
        "structure": engine.structure.described(),
        "programs": programs,
        "versions": {"torch": torch.__version__},
        "probe": _PROBE.model_dump() if scores is not None else None,
        "metadata": engine.metadata.model_dump(),
    }
    try:
        validated(EngineHeader, header, path)
    except CheckpointError as error:
        raise SteppingError(f"the engine cannot be saved: {error}") from None
    write_tensors(path, tensors, pack_header(header))


def _probe_scores(engine: ProgramSet, probe: Probe) -> list[Tensor] | None:
    """Outputs of all subnets, (N, ...) each; None where they would say nothing: random, or no numbers."""
    if any(draws(program.module.graph) for program in engine.programs):
        return None
    images = probe_images(probe, engine.image_size, engine.dtype).to(engine.device)

    def compute() -> list[Tensor]:
        caches = {IMAGE: images}
        with torch.inference_mode():
            for program in engine.programs:
                results = program.module.forward(*[caches[name] for name in program.inputs])
                caches.update(zip(program.outputs, results, strict=True))
                scores.append([caches[name].clone() for name in output_names(engine.structure.count)])
        return [torch.stack(outputs) for outputs in zip(*scores, strict=True)]

    scores: list[list[Tensor]] = []
    return quiet(compute)


def _describe(program: StepProgram, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A step program as JSON; its constants are added to `tensors` as `step<level>.t<k>`."""
    numbers: dict[fx.Node, int] = {}
    nodes: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for node in program.module.graph.nodes:
        numbers[node] = len(numbers)
        entry: dict[str, Any] = {"op": node.op}
        if node.op == "get_attr":
            entry["target"] = names.setdefault(node.target, f"t{len(names)}")
        elif node.op == "call_function":
            entry.update(encode_call(node, numbers, KERNELS))
        elif node.op == "output":
            entry["args"] = [encode(a, numbers) for a in node.args]
        nodes.append(entry)
    for own, name in names.items():
        tensors[f"step{program.level}.{name}"] = program.module.get_buffer(own).detach().cpu().contiguous()
    return {
        "level": program.level,
        "inputs": list(program.inputs),
        "outputs": list(program.outputs),
        "released": list(program.released),
        "macs": program.macs,
        "nodes": nodes,
    }


# ------------------------------------------------------------------------------------------------- reading


def read_engine(path: str | os.PathLike[str], device: str | torch.device | None = None) -> ProgramSet:
    """Step programs that `save_engine` wrote; arguments and errors as of `engine.load_engine`."""
    path, device = checked_path(path), usable_device(device or "cpu")
    content, tensors = read_file(path, ENGINE, VERSION, _OLDEST)
    header: EngineHeader = validated(EngineHeader, content, path)
    try:
        programs = [_Reader(entry, k, tensors, device).program() for k, entry in enumerate(header.programs, 1)]
        engine = ProgramSet(
            programs,
            header.macs,
            tuple(header.image_size),
            read_dtype(header.dtype),
            device,
            {name: None if axis is None else BatchAxis(*axis) for name, axis in header.cache_axes.items()},
            header.metadata,
            Structure.from_description(header.structure),
        )
        _check_caches(engine)
        _check_tensors(header, tensors)
        _check_scores(engine, header, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except DAMAGE as error:
        raise CheckpointError(f"{path}: the description of the engine is damaged ({error}).") from None
    return engine


def _check_tensors(header: EngineHeader, tensors: Mapping[str, Tensor]) -> None:
    if broken := not_finite(tensors):
        raise CheckpointError(f"{broken}: weights that are not finite numbers.")
    names = probe_names(Structure.from_description(header.structure).count)
    if header.probe is not None and not tensors.keys() >= set(names):
        raise ValueError("the stored scores are missing")


def _check_scores(engine: ProgramSet, header: EngineHeader, tensors: Mapping[str, Tensor]) -> None:
    """Run all steps once: whatever a file asks for that cannot run is found here and not in a session."""
    random = any(draws(program.module.graph) for program in engine.programs)
    scores = _probe_scores(engine, header.probe or _PROBE)
    is_scores = scores is not None and engine.structure.is_tensor and scores[0].dim() == 3
    classes = scores[0].shape[-1] if scores and is_scores else None
    if problem := engine.metadata.problem(engine.image_size, engine.num_subnets, classes):
        raise CheckpointError(f"damaged: {problem}.")
    runs_everywhere = engine.dtype in (torch.float32, torch.float64)
    if scores is None and not random and (header.probe is not None or runs_everywhere):
        raise ValueError("its steps cannot run, or give scores that are no numbers")
    stored = [tensors[name] for name in probe_names(engine.structure.count)] if header.probe is not None else []
    if stored and scores is not None and (problem := compare_outputs(stored, scores)):
        raise CheckpointError(f"the engine computes something else than when it was saved: {problem}.")


class _Reader:
    """Rebuilds one step program.

    Args:
        entry: its description.
        level: which step it has to be.
        tensors: constants of all steps.
    """

    def __init__(self, entry: Any, level: int, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.entry, self.level, self.tensors, self.device = entry, level, tensors, device
        self.graph, self.root = fx.Graph(), nn.Module()
        self.nodes: list[fx.Node] = []
        self.inputs = 0

    def program(self) -> StepProgram:
        if self.entry["level"] != self.level:
            raise ValueError(f"step {self.entry['level']!r} in place of step {self.level}")
        inputs, outputs, released = (
            tuple(checked(name, str) for name in self.entry[key]) for key in ("inputs", "outputs", "released")
        )
        for entry in self.entry["nodes"]:
            self.nodes.append(self._node(entry))
        self.graph.lint()
        results = self.graph.output_node().args[0]
        if self.inputs != len(inputs) or len(results) != len(outputs):
            raise ValueError(f"step {self.level} has {self.inputs} inputs and {len(results)} outputs")
        if any(not isinstance(result, fx.Node) for result in results):
            raise ValueError(f"step {self.level} returns something that is not computed")
        macs = checked(self.entry["macs"], int)
        return StepProgram(self.level, fx.GraphModule(self.root, self.graph), inputs, outputs, macs, released)

    def _node(self, entry: Any) -> fx.Node:
        kind = entry["op"]
        if kind == "placeholder":
            self.inputs += 1
            return self.graph.placeholder(f"cache_{self.inputs}")
        if kind == "get_attr":
            return self._constant(checked(entry["target"], str))
        if kind == "output":
            return self.graph.output(tuple(decode(entry["args"][0], self.nodes, self.device)))
        if kind != "call_function":
            raise CheckpointError(f"step {self.level} has a node of kind {kind!r}, which no engine file contains.")
        try:
            return self.graph.call_function(*decode_call(entry, self.nodes, self.device, KERNELS))
        except CheckpointError as error:
            raise CheckpointError(f"step {self.level}: {error}") from None

    def _constant(self, name: str) -> fx.Node:
        if not _CONSTANT.fullmatch(name):
            raise ValueError(f"{name!r} is no constant of step {self.level}")
        if name not in dict(self.root.named_buffers()):
            value = self.tensors[f"step{self.level}.{name}"].to(self.device)
            self.root.register_buffer(name, value.clone())  # aligned: matrix products round by alignment
        return self.graph.get_attr(name)


def _check_caches(engine: ProgramSet) -> None:
    """Every step finds its caches, gives scores, and the MACs add up."""
    if not engine.programs or len(engine.macs) != engine.num_subnets or len(engine.image_size) != 3:
        raise ValueError("steps, MACs and image size do not fit together")
    available, macs = {IMAGE}, 0
    for program, total in zip(engine.programs, engine.macs, strict=True):
        macs += program.macs
        missing = set(program.inputs) - available
        available |= set(program.outputs)
        outputs = set(output_names(engine.structure.count))
        twice = len(set(program.released)) != len(program.released)
        released = set(program.released) <= available and not twice
        if missing or not outputs <= set(program.outputs) or not released or macs != total:
            raise ValueError(f"step {program.level} does not fit the steps before it")
        available -= set(program.released)
    unknown = {name for program in engine.programs for name in program.outputs} - set(engine.cache_axes)
    if unknown:
        raise ValueError(f"no batch axis for {sorted(unknown)[0]!r}")


# ------------------------------------------------------------------------------------------------- pickle


def pack_engine(engine: ProgramSet) -> tuple[bytes, str]:
    """An engine as the bytes of its file, and its device: for pickle."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "engine")
        save_engine(engine, path)
        return path.read_bytes(), str(engine.device)


def unpack_engine(content: bytes, device: str) -> ProgramSet:
    """What `pack_engine` took apart."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "engine")
        path.write_bytes(content)
        return read_engine(path, device)
