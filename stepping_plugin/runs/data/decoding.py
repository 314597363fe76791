"""Small pictures that are decoded once and kept in memory."""

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
from stepping_plugin.training.loader import Unreadable

from .bundle import DataBundle
from .memory import Pictures, check_memory, in_memory
from .sources import LeftOut, Opened, Source

__all__ = ["decoded"]

_SAY_EVERY = 5.0  # seconds
_BLOCK = 512  # pictures handed to the threads at once

Size = tuple[int, int, int]
Convert = Callable[[Image.Image], Tensor]


def decoded(
    cfg: DataConfig, parts: tuple[Source, Source, Source], model_name: str | None, left_out: LeftOut
) -> DataBundle:
    """All pictures, as they are or at the size of the recipe, kept as bytes.

    Args:
        cfg: of the recipe.
        parts: training, validation and test pictures.
        model_name: model whose mean and standard deviation are the defaults; None: those of the training pictures.
        left_out: told which pictures cannot be read; it also says how far it is.

    Raises:
        SteppingError: pictures of different sizes without `data.img_size`, too many of them, or none is readable.
    """
    train, val, test = parts
    convert = _converter(cfg)
    size = _size_of_all(Opened(train), convert)
    check_memory(cfg, sum(len(part) for part in parts), size)
    read = {name: _decode(name, part, convert, size, cfg, left_out)
            for name, part in (("training", train), ("validation", val), ("test", test))
            if name != "validation" or part is not test}  # fmt: skip
    cfg = cfg.model_copy(update={"img_size": None})  # done
    pictures = read["training"], read.get("validation", read["test"]), read["test"]
    return in_memory(cfg, pictures, _statistics_of(model_name), classes=train.classes, left_out=left_out)


def _statistics_of(model_name: str | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation that a pretrained model wants."""
    if model_name is None:
        return None
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    own = get_pretrained_cfg(model_name)
    config = resolve_data_config({}, pretrained_cfg=own.to_dict() if own else {"input_size": (3, 224, 224)})
    return tuple(config["mean"]), tuple(config["std"])


def _converter(cfg: DataConfig) -> Convert:
    """Picture -> uint8 (C, H, W)."""
    from timm.data import create_transform

    if cfg.img_size is None:
        return lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    interpolation, crop_pct = cfg.interpolation or "bicubic", cfg.crop_pct or 1.0
    return create_transform(cfg.img_size, interpolation=interpolation, crop_pct=crop_pct, normalize=False)


def _size_of_all(train: Opened, convert: Convert) -> Size:
    """(C, H, W) of the first picture that can be read; all others must have it."""
    for index in range(len(train)):
        try:
            channels, height, width = convert(train[index][0]).shape
        except Unreadable:
            continue
        if height != width:
            where, action = train.source.name(index), "Pass data.img_size=PIXELS to resize them."
            raise SteppingError(
                explain("not square", where=where, got=f"{height} x {width} pixels", expected="square", action=action)
            )
        return channels, height, width
    raise SteppingError(
        f"{train.source.where}: none of its {len(train):,} pictures can be read, {train.source.name(0)}."
    )


def _decode(name: str, part: Source, convert: Convert, size: Size, cfg: DataConfig, left_out: LeftOut) -> Pictures:
    """All readable pictures of a part."""
    images, labels = torch.empty(len(part), *size, dtype=torch.uint8), torch.empty(len(part), dtype=torch.int64)
    opened, good = Opened(part), []

    def read(place: int) -> SteppingError | None:
        try:
            picture, labels[place] = opened[place]
            image = convert(picture)
        except Unreadable as problem:
            return problem
        if image.shape != size:
            return SteppingError(
                explain("pictures of different sizes", where=part.name(place), got=f"{tuple(image.shape[1:])} pixels",
                        expected=f"{size[1:]} as the first one", action="Pass data.img_size=PIXELS to resize them.")
            )  # fmt: skip
        images[place] = image
        return None

    for place, problem in enumerate(_read_all(read, len(part), cfg.workers, name, left_out.say)):
        if problem is None:
            good.append(place)
        elif isinstance(problem, Unreadable):
            left_out(problem)
        else:
            raise problem
    pictures = Pictures(images, labels)
    return pictures if len(good) == len(part) else pictures.take(torch.tensor(good, dtype=torch.int64))


def _read_all(
    read: Callable[[int], SteppingError | None], count: int, threads: int, name: str, say: Callable[[str], None]
) -> Iterator[SteppingError | None]:
    """What became of every picture, in order. Pillow decodes outside of Python's lock, so threads help."""
    said = began = time.monotonic()
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for start in range(0, count, _BLOCK):
            yield from pool.map(read, range(start, min(start + _BLOCK, count)))
            now, done = time.monotonic(), min(start + _BLOCK, count)
            if now - said > _SAY_EVERY and done < count:
                left = (now - began) / done * (count - done)
                say(f"{name} pictures: {done:,} of {count:,} read into memory, {left:.0f} s left")
                said = now
    say(f"{name} pictures: {count:,} read into memory in {time.monotonic() - began:.0f} s")
