"""Step programs as files of torch's own runtimes: one archive that holds them all.

`programs.pt2` (torch.export) and `kernels.pt2` (AOTInductor: compiled code, run from Python or C++ without tracing)
are PT2 archives, `programs.pte` (ExecuTorch) is a program with one method per step. Entries are step1, step2, ...
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import SteppingError

__all__ = [
    "check_compiler", "check_executorch", "load_aoti", "load_torch", "write_aoti", "write_executorch", "write_torch",
]  # fmt: skip

Captured = Mapping[str, torch.export.ExportedProgram]


def write_torch(captured: Captured, path: Path) -> None:
    """One archive with all programs; `load_torch` reads it."""
    package, _ = _archives()
    for program in captured.values():
        program.example_inputs = None  # type: ignore[assignment]  # they would be saved as a pickle; nobody reads them
    package(path, exported_programs=dict(captured))


def _archives() -> tuple[Any, Any]:
    """Writer and reader of PT2 archives with several programs, which torch has had under two names."""
    try:
        from torch.export.pt2_archive._package import load_pt2, package_pt2
    except ImportError:
        raise SteppingError(
            f"export: torch {torch.__version__} cannot keep several programs in one .pt2 file. Install torch 2.8 or "
            "newer, or use format='onnx'."
        ) from None
    return package_pt2, load_pt2


def load_torch(path: Path) -> dict[str, torch.export.ExportedProgram]:
    """The programs of a file that `write_torch` wrote, by name."""
    _, load = _archives()
    return dict(load(path).exported_programs)


def load_aoti(path: Path) -> dict[str, Any]:
    """The compiled programs of a file that `write_aoti` wrote, by name."""
    _, load = _archives()
    return dict(load(path).aoti_runners)


def check_compiler() -> None:
    """Raise a SteppingError where AOTInductor would find no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        found = shutil.which(get_cpp_compiler())
    except InvalidCxxCompiler:
        found = None
    if found is None:
        raise SteppingError(
            "export: the format aoti needs a C++ compiler, and there is none. Install g++ (or set CXX), or use "
            "format='torch', which torch.compile can compile where it runs."
        )


def write_aoti(captured: Captured, path: Path) -> None:
    """One archive with all programs compiled for this kind of machine."""
    package, _ = _archives()
    options = {"aot_inductor.package": True}
    files = {}
    for name, program in captured.items():
        try:
            files[name] = torch._inductor.aot_compile(
                program.module(check_guards=False), *program.example_inputs, options=options
            )
        except Exception as error:  # compilers have no common class of errors
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise SteppingError(f"export: {name} cannot be compiled: {reason}") from error
    package(path, aoti_files=files)


def check_executorch() -> None:
    """Raise a SteppingError where executorch is not installed."""
    if importlib.util.find_spec("executorch") is None:
        raise SteppingError(
            'export: the format executorch needs executorch. Run: pip install "stepping-plugin[executorch]"'
        )


def write_executorch(captured: Captured, path: Path) -> None:
    """One program with a method per step, convolutions and products by XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    try:
        lowered = to_edge_transform_and_lower(
            dict(captured), partitioner={name: [XnnpackPartitioner()] for name in captured}
        )
        content = lowered.to_executorch().buffer
    except Exception as error:  # neither
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SteppingError(f"export: the steps have no ExecuTorch form: {reason}") from error
    path.write_bytes(content)
