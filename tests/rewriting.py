"""Files with planted defects, with their checksums computed anew or left as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from stepping_plugin.tensorfile import write_tensors


def rewrite(
    source: Path,
    target: Path,
    edit: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda header, tensors: None,
    signed: bool = True,
    key: str = "stepping",
    text: str | None = None,
) -> Path:
    """Copy a file with changes.

    Args:
        source, target: paths.
        edit: changes header and tensors in place.
        signed: compute the checksums anew, as somebody does who knows the format.
        key: of the header among the file's texts.
        text: in place of the header.
    """
    with safe_open(source, framework="pt") as file:
        texts = dict(file.metadata())
        tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
    header = json.loads(texts[key])
    edit(header, tensors)
    if header != json.loads(texts[key]):
        texts[key] = json.dumps(header)
    texts[key] = texts[key] if text is None else text
    if signed:
        texts.pop("digests", None), texts.pop("digest", None)
        write_tensors(target, tensors, texts)
    else:
        save_file({k: t.contiguous().clone() for k, t in tensors.items()}, target, metadata=texts)
    return target
