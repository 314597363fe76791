"""Which set a recipe means, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stepping_plugin.runs.recipe_schema import DataConfig

from .arrays import digits, fashion_mnist, torchvision_arrays
from .bundle import DataBundle
from .decoding import in_memory_folders
from .disk import on_disk, timm_dataset, timm_folder
from .folders import image_folders, is_image_folder
from .memory import in_memory

__all__ = ["build_data"]

# Where torchvision keeps its sets below the root.
_OWN_FOLDER = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "kmnist": "KMNIST", "mnist": "MNIST",
               "qmnist": "QMNIST"}  # fmt: skip


def build_data(
    cfg: DataConfig,
    model_name: str | None = None,
    *,
    pretrained: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> DataBundle:
    """Open the data set that `cfg` names.

    Args:
        cfg: section `data` of a recipe.
        model_name: timm model whose own size, mean, std and interpolation are the defaults for sets on disk.
        pretrained: whether it comes with weights; then pictures of `in_memory: true` are normalised as it wants them.
        say: told what takes long, and what is left out.

    Raises:
        SteppingError: data missing, damaged or empty; the text says how to get it.
    """
    if cfg.name == "digits":
        return in_memory(cfg, *digits(cfg))
    if cfg.name == "fashion_mnist":
        return in_memory(cfg, *fashion_mnist(cfg))
    if cfg.name == "imagefolder" and not cfg.in_memory:
        parts = image_folders(cfg)
        train, val, test = (timm_folder(part) for part in parts)
        return on_disk(cfg, model_name, (train, val, test), parts[0].classes)
    if cfg.name == "imagefolder" or _are_pictures(cfg):
        return in_memory_folders(cfg, image_folders(cfg), model_name if pretrained else None, say)
    train, test = timm_dataset(cfg, cfg.train_split), timm_dataset(cfg, cfg.val_split)
    if hasattr(train, "data") and hasattr(train, "targets"):
        return in_memory(cfg, torchvision_arrays(train), torchvision_arrays(test))
    return on_disk(cfg, model_name, (train, None, test))


def _are_pictures(cfg: DataConfig) -> bool:
    """Whether one of torchvision's sets is there as folders of pictures, and not as torchvision keeps it."""
    name, root = cfg.name.removeprefix("torch/"), Path(cfg.root if cfg.root is not None else "data")
    return name in _OWN_FOLDER and not (root / _OWN_FOLDER[name]).is_dir() and is_image_folder(root)
