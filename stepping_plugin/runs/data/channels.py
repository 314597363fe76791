"""An opened file as a picture of so many channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain

__all__ = ["EXTENSIONS", "as_channels", "open_file", "plain_modes"]

plain_modes = {1: "L", 3: "RGB"}  # that Pillow and timm's augmentations work on
# As torchvision's folders; .npy: arrays (H, W) or (H, W, C).
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".npy")


def open_file(file: str) -> Image.Image | np.ndarray[Any, Any]:
    """A picture, not decoded yet, or an array."""
    return np.load(file, allow_pickle=False) if Path(file).suffix.lower() == ".npy" else Image.open(file)


def as_channels(picture: Image.Image | np.ndarray[Any, Any], channels: int, name: str) -> Image.Image | Tensor:
    """A decoded picture: a Pillow image of mode L or RGB for 1 and 3 channels, uint8 (C, H, W) for others.

    16 bits become the upper 8: Pillow's own conversion would cut everything above 255.

    Args:
        picture: as it was opened. Several pages (TIFF) are channels, if there are as many as channels are wanted.
        channels: grey and RGB are made from any picture, other numbers must be there.
        name: for texts.

    Raises:
        SteppingError: another number of channels, or numbers that are neither 8 nor 16 bits.
        OSError and others: see `sources.UNREADABLE`.
    """
    if isinstance(picture, Image.Image):
        with picture:
            if channels > 1 and getattr(picture, "n_frames", 1) == channels:
                picture = np.stack([np.asarray(page) for page in ImageSequence.Iterator(picture)], -1)
            elif channels in plain_modes and not picture.mode.startswith(("I", "F")):
                return picture.convert(plain_modes[channels])
            else:
                picture = np.asarray(picture)
    array = _bytes(picture, name)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim == 3 and channels in plain_modes and array.shape[-1] in plain_modes:
        return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).convert(plain_modes[channels])
    if array.ndim != 3 or array.shape[-1] != channels:
        expected = f"(H, W, {channels}), because of data.in_chans"
        raise SteppingError(explain("wrong number of channels", where=name, got=f"{array.shape}", expected=expected))
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def _bytes(array: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """uint8 of the same brightness."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.int32 and array.min(initial=0) >= 0 and array.max(initial=0) < 2**16:
        array = array.astype(np.uint16)  # Pillow opens some files of 16 bits so
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return (array >> 8).astype(np.uint8)
    expected, action = "8 or 16 bits per channel", "Convert the pictures once."
    raise SteppingError(explain("numbers of another kind", where=name, got=str(array.dtype), expected=expected,
                                action=action))  # fmt: skip
