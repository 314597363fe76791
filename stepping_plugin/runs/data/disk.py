"""Pictures that stay on disk: opened one by one, transformed by timm."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import TORCH_SETS, DataConfig
from stepping_plugin.training.loader import TransformSet

from .bundle import DataBundle
from .crops import crop_warnings
from .sources import LeftOut, Opened, Source, TimmSet
from .transforms import data_config, transforms

__all__ = ["on_disk", "timm_dataset", "timm_source"]


def timm_dataset(cfg: DataConfig, split: str) -> Any:
    """`timm.data.create_dataset`, with one error for all the ways in which data can be absent."""
    from timm.data import create_dataset

    name = f"torch/{cfg.name}" if cfg.name in TORCH_SETS else cfg.name
    root = cfg.root if cfg.root is not None else "data"
    try:
        dataset = create_dataset(name, root=root, split=split, download=cfg.download)
    except (RuntimeError, OSError, AssertionError, ValueError, ImportError) as error:
        raise SteppingError(
            f"data set {cfg.name!r}, split {split!r}, cannot be opened in {root}: {error} "
            f"Pass data.root=FOLDER that holds it, or data.download=true where the source allows it."
        ) from error
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise SteppingError(
            f"data set {cfg.name!r} can only be read as a stream, which cannot be resumed. "
            f"Use a form that is indexed (hfds/ instead of hfids/, or an image folder)."
        )
    return dataset


def timm_source(cfg: DataConfig, dataset: Any) -> TimmSet:
    """A set that timm opened, with what it tells about labels and classes."""
    listed = getattr(getattr(dataset, "reader", None), "iter_targets", None)
    targets = getattr(dataset, "targets", None) if listed is None else list(listed())
    labels = None if targets is None else torch.as_tensor(np.asarray(targets), dtype=torch.int64)
    numbers = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}
    classes = sorted(numbers, key=numbers.__getitem__)
    return TimmSet(cfg.name, dataset, labels, tuple(str(name) for name in classes))


def on_disk(
    cfg: DataConfig, model_name: str | None, parts: tuple[Source, Source, Source], left_out: LeftOut
) -> DataBundle:
    """A set whose pictures are opened when they are needed.

    Args:
        cfg: of the recipe.
        model_name: timm model whose own size, mean, std and interpolation are the defaults.
        parts: training, validation and test pictures.
        left_out: told of pictures that cannot be read.

    Raises:
        SteppingError: keys that timm cannot use.
    """
    if cfg.balance and parts[0].labels is None:
        reason = f"data set {cfg.name!r} tells the class of a picture only when it is opened"
        raise SteppingError(explain(reason, where="data.balance", action="Take a set with labels, or remove the key."))
    config = data_config(cfg, model_name)
    augmented, plain = transforms(cfg, config)
    warnings = tuple(crop_warnings(cfg, config, parts[0], random=True))
    channels, _, img_size = config["input_size"]

    def images(part: Source, transform: Any) -> TransformSet:
        return TransformSet(Opened(part, channels), transform, None, cfg.workers, left_out)

    train, val, test = parts
    test_set = images(test, plain)
    return DataBundle(
        name=cfg.name,
        train=images(train, augmented),
        val=test_set if val is test else images(val, plain),
        test=test_set,
        num_classes=_count_classes(cfg, train),
        in_chans=channels,
        img_size=img_size,
        mean=config["mean"],
        std=config["std"],
        classes=train.classes,
        train_labels=train.labels,
        balanced=cfg.balance == "sampler",
        left_out=left_out,
        warnings=warnings,
    )


def _count_classes(cfg: DataConfig, train: Source) -> int:
    known = len(train.classes)
    count = cfg.num_classes or known
    if count < known:
        raise SteppingError(
            explain("too few", where="data.num_classes", got=count, expected=f"at least the {known} classes of the set")
        )
    if not count:
        raise SteppingError(f"data set {cfg.name!r} does not tell its number of classes: pass data.num_classes=COUNT")
    return count
