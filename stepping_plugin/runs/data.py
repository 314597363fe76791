"""Data by name: `build_data(DataConfig(name="digits"))`.

Three kinds. *In memory*: `digits` (comes with scikit-learn), `fashion_mnist` (idx files) and torchvision's
small sets (`cifar10`, `cifar100`, `mnist`, `kmnist`, `qmnist`, through timm). *Folders*: `imagefolder`, with
one subfolder per class under train/ and val/. *Anything else that timm opens*: `torch/imagenet`, `hfds/NAME`.
Loaders: `stepping_plugin.training.loader`.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from psutil import virtual_memory
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import TORCH_SETS, DataConfig
from stepping_plugin.training.loader import (
    Augment,
    EpochLoader,
    EpochSampler,
    ImageSet,
    TensorSet,
    TransformSet,
    seeded_generator,
)

__all__ = ["Augment", "DataBundle", "EpochLoader", "EpochSampler", "TensorSet", "TransformSet", "build_data"]

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist

# Shift in pixels, probability of a mirror image, share of the training set held out for validation.
_IN_MEMORY_DEFAULTS: dict[str, tuple[int, float, float]] = {
    "digits": (1, 0.0, 0.1),
    "fashion_mnist": (2, 0.5, 0.1),
    "cifar10": (4, 0.5, 0.1),
    "cifar100": (4, 0.5, 0.1),
}
_DIGITS_TEST_SHARE = 0.25  # the set comes without a test part


@dataclass(frozen=True)
class DataBundle:
    """The three parts of a data set and what a model must know about it.

    `val` chooses (checkpoints, thresholds), `test` is what gets reported. They are the same set where nothing
    is held out for validation, as is usual for ImageNet: `val is test` tells.

    Attributes:
        num_classes, in_chans, img_size: of the model to build (images are square).
        mean, std: per channel; the loaders' images are normalised with them.
    """

    name: str
    train: ImageSet
    val: ImageSet
    test: ImageSet
    num_classes: int
    in_chans: int
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.in_chans, self.img_size, self.img_size

    def loader(self, part: str, batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1) -> EpochLoader:
        """Loader of "train" (shuffled, augmented), "val" or "test" (in order, as they are, none twice)."""
        data = {"train": self.train, "val": self.val, "test": self.test}[part]
        return EpochLoader(data, batch_size, train=part == "train", seed=seed, rank=rank, world=world)


def build_data(cfg: DataConfig, model_name: str | None = None) -> DataBundle:
    """Open the data set that `cfg` names.

    Args:
        cfg: section `data` of a recipe.
        model_name: timm model whose own size, mean, std and interpolation are the defaults for sets on disk.

    Raises:
        SteppingError: data missing, damaged or empty; the text says how to get it.
    """
    if cfg.name == "digits":
        return _in_memory(cfg, *_digits(cfg))
    if cfg.name == "fashion_mnist":
        return _in_memory(cfg, *_fashion_mnist(cfg))
    if cfg.name == "imagefolder":
        return _on_disk(cfg, model_name, *_image_folders(cfg))
    train, test = _timm_dataset(cfg, cfg.train_split), _timm_dataset(cfg, cfg.val_split)
    if hasattr(train, "data") and hasattr(train, "targets"):
        return _in_memory(cfg, _arrays(train), _arrays(test))
    return _on_disk(cfg, model_name, train, test)


# --- In memory ----------------------------------------------------------------------------------------------


class Pictures(NamedTuple):
    """uint8 (M, C, H, W) and int64 (M,)."""

    images: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> Pictures:
        return Pictures(self.images[indices], self.labels[indices])


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (kept, held out), `share` of every class held out, rounded; each in the order of the set."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=seeded_generator("split", seed, label))
        held[members[order[: round(share * len(members))]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _in_memory(cfg: DataConfig, train: Pictures, test: Pictures) -> DataBundle:
    shift, hflip, val_share = _IN_MEMORY_DEFAULTS.get(cfg.name.removeprefix("torch/"), (2, 0.0, 0.1))
    shift = shift if cfg.shift is None else cfg.shift
    hflip = hflip if cfg.hflip is None else cfg.hflip
    val_share = val_share if cfg.val_fraction is None else cfg.val_fraction
    if min(len(train.labels), len(test.labels)) == 0:
        raise SteppingError(f"data set {cfg.name!r} is empty: check the files in data.root")
    num_classes = int(train.labels.max()) + 1
    if cfg.img_size is not None:
        _check_memory(cfg, len(train.labels) + len(test.labels), train.images.shape[1])
        train, test = (_resize(part, cfg.img_size) for part in (train, test))
    kept, held = stratified_split(train.labels, val_share, cfg.split_seed)
    val = train.take(held) if len(held) else test
    train = train.take(_limited(kept, cfg))
    mean, std = _statistics(train.images)
    mean, std = tuple(cfg.mean or mean), tuple(cfg.std or std)
    channels, height, width = train.images.shape[1:]
    if cfg.shift and shift >= min(height, width):
        expected = f"less than the {min(height, width)} pixels of the pictures"
        raise SteppingError(
            explain("the pictures would leave the frame", where="data.shift", got=shift, expected=expected)
        )
    _check_channels(cfg, channels, mean, std)
    test_set = TensorSet(*test, mean, std)
    return DataBundle(
        name=cfg.name,
        train=TensorSet(*train, mean, std, Augment(shift, hflip)),
        val=TensorSet(*val, mean, std) if len(held) else test_set,
        test=test_set,
        num_classes=num_classes,
        in_chans=channels,
        img_size=max(height, width),
        mean=mean,
        std=std,
    )


def _limited(indices: Tensor, cfg: DataConfig) -> Tensor:
    """`cfg.limit` of the indices, chosen by the split seed."""
    if cfg.limit is None:
        return indices
    order = torch.randperm(len(indices), generator=seeded_generator("limit", cfg.split_seed))
    return indices[order[: cfg.limit]]


def _check_memory(cfg: DataConfig, pictures: int, channels: int) -> None:
    """Sets in memory are resized once, as a whole; for a moment they are there twice."""
    needed, memory = 2 * pictures * channels * (cfg.img_size or 1) ** 2, virtual_memory().available
    if needed > memory / 2:
        sizes = f"{needed / 2**30:.0f} GiB for {pictures:,} pictures, {memory / 2**30:.0f} GiB are free"
        got = f"{cfg.img_size}: {sizes}"
        raise SteppingError(explain("too large", where="data.img_size", got=got, action="Take smaller pictures."))


def _resize(part: Pictures, size: int) -> Pictures:
    if part.images.shape[-2:] == (size, size):
        return part
    blocks = [  # in blocks: float copies of a whole set are large
        F.interpolate(block.float(), (size, size), mode="bilinear", antialias=True).round().byte()
        for block in part.images.split(max(1, 2**24 // size**2))
    ]
    return Pictures(torch.cat(blocks), part.labels)


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], exact: from the histogram of the values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float(share @ values)
        means.append(mean)
        stds.append(max(float(share @ (values - mean) ** 2) ** 0.5, 1e-6))
    return tuple(means), tuple(stds)


def _check_channels(cfg: DataConfig, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """One number per channel each, where they are given."""
    for key, values in (("data.mean", mean), ("data.std", std)):
        if len(values) != channels:
            expected = f"{channels} values, one per channel of {cfg.name}"
            raise SteppingError(explain("wrong number of channels", where=key, got=list(values), expected=expected))


def _digits(cfg: DataConfig) -> tuple[Pictures, Pictures]:
    """1,797 pictures of 8x8 pixels that scikit-learn carries with it."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    pictures = Pictures(images, torch.from_numpy(digits.target.astype(np.int64)))
    train, test = stratified_split(pictures.labels, _DIGITS_TEST_SHARE, cfg.split_seed)
    return pictures.take(train), pictures.take(test)


