"""What loaders give, looked at batch by batch: mistakes in data are named before they fail deep inside of torch."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

import torch
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.training.checkpoint import random_state, restore_random_state

__all__ = ["check_target", "checked_batch", "images_at_hand"]


def images_at_hand(*sources: Any) -> Tensor | None:
    """The first images (B, C, H, W) of the first source that is not None: a tensor, or batches of images.

    No generator moves by it. What has no length may be gone through only once, so it is left alone: None.
    """
    source: Any = next((s for s in sources if s is not None), None)
    if isinstance(source, Tensor):
        return source if source.dim() == 4 else None
    if not isinstance(source, Sized):
        return None
    parts = (source, getattr(source, "sampler", None))
    own = [g for g in (getattr(part, "generator", None) for part in parts) if isinstance(g, torch.Generator)]
    before = random_state(), [g.get_state() for g in own]
    try:
        first = next(iter(cast(Any, source)), None)
    finally:
        restore_random_state(before[0])
        for generator, state in zip(own, before[1]):
            generator.set_state(state)
    images = first[0] if isinstance(first, (tuple, list)) and first else first
    return images if isinstance(images, Tensor) and images.dim() == 4 else None


def checked_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """Images (B, ...) and labels: int64 (B,) (other whole numbers are converted) or class probabilities (B, classes).

    Raises:
        SteppingError: something else.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise SteppingError(explain("not a batch", got=got, expected="a pair (images, labels)"))
    images, labels = batch
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        got = f"({type(images).__name__}, {type(labels).__name__})"
        action = "Convert them with torch.as_tensor."
        raise SteppingError(explain("not a batch", got=got, expected="two tensors", action=action))
    if not images.dim() or not len(images):
        raise SteppingError(explain("an empty batch", got=f"images {tuple(images.shape)}", action="Check the loader."))
    if labels.dim() not in (1, 2) or len(labels) != len(images) or labels.dtype == torch.bool or labels.is_complex():
        got = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)} for {len(images)} images"
        expected = "int64 (B,), or probabilities (B, classes)"
        raise SteppingError(explain("labels do not fit the images", got=got, expected=expected))
    return images, labels if labels.is_floating_point() else labels.long()


def check_target(target: Tensor, scores: Tensor) -> None:
    """Labels that the net has no score for would fail deep inside of torch, or be left out in silence.

    Args:
        target: labels (B,) or class probabilities (B, classes).
        scores: (N, B, classes).

    Raises:
        SteppingError: they do not fit.
    """
    classes, what = scores.shape[-1], "labels do not fit the net"
    if target.is_floating_point():
        if target.shape != scores.shape[1:]:
            expected = f"{tuple(scores.shape[1:])}, a probability per class"
            raise SteppingError(explain(what, got=f"shape {tuple(target.shape)}", expected=expected))
        return
    if target.shape != scores.shape[1:2]:
        expected = f"{tuple(scores.shape[1:2])}, a class per image"
        raise SteppingError(explain(what, got=f"shape {tuple(target.shape)}", expected=expected))
    low, high = (int(v) for v in torch.stack(torch.aminmax(target)).tolist())
    if low < 0 or high >= classes:
        expected, action = f"0 to {classes - 1}", "Make the model with as many classes as the data has."
        raise SteppingError(explain(what, got=f"labels {low} to {high}", expected=expected, action=action))
