"""Reading our files: safetensors with a JSON header. They are data, and anything may be in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError, explain

__all__ = ["ENGINE", "NET", "read_file"]

NET, ENGINE = "stepping-plugin net", "stepping-plugin engine"
_WRITERS = {NET: "SteppingNet.save", ENGINE: "Engine.save"}
_OTHERS = {
    NET: "holds a net, not an engine. Call stepping_plugin.load(path).deploy()",
    ENGINE: "holds an engine, not a net. Call stepping_plugin.engine.load_engine(path)",
}


def read_file(path: Path, kind: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file.

    Args:
        path: the file.
        kind: `NET` or `ENGINE`.
        version: of the format, that the caller understands.

    Raises:
        CheckpointError: no such file, damaged, not ours, of the other kind, or of another version.
    """
    if not path.is_file():
        raise CheckpointError(explain("no such file", where=str(path), action="Check the path."))
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("stepping", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error}).") from None
    found = header.get("format") if isinstance(header, dict) else None
    if found != kind:
        ours = found in (NET, ENGINE)
        text = _OTHERS[str(found)] if ours else f"a safetensors file, but not one that {_WRITERS[kind]} wrote"
        raise CheckpointError(f"{path}: {text}.")
    if header.get("version") != version:
        got = header.get("version")
        older = isinstance(got, int) and got < version
        action = f"Make it again: {_WRITERS[kind]} of this version." if older else "Update stepping-plugin."
        raise CheckpointError(
            explain("unknown version", where=str(path), got=got, expected=str(version), action=action)
        )
    return header, tensors
