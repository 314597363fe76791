"""Weights of an original as a safetensors file: of a run, with checksums and settings they come from, or anybody's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, SteppingError
from ..tensorfile import is_signed, not_finite, read_tensors, write_tensors
from ..training.checkpoint import differences

__all__ = ["load_weights", "misfit", "read_weights", "save_weights"]

_FORMAT = "stepping-plugin weights 1"
_WHOLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_weights(model: nn.Module, path: Path, settings: Mapping[str, Any]) -> None:
    """Write the weights, with the settings that they come from."""
    texts = {"format": _FORMAT, "settings": json.dumps(settings, sort_keys=True)}
    write_tensors(path, model.state_dict(), texts, durable=True)


def load_weights(
    model: nn.Module,
    path: Path,
    settings: Mapping[str, Any] | None = None,
    completed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> None:
    """Put the weights of a file into a model.

    Args:
        model: as it was built when they were saved.
        path: a .safetensors file.
        settings: that they must come from; files of older versions do not tell.
        completed: brings the settings of a file to the keys of this version.

    Raises:
        SteppingError: no such file, or one that can hold code.
        CheckpointError: damaged, of other settings, or weights of another model; the model is as it was.
    """
    texts, tensors = read_weights(path)
    if texts.get("format") == _FORMAT:
        found = completed(json.loads(texts["settings"])) if settings is not None else {}
        if settings is not None and (changed := differences(found, dict(settings))):
            raise CheckpointError(f"{path} belongs to a run with other settings: {'; '.join(changed[:3])}.")
    problem = misfit(model.state_dict(), tensors)
    if problem:
        raise CheckpointError(f"{path}: not the weights of {type(model).__name__} as built here ({problem}).")
    model.load_state_dict(tensors)


def read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Texts and tensors of a .safetensors file.

    Raises:
        SteppingError: no such file, or one that can hold code.
        CheckpointError: damaged.
    """
    if not path.is_file():
        raise SteppingError(f"checkpoint_path: no such file: {path}")
    if path.suffix != ".safetensors":
        raise SteppingError(
            f"checkpoint_path: got {path}, expected a .safetensors file: other formats can hold code (pickle). Convert "
            f"it once: stepping convert-weights {path}"
        )
    texts, tensors = read_tensors(path)
    if texts.get("format") == _FORMAT and not is_signed(texts):
        raise CheckpointError(f"{path}: damaged: its checksums are missing. Take a copy that is whole.")
    return texts, tensors


def misfit(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """Why tensors are not the state of a model; torch would convert numbers of any kind without a word."""
    missing, unknown = [k for k in own if k not in given], [k for k in given if k not in own]
    if missing or unknown:
        return f"{len(missing)} tensors are missing and {len(unknown)} unknown, such as {(missing + unknown)[0]}"
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            return f"{name} has shape {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
        if tensor.dtype != given[name].dtype and not (tensor.dtype in _WHOLE and given[name].dtype in _WHOLE):
            return f"{name} holds {given[name].dtype} instead of {tensor.dtype}"
    bad = not_finite(given)
    return f"{bad} holds NaN" if bad else None
