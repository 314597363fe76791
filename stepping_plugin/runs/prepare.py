"""From files to the pictures that a net is asked about: found, opened, and prepared as they were for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SteppingError
from ..training.loader import TransformSet
from ..views.named import Named
from .data.decoding import UNREADABLE, bytes_of
from .parts import Parts
from .recipe import load_recipe

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Preparation", "files_of", "opened", "preparation_of"]


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes a net's input.

    Attributes:
        transform: from a picture to (C, H, W).
        classes: their names, in the order of the scores; empty: nobody says.
        source: where that is known from, in words.
    """

    transform: Callable[[Image], Tensor]
    classes: Sequence[str]
    source: str

    def name(self, index: int) -> str:
        """Of a class; its number where it has no name."""
        return str(self.classes[index]) if index < len(self.classes) else str(index)


def preparation_of(source: Named, image_size: Sequence[int], origin: str | None = None) -> Preparation:
    """As the evaluation of the run did it, or without one, as timm does it for this model.

    Args:
        source: what the net was named by.
        image_size: (C, H, W) of the net.
        origin: timm name of the model that the net was made from.

    Raises:
        SteppingError: the run's data set cannot be opened, or nobody says how pictures were prepared.
    """
    if source.run is not None:
        return _of_run(source.run)
    if origin is None:
        raise SteppingError(
            f"{source.word}: neither a run nor a timm model says how pictures are prepared for this net. Give the "
            "folder of its run."
        )
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg

    own = get_pretrained_cfg(origin)
    config = resolve_data_config({"input_size": tuple(image_size)}, pretrained_cfg=own.to_dict() if own else {})
    channels, height, width = image_size
    for key in ("mean", "std"):
        if len(config[key]) != channels:  # timm adds up or repeats the weights of the first layer
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    chosen = {key: config[key] for key in ("interpolation", "mean", "std", "crop_pct")}
    transform = create_transform((channels, height, width), **chosen)
    return Preparation(_in_mode("L" if image_size[0] == 1 else "RGB", transform), (), f"timm's {origin}")


def _of_run(folder: Path) -> Preparation:
    recipe = load_recipe(folder / "recipe.yaml")
    data = Parts(recipe, folder, lambda text: None).data
    mode = "L" if data.in_chans == 1 else "RGB"
    if isinstance(data.test, TransformSet):
        transform = data.test.transform
    elif recipe.data.name == "imagefolder":
        transform = _Normalised(bytes_of(recipe.data), data.mean, data.std)
    else:
        transform = _Normalised(_Resized(data.img_size), data.mean, data.std)
    return Preparation(_in_mode(mode, transform), data.classes, f"the evaluation of {folder}")


def _in_mode(mode: str, transform: Callable[[Any], Any]) -> Callable[[Image], Tensor]:
    return lambda picture: transform(picture.convert(mode))


@dataclass(frozen=True)
class _Resized:
    """What sets of arrays do: bytes are resized by torch, to bytes."""

    size: int

    def __call__(self, picture: Image) -> Tensor:
        pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
        pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        if tuple(pixels.shape[1:]) == (self.size, self.size):
            return pixels
        resized = F.interpolate(pixels[None].float(), (self.size, self.size), mode="bilinear", antialias=True)
        return resized[0].round().byte()


@dataclass(frozen=True)
class _Normalised:
    """Bytes (C, H, W) of a picture, scaled to [0, 1] and normalised."""

    as_bytes: Callable[[Image], Tensor]
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, picture: Image) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (self.as_bytes(picture).float() / 255 - mean) / std


# ------------------------------------------------------------------------------------------------- files


def files_of(words: Iterable[str]) -> list[Path]:
    """Files as they are named, and the pictures in folders, in order.

    Raises:
        SteppingError: no such file, or a folder without pictures.
    """
    from timm.data.readers.img_extensions import get_img_extensions

    endings, found = set(get_img_extensions(as_set=True)), []
    for word in words:
        path = Path(word)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and p.is_file())
            if not inside:
                raise SteppingError(f"{word}: no picture in this folder ({', '.join(sorted(endings))}).")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise SteppingError(f"{word}: no such file or folder.")
    return found


def opened(files: Iterable[Path], prepare: Callable[[Image], Tensor]) -> Iterator[tuple[Path, Tensor | str]]:
    """Every file with its picture, prepared, or with the reason why it is none."""
    from PIL import Image

    for path in files:
        try:
            with Image.open(path) as picture:
                yield path, prepare(picture)
        except UNREADABLE as error:
            yield path, " ".join(str(error).split())[:200] or type(error).__name__
