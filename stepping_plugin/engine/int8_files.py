"""ONNX steps in int8: static quantisation by onnxruntime, one step after the other.

Every step has weights of its own, so nesting holds as before: a step reads what smaller steps cached and changes none
of it. A step is calibrated on the caches that the quantised steps before it leave. A cached value that a step gives in
int8 has one scale for good: that of the step that made it, which all later steps take over.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SteppingError, explain
from .emit import IMAGE, StepProgram
from .onnx_files import NEW

__all__ = ["check_pictures", "quantise"]

_BATCH = 32  # calibration pictures at a time


def check_pictures(pictures: Any, image_size: tuple[int, ...], batch_size: int | None) -> None:
    """Raise a SteppingError where int8 cannot be calibrated."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise SteppingError("export: int8 needs onnxruntime. Run: pip install onnx onnxscript onnxruntime")
    fits = isinstance(pictures, Tensor) and tuple(pictures.shape[1:]) == image_size and len(pictures) > 0
    if not fits or pictures.dtype != torch.float32 or not bool(pictures.isfinite().all()):
        got = f"{pictures.dtype} of shape {tuple(pictures.shape)}" if isinstance(pictures, Tensor) else pictures
        expected = f"float32 pictures (B, {', '.join(map(str, image_size))}), some hundred, as the net is used with"
        raise SteppingError(explain("calibration", where="export", got=got, expected=expected))
    if batch_size is not None and len(pictures) % batch_size:
        raise SteppingError(
            f"export: {len(pictures)} calibration pictures are no multiple of the batch size {batch_size}"
        )


def quantise(
    files: Sequence[Path], programs: Sequence[StepProgram], pictures: Tensor, batch_size: int | None = None
) -> None:
    """Replace float ONNX steps by int8 ones.

    Args:
        files: one per step, rewritten in place.
        programs: the steps.
        pictures: (B, C, H, W), for ranges of values.
        batch_size: of the files; None: any.
    """
    import onnxruntime
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    caches = [{IMAGE: part.numpy()} for part in pictures.cpu().split(batch_size or _BATCH)]
    scales: dict[str, dict[str, Any]] = {}
    for path, program in zip(files, programs, strict=True):
        target = path.with_name(f"{path.name}.int8")
        try:
            with _quiet():
                quantize_static(
                    path,
                    target,
                    _Reader(program.inputs, caches),
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    per_channel=True,
                    extra_options={
                        "TensorQuantOverrides": {n: [scales[n]] for n in program.inputs if n in scales},
                        "QuantizeBias": True,
                    },
                )
            os.replace(target, path)
        except Exception as error:  # onnxruntime's tool has no common class of errors
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise SteppingError(f"export: step {program.level} cannot be quantised: {reason}") from error
        finally:
            target.unlink(missing_ok=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for held in caches:
            given = {name: held[name] for name in program.inputs}
            held.update(zip(program.outputs, session.run([n + NEW for n in program.outputs], given)))
            for name in program.released:
                del held[name]
        scales.update(_scales(path, program.outputs))


class _Reader:
    """Inputs of one step for every batch of pictures, as onnxruntime's calibration asks for them."""

    def __init__(self, names: Sequence[str], caches: Sequence[dict[str, Any]]) -> None:
        self.batches: Iterator[dict[str, Any]] = iter([{n: held[n] for n in names} for held in caches])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def _scales(path: Path, outputs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Scale and zero point of the outputs that a quantised step gives in steps of a grid."""
    import onnx
    from onnx import numpy_helper
    from onnxruntime.quantization import QuantType

    graph = onnx.load(path).graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found: dict[str, dict[str, Any]] = {}
    for name in outputs:
        node = makers.get(name + NEW)
        if node is not None and node.op_type == "DequantizeLinear":
            scale, zero = (numpy_helper.to_array(constants[key]) for key in node.input[1:3])
            found[name] = {"quant_type": QuantType.QUInt8, "scale": scale, "zero_point": zero}
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tool's advice to preprocess: exported steps are folded already."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)
