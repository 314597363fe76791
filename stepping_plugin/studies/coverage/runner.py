"""Runs the checks, each model in a process of its own with limits, and keeps the results so that a run can go on."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...console.progress import track
from ...errors import SteppingError
from .specs import Spec

__all__ = ["check_in_process", "read_results", "run_coverage", "write_results"]


def run_coverage(
    specs: Iterable[Spec],
    output: str | Path,
    *,
    jobs: int = 1,
    seconds: float = 600.0,
    gib: float = 12.0,
    again: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Check models and write `output` (a list of rows, sorted by module and model) after every one.

    Args:
        specs: models; those that `output` has a row of are left out.
        output: JSON file, made or continued.
        jobs: models at a time.
        seconds, gib: limits of each model's process.
        again: check models again whose row is not "ok".
        say: called with a line of text per model.

    Raises:
        SteppingError: `output` is not a file of results.
    """
    output = Path(output)
    rows = {row["model"]: row for row in read_results(output)} if output.exists() else {}
    done = {name for name, row in rows.items() if not (again and row["status"] != "ok")}
    wanted = {spec.model: spec for spec in specs}
    pending = [spec for name, spec in wanted.items() if name not in done]
    if len(pending) < len(wanted):
        say(f"{len(wanted) - len(pending)} of {len(wanted)} models are in {output} already")
    checked = track(_checked(pending, jobs, seconds, gib), "coverage", len(pending))
    for count, row in enumerate(checked, start=1):
        rows[row["model"]] = row
        write_results(output, rows.values())
        pinned = f", {row['pinned_share']:.1%} pinned" if "pinned_share" in row else ""
        say(f"[{count}/{len(pending)}] {row['model']}: {row['status']} ({row['wall_seconds']:.0f} s{pinned})")
    return list(rows.values())


def _checked(specs: list[Spec], jobs: int, seconds: float, gib: float) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        waiting = {pool.submit(check_in_process, spec, seconds, gib) for spec in specs}
        try:
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            for future in waiting:
                future.cancel()


def check_in_process(spec: Spec, seconds: float, gib: float) -> dict[str, Any]:
    """Row of one model. A process that ends early leaves the figures of the stages before."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            _command(spec), stdout=out, stderr=errors, env=environment, preexec_fn=lambda: _prepare(gib)
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        out.seek(0)
        errors.seek(0)
        row = _last_row(out.read()) or {"model": spec.model, "module": spec.module, "image": spec.image}
        if "stage" in row or "status" not in row:
            where = row.pop("stage", "build")
            row["status"] = f"{where}: {_ending(code, seconds, gib, errors.read())}"
    row["wall_seconds"] = round(time.perf_counter() - start, 1)
    return row


def _command(spec: Spec) -> list[str]:
    return [sys.executable, "-m", "stepping_plugin.studies.coverage", json.dumps(asdict(spec))]


_PR_SET_PDEATHSIG = 1


def _prepare(gib: float) -> None:
    """In the new process: a limit of memory, and on Linux an end together with the process that started it."""
    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _ending(code: int | None, seconds: float, gib: float, errors: str) -> str:
    """Why a process ended before its last row."""
    if code is None:
        return f"not finished after {seconds:.0f} s"
    lines = errors.strip().splitlines()
    if code == -signal.SIGKILL or any("MemoryError" in line or "can't allocate memory" in line for line in lines[-3:]):
        return f"more than {gib:g} GiB of memory"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return (lines[-1] if lines else f"exit status {code}")[:300]


def _last_row(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return None


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a results file.

    Raises:
        SteppingError: no such file, or not a list of rows.
    """
    try:
        rows = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise SteppingError(f"{path}: cannot be read as coverage results ({error}).") from error
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "model" in r and "status" in r for r in rows):
        raise SteppingError(f"{path}: not a file of coverage results. Give another --output.")
    return rows


def write_results(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows in one go: a run that is killed leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(rows, key=lambda row: (row["module"], row["model"]))
    text = "[\n" + ",\n".join(json.dumps(row, sort_keys=True) for row in ordered) + "\n]\n"
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
