"""How much of a picture crops show: what lies outside is trained, or judged, under the picture's label all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from stepping_plugin.runs.recipe_schema import DataConfig
from stepping_plugin.training.loader import global_seed

from .sources import UNREADABLE, Source

__all__ = ["crop_warnings", "shown_by_evaluation", "shown_by_training"]

_LOOKED_AT = 100  # pictures
_DRAWS = 20  # crops of each
_MUCH = 0.8  # of the area; the crop of most of timm's models, 0.875 of both sides, shows 77 %

Sizes = list[tuple[int, int]]  # (width, height) in pixels


def crop_warnings(cfg: DataConfig, config: dict[str, Any], train: Source, *, random: bool) -> Iterator[str]:
    """One text for each default that cuts much of these pictures away; a recipe that sets the key knows.

    Args:
        cfg: of the recipe.
        config: timm's data configuration, with `crop_pct` and `crop_mode` of the evaluation.
        train: pictures to look at: only the head of some files is read.
        random: whether training crops are random.
    """
    sizes = _sizes(train)
    if not sizes:
        return
    if random and cfg.scale is None and cfg.train_crop_mode in (None, "rrc"):
        shown = shown_by_training(sizes)
        yield (
            f"training crops show {np.mean(shown):.0%} of a picture's area on average, one in ten less than "
            f"{np.quantile(shown, 0.1):.0%}: timm's default, as data.scale: [0.08, 1.0]. If what makes the class can "
            "lie outside (a defect, a small object), set data.scale: [0.6, 1.0] or data.train_crop_mode: rkrc"
        )
    shown = shown_by_evaluation(sizes, config["input_size"][-1], config["crop_pct"], config["crop_mode"])
    if np.mean(shown) < _MUCH and cfg.crop_pct is None and cfg.crop_mode is None:
        width, height = sizes[0]
        yield (
            f"validation and test crops show {np.mean(shown):.0%} of a picture's area on average (data.crop_pct: "
            f"{config['crop_pct']}, data.crop_mode: {config['crop_mode']}, pictures such as {width} x {height}): "
            "data.crop_pct: 1.0 with data.crop_mode: border or squash shows all of it"
        )


def _sizes(train: Source) -> Sizes:
    found = []
    for index in torch.linspace(0, len(train) - 1, min(_LOOKED_AT, len(train))).round().long().tolist():
        try:
            picture, _ = train.open(index)
        except UNREADABLE:
            continue
        if isinstance(picture, Image.Image):
            found.append(picture.size)
            picture.close()
    return found


def shown_by_training(sizes: Sizes, scale: tuple[float, float] = (0.08, 1.0)) -> np.ndarray[Any, Any]:
    """Shares of the area that random crops of timm show, `_DRAWS` per picture."""
    shares = []
    with global_seed(0):
        for size in sizes:
            blank = Image.new("1", size)
            for _ in range(_DRAWS):
                _, _, height, width = RandomResizedCropAndInterpolation.get_params(blank, scale, (3 / 4, 4 / 3))
                shares.append(width * height / (size[0] * size[1]))
    return np.array(shares)


def shown_by_evaluation(sizes: Sizes, img_size: int, crop_pct: float, crop_mode: str) -> np.ndarray[Any, Any]:
    """Share of the area of every picture that is left after timm's resize and its crop to `img_size` pixels."""
    sides = np.array(sizes, dtype=float)
    if crop_mode == "squash":
        resized = np.full_like(sides, img_size / crop_pct)
    else:
        reference = sides.max(1) if crop_mode == "border" else sides.min(1)
        resized = sides * (img_size / crop_pct / reference)[:, None]
    return np.minimum(img_size / resized, 1).prod(1)
