"""Engines as files: one safetensors file with the constants of all step programs and their graphs as JSON.

Nothing in the file is executed. A graph is rebuilt node by node, and a node may only call an operator of a fixed
list: functional ATen operators that the package knows, `getitem`, `mul` of sizes, and the functions in
`engine.kernels`. Names that end up in generated code are made or checked here, never taken over as they are.
"""

from __future__ import annotations

import json
import keyword
import operator
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from ..errors import CheckpointError, SteppingError, explain
from ..graph.rules import RULES
from ..tensorfile import ENGINE, read_file
from .emit import IMAGE, SCORES, StepProgram
from .kernels import KERNELS
from .plan import BatchAxis
from .program_set import ProgramSet

__all__ = ["read_engine", "save_engine"]

# Counted up whenever older files would be read wrongly: 2 has a cache per level, and norms keep other statistics.
VERSION = 2

# What step programs call besides the operators that have a label rule. All are functional.
_FURTHER = {
    "_native_batch_norm_legit_no_training", "_softmax", "_weight_norm", "addmm", "arange", "arange.start",
    "arange.start_step", "baddbmm", "eye", "full", "gather", "grid_sampler_2d", "max_pool2d_with_indices", "mm",
    "native_group_norm", "native_layer_norm", "norm.ScalarOpt_dim", "one_hot", "ones", "scalar_tensor", "sort",
    "split.Tensor", "split_with_sizes", "sum.dim_IntList", "sym_size.int", "topk", "tril", "triu", "unbind.int",
    "var_mean.correction", "zeros",
}  # fmt: skip
_PYTHON: dict[str, Callable[..., Any]] = {"getitem": operator.getitem, "mul": operator.mul}
_CONSTANT = re.compile(r"t\d+")
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last,
            "preserve": torch.preserve_format}  # fmt: skip


def find_operator(name: str) -> Callable[..., Any] | None:
    """The operator of an allowed name such as `aten.conv2d`, `aten.add.Tensor`, `kernels.next_norm` or `mul`."""
    space, _, rest = name.partition(".")
    if space == "kernels":
        return KERNELS.get(rest)
    if space != "aten":
        return _PYTHON.get(name)
    base, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
        return None
    return found if rest in _FURTHER or rest in RULES or torch.Tag.pointwise in found.tags else None


def operator_name(target: Any) -> str:
    """The name by which `find_operator` finds an operator.

    Raises:
        SteppingError: it is not on the list.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.replace("::", ".")
        name += "" if target._overloadname == "default" else f".{target._overloadname}"
    elif target in KERNELS.values():
        name = f"kernels.{target.__name__}"
    else:
        name = getattr(target, "__name__", str(target))
    if find_operator(name) is not target:
        raise SteppingError(
            f"save: the step programs call {name}, which engine files cannot name. Save the net instead "
            "(net.save) and call deploy() after loading it."
        )
    return name


# ------------------------------------------------------------------------------------------------- writing


def save_engine(engine: ProgramSet, path: str | os.PathLike[str]) -> None:
    """Write an engine atomically: the file at `path` is the old one or the complete new one.

    Raises:
        SteppingError: a step program calls an operator that engine files cannot name.
    """
    tensors: dict[str, Tensor] = {}
    header = {
        "format": ENGINE,
        "version": VERSION,
        "image_size": list(engine.image_size),
        "dtype": _plain_name(engine.dtype),
        "macs": list(engine.macs),
        "cache_axes": engine.cache_axes,
        "programs": [_describe(program, tensors) for program in engine.programs],
        "versions": {"torch": torch.__version__},
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"stepping": json.dumps(header, separators=(",", ":"))})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
            entry["target"] = operator_name(node.target)
        if node.op in ("call_function", "output"):
            entry["args"] = [encode(a, numbers) for a in node.args]
        if node.kwargs:
            entry["kwargs"] = {k: encode(v, numbers) for k, v in node.kwargs.items()}
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


def _plain_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def encode(value: Any, numbers: Mapping[fx.Node, int]) -> Any:
    """An argument as JSON: nodes by number, torch's own kinds of value by name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": numbers[value]}
    if isinstance(value, tuple):
        return {"tuple": [encode(v, numbers) for v in value]}
    if isinstance(value, list):
        return [encode(v, numbers) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": _plain_name(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": next(k for k, v in _FORMATS.items() if v == value)}
    if isinstance(value, torch.device):
        return {"device": "here"}  # wherever the engine is loaded to
    if value == torch.strided:
        return {"layout": "strided"}
    raise SteppingError(f"save: an argument of type {type(value).__name__} has no form in an engine file.")


# ------------------------------------------------------------------------------------------------- reading


