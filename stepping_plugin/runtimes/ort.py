"""Stepping an ONNX export (`stepping export RUN --format onnx`) with onnxruntime and numpy, without torch.

    from stepping_plugin.runtimes.ort import SteppingModel

    model = SteppingModel("export-onnx")
    session = model.start(images)  # subnet 1 has answered: session.logits
    session.step()  # subnet 2, for the price of the difference
    model.predict(images, until={"max_prob": 0.9}, deadline=0.02)

The same manifest, the same rules and the same names as those of `runtimes/stepping.mjs` for onnxruntime-web, and as the
engine's (`net.deploy()`).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..errors import SteppingError, explain, image_shape_error, nearest
from .clock import StepClock

__all__ = ["Prediction", "SteppingModel", "SteppingSession"]

Array = NDArray[Any]
Rule = Callable[[Array], NDArray[np.bool_]]


@dataclass
class Prediction:
    """Answer of `SteppingModel.predict`.

    Attributes:
        logits: class scores (B, classes) of the largest subnet that ran for each sample.
        subnet: (B,), that subnet.
        macs: (B,), MACs executed for each sample.
        seconds: wall-clock time of the call.
        in_time: whether a deadline, if there was one, was met.
    """

    logits: Array
    subnet: Array
    macs: Array
    seconds: float
    in_time: bool


class SteppingModel:
    """The steps of an export, ready to run. Any number of sessions, in any threads, share it.

    Args:
        folder: with manifest.json and the files it names.
        providers: of onnxruntime, the best first. Caches stay on their device.
        options: `onnxruntime.SessionOptions`, for example with `intra_op_num_threads` set.

    Raises:
        SteppingError: there is no manifest of an ONNX export.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: onnxruntime.SessionOptions | None = None,
    ) -> None:
        self.manifest = _manifest(Path(folder))
        self.image_size = tuple(self.manifest["image_size"])
        self.macs: list[int] = self.manifest["macs"]
        self.steps: list[dict[str, Any]] = self.manifest["steps"]
        self.clock = StepClock([step["macs"] for step in self.steps])
        self._sessions = [
            onnxruntime.InferenceSession(Path(folder, step["file"]), options, providers=list(providers))
            for step in self.steps
        ]
        # Binding keeps caches on another device; on the CPU it was no faster (8.2 against 9.2 ms for four steps of an
        # EfficientNet-Lite0 at batch 1, 55.5 against 55.3 at batch 8).
        self._device = "cpu" if self._sessions[0].get_providers() == ["CPUExecutionProvider"] else "cuda"
        self._bind = self._device != "cpu"

    @property
    def num_subnets(self) -> int:
        """N."""
        return len(self.steps)

    def start(self, images: Array) -> SteppingSession:
        """Run subnet 1 on images (B, C, H, W); larger subnets follow with `session.step()`."""
        if images.ndim != 4 or images.shape[1:] != self.image_size or not len(images):
            raise image_shape_error(images.shape, self.image_size)
        if images.dtype != self.manifest["dtype"] or self.manifest["batch"] not in ("dynamic", len(images)):
            expected = f"{self.manifest['dtype']}, batch size {self.manifest['batch']}"
            raise SteppingError(explain("wrong images", got=f"{len(images)} in {images.dtype}", expected=expected))
        return SteppingSession(self, images)

    def predict(
        self, images: Array, until: Mapping[str, float] | Rule | None = None, deadline: float | None = None
    ) -> Prediction:
        """Step up until a rule on the scores says stop, for each sample on its own, or until time runs out.

        Args:
            images: (B, C, H, W).
            until: `{"max_prob": t}`, `{"margin": t}` or `{"entropy": t}`, any of several; or a function from scores
                (B, classes) to booleans (B,), True = stop. Without it all samples step to the last subnet.
            deadline: seconds from now. Subnet 1 always runs; see `clock.StepClock` for the others.
        """
        began, rule, limit = time.perf_counter(), _rule(until), math.inf if deadline is None else deadline
        session = self.start(images)
        logits, subnet, active = session.logits.copy(), np.ones(len(images), int), np.arange(len(images))
        while session.subnet < self.num_subnets:
            going = ~rule(session.logits)
            if not going.any():
                break
            if not going.all():
                session.keep(going)
                active = active[going]
            left = limit - (time.perf_counter() - began)
            if not self.clock.allows(session.subnet + 1, len(active), left, session.subnet):
                break
            logits[active] = session.step()
            subnet[active] = session.subnet
        seconds = time.perf_counter() - began
        return Prediction(logits, subnet, np.array([0, *self.macs])[subnet], seconds, seconds <= limit)

    def run_step(self, level: int, caches: dict[str, Any]) -> Array:
        """Run step `level` on caches, bring them up to date and return the class scores (B, classes)."""
        step, session = self.steps[level - 1], self._sessions[level - 1]
        began = time.perf_counter()
        if not self._bind:
            names = [entry["name"] for entry in step["outputs"]]
            results = session.run(names, {entry["name"]: caches[entry["cache"]] for entry in step["inputs"]})
        else:  # only scores leave the device
            binding = session.io_binding()
            for entry in step["inputs"]:
                binding.bind_ortvalue_input(entry["name"], _on_device(caches[entry["cache"]], self._device))
            for entry in step["outputs"]:
                binding.bind_output(entry["name"], "cpu" if entry["cache"] == "scores" else self._device)
            session.run_with_iobinding(binding)
            results = binding.get_outputs()
        caches.update(zip((entry["cache"] for entry in step["outputs"]), results))
        for name in step["drop"]:
            del caches[name]
        scores = _numpy(caches["scores"])
        self.clock.record(level, len(scores), time.perf_counter() - began)
        return scores