def _fashion_mnist(cfg: DataConfig) -> tuple[Pictures, Pictures]:
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


def _arrays(dataset: Any) -> Pictures:
    """A torchvision set that keeps its pictures as one array, (M, H, W) or (M, H, W, C)."""
    images = torch.as_tensor(np.asarray(dataset.data))
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(np.asarray(dataset.targets), dtype=torch.int64)
    return Pictures(images, labels if labels.ndim == 1 else labels[:, 0])  # QMNIST: the class is column 0


# --- On disk ------------------------------------------------------------------------------------------------


def _timm_dataset(cfg: DataConfig, split: str) -> Any:
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


def _image_folders(cfg: DataConfig) -> tuple[Any, Any]:
    """Train and validation folder; classes are numbered by the train folder's subfolders."""
    from timm.data import create_dataset

    if cfg.root is None:
        raise SteppingError("data.name=imagefolder needs data.root=FOLDER with train/CLASS/*.jpg and val/CLASS/*.jpg")
    folders = [_subfolder(Path(cfg.root), ("train",)), _subfolder(Path(cfg.root), ("val", "validation"))]
    try:
        train, test = (create_dataset("", root=str(folder), search_split=False) for folder in folders)
    except RuntimeError as error:
        raise SteppingError(f"no pictures under {cfg.root}: {error}") from None
    classes = train.reader.class_to_idx
    strangers = sorted(set(test.reader.class_to_idx) - set(classes))
    if strangers:
        raise SteppingError(f"{folders[1]} has classes that {folders[0]} lacks: {', '.join(strangers[:5])}")
    if test.reader.class_to_idx != classes:  # some class has no validation picture
        test = create_dataset("", root=str(folders[1]), search_split=False, class_map=classes)
    return train, test


def _subfolder(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise SteppingError(
        f"{root} has no folder {' or '.join(names)}/. Pass data.root=FOLDER that holds train/ and val/."
    )


def _on_disk(cfg: DataConfig, model_name: str | None, train: Any, test: Any) -> DataBundle:
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg

    own = get_pretrained_cfg(model_name) if model_name else None
    _check_channels(cfg, 3, cfg.mean or (0,) * 3, cfg.std or (1,) * 3)  # pictures are opened in RGB
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
    order = torch.randperm(len(train), generator=seeded_generator("split", cfg.split_seed))
    held = round((cfg.val_fraction or 0) * len(train))
    kept = _limited(order[held:], cfg).tolist()
    if not kept:
        raise SteppingError(f"data set {cfg.name!r}: no picture is left to train on; data.val_fraction takes them all.")
    test_set = TransformSet(_Counted(test), eval_transform, workers=cfg.workers)
    val_set = TransformSet(_Counted(train), eval_transform, order[:held].tolist(), cfg.workers) if held else test_set
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
