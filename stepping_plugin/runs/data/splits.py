"""Who is trained on, who chooses, who is measured: parts of a set that overlap in nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import DataConfig
from stepping_plugin.training.loader import seeded_generator

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["split_parts", "stratified_split"]

_VAL_SHARE = 0.1  # of the training pictures, where the set has no validation part
_TEST_SHARE = 0.2  # where it has no test part


class Splittable(Protocol):
    """Pictures and their labels, int64 (M,), if they are known."""

    @property
    def labels(self) -> Tensor | None: ...

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Self: ...


PartT = TypeVar("PartT", bound=Splittable)


def split_parts(cfg: DataConfig, train: PartT, val: PartT | None, test: PartT | None) -> tuple[PartT, PartT, PartT]:
    """Training, validation and test part, what is missing being held out of the training part.

    Where only one of validation and test part is there, it is for testing: what is reported is not measured on the
    pictures that chose. Held out is a share of every class, or of all where labels are unknown. With
    `data.val_fraction: 0` the validation part is the test part.

    Raises:
        SteppingError: a share for a part that is there, or nothing is left to train on.
    """
    if test is None:
        val, test = None, val
    for key, share, part in (("val_fraction", cfg.val_fraction, val), ("test_fraction", cfg.test_fraction, test)):
        if share is not None and part is not None:
            name = key.partition("_")[0]
            action = f"Remove the key: the set has a {name} part of its own, {len(part):,} pictures."
            raise SteppingError(explain("has no effect", where=f"data.{key}", got=share, action=action))
    if test is None:
        kept, held = _hold_out(train, _TEST_SHARE if cfg.test_fraction is None else cfg.test_fraction, cfg)
        train, test = train.take(kept), train.take(held)
    share = _VAL_SHARE if cfg.val_fraction is None else cfg.val_fraction
    if val is None and share:
        kept, held = _hold_out(train, share, cfg)
        train, val = train.take(kept), train.take(held)
    if not len(train) or not len(test) or (val is not None and not len(val)):
        sizes = ", ".join(f"{len(part)} {name}" for name, part in (("training", train), ("test", test)))
        got = f"{sizes} pictures" if val is None else f"{sizes}, {len(val)} validation pictures"
        action = "Check data.root, data.val_fraction and data.test_fraction."
        raise SteppingError(explain(f"data set {cfg.name!r} is empty in part", got=got, action=action))
    if cfg.limit is not None:
        order = torch.randperm(len(train), generator=seeded_generator("limit", cfg.split_seed))
        train = train.take(order[: cfg.limit])
    return train, test if val is None else val, test


def _hold_out(part: Splittable, share: float, cfg: DataConfig) -> tuple[Tensor, Tensor]:
    if part.labels is not None:
        return stratified_split(part.labels, share, cfg.split_seed)
    order = torch.randperm(len(part), generator=seeded_generator("split", cfg.split_seed))
    held = round(share * len(part))
    return order[held:].sort().values, order[:held].sort().values


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (kept, held out), each in the order of the set.

    Of every class `share` is held out, rounded, but neither none nor all of those that have two members.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=seeded_generator("split", seed, label))
        count = min(max(round(share * len(members)), 1 if share else 0), len(members) - 1)
        held[members[order[:count]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()
