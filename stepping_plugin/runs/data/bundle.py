"""A data set as a run holds it: three parts, and what a model must know about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import DataConfig
from stepping_plugin.training.loader import EpochLoader, ImageSet

from .sources import LeftOut

__all__ = ["DataBundle", "check_channels"]


@dataclass(frozen=True)
class DataBundle:
    """The three parts of a data set and what a model must know about it.

    `val` chooses (checkpoints, thresholds), `test` is what gets reported. They are the same set where the recipe wants
    nothing held out: `val is test` tells.

    Attributes:
        num_classes, in_chans, img_size: of the model to build (images are square).
        mean, std: per channel; the loaders' images are normalised with them.
        classes: their names in the order of the class scores; empty where the set has none.
        train_labels: of the training pictures, int64; None: only opening the pictures would tell.
        balanced: batches of training pictures hold every class equally often.
        warnings: what the recipe may not want, in sentences.
        to_bytes: made the bytes of a folder in memory from opened pictures; None: they were taken as they are.
        left_out: pictures that could not be read so far, of all parts.
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
    train_labels: Tensor | None = None
    balanced: bool = False
    warnings: tuple[str, ...] = ()
    to_bytes: Callable[[Any], Tensor] | None = None
    left_out: LeftOut = field(default_factory=lambda: LeftOut(lambda text: None))

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.in_chans, self.img_size, self.img_size

    def notes(self) -> list[str]:
        """For a report: warnings, and what is in no figure. In a distributed run every process calls it."""
        for name in gather_object(list(self.left_out.names)):
            self.left_out.names[name] = None
        return [*self.warnings, *self.left_out.notes()]

    def loader(self, part: str, batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1) -> EpochLoader:
        """Loader of "train" (shuffled, augmented), "val" or "test" (in order, as they are, none twice)."""
        data, train = {"train": self.train, "val": self.val, "test": self.test}[part], part == "train"
        labels = self.train_labels if train and self.balanced else None
        return EpochLoader(data, batch_size, train=train, seed=seed, rank=rank, world=world, balance=labels)


def check_channels(cfg: DataConfig, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """One number per channel each, where they are given.

    Raises:
        SteppingError: more or fewer.
    """
    for key, values in (("data.mean", mean), ("data.std", std)):
        if len(values) != channels:
            expected = f"{channels} values, one per channel of {cfg.name}"
            raise SteppingError(explain("wrong number of channels", where=key, got=list(values), expected=expected))
