"""Step programs as ONNX files, and their weights in one file beside them."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import SteppingError
from .emit import StepProgram

__all__ = ["NEW", "require_onnx", "share_weights", "write_onnx"]

NEW = ".new"  # ends the name of an output: inputs and outputs may not share names
PACKAGES = ("onnx", "onnxscript")
_SMALL = 1024  # bytes of a tensor that stays in the graph, where runtimes look for shapes and axes
_FIELDS = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data")  # where numbers may stand instead
_PAGE = 4096  # tensors start at multiples of it, so that runtimes can map them into memory


def require_onnx(*further: str) -> None:
    """Raise a SteppingError that names the packages if some are missing."""
    missing = [name for name in (*PACKAGES, *further) if importlib.util.find_spec(name) is None]
    if missing:
        raise SteppingError(
            f"export: the ONNX format needs {' and '.join(missing)}. Run: pip install onnx onnxscript onnxruntime"
        )


def write_onnx(captured: torch.export.ExportedProgram, program: StepProgram, path: Path) -> None:
    """Write one step."""
    try:
        made = torch.onnx.export(
            captured,
            (),
            input_names=list(program.inputs),
            output_names=[name + NEW for name in program.outputs],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        assert made is not None
        path.write_bytes(_with_named_batch(made.model_proto).SerializeToString())
    except Exception as error:  # the exporter has no common class of errors
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SteppingError(f"export: step {program.level} has no ONNX form: {reason}. Use format='torch'.") from error


def _with_named_batch(model: Any) -> Any:
    """The one symbolic size, s and a number by torch's naming, is the batch."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = re.sub(r"\bs\d+\b", "batch", dim.dim_param)
    return model


def share_weights(files: Sequence[Path], weights: Path, name: str) -> None:
    """Move the weights of several ONNX files into one file; what several of them hold is stored once.

    Args:
        files: rewritten in place.
        weights: the file to write.
        name: by which the ONNX files call it, relative to themselves.
    """
    import onnx
    from onnx.external_data_helper import set_external_data

    places: dict[bytes, int] = {}
    with open(weights, "wb") as stream:
        for path in files:
            model = onnx.load(path)
            for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer):
                del part.metadata_props[:]  # the exporter's notes, larger than what is left of the graph
            for tensor in model.graph.initializer:
                content = _bytes_of(tensor)
                if len(content) < _SMALL:
                    continue
                digest = hashlib.sha256(content).digest()
                if digest not in places:
                    stream.write(bytes(-stream.tell() % _PAGE))
                    places[digest] = stream.tell()
                    stream.write(content)
                for field in _FIELDS:
                    tensor.ClearField(field)
                tensor.raw_data = content
                set_external_data(tensor, name, offset=places[digest], length=len(content))
                tensor.ClearField("raw_data")
            onnx.save(model, path)


def _bytes_of(tensor: Any) -> bytes:
    from onnx import numpy_helper

    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    return bytes(numpy_helper.to_array(tensor).tobytes())
