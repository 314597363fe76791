"""Small sets that come as arrays: digits, Fashion-MNIST's idx files, torchvision's."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepping_plugin.errors import SteppingError
from stepping_plugin.runs.recipe_schema import DataConfig

from .memory import Pictures
from .splits import stratified_split

__all__ = ["digits", "fashion_mnist", "torchvision_arrays"]

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
_DIGITS_TEST_SHARE = 0.25  # the set comes without a test part


def digits(cfg: DataConfig) -> tuple[Pictures, Pictures]:
    """1,797 pictures of 8x8 pixels that scikit-learn carries with it."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy((data.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    pictures = Pictures(images, torch.from_numpy(data.target.astype(np.int64)))
    train, test = stratified_split(pictures.labels, _DIGITS_TEST_SHARE, cfg.split_seed)
    return pictures.take(train), pictures.take(test)


def fashion_mnist(cfg: DataConfig) -> tuple[Pictures, Pictures]:
    root = Path(cfg.root) if cfg.root is not None else FASHION_MNIST_ROOT
    return _idx_pictures(root, "train"), _idx_pictures(root, "t10k")


def _idx_pictures(root: Path, prefix: str) -> Pictures:
    images = _read_idx(_find_idx(root, f"{prefix}-images-idx3-ubyte"), 3)
    labels = _read_idx(_find_idx(root, f"{prefix}-labels-idx1-ubyte"), 1)
    if len(images) != len(labels):
        raise SteppingError(
            f"{root}: {len(images)} pictures but {len(labels)} labels in {prefix}-*. Get the files anew."
        )
    return Pictures(images.unsqueeze(1), labels.long())


def _find_idx(root: Path, name: str) -> Path:
    for folder in (root, root / "FashionMNIST" / "raw"):  # the second is where torchvision puts it
        for suffix in (".gz", ""):
            if (folder / (name + suffix)).is_file():
                return folder / (name + suffix)
    raise SteppingError(
        f"Fashion-MNIST not found: no {name}.gz in {root}. On Debian or Ubuntu run "
        f"`apt-get install dataset-fashion-mnist`, or pass data.root=FOLDER with the four idx files."
    )


def _read_idx(path: Path, dims: int) -> Tensor:
    """uint8 array of an idx file: 2 zero bytes, type 8, number of dimensions, big-endian sizes, bytes."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, found = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{found}I", raw, 4)
        if (zero, kind, found) != (0, 8, dims):
            raise ValueError(f"not a {dims}-dimensional array of bytes")
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise SteppingError(f"{path}: damaged idx file ({error}). Get it anew.") from None


def torchvision_arrays(dataset: Any) -> Pictures:
    """A torchvision set that keeps its pictures as one array, (M, H, W) or (M, H, W, C)."""
    images = torch.as_tensor(np.asarray(dataset.data))
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(np.asarray(dataset.targets), dtype=torch.int64)
    return Pictures(images, labels if labels.ndim == 1 else labels[:, 0])  # QMNIST: the class is column 0
