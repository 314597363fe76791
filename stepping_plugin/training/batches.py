"""What loaders give, looked at batch by batch: mistakes in data are named before they fail deep inside of torch."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.graph.program import call_arg, op_name
from stepping_plugin.nested.net import NestedNet
from stepping_plugin.training.checkpoint import random_state, restore_random_state
from stepping_plugin.training.loader import EpochLoader

__all__ = ["check_batch_size", "check_target", "checked_batch", "images_at_hand", "learns_from_batches", "single_image",
           "smallest_batch"]  # fmt: skip


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


def learns_from_batches(net: nn.Module) -> bool:
    """Whether there is a batch norm that takes its statistics from the batch in train mode: one image has none."""
    program = net.analysis.programs.get(True) if isinstance(net, NestedNet) else None
    if program is not None:  # a net that was loaded for inference has none yet
        return any(op_name(node) == "batch_norm" and call_arg(node, "training") for node in program.operators())
    net = net.model if isinstance(net, NestedNet) else net
    modes = {module: module.training for module in net.modules()}
    try:
        net.train()  # parts may refuse to leave eval mode
        return any(isinstance(module, _BatchNorm) and module.training for module in modes)
    finally:
        for module, mode in modes.items():
            module.training = mode


def single_image(where: str | None = None, got: str | None = None) -> SteppingError:
    """The error for what `learns_from_batches` and meets a batch of one image."""
    action = "Use batch_size >= 2 per process, and drop_last=True if only the last batch is that small."
    return SteppingError(
        explain("batch norm cannot learn from a batch of one image", where=where, got=got, action=action)
    )


def smallest_batch(loader: Any) -> int | None:
    """Images of the smallest batch that a loader will give, where it tells before it is gone through."""
    if isinstance(loader, (list, tuple)):
        sizes = [len(b[0]) for b in loader if isinstance(b, (list, tuple)) and b and isinstance(b[0], Tensor)]
        return min(sizes, default=None)
    size = getattr(loader, "batch_size", None)
    try:
        samples = len(loader.dataset if isinstance(loader, EpochLoader) else loader.sampler)
    except (TypeError, AttributeError):
        return None
    if isinstance(size, bool) or not isinstance(size, int) or samples < 1 or size < 1:
        return None
    if isinstance(loader, EpochLoader):
        samples = -(-samples // loader.world)
        return min(size, samples) if loader.train else samples % size or size
    return size if getattr(loader, "drop_last", False) else samples % size or size


def check_batch_size(net: nn.Module, loader: Any) -> None:
    """Refuse batches that would stop a training, however late they come.

    Raises:
        SteppingError: a batch of one image, and a batch norm that learns from it.
    """
    if smallest_batch(loader) == 1 and learns_from_batches(net):
        size = getattr(loader, "batch_size", None)
        raise single_image("training loader", None if size is None else f"batch_size {size}, the smallest batch is 1")


def checked_batch(batch: Any, free: bool = False) -> tuple[Tensor, Any]:
    """Images (B, ...) and labels: int64 (B,) (other whole numbers are converted), or floats (B, classes): class
    probabilities, or 1 for every class that a picture shows (whole numbers and booleans of that shape are converted).

    Args:
        batch: what a loader gave.
        free: leave the targets alone, which only a criterion of the caller's own reads: masks, boxes, dictionaries.

    Raises:
        SteppingError: something else.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise SteppingError(explain("not a batch", got=got, expected="a pair (images, labels)"))
    images, labels = batch
    if not isinstance(images, Tensor) or not (free or isinstance(labels, Tensor)):
        got = f"({type(images).__name__}, {type(labels).__name__})"
        action = "Convert them with torch.as_tensor."
        raise SteppingError(explain("not a batch", got=got, expected="two tensors", action=action))
    if not images.dim() or not len(images):
        raise SteppingError(explain("an empty batch", got=f"images {tuple(images.shape)}", action="Check the loader."))
    if free:
        return images, labels
    wrong_type = labels.is_complex() or (labels.dtype == torch.bool and labels.dim() == 1)
    if labels.dim() not in (1, 2) or len(labels) != len(images) or wrong_type:
        got = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)} for {len(images)} images"
        expected = "int64 (B,), or probabilities or several labels per image (B, classes)"
        raise SteppingError(explain("labels do not fit the images", got=got, expected=expected))
    if labels.is_floating_point():
        return images, labels
    return images, labels.long() if labels.dim() == 1 else labels.float()


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
