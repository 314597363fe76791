"""Sets whose pictures are opened one by one, and transformed by timm."""

from __future__ import annotations

from typing import Any

import torch

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import TORCH_SETS, DataConfig
from stepping_plugin.training.loader import TransformSet, seeded_generator

from .bundle import DataBundle, check_channels, limited
from .folders import Listing

__all__ = ["on_disk", "timm_dataset", "timm_folder"]


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


def timm_folder(part: Listing | None) -> Any:
    """timm's set of the pictures of a folder."""
    from timm.data import create_dataset

    numbers = {name: number for number, name in enumerate(part.classes)} if part else {}
    return part and create_dataset("", root=str(part.folder), search_split=False, class_map=numbers)


def on_disk(
    cfg: DataConfig, model_name: str | None, parts: tuple[Any, Any, Any], classes: tuple[str, ...] = ()
) -> DataBundle:
    """A set out of sized, indexable parts of (picture, label): training, validation, test.

    Args:
        cfg: of the recipe.
        model_name: timm model whose own size, mean, std and interpolation are the defaults.
        parts: validation may be None: then `data.val_fraction` of the training part is held out.
        classes: their names, where known.

    Raises:
        SteppingError: keys that timm cannot use, or that leave nothing to train on.
    """
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg

    own = get_pretrained_cfg(model_name) if model_name else None
    check_channels(cfg, 3, cfg.mean or (0,) * 3, cfg.std or (1,) * 3)  # pictures are opened in RGB
    config = resolve_data_config(
        cfg.model_dump(include={"img_size", "mean", "std", "interpolation", "crop_pct"}),
        pretrained_cfg=own.to_dict() if own else {"input_size": (3, 224, 224)},
    )
    size = config["input_size"]
    norm = {"mean": config["mean"], "std": config["std"]}
    chosen = cfg.model_dump(include={"scale", "ratio", "hflip", "color_jitter"}, exclude_none=True)
    try:
        train_transform = create_transform(
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
    eval_transform = create_transform(size, interpolation=config["interpolation"], crop_pct=config["crop_pct"], **norm)
    train, val, test = parts
    order = torch.randperm(len(train), generator=seeded_generator("split", cfg.split_seed))
    held = round((cfg.val_fraction or 0) * len(train)) if val is None else 0
    kept = limited(order[held:], cfg).tolist()
    if not kept:
        raise SteppingError(f"data set {cfg.name!r}: no picture is left to train on; data.val_fraction takes them all.")
    test_set = TransformSet(_Counted(test), eval_transform, workers=cfg.workers)
    val_set = test_set
    if val is not None:
        val_set = TransformSet(_Counted(val), eval_transform, workers=cfg.workers)
    elif held:
        val_set = TransformSet(_Counted(train), eval_transform, order[:held].tolist(), cfg.workers)
    return DataBundle(
        name=cfg.name,
        train=TransformSet(train, train_transform, kept, cfg.workers),
        val=val_set,
        test=test_set,
        num_classes=_count_classes(cfg, train),
        in_chans=size[0],
        img_size=size[-1],
        mean=config["mean"],
        std=config["std"],
        classes=classes,
    )


class _Counted:
    """Pictures that accuracies are measured on: one that cannot be read is an error.

    timm's image folders give the next picture in its place, which would count with its own label. In training that
    does no harm, and timm logs it.
    """

    def __init__(self, base: Any) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image
        from timm.data import ImageDataset

        if not isinstance(self.base, ImageDataset):
            return self.base[index]
        try:
            file, label, *_ = self.base.reader[index]
            return Image.open(file).convert("RGB"), -1 if label is None else label
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = self.base.reader.filename(index, absolute=True)
            raise SteppingError(
                f"{name}: this picture cannot be read ({error}). Accuracies would be those of other pictures: get it "
                "anew, or remove it."
            ) from None


def _count_classes(cfg: DataConfig, dataset: Any) -> int:
    known = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    count = cfg.num_classes or len(known or ())
    if count < len(known or ()):
        expected = f"at least the {len(known or ())} classes of the set"
        raise SteppingError(explain("too few", where="data.num_classes", got=count, expected=expected))
    if not count:
        raise SteppingError(f"data set {cfg.name!r} does not tell its number of classes: pass data.num_classes=COUNT")
    return count
