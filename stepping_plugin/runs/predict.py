"""`stepping predict`: what a net says about pictures, and what every answer costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.engine import Engine
from ..engine.exit import wide
from .prepare import Preparation, opened

__all__ = ["predictions"]


def predictions(
    engine: Engine,
    preparation: Preparation,
    files: Sequence[Path],
    *,
    until: Any = None,
    deadline: float | None = None,
    batch_size: int = 1,
) -> Iterator[dict[str, Any]]:
    """One row per file, in their order.

    Args:
        engine: of the net.
        preparation: of pictures.
        files: pictures.
        until, deadline: see `Engine.predict`; a deadline is that of a batch.
        batch_size: pictures at a time.

    Yields:
        file, and: label (its class's number), class, confidence (largest softmax probability), subnet, macs; with a
        deadline, in_time. Of a file that cannot be read: error.
    """
    pictures = opened(files, preparation)
    while chunk := list(itertools.islice(pictures, batch_size)):
        good = [content for _, content in chunk if isinstance(content, Tensor)]
        answers = iter(_answers(engine, good, until, deadline) if good else [])
        for path, content in chunk:
            if isinstance(content, Tensor):
                row = next(answers)
                yield {"file": str(path), "class": preparation.name(row["label"]), **row}
            else:
                yield {"file": str(path), "error": content}


def _answers(engine: Engine, pictures: list[Tensor], until: Any, deadline: float | None) -> list[dict[str, Any]]:
    images = torch.stack(pictures).to(engine.device, engine.dtype)
    result = engine.predict(images, until=until, deadline=deadline)
    confidence = wide(result.logits).softmax(-1).amax(-1)
    columns: Mapping[str, list[Any]] = {
        "label": result.classes.tolist(),
        "confidence": [round(value, 6) for value in confidence.tolist()],
        "subnet": result.subnet.tolist(),
        "macs": result.macs.tolist(),
    }
    rows: list[dict[str, Any]] = [dict(zip(columns, row)) for row in zip(*columns.values())]
    return rows if deadline is None else [{**row, "in_time": result.in_time} for row in rows]
