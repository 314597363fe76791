"""Pictures that stay on disk: opened one by one, transformed by timm."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import TORCH_SETS, DataConfig
from stepping_plugin.training.loader import TransformSet

from .bundle import DataBundle, check_channels
from .sources import LeftOut, Opened, Source, TimmSet

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
    targets = getattr(dataset, "targets", None)
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
    config = _model_config(cfg, model_name)
    train_transform, eval_transform = _transforms(cfg, config)
    train, val, test = parts
    test_set = TransformSet(Opened(test), eval_transform, None, cfg.workers, left_out)
    return DataBundle(
        name=cfg.name,
        train=TransformSet(Opened(train), train_transform, None, cfg.workers, left_out),
        val=test_set if val is test else TransformSet(Opened(val), eval_transform, None, cfg.workers, left_out),
        test=test_set,
        num_classes=_count_classes(cfg, train),
        in_chans=config["input_size"][0],
        img_size=config["input_size"][-1],
        mean=config["mean"],
        std=config["std"],
        classes=train.classes,
        left_out=left_out,
    )


def _model_config(cfg: DataConfig, model_name: str | None) -> dict[str, Any]:
    """timm's data configuration: of the recipe, else of the model."""
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    own = get_pretrained_cfg(model_name) if model_name else None
    check_channels(cfg, 3, cfg.mean or (0,) * 3, cfg.std or (1,) * 3)  # pictures are opened in RGB
    return resolve_data_config(
        cfg.model_dump(include={"img_size", "mean", "std", "interpolation", "crop_pct"}),
        pretrained_cfg=own.to_dict() if own else {"input_size": (3, 224, 224)},
    )


def _transforms(cfg: DataConfig, config: dict[str, Any]) -> tuple[Any, Any]:
    """Of training and of evaluation."""
    from timm.data import create_transform

    size, norm = config["input_size"], {"mean": config["mean"], "std": config["std"]}
    chosen = cfg.model_dump(include={"scale", "ratio", "hflip", "color_jitter"}, exclude_none=True)
    try:
        train = create_transform(
            size,
            is_training=True,
            auto_augment=cfg.aa,
            re_prob=cfg.reprob,
            interpolation="random",
            **norm,
            **chosen,
        )
    except (AssertionError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"timm cannot read it ({type(error).__name__}: {error})"
        expected = "a policy such as rand-m9-mstd0.5-inc1, augmix-m5-w4 or original-mstd0.5"
        raise SteppingError(explain(reason, where="data.aa", got=cfg.aa, expected=expected)) from error
    return train, create_transform(size, interpolation=config["interpolation"], crop_pct=config["crop_pct"], **norm)


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
