"""Steps in onnxruntime, beside the dense original there: what an exported net costs where it is deployed."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from ...engine.engine import compile_engine
from ...engine.export import export_engine
from ...integrations.ort import opened, require_onnxruntime
from ...net import SteppingNet

__all__ = ["bench_nets_in_onnxruntime"]

Run = Callable[[], Any]


def bench_nets_in_onnxruntime(
    nets: Mapping[str, SteppingNet],
    dense: nn.Module,
    batch_sizes: Sequence[int] = (1, 8),
    *,
    turns: int = 15,
    threads: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, dict[str, dict[str, Any]]]:
    """Time the steps of nets of one original; all of them take turns.

    Args:
        nets: in eval mode.
        dense: the original in eval mode, same image size.
        batch_sizes: images per batch.
        turns: times that everything runs; the median counts.
        threads: of every session.
        clock: seconds; with one thread, `time.process_time` leaves out what other processes take.

    Returns:
        Per batch size and net, milliseconds: `dense`, `steps`, `total` (sum of the steps), and `ratio` = total / dense.

    Raises:
        SteppingError: onnx or onnxruntime is missing, or a step has no ONNX form.
    """
    require_onnxruntime("bench: onnxruntime")
    size = next(iter(nets.values())).analysis.image_size
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / str(number) for number, name in enumerate(nets)}
        for name, net in nets.items():
            export_engine(compile_engine(net), folders[name], format="onnx")
        original = Path(place) / "dense.onnx"
        _export_dense(dense, size, original)
        for batch in batch_sizes:
            image = np.random.default_rng(0).standard_normal((batch, *size)).astype(np.float32)
            runners = {name: _step_runners(folder, image, threads) for name, folder in folders.items()}
            runners["dense"] = [partial(opened(original, threads).run, None, {"image": image})]
            found[batch] = _beside_dense(_interleaved(runners, turns, clock))
    return found


def _export_dense(dense: nn.Module, size: tuple[int, ...], path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        dense, (torch.zeros(3, *size),), str(path), input_names=["image"], dynamic_shapes=({0: batch},),
        dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip


def _step_runners(folder: Path, image: np.ndarray, threads: int) -> list[Run]:
    """Functions that run one step each, on the caches that the steps before leave for the images."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    caches: dict[str, Any] = {"image": image}
    runners: list[Run] = []
    for step in manifest["steps"]:
        session = opened(folder / step["file"], threads)
        given = {entry["name"]: caches[entry["cache"]] for entry in step["inputs"]}
        results = session.run([entry["name"] for entry in step["outputs"]], given)
        caches.update({entry["cache"]: value for entry, value in zip(step["outputs"], results)})
        runners.append(partial(session.run, None, given))
    return runners


def _interleaved(
    runners: Mapping[str, Sequence[Run]], turns: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Median milliseconds of every function; two turns warm up."""
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(turns + 2):
        for name, group in runners.items():
            for number, run in enumerate(group):
                began = clock()
                run()
                if turn >= 2:
                    times.setdefault((name, number), []).append(clock() - began)
    return {name: [1e3 * median(times[name, k]) for k in range(len(group))] for name, group in runners.items()}


def _beside_dense(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    whole = times.pop("dense")[0]
    return {
        name: {"dense": whole, "steps": steps, "total": sum(steps), "ratio": sum(steps) / whole}
        for name, steps in times.items()
    }
