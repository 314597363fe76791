"""Sets that lie in memory as one array of bytes: resized once, split, normalised and augmented a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from psutil import virtual_memory
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import DataConfig
from stepping_plugin.training.loader import Augment, TensorSet

from .bundle import DataBundle, check_channels

__all__ = ["Pictures", "check_memory", "in_memory"]

# Shift in pixels, probability of a mirror image.
_DEFAULTS = {"digits": (1, 0.0), "fashion_mnist": (2, 0.5), "cifar10": (4, 0.5), "cifar100": (4, 0.5)}
_OF_FOLDERS = (2, 0.5)


@dataclass(frozen=True)
class Pictures:
    """uint8 (M, C, H, W) and int64 (M,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Pictures:
        return Pictures(self.images[indices], self.labels[indices])


def in_memory(
    cfg: DataConfig,
    parts: tuple[Pictures, Pictures, Pictures],
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    **known: Any,
) -> DataBundle:
    """A set out of its arrays.

    Args:
        cfg: of the recipe.
        parts: training, validation, test.
        statistics: mean and standard deviation where the recipe gives none; None: those of the training pictures.
        known: what else the bundle is to know.

    Raises:
        SteppingError: keys that do not fit the pictures.
    """
    shift, hflip = _DEFAULTS.get(cfg.name.removeprefix("torch/"), _OF_FOLDERS if cfg.in_memory else (2, 0.0))
    shift = shift if cfg.shift is None else cfg.shift
    hflip = hflip if cfg.hflip is None else cfg.hflip
    train, val, test = _resized(parts, cfg)
    mean, std = statistics or _statistics(train.images)
    mean, std = tuple(cfg.mean or mean), tuple(cfg.std or std)
    channels, height, width = train.images.shape[1:]
    if cfg.shift and shift >= min(height, width):
        expected = f"less than the {min(height, width)} pixels of the pictures"
        raise SteppingError(
            explain("the pictures would leave the frame", where="data.shift", got=shift, expected=expected)
        )
    check_channels(cfg, channels, mean, std)
    test_set = TensorSet(test.images, test.labels, mean, std)
    return DataBundle(
        name=cfg.name,
        train=TensorSet(train.images, train.labels, mean, std, Augment(shift, hflip, cfg.vflip)),
        val=test_set if val is test else TensorSet(val.images, val.labels, mean, std),
        test=test_set,
        num_classes=max(len(known.get("classes", ())), *(int(part.labels.max()) + 1 for part in parts)),
        in_chans=channels,
        img_size=max(height, width),
        mean=mean,
        std=std,
        train_labels=train.labels,
        balanced=cfg.balance == "sampler",
        **known,
    )


def check_memory(cfg: DataConfig, pictures: int, size: tuple[int, int, int]) -> None:
    """Before a set is brought to a size (C, H, W), or decoded at that size.

    Raises:
        SteppingError: so many pictures would fill more than half of what is free.
    """
    channels, height, width = size
    needed, memory = pictures * channels * height * width, virtual_memory().available
    if needed > memory / 2:
        sizes = f"{needed / 2**30:.0f} GiB for {pictures:,} pictures, {memory / 2**30:.0f} GiB are free"
        got = f"{max(height, width)}: {sizes}"
        action = "Take smaller pictures, or leave them on disk." if cfg.in_memory else "Take smaller pictures."
        raise SteppingError(explain("too large", where="data.img_size", got=got, action=action))


def _resized(parts: tuple[Pictures, Pictures, Pictures], cfg: DataConfig) -> tuple[Pictures, Pictures, Pictures]:
    """Parts at the size of the recipe; a test part that is the validation part stays so."""
    size = cfg.img_size
    if size is None:
        return parts
    train, val, test = parts
    check_memory(
        cfg, 2 * sum(map(len, parts)), (train.images.shape[1], size, size)
    )  # for a moment they are there twice
    small_test = _resize(test, size)
    return _resize(train, size), small_test if val is test else _resize(val, size), small_test


def _resize(part: Pictures, size: int) -> Pictures:
    if part.images.shape[-2:] == (size, size):
        return part
    blocks = [  # in blocks: float copies of a whole set are large
        F.interpolate(block.float(), (size, size), mode="bilinear", antialias=True).round().byte()
        for block in part.images.split(max(1, 2**24 // size**2))
    ]
    return Pictures(torch.cat(blocks), part.labels)


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], exact: from the histogram of the values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float(share @ values)
        means.append(mean)
        stds.append(max(float(share @ (values - mean) ** 2) ** 0.5, 1e-6))
    return tuple(means), tuple(stds)
