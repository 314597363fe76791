"""Small convolution nets in onnxruntime, to be timed: for measurements that ask which shapes it likes.

onnxruntime and onnx are an optional extra of the package (`pip install "stepping-plugin[onnx]"`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from stepping_plugin.errors import SteppingError, explain

__all__ = ["Conv", "conv_runner", "opened", "require_onnxruntime"]

OPSET = 18


class Conv(NamedTuple):
    """One convolution with bias and ReLU, stride 1, padded to keep its size."""

    inputs: int
    outputs: int
    kernel: int = 1
    groups: int = 1


def require_onnxruntime(where: str) -> None:
    """Refuse to go on without the packages.

    Raises:
        SteppingError: one of them is missing; names the extra.
    """
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise SteppingError(
            explain(
                f"{' and '.join(missing)} cannot be imported",
                where=where,
                action='Run: pip install "stepping-plugin[onnx]", or measure with latency: torch.',
            )
        )


def opened(model: bytes | str | os.PathLike[str], threads: int) -> Any:
    """A session on the CPU, of a file or of what is in one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    source = model if isinstance(model, bytes) else os.fspath(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def conv_runner(layers: Sequence[Conv], batch: int, size: int, threads: int) -> Callable[[], Any]:
    """A function that runs convolutions one after the other on a random batch (batch, channels, size, size)."""
    session = opened(_model(layers, size).SerializeToString(), threads)
    x = np.random.default_rng(0).standard_normal((batch, layers[0].inputs, size, size)).astype(np.float32)
    return lambda: session.run(None, {"x": x})


def _model(layers: Sequence[Conv], size: int) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    rng, nodes, weights = np.random.default_rng(0), [], []
    for i, layer in enumerate(layers):
        shape = (layer.outputs, layer.inputs // layer.groups, layer.kernel, layer.kernel)
        weight = rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
        weights += [
            numpy_helper.from_array(weight, f"w{i}"),
            numpy_helper.from_array(np.zeros(layer.outputs, np.float32), f"b{i}"),
        ]
        source = "x" if i == 0 else f"r{i - 1}"
        pads = [layer.kernel // 2] * 4
        nodes += [
            helper.make_node("Conv", [source, f"w{i}", f"b{i}"], [f"c{i}"], pads=pads, group=layer.groups),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"]),
        ]
    shapes: list[list[Any]] = [["batch", channels, size, size] for channels in (layers[0].inputs, layers[-1].outputs)]
    given, result = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(("x", f"r{len(layers) - 1}"), shapes)
    )
    graph = helper.make_graph(nodes, "convolutions", [given], [result], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
