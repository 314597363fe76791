"""Folders of small pictures, decoded once into memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import DataConfig

from .bundle import DataBundle
from .folders import Listing
from .memory import Pictures, check_memory, in_memory

__all__ = ["UNREADABLE", "in_memory_folders"]

# What Pillow raises for files that are no pictures, or damaged ones.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_SAY_EVERY = 5.0  # seconds
_BLOCK = 512  # pictures handed to the threads at once

Parts = tuple[Listing, Listing | None, Listing]
Say = Callable[[str], None]


def in_memory_folders(cfg: DataConfig, parts: Parts, model_name: str | None, say: Say) -> DataBundle:
    """Decode all pictures, as they are or at the size of the recipe, and keep them as bytes.

    Args:
        cfg: of the recipe.
        parts: training, validation and test pictures.
        model_name: model whose mean and standard deviation are the defaults; None: those of the training pictures.
        say: told how far it is, and which files cannot be read: those are left out.

    Raises:
        SteppingError: pictures of different sizes without `data.img_size`, too many of them, or none is readable.
    """
    convert = _converter(cfg)
    size = _size_of_all(parts[0], convert)
    check_memory(cfg, sum(len(part) for part in parts if part is not None), size)
    bad: list[str] = []
    train, val, test = (_decode(part, convert, size, cfg, say, bad) if part else None for part in parts)
    assert train is not None and test is not None
    if bad:
        say(f"left out of everything, because they cannot be read ({len(bad)}): {', '.join(bad[:5])}")
    cfg = cfg.model_copy(update={"img_size": None})  # done
    return in_memory(cfg, train, test, val, _statistics_of(model_name), parts[0].classes, tuple(bad))


def _statistics_of(model_name: str | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation that a pretrained model wants."""
    if model_name is None:
        return None
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    own = get_pretrained_cfg(model_name)
    config = resolve_data_config({}, pretrained_cfg=own.to_dict() if own else {"input_size": (3, 224, 224)})
    return tuple(config["mean"]), tuple(config["std"])


def _converter(cfg: DataConfig) -> Callable[[str], Tensor]:
    """File -> uint8 (3, H, W)."""
    from timm.data import create_transform

    resize = None
    if cfg.img_size is not None:
        interpolation, crop_pct = cfg.interpolation or "bicubic", cfg.crop_pct or 1.0
        resize = create_transform(cfg.img_size, interpolation=interpolation, crop_pct=crop_pct, normalize=False)

    def convert(file: str) -> Tensor:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        return resize(picture) if resize else torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    return convert


def _size_of_all(train: Listing, convert: Callable[[str], Tensor]) -> tuple[int, int, int]:
    """(C, H, W) of the first picture that can be read; all others must have it."""
    for file in train.files:
        try:
            channels, height, width = convert(file).shape
        except UNREADABLE:
            continue
        if height != width:
            action = "Pass data.img_size=PIXELS to resize them."
            raise SteppingError(
                explain("not square", where=file, got=f"{height} x {width} pixels", expected="square", action=action)
            )
        return channels, height, width
    raise SteppingError(f"{train.folder}: none of its {len(train):,} pictures can be read, {train.files[0]} and so on.")


def _decode(
    part: Listing,
    convert: Callable[[str], Tensor],
    size: tuple[int, int, int],
    cfg: DataConfig,
    say: Say,
    bad: list[str],
) -> Pictures:
    """All readable pictures of a part; the names of the others are added to `bad`."""
    images = torch.empty(len(part), *size, dtype=torch.uint8)
    good: list[int] = []

    def read(place: int) -> Exception | None:
        try:
            image = convert(part.files[place])
        except UNREADABLE as error:
            return error
        if image.shape != size:
            return SteppingError(
                explain("pictures of different sizes", where=part.files[place], got=f"{tuple(image.shape[1:])} pixels",
                        expected=f"{size[1:]} as the first one", action="Pass data.img_size=PIXELS to resize them.")
            )  # fmt: skip
        images[place] = image
        return None

    for place, problem in enumerate(_read_all(read, len(part), cfg.workers, part.folder.name, say)):
        if isinstance(problem, SteppingError):
            raise problem
        if problem is None:
            good.append(place)
        else:
            bad.append(part.files[place])
    pictures = Pictures(images, torch.tensor(part.labels, dtype=torch.int64))
    return pictures if len(good) == len(part) else pictures.take(torch.tensor(good, dtype=torch.int64))


def _read_all(
    read: Callable[[int], Exception | None], count: int, threads: int, name: str, say: Say
) -> Iterator[Exception | None]:
    """What became of every picture, in order. Pillow decodes outside of Python's lock, so threads help."""
    said = began = time.monotonic()
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for start in range(0, count, _BLOCK):
            yield from pool.map(read, range(start, min(start + _BLOCK, count)))
            now, done = time.monotonic(), min(start + _BLOCK, count)
            if now - said > _SAY_EVERY and done < count:
                left = (now - began) / done * (count - done)
                say(f"reading {name}/ into memory: {done:,} of {count:,} pictures, {left:.0f} s left")
                said = now
    say(f"{name}/: {count:,} pictures read into memory in {time.monotonic() - began:.0f} s")
