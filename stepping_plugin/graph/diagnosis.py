"""Why a model cannot be captured: the construct, and the line of the user's code that holds it."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import CaptureError, explain
from .program import op_name

__all__ = ["capture_failure", "changed_parameter", "no_tensors", "part_of_batch", "refuse_data_dependence"]

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parents[1])
_DYNAMIC = ("GuardOnDataDependentSymNode", "UserError", "DataDependentOutputException", "DynamicOutputShapeException")
_REWRITE = "Rewrite it without the condition, for example with torch.where, or use a fixed number of rounds."


def capture_failure(model: nn.Module, image_size: tuple[int, ...], error: Exception) -> CaptureError:
    """The error to raise for an exception of torch.export."""
    name, text = type(model).__name__, str(error)
    place = _line_in(error)
    if isinstance(error, TypeError) and "missing a required argument" in text:
        wanted = ", ".join(re.findall(r"'(\w+)'", text))
        return CaptureError(
            explain(
                f"{name}.forward needs further arguments ({wanted})",
                expected="a model of one image batch (B, C, H, W)",
                action="Wrap it in a module that holds or makes them.",
            )
        )
    if any(cause in f"{type(error).__name__} {type(error.__cause__).__name__}" for cause in _DYNAMIC) or re.search(
        r"\bz?u[a-z]*\d+\b", text
    ):
        what = f"{name} has control flow that depends on the values of a tensor (a condition, a loop bound or an index)"
        return CaptureError(explain(what, where=place, action=_REWRITE))
    if unknown := re.search(r"Found <class '([\w.<>]+)'> in output", text):
        kind = unknown[1].rpartition(".")[2]
        what = f"{name} returns a {unknown[1]}, in which torch.export cannot find the tensors"
        action = f"Call torch.export.register_dataclass({kind}) once before the conversion, or return a dict or tuple."
        return CaptureError(explain(what, action=action))
    if ".numpy()" in text:
        what = f"{name} leaves torch for numpy, where nothing can be traced"
        return CaptureError(explain(what, where=place, action="Write that part with torch operators."))
    if "fake tensor in the exported program constant" in text and (assigned := _data_assignment(model)):
        return changed_parameter(model, place=assigned)
    if isinstance(model, torch.jit.ScriptModule):
        what = f"{name} is a TorchScript module, which cannot be captured"
        return CaptureError(explain(what, action="Pass the nn.Module that it was made from."))
    first = next((line for line in text.splitlines() if line.strip()), "")
    return CaptureError(
        explain(
            f"{name} cannot be captured for images of shape {tuple(image_size)}: {type(error).__name__}: {first}",
            where=place,
            action="Check that model(images) runs for batches of any size, and give example_inputs of the shape that "
            "the model expects.",
        )
    )


def changed_parameter(
    model: nn.Module, parameter: str = "", node: fx.Node | None = None, place: str | None = None
) -> CaptureError:
    """The error for a forward that changes its own weights.

    Args:
        parameter: name of the parameter, where it is known.
        node: what makes its new value.
        place: the line of code, where it is known.
    """
    what = f"{type(model).__name__} changes its parameters in forward" + (f" ({parameter})" if parameter else "")
    traced = node.meta.get("stack_trace") if node is not None else None
    place = place or _data_assignment(model, parameter) or _user_line(traced or "")
    action = (
        "Make the weight from the parameter instead, for example weight = torch.renorm(self.weight, 2, 0, 1.0) for "
        "functional.conv2d or a torch.nn.utils.parametrize parametrization, or change it in the training loop."
    )
    return CaptureError(explain(what, where=place, action=action))


def no_tensors(model: nn.Module, results: Sequence[Any], training: bool) -> CaptureError:
    """The error for a model whose result holds no tensor, or numbers that change with the batch."""
    listed = [r for r in results if not isinstance(r, fx.Node)]
    return CaptureError(
        explain(
            "the result is no tensor, nor a structure of tensors and constants",
            where=f"{type(model).__name__}.forward in {'train' if training else 'eval'} mode",
            got=f"numbers that depend on the batch size ({listed})" if len(listed) < len(results) else f"{listed}",
            expected="a tensor, or a tuple, list, dict or dataclass of tensors",
            action="Wrap the model in a module that returns its tensors and nothing else.",
        )
    )


def part_of_batch(model: nn.Module, node: fx.Node) -> CaptureError:
    """The error for a model that treats some pictures of a batch in another way than others."""
    return CaptureError(
        explain(
            f"{type(model).__name__} takes a part of the batch ({op_name(node)}), so that what it says about a picture "
            "depends on the others or on their number",
            where=_user_line(node.meta.get("stack_trace") or ""),
            expected="operators that treat all pictures alike; whole batches may be joined and split again",
            action="Wrap or rewrite that part.",
        )
    )


_WRITES = re.compile(
    r"\.data\s*(\[[^\]]*\]\s*)?([-+*/]?=)(?!=)|\.data\.\w+_\(|\.set_\(|\b(weight|bias)(\.\w+_\(|\s*[-+*/]=)"
)


def _data_assignment(model: nn.Module, parameter: str = "") -> str | None:
    """The first line of the users' modules that writes into a parameter: `file:line (code)`.

    Args:
        parameter: look in the module of this parameter first.
    """
    owner = parameter.rpartition(".")[0]
    modules = [m for n, m in model.named_modules() if n == owner] + list(model.modules())
    for kind in dict.fromkeys(c for m in modules for c in type(m).__mro__):
        functions = [f for k, f in vars(kind).items() if inspect.isfunction(f) and k != "__init__"]
        for function in (f for f in functions if _is_users(f.__code__.co_filename)):
            try:
                lines, start = inspect.getsourcelines(function)
            except OSError:
                continue
            for number, line in enumerate(lines, start):
                if _WRITES.search(line):
                    return f"{function.__code__.co_filename}:{number} ({line.strip()})"
    return None


def refuse_data_dependence(model: nn.Module, graph: fx.Graph) -> None:
    """Refuse values that are numbers read from a tensor, and tensors whose shape depends on values.

    Raises:
        CaptureError: names the operator and the line of code.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        unknown = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
        if isinstance(value, Tensor):
            unknown = any(isinstance(size, torch.SymInt) for size in value.shape)
        if node.op == "call_function" and unknown:
            what = "a shape that depends" if isinstance(value, Tensor) else "a number that depends"
            raise CaptureError(
                explain(
                    f"{type(model).__name__} has {what} on the values of a tensor ({op_name(node)})",
                    where=_user_line(node.meta.get("stack_trace") or ""),
                    action="Keep it a tensor of fixed shape, for example a product with a mask.",
                )
            )


def _line_in(error: BaseException) -> str | None:
    """The innermost frame of an exception outside torch and this package: `file:line (code)`."""
    found = None
    current: BaseException | None = error
    while current is not None:
        for frame in traceback.extract_tb(current.__traceback__):
            if _is_users(frame.filename):
                found = f"{frame.filename}:{frame.lineno} ({(frame.line or '').strip()})"
        current = current.__cause__
    return found


def _user_line(stack_trace: str) -> str | None:
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', stack_trace)
    frames = [frame for frame in frames if _is_users(frame[0])]
    return "{}:{} ({})".format(*frames[-1]) if frames else None


def _is_users(filename: str) -> bool:
    return not filename.startswith((_TORCH, _OURS, "<"))