def read_engine(path: str | os.PathLike[str], device: str | torch.device | None = None) -> ProgramSet:
    """Step programs that `save_engine` wrote; arguments and errors as of `engine.load_engine`."""
    path, device = Path(path), torch.device(device or "cpu")
    header, tensors = read_file(path, ENGINE, VERSION)
    try:
        programs = [_Reader(entry, k, tensors, device).program() for k, entry in enumerate(header["programs"], 1)]
        engine = ProgramSet(
            programs,
            [_checked(m, int) for m in header["macs"]],
            tuple(_checked(s, int) for s in header["image_size"]),
            _dtype(header["dtype"]),
            device,
            {name: _batch_axis(entry) for name, entry in header["cache_axes"].items()},
        )
        _check_caches(engine)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the description of the engine is damaged ({error}).") from None
    return engine


def _batch_axis(entry: Any) -> BatchAxis | None:
    return None if entry is None else BatchAxis(*(_checked(number, int) for number in entry))


def _checked(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind) or (kind is int and value < 0):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, _checked(name, str), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


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
            tuple(_checked(name, str) for name in self.entry[key]) for key in ("inputs", "outputs", "released")
        )
        for entry in self.entry["nodes"]:
            self.nodes.append(self._node(entry))
        self.graph.lint()
        results = self.graph.output_node().args[0]
        if self.inputs != len(inputs) or len(results) != len(outputs):
            raise ValueError(f"step {self.level} has {self.inputs} inputs and {len(results)} outputs")
        if any(not isinstance(result, fx.Node) for result in results):
            raise ValueError(f"step {self.level} returns something that is not computed")
        macs = _checked(self.entry["macs"], int)
        return StepProgram(self.level, fx.GraphModule(self.root, self.graph), inputs, outputs, macs, released)

    def _node(self, entry: Any) -> fx.Node:
        kind = entry["op"]
        if kind == "placeholder":
            self.inputs += 1
            return self.graph.placeholder(f"cache_{self.inputs}")
        if kind == "get_attr":
            return self._constant(_checked(entry["target"], str))
        args = tuple(self._decode(a) for a in entry["args"])
        if kind == "output":
            return self.graph.output(tuple(args[0]))
        if kind != "call_function":
            raise CheckpointError(f"step {self.level} has a node of kind {kind!r}, which no engine file contains.")
        target = find_operator(_checked(entry["target"], str))
        if target is None:
            raise CheckpointError(
                explain(
                    "operator that engine files may not call",
                    where=f"step {self.level}",
                    got=entry["target"],
                    action="The file is foreign, or written by another version; save the engine again.",
                )
            )
        if target is operator.mul and not all(isinstance(a, (fx.Node, int)) for a in args):
            raise ValueError("mul of something that is no size")
        kwargs = {self._keyword(k): self._decode(v) for k, v in entry.get("kwargs", {}).items()}
        return self.graph.call_function(target, args, kwargs)

    def _keyword(self, name: str) -> str:
        """Keywords become part of generated code: nothing but a name may pass."""
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"{name!r} is no keyword of an operator")
        return name

    def _constant(self, name: str) -> fx.Node:
        if not _CONSTANT.fullmatch(name):
            raise ValueError(f"{name!r} is no constant of step {self.level}")
        if name not in dict(self.root.named_buffers()):
            value = self.tensors[f"step{self.level}.{name}"].to(self.device)
            self.root.register_buffer(name, value.clone())  # aligned: matrix products round by alignment
        return self.graph.get_attr(name)

    def _decode(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [self._decode(v) for v in value]
        ((kind, content),) = value.items()
        if kind == "node":
            return self.nodes[_checked(content, int)]
        if kind == "tuple":
            return tuple(self._decode(v) for v in content)
        if kind == "dtype":
            return _dtype(content)
        if kind == "memory_format":
            return _FORMATS[content]
        return {"device": self.device, "layout": torch.strided}[kind]


def _check_caches(engine: ProgramSet) -> None:
    """Every step finds its caches, gives scores, and the MACs add up."""
    if not engine.programs or len(engine.macs) != engine.num_subnets or len(engine.image_size) != 3:
        raise ValueError("steps, MACs and image size do not fit together")
    available, macs = {IMAGE}, 0
    for program, total in zip(engine.programs, engine.macs, strict=True):
        macs += program.macs
        missing = set(program.inputs) - available
        available |= set(program.outputs)
        if missing or SCORES not in program.outputs or not set(program.released) <= available or macs != total:
            raise ValueError(f"step {program.level} does not fit the steps before it")
        available -= set(program.released)
    unknown = {name for program in engine.programs for name in program.outputs} - set(engine.cache_axes)
    if unknown:
        raise ValueError(f"no batch axis for {sorted(unknown)[0]!r}")
