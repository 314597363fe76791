"""Step programs as files of other runtimes, caches as named inputs and outputs.

Step programs have no side effects and consist of ATen operators, so that they are exported as they are; what
`engine.fuse` makes of them for running is not. `manifest.json` beside the files says what goes where.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..console.progress import track
from ..errors import SteppingError, explain, nearest
from .emit import IMAGE, StepProgram, output_names
from .int8_files import check_pictures, quantise
from .onnx_files import NEW, require_onnx, share_weights, write_onnx
from .plan import BatchAxis
from .program_set import ProgramSet
from .torch_files import check_compiler, check_executorch, write_aoti, write_executorch, write_torch

__all__ = ["FORMATS", "export_engine"]

# Formats of one file with all steps: what writes it, its name, and what has to be there.
_ARCHIVES: dict[str, tuple[Callable[..., None], str, Callable[[], None]]] = {
    "torch": (write_torch, "programs.pt2", lambda: None),
    "aoti": (write_aoti, "kernels.pt2", check_compiler),
    "executorch": (write_executorch, "programs.pte", check_executorch),
}
FORMATS = ("torch", "onnx", "aoti", "executorch")
WEIGHTS = "weights.bin"
RUNNER = "run.py"
_TRACED_BATCH = 3  # 0 and 1 are special to the tracer; no axis that is not the batch should be taken for it


def export_engine(
    engine: ProgramSet,
    folder: str | os.PathLike[str],
    format: str = "torch",
    batch_size: int | None = None,
    *,
    external_data: bool = False,
    calibration: Tensor | None = None,
) -> dict[str, Any]:
    """Write all steps and `manifest.json`, which is written last.

    Args:
        engine: deployed or loaded.
        folder: made if it does not exist; files of an earlier export are replaced.
        format: "torch" (one .pt2 file with N programs), "aoti" (the same, compiled by AOTInductor for this kind of
            machine), "executorch" (one .pte file with N methods) or "onnx" (step1.onnx, ...).
        batch_size: images per batch; if left out, any number where the exporter manages that, otherwise 1,
            and the manifest's notes say so. ExecuTorch plans its memory ahead: 1 if left out.
        external_data: of ONNX: put the weights of all steps into one file, weights.bin, instead of each step's own.
        calibration: of ONNX: some hundred pictures (B, C, H, W) in float32, as the net is used with; weights and values
            become int8 (`int8_files`), and the manifest says so. Scores are no longer the engine's to the last digit:
            measure the accuracy.

    Returns:
        The manifest: format, image_size, dtype, subnets, macs (cumulative, per sample), batch ("dynamic" or a
        number), notes, weights (with `external_data`: the file), outputs (what the model calls the caches that hold its
        results; "scores" alone has the empty name) and per step: subnet, file, program (its name in a file of several),
        macs, inputs and outputs in order (cache, shape, dtype and, for ONNX, name; `outer` where an axis holds k *
        batch rows: sample b has the rows (o * batch + b) * inner + i, o < outer) and the caches to drop afterwards.
        "image" is the batch of images, "scores" the class scores; pass every other cache on as it is.
        Further, where the net knows them (else null), classes (names), preprocessing, exit and provenance, see
        `files.metadata`. Beside ONNX files of class scores, run.py carries all that out with onnxruntime, numpy and
        Pillow alone.

    Raises:
        SteppingError: unknown format, packages or a compiler missing, or a step that the format cannot express.
    """
    _check(format, batch_size, external_data or calibration is not None)
    if calibration is not None:
        check_pictures(calibration, engine.image_size, batch_size)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    if format == "executorch":
        batch_size = batch_size or 1
    exported, examples, batch_size, notes = _captured(engine, batch_size)
    convert = [] if calibration is None else [lambda paths: quantise(paths, engine.programs, calibration, batch_size)]
    files = _write(folder, format, engine.programs, exported, external_data, convert)
    describe = _Describer(engine.cache_axes, batch_size, format == "onnx")
    steps = [
        {
            "subnet": program.level,
            **place,
            "macs": program.macs,
            "inputs": [describe(cache, given, "") for cache in program.inputs],
            "outputs": [describe(cache, given, NEW) for cache in program.outputs],
            "drop": list(program.released),
        }
        for program, place, given in zip(engine.programs, files, examples, strict=True)
    ]
    manifest = {
        "format": f"stepping-plugin {format} export",
        "version": 1,
        "image_size": list(engine.image_size),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "subnets": engine.num_subnets,
        "macs": list(engine.macs),
        "batch": "dynamic" if batch_size is None else batch_size,
        "notes": notes,
        **({"weights": WEIGHTS} if external_data else {}),
        **({"quantised": "int8"} if calibration is not None else {}),
        "outputs": dict(zip(output_names(engine.structure.count), engine.structure.names())),
        "steps": steps,
        "versions": {"torch": torch.__version__},
        **engine.metadata.model_dump(),
    }
    if format == "onnx" and engine.structure.is_tensor:
        source = Path(__file__).with_name("standalone.py").read_text(encoding="utf-8")
        _atomically(folder / RUNNER, lambda path: path.write_text(source, encoding="utf-8"))
    text = json.dumps(manifest, indent=2) + "\n"
    _atomically(folder / "manifest.json", lambda path: path.write_text(text, encoding="utf-8"))
    return manifest


def _check(format: str, batch_size: int | None, of_onnx: bool) -> None:
    if format not in FORMATS:
        raise SteppingError(explain("unknown format", where="export", got=format, action=nearest(format, FORMATS)))
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise SteppingError(
            explain("bad batch size", where="export", got=batch_size, expected="a positive integer, or None")
        )
    if of_onnx and format != "onnx":
        raise SteppingError(f"export: external_data and calibration are for format='onnx', not for {format!r}.")
    if format == "onnx":
        require_onnx()
    else:
        _ARCHIVES[format][2]()


def _captured(
    engine: ProgramSet, batch_size: int | None
) -> tuple[list[torch.export.ExportedProgram], list[dict[str, Tensor]], int | None, list[str]]:
    """Steps through `torch.export`, caches around each, batch size (None: open), and a note if it had to be fixed."""
    exported, examples = _exported(engine, batch_size or _TRACED_BATCH, dynamic=batch_size is None)
    if exported is not None:
        return exported, examples, batch_size, []
    exported, examples = _exported(engine, 1, dynamic=False)
    assert exported is not None
    note = "The batch size is fixed at 1: torch.export could not keep it open for this model."
    return exported, examples, 1, [note]


def _write(
    folder: Path,
    format: str,
    programs: Sequence[StepProgram],
    exported: Sequence[torch.export.ExportedProgram],
    external_data: bool,
    convert: Sequence[Callable[[list[Path]], None]],
) -> list[dict[str, str]]:
    """Write the files; where every step is."""
    named = {f"step{program.level}": captured for program, captured in zip(programs, exported, strict=True)}
    if format != "onnx":
        write, name, _ = _ARCHIVES[format]
        _atomically(folder / name, lambda path: write(named, path))
        return [{"file": name, "program": step} for step in named]
    files = [folder / f"{step}.onnx" for step in named]
    partial = [_partial(path) for path in files]
    try:
        listed = list(zip(exported, programs, partial, strict=True))
        for captured, program, path in track(listed, "writing ONNX files"):
            write_onnx(captured, program, path)
        for change in convert:
            change(partial)
        if external_data:
            _atomically(folder / WEIGHTS, lambda path: share_weights(partial, path, WEIGHTS))
        for path, final in zip(partial, files, strict=True):
            os.replace(path, final)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    return [{"file": path.name} for path in files]


def _partial(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}.partial.{path.name}")


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    partial = _partial(path)
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class _Describer:
    """Entries of the manifest: one cache with its shape, in which the batch is a word or a number."""

    def __init__(self, axes: Mapping[str, BatchAxis | None], batch_size: int | None, named: bool) -> None:
        self.axes, self.batch_size, self.named = axes, batch_size, named

    def __call__(self, cache: str, caches: Mapping[str, Tensor], ending: str) -> dict[str, Any]:
        tensor, place = caches[cache], self.axes[cache]
        shape: list[int | str] = list(tensor.shape)
        entry: dict[str, Any] = {"name": cache + ending} if self.named else {}
        entry.update(cache=cache, shape=shape, dtype=str(tensor.dtype).removeprefix("torch."))
        if place is not None:
            each = tensor.shape[place.axis] // (self.batch_size or _TRACED_BATCH)
            entry["axis"] = place.axis
            if each > 1:
                entry["outer"] = place.outer
            if self.batch_size is None:
                shape[place.axis] = "batch" if each == 1 else f"{each}*batch"
        return entry


# ------------------------------------------------------------------------------------------------- exporting


def _exported(
    engine: ProgramSet, batch_size: int, dynamic: bool
) -> tuple[list[torch.export.ExportedProgram] | None, list[dict[str, Tensor]]]:
    """All steps through `torch.export`, and the caches before and after each; None if the batch cannot stay open."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, *engine.image_size, generator=generator).to(engine.device, engine.dtype)
    caches, exported, examples = {IMAGE: images}, [], []
    batch = torch.export.Dim("batch", min=1) if dynamic else None
    for program in track(engine.programs, "torch.export of the steps"):
        given = tuple(caches[name] for name in program.inputs)
        shapes = tuple(_open_axes(c, engine.cache_axes[n], batch, batch_size) for n, c in zip(program.inputs, given))
        try:
            with torch.no_grad():
                exported.append(torch.export.export(program.module, given, dynamic_shapes=shapes, strict=False))
                results = program.module(*given)
        except Exception as error:  # the exporter has no common class of errors
            if dynamic:
                return None, []
            raise SteppingError(f"export: step {program.level} cannot be exported: {_first_line(error)}") from error
        after = {**caches, **dict(zip(program.outputs, results, strict=True))}
        examples.append({**caches, **{n: t for n, t in after.items() if n not in caches or n in program.outputs}})
        caches = {name: t for name, t in after.items() if name not in program.released}
    return exported, examples


def _open_axes(cache: Tensor, place: BatchAxis | None, batch: Any, batch_size: int) -> dict[int, Any] | None:
    """Which axis of an input follows the batch; some hold several rows per image."""
    if batch is None or place is None:
        return None
    each = cache.shape[place.axis] // batch_size
    return {place.axis: batch if each == 1 else each * batch}


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
