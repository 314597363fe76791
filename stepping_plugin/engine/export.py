"""Step programs as files of other runtimes: `torch.export` programs or ONNX, caches as named inputs and outputs.

Step programs have no side effects and consist of ATen operators, so that they are exported as they are; what
`engine.fuse` makes of them for running is not. `manifest.json` beside the files says what goes where.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..console.progress import track
from ..errors import SteppingError, explain, nearest
from .emit import IMAGE, StepProgram
from .plan import BatchAxis
from .program_set import ProgramSet

__all__ = ["export_engine"]

SUFFIXES = {"torch": "pt2", "onnx": "onnx"}
PACKAGES = ("onnx", "onnxscript")
NEW = ".new"  # ends the name of an ONNX output: inputs and outputs may not share names
_TRACED_BATCH = 3  # 0 and 1 are special to the tracer; no axis that is not the batch should be taken for it


def export_engine(
    engine: ProgramSet, folder: str | os.PathLike[str], format: str = "torch", batch_size: int | None = None
) -> dict[str, Any]:
    """Write one file per step and `manifest.json`, which is written last.

    Args:
        engine: deployed or loaded.
        folder: made if it does not exist; files of an earlier export are replaced.
        format: "torch" (`torch.export.load` reads step1.pt2, ...) or "onnx" (step1.onnx, ...).
        batch_size: images per batch; if left out, any number where the exporter manages that, otherwise 1,
            and the manifest's notes say so.

    Returns:
        The manifest: format, image_size, dtype, subnets, macs (cumulative, per sample), batch ("dynamic" or a
        number), notes, and per step: subnet, file, macs, inputs and outputs in order (cache, shape, dtype and,
        for ONNX, name) and the caches to drop afterwards. "image" is the batch of images, "scores" the class
        scores; pass every other cache on as it is.

    Raises:
        SteppingError: unknown format, packages missing, or a step that the format cannot express.
    """
    if format not in SUFFIXES:
        raise SteppingError(explain("unknown format", where="export", got=format, action=nearest(format, SUFFIXES)))
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise SteppingError(
            explain("bad batch size", where="export", got=batch_size, expected="a positive integer, or None")
        )
    if format == "onnx":
        _require_onnx()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    programs, notes = engine.programs, []
    exported, examples = _exported(engine, programs, batch_size or _TRACED_BATCH, dynamic=batch_size is None)
    if exported is None:
        notes.append("The batch size is fixed at 1: torch.export could not keep it open for this model.")
        batch_size = 1
        exported, examples = _exported(engine, programs, 1, dynamic=False)
    assert exported is not None
    write = _write_torch if format == "torch" else _write_onnx
    steps = []
    for program, captured, given in track(
        list(zip(programs, exported, examples, strict=True)), f"writing {format} files"
    ):
        name = f"step{program.level}.{SUFFIXES[format]}"
        _atomically(folder / name, lambda path, c=captured, p=program: write(c, p, path))  # type: ignore[misc]
        describe = _Describer(engine.cache_axes, given, batch_size)
        steps.append(
            {
                "subnet": program.level,
                "file": name,
                "macs": program.macs,
                "inputs": [describe(c, c if format == "onnx" else None) for c in program.inputs],
                "outputs": [describe(c, c + NEW if format == "onnx" else None) for c in program.outputs],
                "drop": list(program.released),
            }
        )
    manifest = {
        "format": f"stepping-plugin {format} export",
        "version": 1,
        "image_size": list(engine.image_size),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "subnets": engine.num_subnets,
        "macs": list(engine.macs),
        "batch": "dynamic" if batch_size is None else batch_size,
        "notes": notes,
        "steps": steps,
        "versions": {"torch": torch.__version__},
    }
    text = json.dumps(manifest, indent=2) + "\n"
    _atomically(folder / "manifest.json", lambda path: path.write_text(text, encoding="utf-8"))
    return manifest


def _require_onnx() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SteppingError(
            f"export: the ONNX format needs {' and '.join(missing)}. Run: pip install onnx onnxscript onnxruntime"
        )


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class _Describer:
    """Entries of the manifest: one cache with its shape, in which the batch is a word or a number."""

    def __init__(
        self, axes: Mapping[str, BatchAxis | None], caches: Mapping[str, Tensor], batch_size: int | None
    ) -> None:
        self.axes, self.caches, self.batch_size = axes, caches, batch_size

    def __call__(self, cache: str, name: str | None) -> dict[str, Any]:
        tensor, place = self.caches[cache], self.axes[cache]
        shape: list[int | str] = list(tensor.shape)
        if place is not None and self.batch_size is None:
            axis = place.axis
            each = tensor.shape[axis] // _TRACED_BATCH
            shape[axis] = "batch" if each == 1 else f"{each}*batch"
        entry = {"cache": cache, "shape": shape, "dtype": str(tensor.dtype).removeprefix("torch.")}
        return entry if name is None else {"name": name, **entry}


# ------------------------------------------------------------------------------------------------- exporting


def _exported(
    engine: ProgramSet, programs: Sequence[StepProgram], batch_size: int, dynamic: bool
) -> tuple[list[torch.export.ExportedProgram] | None, list[dict[str, Tensor]]]:
    """All steps through `torch.export`, and the caches before and after each; None if the batch cannot stay open."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, *engine.image_size, generator=generator).to(engine.device, engine.dtype)
    caches, exported, examples = {IMAGE: images}, [], []
    batch = torch.export.Dim("batch", min=1) if dynamic else None
    for program in track(programs, "torch.export of the steps"):
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


def _write_torch(captured: torch.export.ExportedProgram, program: StepProgram, path: Path) -> None:
    captured.example_inputs = None  # type: ignore[assignment]  # they would be saved as a pickle; nobody reads them
    torch.export.save(captured, path)


def _write_onnx(captured: torch.export.ExportedProgram, program: StepProgram, path: Path) -> None:
    try:
        torch.onnx.export(
            captured,
            (),
            str(path),
            input_names=list(program.inputs),
            output_names=[name + NEW for name in program.outputs],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # the exporter has no common class of errors
        reason = _first_line(error)
        raise SteppingError(f"export: step {program.level} has no ONNX form: {reason}. Use format='torch'.") from error
