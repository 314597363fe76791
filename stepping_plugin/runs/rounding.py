"""`round_to: auto` of a run: measured once, by the main process, and kept in the run's folder.

A run that was killed goes on with what it began with, also if another machine would like another multiple.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from ..construction.calibration import calibrate
from ..construction.config import ConstructionConfig
from ..errors import CheckpointError, SteppingError, explain
from ..tensorfile import write_bytes

__all__ = ["FILE", "with_fixed_rounding"]

FILE = "construction/round_to.json"


def with_fixed_rounding(
    config: ConstructionConfig, device: torch.device, folder: Path, keep: bool, main: bool
) -> ConstructionConfig:
    """A construction's settings with a number in `round_to`, the same in all processes.

    Args:
        config: of the recipe.
        device: that torch is measured on.
        folder: of the run; where an earlier part of it measured, that counts.
        keep: write what was measured there.
        main: whether this process measures.

    Raises:
        CheckpointError: the file in the folder is damaged.
        SteppingError: onnxruntime is to be measured and is not installed.
    """
    if isinstance(config.round_to, int):
        return config
    found = [None]
    if main:
        found = [_kept(folder / FILE) or _measured(config, device, folder if keep else None)]  # type: ignore[list-item]
    (multiple,) = broadcast_object_list(found)
    return dataclasses.replace(config, round_to=multiple)


def _kept(path: Path) -> int | None:
    if not path.is_file():
        return None
    try:
        multiple = json.loads(path.read_text(encoding="utf-8"))["round_to"]
        if not isinstance(multiple, int):
            raise TypeError(f"round_to is {multiple!r}")
        ConstructionConfig(round_to=multiple)
    except (OSError, ValueError, KeyError, TypeError, SteppingError) as error:
        text = f"damaged measurement of round_to: auto ({type(error).__name__}: {error})"
        raise CheckpointError(explain(text, where=str(path), action="Delete it to measure anew.")) from None
    return int(multiple)


def _measured(config: ConstructionConfig, device: torch.device, folder: Path | None) -> int:
    found = calibrate(config.latency, str(device), torch.get_num_threads())
    if folder is not None:
        times = {str(candidate): round(value, 3) for candidate, value in found.times.items()}
        content = {"round_to": found.multiple, "runtime": config.latency, "device": str(device), "time_per_mac": times}
        (folder / FILE).parent.mkdir(exist_ok=True)
        write_bytes(folder / FILE, json.dumps(content, indent=1).encode())
    return found.multiple