class SteppingSession:
    """What one batch of images has computed so far. Made by `SteppingModel.start`, which runs subnet 1.

    Attributes:
        subnet: number of the largest subnet that has run, 1..N.
        logits: class scores (B, classes) of that subnet.
    """

    def __init__(self, model: SteppingModel, images: Array) -> None:
        self._model, self._caches, self.subnet = model, {"image": images}, 0
        self._places = {e["cache"]: e for step in model.steps for e in (*step["inputs"], *step["outputs"])}
        self.step()

    @property
    def macs(self) -> int:
        """MACs executed so far, per sample that is still in the session."""
        return self._model.macs[self.subnet - 1]

    def step(self) -> Array:
        """Run the next subnet's new units and return its class scores (B, classes)."""
        if self.subnet == self._model.num_subnets:
            raise SteppingError(f"Subnet {self.subnet} of {self._model.num_subnets} has run; there is no larger one.")
        self.logits = self._model.run_step(self.subnet + 1, self._caches)
        self.subnet += 1
        return self.logits

    def keep(self, mask: Array) -> None:
        """Go on with the samples of a mask (B,), True = stays; what is held for the others is dropped."""
        kept, size = np.flatnonzero(mask), len(self.logits)
        if len(mask) != size or not len(kept):
            raise SteppingError(explain("wrong mask", where="keep", got=mask, expected=f"{size} booleans, one True"))
        for name, cache in self._caches.items():
            place = self._places[name]
            if "axis" in place:
                self._caches[name] = _rows(_numpy(cache), place["axis"], place.get("outer", 1), size, kept)
        self.logits = self.logits[kept]


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SteppingError(f"{path}: no manifest of an export ({error}).") from None
    if manifest.get("format") != "stepping-plugin onnx export" or manifest.get("version") != 1:
        got = f"{manifest.get('format')}, version {manifest.get('version')}"
        raise SteppingError(
            explain("not an ONNX export", where=str(path), got=got, action="Export with format='onnx'.")
        )
    if manifest.get("outputs", {"scores": ""}) != {"scores": ""}:
        raise SteppingError(
            explain(
                "this runtime is for class scores",
                where=str(path),
                got=f"outputs {list(manifest['outputs'].values())}",
                action="Run the steps' files with onnxruntime as the manifest says.",
            )
        )
    return dict(manifest)


def _numpy(value: Any) -> Array:
    return value if isinstance(value, np.ndarray) else value.numpy()


def _on_device(value: Any, device: str) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0) if isinstance(value, np.ndarray) else value


def _rows(cache: Array, axis: int, outer: int, size: int, kept: Array) -> Array:
    """The kept samples of a cache: sample b has the rows (o * B + b) * inner + i of the axis, o < outer."""
    shape = cache.shape
    parts = cache.reshape(*shape[:axis], outer, size, -1, *shape[axis + 1 :])
    return np.take(parts, kept, axis + 1).reshape(*shape[:axis], -1, *shape[axis + 1 :])


# ------------------------------------------------------------------------------------------------- rules


def _log_softmax(scores: Array) -> Array:
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _measures(scores: Array) -> dict[str, Array]:
    logs = _log_softmax(scores)
    best = np.sort(np.exp(logs), -1)[:, ::-1]
    entropy = -(np.exp(logs) * np.where(np.isneginf(logs), 0, logs)).sum(-1)
    return {"max_prob": best[:, 0], "margin": best[:, 0] - best[:, 1:2].sum(-1), "entropy": -entropy}


def _rule(until: Mapping[str, float] | Rule | None) -> Rule:
    if callable(until):
        return until
    limits = dict(until or {})
    for name in limits:
        if name not in ("max_prob", "margin", "entropy"):
            names = ("max_prob", "margin", "entropy")
            raise SteppingError(explain(f"unknown rule {name!r}", where="until", action=nearest(name, names)))

    def rule(scores: Array) -> NDArray[np.bool_]:
        found, stop = _measures(scores) if limits else {}, np.zeros(len(scores), bool)
        for name, limit in limits.items():
            stop |= found[name] >= (-limit if name == "entropy" else limit)
        return stop

    return rule
