"""Small pictures that are decoded once and kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from stepping_plugin.console.progress import track
from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import DataConfig
from stepping_plugin.training.loader import Unreadable

from .bundle import DataBundle
from .crops import crop_warnings
from .memory import Pictures, check_memory, in_memory
from .sources import LeftOut, Opened, Source
from .transforms import data_config

__all__ = ["converter", "decoded", "decoding_config"]

_RESIZE = "Pass data.img_size=PIXELS to resize them."
_BLOCK = 512  # pictures handed to the threads at once

Size = tuple[int, int, int]
Convert = Callable[[Image.Image | Tensor], Tensor]


def decoded(
    cfg: DataConfig, parts: tuple[Source, Source, Source], model_name: str | None, left_out: LeftOut
) -> DataBundle:
    """All pictures, as they are or at the size of the recipe, kept as bytes.

    Args:
        cfg: of the recipe.
        parts: training, validation and test pictures.
        model_name: model whose mean and standard deviation are the defaults; None: those of the training pictures.
        left_out: told which pictures cannot be read.

    Raises:
        SteppingError: pictures of different sizes without `data.img_size`, too many of them, or none is readable.
    """
    train, val, test = (Opened(part, cfg.in_chans or 3) for part in parts)
    cut = decoding_config(cfg, model_name)
    convert = converter(cfg, cut)
    size = _size_of_all(train, convert)
    check_memory(cfg, sum(len(part) for part in parts), size)
    pictures = _decode("training", train, convert, size, cfg, left_out)
    measured = _decode("test", test, convert, size, cfg, left_out)
    choosing = measured
    if parts[1] is not parts[2]:
        choosing = _decode("validation", val, convert, size, cfg, left_out)
    statistics = (cut["mean"], cut["std"]) if model_name else None
    warnings = tuple(crop_warnings(cfg, cut, parts[0], random=False)) if cfg.img_size else ()
    to_bytes = convert if cfg.img_size else None
    known = {"to_bytes": to_bytes, "classes": parts[0].classes, "left_out": left_out, "warnings": warnings}
    return in_memory(cfg.model_copy(update={"img_size": None}), (pictures, choosing, measured), statistics, **known)


def decoding_config(cfg: DataConfig, model_name: str | None) -> dict[str, Any]:
    """timm's data configuration; nothing is cut off unless the recipe says so."""
    return data_config(cfg.model_copy(update={"crop_pct": cfg.crop_pct or 1.0}), model_name)


def converter(cfg: DataConfig, cut: dict[str, Any]) -> Convert:
    """Picture -> uint8 (C, H, W)."""
    from timm.data import create_transform

    if cfg.img_size is None:
        return lambda picture: picture if isinstance(picture, Tensor) else pil_to_tensor(picture)
    keys = ("interpolation", "crop_pct", "crop_mode", "mean")
    return create_transform(cut["input_size"], normalize=False, **{key: cut[key] for key in keys})


def _size_of_all(train: Opened, convert: Convert) -> Size:
    """(C, H, W) of the first picture that can be read; all others must have it."""
    for index in range(len(train)):
        try:
            channels, height, width = convert(train[index][0]).shape
        except Unreadable:
            continue
        if height != width:
            where, got = train.source.name(index), f"{height} x {width} pixels"
            raise SteppingError(explain("not square", where=where, got=got, expected="square", action=_RESIZE))
        return channels, height, width
    raise SteppingError(
        f"{train.source.where}: none of its {len(train):,} pictures can be read, {train.source.name(0)}."
    )


def _decode(name: str, opened: Opened, convert: Convert, size: Size, cfg: DataConfig, left_out: LeftOut) -> Pictures:
    """All readable pictures of a part."""
    count, good = len(opened), []
    images, labels = torch.empty(count, *size, dtype=torch.uint8), torch.empty(count, dtype=torch.int64)

    def read(place: int) -> SteppingError | None:
        try:
            picture, labels[place] = opened[place]
            image = convert(picture)
        except Unreadable as problem:
            return problem
        if image.shape != size:
            where, got, action = opened.source.name(place), f"{tuple(image.shape[1:])} pixels", _RESIZE
            expected = f"{size[1:]} as the first one"
            return SteppingError(
                explain("pictures of different sizes", where=where, got=got, expected=expected, action=action)
            )
        images[place] = image
        return None

    problems = track(_read_all(read, count, cfg.workers), f"reading {name} pictures", count)
    for place, problem in enumerate(problems):
        if problem is None:
            good.append(place)
        elif isinstance(problem, Unreadable):
            left_out(problem)
        else:
            raise problem
    pictures = Pictures(images, labels)
    return pictures if len(good) == count else pictures.take(torch.tensor(good, dtype=torch.int64))


def _read_all(read: Callable[[int], SteppingError | None], count: int, threads: int) -> Iterator[SteppingError | None]:
    """What became of every picture, in order. Pillow decodes outside of Python's lock, so threads help."""
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for start in range(0, count, _BLOCK):
            yield from pool.map(read, range(start, min(start + _BLOCK, count)))
