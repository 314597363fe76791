"""The report of a run: report.json, two pictures, a self-contained HTML page, and a table for the terminal.

The data are a plain dictionary (accuracies are shares in [0, 1], MACs are per image):

    original:  {macs: int, accuracy: float | None}
    subnets:   [{subnet: 1.., macs: int, budget: int, accuracy: float | None,
                 accuracy_before_retraining: float | None}, ...]
    layers:    [{name: str, units_per_level: [int, ...]}, ...], one entry per level 1..N, then the spare units
    early_exit: {rule: str, thresholds_from: str, points: [{threshold, macs (average), accuracy, subnets: shares of the
                 samples that stop there}, ...]} (optional)
    metrics:   {pictures: int, original: see `training.metrics.Metrics` or None, subnets: [Metrics, ...]} (optional)
    calibrated_exit: see `training.exits.judge_exit` (optional)
    contribution: see `files.headers.Contribution` (optional)
    warnings:  [str, ...], see `runs.judgement` (optional)
    recipe:    str, the resolved recipe as YAML (optional)
    title:     str (optional)

Whatever else they hold (history, machine, times) goes into report.json as it is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.tensorfile import write_bytes

from .page import html_page
from .pictures import draw_accuracy, draw_units, png
from .tables import calibrated_sentence, calibrated_table, exit_table, metrics_table, results_table

__all__ = ["calibrated_sentence", "calibrated_table", "draw_accuracy", "draw_units", "exit_table", "metrics_table",
           "results_table", "write_report"]  # fmt: skip


def write_report(folder: str | os.PathLike[str], data: Mapping[str, Any]) -> Path:
    """Write report.json, accuracy_vs_macs.png, units_per_layer.png and index.html; returns the page's path.

    Every file appears whole or not at all: it is written beside its place and then renamed.

    Raises:
        SteppingError: data incomplete, or the folder cannot be written.
    """
    plain = _plain(data)
    _check(plain)
    folder = Path(folder)
    pictures = {
        "accuracy_vs_macs.png": png(draw_accuracy(plain)),
        "units_per_layer.png": png(draw_units(plain)),
    }
    page = html_page(plain, pictures)
    contents = {
        "report.json": json.dumps(plain, indent=2, allow_nan=False).encode() + b"\n",
        **pictures,
        "index.html": page.encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_bytes(folder / name, content)
    except OSError as error:
        raise SteppingError(f"the report cannot be written to {folder}: {error.strerror or error}") from error
    return folder / "index.html"


def _plain(value: Any) -> Any:
    """Tensors, numpy scalars, paths and tuples as JSON knows them; NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # tensors and numpy
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _check(data: Mapping[str, Any]) -> None:
    missing = [key for key in ("original", "subnets", "layers") if not data.get(key)]
    if missing:
        raise SteppingError(explain("report data are incomplete", got=f"no {', '.join(missing)}"))
    accuracies = [row.get("accuracy") for row in (data["original"], *data["subnets"])]
    beyond = [value for value in accuracies if value is not None and not 0 <= value <= 1]
    if beyond:
        raise SteppingError(explain("bad accuracy in report data", got=beyond[0], expected="a share in [0, 1]"))
