"""Pictures as inputs of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SteppingError, explain
from ..files.metadata import Preprocessing
from .standalone import prepare

__all__ = ["prepared"]


def prepared(picture: Any, how: Preprocessing | None) -> Tensor:
    """A picture as float32 Tensor (C, H, W).

    Args:
        picture: PIL image, or the path of a file.
        how: of the net.

    Raises:
        SteppingError: no picture, or the net does not say how.
    """
    from PIL import Image, UnidentifiedImageError

    if how is None:
        raise SteppingError(
            "preprocess: this net does not say how its pictures are prepared. Set net.metadata = "
            "Metadata(preprocessing=preprocessing_of(transform)) with the evaluation transform, see "
            "stepping_plugin.training.pictures, and deploy it again; nets of `stepping run` have it."
        )
    try:
        if isinstance(picture, (str, Path)):
            with Image.open(picture) as opened:
                return torch.from_numpy(prepare(opened, how.model_dump()))
        if isinstance(picture, Image.Image):
            return torch.from_numpy(prepare(picture, how.model_dump()))
    except (OSError, EOFError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise SteppingError(f"{picture}: this picture cannot be read ({error}).") from None
    raise SteppingError(explain("no picture", got=type(picture).__name__, expected="a PIL image or the path of a file"))
