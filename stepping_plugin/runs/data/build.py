"""Which set a recipe means, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from stepping_plugin.runs.recipe_schema import FOLDERS, DataConfig

from .arrays import digits, fashion_mnist, torchvision_arrays
from .bundle import DataBundle
from .decoding import converter, decoded, decoding_config
from .disk import on_disk, timm_dataset, timm_source
from .folders import image_folders, is_image_folder, root_of
from .hub import dataset_folder
from .memory import in_memory
from .sources import LeftOut
from .splits import split_parts
from .tables import labelled_files

__all__ = ["build_data", "bytes_of"]

_FOLDERS: dict[str, Callable[[DataConfig], tuple[Any, Any, Any]]] = {
    "imagefolder": image_folders,
    "csv": labelled_files,
    "hfds": dataset_folder,
}
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
    bundle = _opened(cfg, model_name if pretrained or not cfg.in_memory else None, say)
    for text in bundle.warnings:
        say(f"warning: {text}")
    return bundle


def _opened(cfg: DataConfig, model_name: str | None, say: Callable[[str], None]) -> DataBundle:
    if cfg.val_fraction == 0:
        say("data.val_fraction: 0: the test pictures are for validation too, every other one for thresholds")
    if cfg.name in ("digits", "fashion_mnist"):
        arrays = digits(cfg) if cfg.name == "digits" else fashion_mnist(cfg)
        return in_memory(cfg, split_parts(cfg, arrays[0], None, arrays[1]))
    left_out = LeftOut(say)
    if cfg.name in FOLDERS or _are_pictures(cfg):
        parts = split_parts(cfg, *_FOLDERS.get(cfg.name, image_folders)(cfg))
        if cfg.in_memory or cfg.name not in FOLDERS:
            return decoded(cfg, parts, model_name if cfg.in_memory else None, left_out)
        return on_disk(cfg, model_name, parts, left_out)
    train, test = timm_dataset(cfg, cfg.train_split), timm_dataset(cfg, cfg.val_split)
    if hasattr(train, "data") and hasattr(train, "targets"):
        return in_memory(cfg, split_parts(cfg, torchvision_arrays(train), None, torchvision_arrays(test)))
    sets = split_parts(cfg, timm_source(cfg, train), None, timm_source(cfg, test))
    return on_disk(cfg, model_name, sets, left_out)


def bytes_of(cfg: DataConfig, model_name: str | None, *, pretrained: bool = False) -> Callable[..., Tensor] | None:
    """How pictures of a set that is decoded into memory become bytes, (C, H, W); None: the set comes as arrays."""
    if not (cfg.name in FOLDERS or _are_pictures(cfg)):
        return None
    model = model_name if pretrained and cfg.in_memory else None
    return converter(cfg, decoding_config(cfg, model))


def _are_pictures(cfg: DataConfig) -> bool:
    """Whether one of torchvision's sets is there as folders of pictures, and not as torchvision keeps it."""
    name, root = cfg.name.removeprefix("torch/"), root_of(cfg)
    return name in _OWN_FOLDER and not (root / _OWN_FOLDER[name]).is_dir() and is_image_folder(root)
