"""Sets that lie in memory as one array of bytes: resized once, split, normalised and augmented a batch at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from psutil import virtual_memory
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import DataConfig
from stepping_plugin.training.loader import Augment, TensorSet

from .bundle import DataBundle, check_channels, limited, stratified_split

__all__ = ["Pictures", "check_memory", "in_memory"]

# Shift in pixels, probability of a mirror image, share of the training set held out for validation.
_DEFAULTS: dict[str, tuple[int, float, float]] = {
    "digits": (1, 0.0, 0.1),
    "fashion_mnist": (2, 0.5, 0.1),
    "cifar10": (4, 0.5, 0.1),
    "cifar100": (4, 0.5, 0.1),
    "imagefolder": (2, 0.5, 0.1),
}


class Pictures(NamedTuple):
    """uint8 (M, C, H, W) and int64 (M,)."""

    images: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> Pictures:
        return Pictures(self.images[indices], self.labels[indices])


def in_memory(
    cfg: DataConfig,
    train: Pictures,
    test: Pictures,
    val: Pictures | None = None,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    classes: tuple[str, ...] = (),
    left_out: tuple[str, ...] = (),
) -> DataBundle:
    """A set out of its arrays.

    Args:
        cfg: of the recipe.
        train, test: the parts that it comes in.
        val: None: a share of every class is held out of `train`.
        statistics: mean and standard deviation where the recipe gives none; None: those of the training pictures.
        classes, left_out: see `DataBundle`.

    Raises:
        SteppingError: empty, or keys that do not fit the pictures.
    """
    shift, hflip, val_share = _DEFAULTS.get(cfg.name.removeprefix("torch/"), (2, 0.0, 0.1))
    shift = shift if cfg.shift is None else cfg.shift
    hflip = hflip if cfg.hflip is None else cfg.hflip
    if min(len(train.labels), len(test.labels)) == 0:
        raise SteppingError(f"data set {cfg.name!r} is empty: check the files in data.root")
    num_classes = max(len(classes), int(train.labels.max()) + 1)
    if cfg.img_size is not None:
        size = train.images.shape[1], cfg.img_size, cfg.img_size  # for a moment they are there twice
        check_memory(cfg, 2 * (len(train.labels) + len(test.labels)), size)
        train, test = (_resize(part, cfg.img_size) for part in (train, test))
    if val is None:
        share = val_share if cfg.val_fraction is None else cfg.val_fraction
        kept, held = stratified_split(train.labels, share, cfg.split_seed)
        val = train.take(held) if len(held) else None
        train = train.take(limited(kept, cfg))
    elif cfg.limit is not None:
        train = train.take(limited(torch.arange(len(train.labels)), cfg))
    mean, std = statistics or _statistics(train.images)
    mean, std = tuple(cfg.mean or mean), tuple(cfg.std or std)
    channels, height, width = train.images.shape[1:]
    if cfg.shift and shift >= min(height, width):
        expected = f"less than the {min(height, width)} pixels of the pictures"
        raise SteppingError(
            explain("the pictures would leave the frame", where="data.shift", got=shift, expected=expected)
        )
    check_channels(cfg, channels, mean, std)
    test_set = TensorSet(*test, mean, std)
    return DataBundle(
        name=cfg.name,
        train=TensorSet(*train, mean, std, Augment(shift, hflip)),
        val=TensorSet(*val, mean, std) if val is not None else test_set,
        test=test_set,
        num_classes=num_classes,
        in_chans=channels,
        img_size=max(height, width),
        mean=mean,
        std=std,
        classes=classes,
        left_out=left_out,
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
