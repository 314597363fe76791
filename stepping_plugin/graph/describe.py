"""What a captured program computes, as text: the fingerprint by which files are matched with models.

One line per operator that the result depends on, in the order in which the result asks for them (depth first from the
output), so that neither the names of nodes nor the order in which a tracer wrote them matter:

    LAYER|OPERATOR(first, second, keyword=value)

An argument that equals the default of the operator's schema is left out, and what says where something is
computed, too. `%3` is the result of line 3,
`x` the images, `B*k` k times the batch size, `.weight` a tensor of the layer, `#2` a constant of the model's code.
Constants of whole numbers stand with a hash. Those of real numbers stand with type and shape only, since their last
bits differ between machines; `sketches` has three numbers of each, to be compared with a tolerance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .program import Program, is_random, op_name

__all__ = ["describe", "draws", "first_difference"]

_BESIDE = {"device", "pin_memory", "cudnn_enabled"}  # arguments that say where something is computed, not what
_CLOSE = 1e-4  # of sketches, relative to the size of the constant


def describe(program: Program) -> tuple[list[str], list[list[float]]]:
    """Lines of a program (see the module's text) and sketches of its real constants, in order of use."""
    return _Description(program).run()


def draws(graph: fx.Graph) -> bool:
    """Whether a graph draws random numbers."""
    return any(is_random(node) for node in graph.nodes)


class _Description:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.numbers: dict[fx.Node, str] = {program.image: "x"}
        self.lines: list[str] = []
        self.sketches: list[list[float]] = []
        self.constants = 0

    def run(self) -> tuple[list[str], list[list[float]]]:
        program = self.program
        for result in (*program.outputs, *program.mutated):
            self._visit(result)
        returned = program.structure.build([self._value(v) for v in program.outputs])
        named = [f"{name}={self._value(v)}" for name, v in zip(program.mutations, program.mutated)]
        self.lines.append(f"|output({', '.join([str(returned), *named])})")
        return self.lines, self.sketches

    def _visit(self, result: fx.Node) -> None:
        pending = [result]
        while pending:
            node = pending[-1]
            missing = [] if node in self.numbers else [n for n in node.all_input_nodes if n not in self.numbers]
            if "batch" not in node.meta and missing:
                pending.extend(reversed(missing))
                continue
            pending.pop()
            if node not in self.numbers:
                self.numbers[node] = self._named(node)

    def _named(self, node: fx.Node) -> str:
        """How later lines call a node; operators get their own line here."""
        if "batch" in node.meta:
            return f"B*{node.meta['batch']}"
        if node.op == "placeholder":
            name = node.meta["tensor"]
            return self._constant(name) if name in self.program.constants else name
        self.lines.append(f"{node.meta.get('module') or ''}|{op_name(node)}({self._arguments(node)})")
        return f"%{len(self.lines) - 1}"

    def _constant(self, name: str) -> str:
        value = self.program.constants[name].detach().cpu()
        self.constants += 1
        text = f"#{self.constants}:{_plain(value.dtype)}{list(value.shape)}"
        if value.is_floating_point():
            self.sketches.append(_sketch(value))
            return text
        return f"{text}:{hashlib.sha256(str(value.tolist()).encode()).hexdigest()[:12]}"

    def _arguments(self, node: fx.Node) -> str:
        schema = getattr(node.target, "_schema", None)
        arguments = schema.arguments if schema is not None else []
        module = node.meta.get("module") or ""
        given: list[str] = []
        for position, value in enumerate(node.args):
            argument = arguments[position] if position < len(arguments) else None
            if argument is None or not (argument.name in _BESIDE or _is_default(argument, value)):
                named = argument is not None and not _holds_nodes(value)
                given.append((f"{argument.name}=" if named else "") + self._value(value, module))
        known = {a.name: a for a in arguments}
        for key, value in sorted(node.kwargs.items()):
            if key not in _BESIDE and not (key in known and _is_default(known[key], value)):
                given.append(f"{key}={self._value(value, module)}")
        return ", ".join(given)

    def _value(self, value: Any, module: str = "") -> str:
        if isinstance(value, fx.Node):
            name = self.numbers[value]
            own = module and name.startswith(f"{module}.")
            return name[len(module) :] if own else name
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._value(v, module) for v in value)}]"
        return "here" if isinstance(value, torch.device) else _plain(value)


def _holds_nodes(value: Any) -> bool:
    return isinstance(value, fx.Node) or (isinstance(value, (list, tuple)) and any(map(_holds_nodes, value)))


def _is_default(argument: Any, value: Any) -> bool:
    if isinstance(value, fx.Node) or not argument.has_default_value():
        return False
    default = argument.default_value
    return type(default) is type(value) and default == value


def _plain(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _sketch(value: Tensor) -> list[float]:
    """Length, sum and a mixed sum of a constant's numbers, both divided by the root of their count."""
    flat = value.double().flatten().nan_to_num(nan=1e3, posinf=2e3, neginf=-2e3)
    index = torch.arange(len(flat))
    weights = ((index * 73244475 + 12345) % 65536).double() / 32768 - 1
    root = math.sqrt(max(1, len(flat)))
    return [float(f"{v:.7g}") for v in (float(flat.norm()), float(flat.sum()) / root, float(flat @ weights) / root)]


def first_difference(
    expected: tuple[Sequence[str], Sequence[Sequence[float]]], got: tuple[Sequence[str], Sequence[Sequence[float]]]
) -> str | None:
    """The first operator in which two descriptions differ, as text; None if they are the same."""
    lines, ours = list(expected[0]), list(got[0])
    for number, (theirs, own) in enumerate(zip([*lines, ""], [*ours, ""])):
        if theirs != own:
            return f"operator {number + 1}: got {_readable(own)}, expected {_readable(theirs)}"
    if len(expected[1]) != len(got[1]) or not all(map(_close, expected[1], got[1])):
        number = next((k for k, (a, b) in enumerate(zip(expected[1], got[1])) if not _close(a, b)), 0)
        return f"constant {number + 1} that the model's code makes: other numbers"
    return None


def _readable(line: str) -> str:
    module, _, call = line.partition("|")
    return f"{call} in {module or 'the model itself'}" if call else "nothing"


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    size = max(abs(a[0]), abs(b[0]))
    return len(a) == len(b) and all(abs(x - y) <= _CLOSE * size for x, y in zip(a, b))
