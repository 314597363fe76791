"""From files to the pictures that a net is asked about: found, opened, and prepared as they were for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..engine.pictures import prepared
from ..errors import SteppingError
from ..files.metadata import Metadata
from ..training.loader import TransformSet
from ..views.named import Named
from .data.build import bytes_of
from .data.channels import EXTENSIONS, as_channels, open_file
from .data.sources import UNREADABLE
from .data.transforms import data_config, transforms
from .parts import Parts
from .recipe import load_recipe
from .recipe_data import DataConfig

__all__ = ["Preparation", "files_of", "opened", "preparation_of"]

EMPTY = Metadata()  # of files that say nothing


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes a net's input.

    Attributes:
        open: file -> float32 (C, H, W).
        classes: their names, in the order of the scores; empty: nobody says.
        source: where that is known from, in words.
    """

    open: Callable[[Path], Tensor]
    classes: Sequence[str]
    source: str

    def name(self, index: int) -> str:
        """Of a class; its number where it has no name."""
        return str(self.classes[index]) if index < len(self.classes) else str(index)


def preparation_of(
    source: Named, image_size: Sequence[int], origin: str | None = None, metadata: Metadata = EMPTY
) -> Preparation:
    """As the net's file says; else as the evaluation of its run did it; without one, as timm does it for this model.

    Args:
        source: what the net was named by.
        image_size: (C, H, W) of the net.
        origin: timm name of the model that the net was made from.
        metadata: of the net or engine.

    Raises:
        SteppingError: the run's data set cannot be opened, or nobody says how pictures were prepared.
    """
    how = metadata.preprocessing
    if how is not None:
        return Preparation(lambda path: prepared(path, how), metadata.classes or (), f"the file of {source.word}")
    if source.run is not None:
        return _of_run(source.run)
    if origin is None:
        raise SteppingError(
            f"{source.word}: neither a run nor a timm model says how pictures are prepared for this net. Give the "
            "folder of its run."
        )
    cfg = DataConfig(name="imagefolder", in_chans=image_size[0], img_size=image_size[-1])
    _, transform = transforms(cfg, data_config(cfg, origin))
    return Preparation(_opening(transform, image_size[0]), (), f"timm's {origin}")


def _of_run(folder: Path) -> Preparation:
    recipe = load_recipe(folder / "recipe.yaml")
    parts = Parts(recipe, folder, lambda text: None)
    data, model = parts.data, recipe.model
    transform: Callable[[Any], Tensor]
    if isinstance(data.test, TransformSet):
        transform = data.test.transform
    else:
        as_bytes = bytes_of(recipe.data, model.name, pretrained=parts.pretrained) or _Resized(data.img_size)
        transform = _Normalised(as_bytes, data.mean, data.std)
    return Preparation(_opening(transform, data.in_chans), data.classes, f"the evaluation of {folder}")


def _opening(transform: Callable[[Any], Tensor], channels: int) -> Callable[[Path], Tensor]:
    return lambda path: transform(as_channels(open_file(str(path)), channels, str(path)))


@dataclass(frozen=True)
class _Resized:
    """What sets of arrays do: bytes are resized by torch, to bytes."""

    size: int

    def __call__(self, picture: Any) -> Tensor:
        pixels = picture if isinstance(picture, Tensor) else pil_to_tensor(picture)
        if tuple(pixels.shape[1:]) == (self.size, self.size):
            return pixels
        resized = F.interpolate(pixels[None].float(), (self.size, self.size), mode="bilinear", antialias=True)
        return resized[0].round().byte()


@dataclass(frozen=True)
class _Normalised:
    """Bytes (C, H, W) of a picture, scaled to [0, 1] and normalised."""

    as_bytes: Callable[[Any], Tensor]
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, picture: Any) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (self.as_bytes(picture).float() / 255 - mean) / std


# ------------------------------------------------------------------------------------------------- files


def files_of(words: Iterable[str]) -> list[Path]:
    """Files as they are named, and the pictures in folders, in order.

    Raises:
        SteppingError: no such file, or a folder without pictures.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not inside:
                raise SteppingError(f"{word}: no picture in this folder ({', '.join(EXTENSIONS)}).")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise SteppingError(f"{word}: no such file or folder.")
    return found


def opened(files: Iterable[Path], preparation: Preparation) -> Iterator[tuple[Path, Tensor | str]]:
    """Every file with its picture, prepared, or with the reason why it is none."""
    for path in files:
        try:
            yield path, preparation.open(path)
        except (*UNREADABLE, SteppingError) as error:
            yield path, " ".join(str(error).split())[:200] or type(error).__name__
