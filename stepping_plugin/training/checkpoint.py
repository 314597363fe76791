"""Checkpoints: one safetensors file each, whole or not at all, without pickle.

A checkpoint is a nest of dicts, lists, tuples, numbers, strings, None and tensors (the state of net,
optimizer and random generators, the history). Tensors are stored as such; everything else is JSON in the
file's header, so that one rename replaces the whole state. A process that is killed while it saves, or a disk
that is full, leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepping_plugin.errors import CheckpointError, explain
from stepping_plugin.tensorfile import is_signed, read_tensors, write_tensors
from stepping_plugin.training.loader import derive_seed

__all__ = [
    "check_random_state",
    "differences",
    "load_checkpoint",
    "random_state",
    "restore_random_state",
    "save_checkpoint",
    "seed_generators",
]

FORMAT = "stepping-plugin checkpoint 2"
_OLDER = ("stepping-plugin checkpoint 1",)  # without checksums
_TAG = "$"  # the key that marks what JSON cannot say


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a checkpoint in place of the one that is there.

    The file is written beside its place, flushed to the disk and renamed.

    Raises:
        CheckpointError: it cannot be written; the file that was there is untouched.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    header = json.dumps(_pack(state, "", tensors))
    try:
        write_tensors(path, tensors, {"format": FORMAT, "state": header}, durable=True)
    except OSError as error:
        kept = f"The previous checkpoint {path} is untouched." if path.exists() else "There is none yet."
        raise CheckpointError(
            f"{path}: the checkpoint cannot be written ({error.strerror or error}). {kept} "
            "Make room, then start the same run again."
        ) from error


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; tensors come back on the CPU.

    Raises:
        CheckpointError: damaged, or no checkpoint of a training run.
    """
    try:
        texts, tensors = read_tensors(Path(path))
        if texts.get("format") not in (FORMAT, *_OLDER):
            raise CheckpointError(explain("not a checkpoint of a training run", where=str(path)))
        if texts["format"] == FORMAT and not is_signed(texts):
            raise CheckpointError(f"{path}: damaged: its checksums are missing.")
        state = _unpack(json.loads(texts["state"]), {name: tensor.clone() for name, tensor in tensors.items()})
        if not isinstance(state, dict):
            raise ValueError("it holds no state")
        return state
    except CheckpointError as error:
        raise CheckpointError(f"{error} {ADVICE}") from None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(explain(f"damaged checkpoint ({error})", where=str(path), action=ADVICE)) from None


ADVICE = "Delete it to start anew, or take a copy that is whole."


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON form of a value; its tensors go into `tensors` under their path."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()  # cloned: safetensors refuses shared memory
        return {_TAG: "tensor", "name": path}
    if isinstance(value, (list, tuple)):
        items = [_pack(v, f"{path}/{k}", tensors) for k, v in enumerate(value)]
        return items if isinstance(value, list) else {_TAG: "tuple", "items": items}
    if isinstance(value, Mapping):
        pairs = [(k, _pack(v, f"{path}/{k}", tensors)) for k, v in value.items()]
        if all(isinstance(k, str) for k, _ in pairs) and _TAG not in value:
            return dict(pairs)
        if all(isinstance(k, int) for k, _ in pairs):
            return {_TAG: "dict", "items": pairs}  # JSON would turn the numbers into strings
    what = f"{type(value).__name__} cannot be stored in a checkpoint"
    raise CheckpointError(explain(what, where=path, expected="tensors, numbers, strings, lists, dicts"))


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind == "tensor":
        return tensors[value["name"]]
    if kind == "tuple":
        return tuple(_unpack(v, tensors) for v in value["items"])
    if kind == "dict":
        return {k: _unpack(v, tensors) for k, v in value["items"]}
    return {k: _unpack(v, tensors) for k, v in value.items()}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two nests of dicts differ, as texts."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]


# --- Random generators ---


def random_state() -> dict[str, Any]:
    """State of the generators of Python, numpy, torch, and of every CUDA device."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Take over what `random_state` gave.

    Raises:
        CheckpointError: it is no such state; no generator was changed.
    """
    check_random_state(state)
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():  # another machine has other generators
        torch.cuda.set_rng_state_all(state["cuda"])


def check_random_state(state: Any) -> None:
    """Try a random state on generators that nobody uses.

    Raises:
        CheckpointError: it is no such state.
    """
    try:
        kind, keys, *rest = state["numpy"]
        random.Random().setstate(state["python"])
        np.random.RandomState().set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.Generator().set_state(state["torch"])
        if not all(isinstance(s, Tensor) and s.dtype == torch.uint8 for s in state["cuda"]):
            raise TypeError("cuda: no states of generators")
    except Exception as error:  # whatever three libraries say to it
        raise CheckpointError(f"damaged: the state of the random generators ({error}). {ADVICE}") from None


def seed_generators(seed: int | None, rank: int = 0) -> None:
    """Seed Python, numpy and torch, every process differently; None leaves them alone."""
    if seed is not None:
        number = derive_seed("fit", seed, rank)
        random.seed(number)
        np.random.seed(number % 2**32)
        torch.manual_seed(number)
