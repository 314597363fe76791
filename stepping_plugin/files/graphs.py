"""Graphs in files: calls of operators as JSON, and how a file's word is taken.

Nothing in a file is executed. A graph is rebuilt node by node, and a node may only call an operator of a fixed list:
functional ATen operators that the package knows, `getitem`, `mul` of sizes, and functions that the reader names. Names
that end up in generated code are made or checked here, never taken over as they are.
"""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..errors import CheckpointError, SteppingError, explain
from ..graph.rules import RULES

__all__ = [
    "DAMAGE",
    "checked",
    "decode",
    "decode_call",
    "encode",
    "encode_call",
    "find_operator",
    "plain_name",
    "read_dtype",
]

# What the rebuilding and running of a graph raises where its description is not that of one.
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError, StopIteration,
          ArithmeticError, MemoryError)  # fmt: skip
Functions = Mapping[str, Callable[..., Any]]

_LARGEST = 2**28  # numbers in one value of a step program

# What graphs call besides the operators that have a label rule. All are functional.
_FURTHER = {
    "_native_batch_norm_legit_no_training", "_softmax", "_upsample_bicubic2d_aa.vec", "_upsample_bilinear2d_aa.vec",
    "_weight_norm", "addmm", "arange", "arange.start",
    "arange.start_step", "baddbmm", "eye", "full", "gather", "grid_sampler_2d", "index_copy",
    "max_pool2d_with_indices", "mm",
    "native_group_norm", "native_layer_norm", "norm.ScalarOpt_dim", "one_hot", "ones", "scalar_tensor", "sort",
    "split.Tensor", "split_with_sizes", "sum.dim_IntList", "sym_size.int", "topk", "tril", "triu", "unbind.int",
    "var_mean.correction", "zeros",
}  # fmt: skip
_PYTHON: dict[str, Callable[..., Any]] = {"getitem": operator.getitem, "mul": operator.mul}
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last,
            "preserve": torch.preserve_format}  # fmt: skip


def find_operator(name: str, functions: Functions | None = None) -> Callable[..., Any] | None:
    """The operator of an allowed name such as `aten.conv2d`, `aten.add.Tensor`, `mul` or, if it is among `functions`,
    `kernels.next_norm`."""
    space, _, rest = name.partition(".")
    if space == "kernels":
        return (functions or {}).get(rest)
    if space != "aten":
        return _PYTHON.get(name)
    base, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
        return None
    return found if rest in _FURTHER or rest in RULES or torch.Tag.pointwise in found.tags else None


def operator_name(target: Any, functions: Functions) -> str:
    """The name by which `find_operator` finds an operator.

    Raises:
        SteppingError: it is not on the list.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.replace("::", ".")
        name += "" if target._overloadname == "default" else f".{target._overloadname}"
    elif target in functions.values():
        name = f"kernels.{target.__name__}"
    else:
        name = getattr(target, "__name__", str(target))
    if find_operator(name, functions) is not target:
        raise SteppingError(
            f"save: the graphs call {name}, which files cannot name. Of an engine, save the net instead "
            "(net.save) and call deploy() after loading it."
        )
    return name


def plain_name(value: Any) -> str:
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
        return {"dtype": plain_name(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": next(k for k, v in _FORMATS.items() if v == value)}
    if isinstance(value, torch.device):
        return {"device": "here"}  # wherever it is loaded to
    if value == torch.strided:
        return {"layout": "strided"}
    raise SteppingError(f"save: an argument of type {type(value).__name__} has no form in a file.")


def encode_call(node: fx.Node, numbers: Mapping[fx.Node, int], functions: Functions | None = None) -> dict[str, Any]:
    """Operator and arguments of a node as JSON.

    Raises:
        SteppingError: something that files have no form for.
    """
    entry: dict[str, Any] = {"target": operator_name(node.target, functions or {})}
    entry["args"] = [encode(a, numbers) for a in node.args]
    if node.kwargs:
        entry["kwargs"] = {k: encode(v, numbers) for k, v in node.kwargs.items()}
    return entry


# ------------------------------------------------------------------------------------------------- reading


def decode_call(
    entry: Mapping[str, Any], nodes: Sequence[fx.Node], device: torch.device, functions: Functions | None = None
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Operator and arguments that `encode_call` wrote.

    Raises:
        CheckpointError: an operator that files may not call.
    """
    target = find_operator(checked(entry["target"], str), functions)
    if target is None:
        raise CheckpointError(
            explain(
                "operator that files may not call",
                got=entry["target"],
                action="The file is foreign, or written by another version; save it again.",
            )
        )
    args = tuple(decode(a, nodes, device) for a in entry["args"])
    if "_aa" in entry["target"] and len(args) > 3 and args[3] is not None:
        raise ValueError("a scale in place of a size")
    if target is operator.mul and not all(isinstance(a, (fx.Node, int)) for a in args):
        raise ValueError("mul of something that is no size")
    return target, args, {_keyword(k): decode(v, nodes, device) for k, v in entry.get("kwargs", {}).items()}


def _keyword(name: str) -> str:
    """Keywords become part of generated code: nothing but a name may pass."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{name!r} is no keyword of an operator")
    return name


def decode(value: Any, nodes: Sequence[fx.Node], device: torch.device) -> Any:
    """An argument that `encode` wrote."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return _bounded(value)
    if isinstance(value, list):
        return _bounded([decode(v, nodes, device) for v in value])
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[checked(content, int)]
    if kind == "tuple":
        return tuple(decode(v, nodes, device) for v in content)
    if kind == "dtype":
        return read_dtype(content)
    if kind == "memory_format":
        return _FORMATS[content]
    return {"device": device, "layout": torch.strided}[kind]


def checked(value: Any, kind: type) -> Any:
    """A value of a type, which for numbers is 0 or more."""
    if isinstance(value, bool) or not isinstance(value, kind) or (isinstance(value, int) and value < 0):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def read_dtype(name: Any) -> torch.dtype:
    found = getattr(torch, checked(name, str), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def _bounded(value: Any) -> Any:
    """Numbers that an operator may take for sizes must not ask for any amount of memory. Ends of slices may be huge."""
    numbers = [v for v in (value if isinstance(value, list) else [value]) if type(v) is int]
    if any(_LARGEST < abs(v) < 2**62 or abs(v) >= 2**63 for v in numbers) or (
        len(numbers) > 1 and math.prod(max(1, abs(v)) for v in numbers) > _LARGEST
    ):
        raise ValueError(f"{str(value)[:60]}: sizes beyond {_LARGEST:,} numbers")
    return value
