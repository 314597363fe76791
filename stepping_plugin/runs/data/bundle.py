"""A data set as a run holds it: three parts, and what a model must know about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import DataConfig
from stepping_plugin.training.loader import EpochLoader, ImageSet, seeded_generator

__all__ = ["DataBundle", "check_channels", "limited", "stratified_split"]


@dataclass(frozen=True)
class DataBundle:
    """The three parts of a data set and what a model must know about it.

    `val` chooses (checkpoints, thresholds), `test` is what gets reported. They are the same set where nothing
    is held out for validation, as is usual for ImageNet: `val is test` tells.

    Attributes:
        num_classes, in_chans, img_size: of the model to build (images are square).
        mean, std: per channel; the loaders' images are normalised with them.
        classes: their names in the order of the class scores; empty where the set has none.
        left_out: files of pictures that could not be read, and are in no part.
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
    classes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.in_chans, self.img_size, self.img_size

    def loader(self, part: str, batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1) -> EpochLoader:
        """Loader of "train" (shuffled, augmented), "val" or "test" (in order, as they are, none twice)."""
        data = {"train": self.train, "val": self.val, "test": self.test}[part]
        return EpochLoader(data, batch_size, train=part == "train", seed=seed, rank=rank, world=world)


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (kept, held out), `share` of every class held out, rounded; each in the order of the set."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=seeded_generator("split", seed, label))
        held[members[order[: round(share * len(members))]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def limited(indices: Tensor, cfg: DataConfig) -> Tensor:
    """`cfg.limit` of the indices, chosen by the split seed."""
    if cfg.limit is None:
        return indices
    order = torch.randperm(len(indices), generator=seeded_generator("limit", cfg.split_seed))
    return indices[order[: cfg.limit]]


def check_channels(cfg: DataConfig, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """One number per channel each, where they are given.

    Raises:
        SteppingError: more or fewer.
    """
    for key, values in (("data.mean", mean), ("data.std", std)):
        if len(values) != channels:
            expected = f"{channels} values, one per channel of {cfg.name}"
            raise SteppingError(explain("wrong number of channels", where=key, got=list(values), expected=expected))
