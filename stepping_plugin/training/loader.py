"""Loaders whose every batch is a pure function of (seed, epoch, step, rank, world).

A run that is killed and resumed therefore sees the batches that it would have seen. The order of samples does
not depend on how many processes share it: the batches of all ranks at one step make up the batch that a
single process with the whole batch size would see, augmentation included.

`TensorSet` keeps its pictures in memory and augments whole batches; `TransformSet` opens pictures one by one
and sends them through a transform such as timm's.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from stepping_plugin.errors import SteppingError, explain

__all__ = ["Augment", "EpochLoader", "EpochPlan", "EpochSampler", "ImageSet", "TensorSet", "TransformSet",
           "Unreadable",
           "global_seed"]  # fmt: skip

Batch = tuple[Tensor, Tensor]  # images float32 (B, C, H, W), labels int64 (B,)


def derive_seed(*parts: int | str) -> int:
    """One 63-bit seed out of several numbers; equal parts give equal seeds on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seeded_generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*parts))


class EpochSampler:
    """The indices that one process visits in one epoch.

    Args:
        length: number of samples of the set.
        seed: of the run.
        epoch: from 0; every epoch has its own order.
        rank, world: this process and their number. Process r takes every world-th index, from r on.
        shuffle: False keeps the set's order (evaluation).
        even: all ranks get equally many, the first samples of the order being repeated for it. Training needs
            that (gradients are exchanged at every step); evaluation must not have it (samples would count
            twice).
        balance: labels, int64 (length,): every class is visited equally often, see `balanced_order`.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        *,
        shuffle: bool = True,
        even: bool = True,
        balance: Tensor | None = None,
    ) -> None:
        if length < 1:
            raise SteppingError("the data set is empty: there is nothing to load. Check data.root and data.name.")
        if not 0 <= rank < world:
            raise SteppingError(explain("bad rank", got=f"rank {rank} of {world}", expected="0 <= rank < world"))
        order = torch.arange(length)
        if balance is not None:
            order = balanced_order(balance, seeded_generator("order", seed, epoch))
        elif shuffle:
            order = torch.randperm(length, generator=seeded_generator("order", seed, epoch))
        if even:
            total = math.ceil(length / world) * world
            order = order[torch.arange(total) % length]
        self.indices = order[rank::world]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices.tolist())

    def __len__(self) -> int:
        return len(self.indices)


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """As many indices as there are labels, every class equally often (or once more), its samples in turns.

    So a sample of a rare class comes several times per epoch, as often as the others of its class (or once more),
    and of a frequent class every epoch leaves out others.
    """
    classes = labels.unique().tolist()
    share, rest = divmod(len(labels), len(classes))
    favoured = set(torch.randperm(len(classes), generator=generator)[:rest].tolist())
    parts = []
    for place, label in enumerate(classes):
        members, count = (labels == label).nonzero().flatten(), share + (place in favoured)
        turns = [members[torch.randperm(len(members), generator=generator)] for _ in range(-(-count // len(members)))]
        parts += turns and [torch.cat(turns)[:count]]
    order = torch.cat(parts)
    return order[torch.randperm(len(order), generator=generator)]


@dataclass(frozen=True)
class EpochPlan:
    """What is left of one epoch for one process: the indices of each batch, the first being batch `step`."""

    chunks: list[list[int]]
    seed: int
    epoch: int
    step: int
    rank: int
    world: int
    train: bool = False


class ImageSet(Protocol):
    """What a loader asks of a set."""

    def __len__(self) -> int: ...

    def batches(self, plan: EpochPlan) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Augment:
    """Random shift by up to `shift` pixels (black moves in), mirror image and upside down, by their probabilities."""

    shift: int = 0
    hflip: float = 0.0
    vflip: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator, rank: int = 0, world: int = 1) -> Tensor:
        """(B, C, H, W) -> same shape and dtype.

        The draws are made for all `world` processes and this one takes its own, so that the augmentation of a
        sample does not depend on the number of processes.
        """
        if self.shift == 0 and self.hflip == 0 and self.vflip == 0:
            return images
        batch, _, height, width = images.shape
        draws = torch.rand(3, batch * world, generator=generator)[:, rank::world].unsqueeze(-1)  # (3, B, 1)
        top, left = (draws[:2] * (2 * self.shift + 1)).long().clamp_(max=2 * self.shift)
        rows = top + torch.arange(height)  # (B, H)
        columns = left + torch.arange(width)  # (B, W)
        columns = torch.where(draws[2] < self.hflip, columns.flip(1), columns)
        if self.vflip:
            draw = torch.rand(batch * world, 1, generator=generator)[rank::world]
            rows = torch.where(draw < self.vflip, rows.flip(1), rows)
        padded = F.pad(images, [self.shift] * 4).movedim(1, -1)  # channels last: one index serves all of them
        sample = torch.arange(batch)[:, None, None]
        return padded[sample, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


@dataclass(frozen=True)
class TensorSet:
    """Pictures in memory, normalised and augmented a batch at a time.

    Args:
        images: uint8 (M, C, H, W).
        labels: int64 (M,).
        mean, std: per channel, of pixels scaled to [0, 1].
        augment: None for evaluation.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One sample, not augmented: image float32 (C, H, W) and its label."""
        return self._normalise(self.images[index][None])[0], self.labels[index]

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def batches(self, plan: EpochPlan) -> Iterator[Batch]:
        for step, chunk in enumerate(plan.chunks, start=plan.step):
            images = self.images[chunk]
            if self.augment is not None:
                generator = seeded_generator("augment", plan.seed, plan.epoch, step)
                images = self.augment(images, generator, plan.rank, plan.world)
            yield self._normalise(images), self.labels[chunk]


@contextlib.contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed the generators that transforms draw from, and put them back: dropout must not notice."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


class Unreadable(SteppingError):
    """A picture that cannot be read. It is left out of its batch; nothing takes its place.

    Args:
        name: its file.
        reason: what the decoder says.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.name}: this picture cannot be read ({self.reason})"


@dataclass(frozen=True)
class _Samples:
    """Pictures as a loader process sees them: it gets these fields, and nothing of the run."""

    base: Any
    transform: Callable[[Any], Tensor]
    indices: Sequence[int] | None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.base[index if self.indices is None else self.indices[index]]
        return self.transform(image), int(label)


@dataclass(frozen=True)
class _SeededEpoch(Dataset[tuple[Tensor, int] | Unreadable]):
    """Pictures in one epoch: the randomness of a sample depends on seed, epoch and index only."""

    samples: _Samples
    seed: int
    epoch: int

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        with global_seed(derive_seed("sample", self.seed, self.epoch, index)):
            try:
                return self.samples[index]
            except Unreadable as problem:
                return problem


def _collate(items: list[tuple[Tensor, int] | Unreadable]) -> tuple[Batch | None, list[Unreadable]]:
    """The batch of all that could be read (None: nothing), and what could not."""
    read = [item for item in items if not isinstance(item, Unreadable)]
    batch = tuple(default_collate(read)) if read else None
    return batch, [item for item in items if isinstance(item, Unreadable)]


@dataclass(frozen=True)
class TransformSet:
    """Pictures that are opened and transformed one by one, by worker processes.

    Args:
        base: `base[i]` is (picture, label), without a transform of its own, or raises `Unreadable`.
        transform: picture to float32 (C, H, W), normalised.
        indices: which samples of `base` belong to this set; None: all.
        workers: loader processes; 0: load in this one.
        left_out: told of every picture that cannot be read, each time that it is missing in a batch.
    """

    base: Any  # a sized, indexable data set; torch's own classes do not declare __len__
    transform: Callable[[Any], Tensor]
    indices: Sequence[int] | None = None
    workers: int = 0
    left_out: Callable[[Unreadable], None] | None = None

    def __len__(self) -> int:
        return len(self.base) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return _Samples(self.base, self.transform, self.indices)[index]

    def batches(self, plan: EpochPlan) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            _SeededEpoch(_Samples(self.base, self.transform, self.indices), plan.seed, plan.epoch),
            batch_sampler=plan.chunks,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # without it, loading would draw from the global one
        )
        try:
            for batch, missing in loader:
                for problem in missing:
                    if self.left_out is not None:
                        self.left_out(problem)
                if batch is not None:
                    yield batch
                elif plan.train:  # the processes of a run would lose step
                    raise SteppingError(f"none of the {len(missing)} pictures of a batch can be read: {missing[0]}.")
        except SteppingError as error:  # of a worker: its text is a whole traceback
            raise SteppingError(str(error).rpartition("SteppingError: ")[2].strip()) from None


class EpochLoader:
    """Batches of (images, labels) of one process, resumable at any step of any epoch.

    Iterating gives what is left of the current epoch and then turns to the next one, so that a plain
    `for epoch in range(n): for images, labels in loader:` sees a new order in each epoch. Breaking off leaves
    the position where the iteration began.

    Training shuffles, augments and drops the last, incomplete batch (batch norm cannot use a batch of one); a
    set smaller than one batch is one batch. Evaluation keeps order and all samples.

    Args:
        data: a `TensorSet`, a `TransformSet` or anything else that has `__len__` and `batches`.
        batch_size: of this process; `world` times that many samples make one step.
        train: see above.
        seed, rank, world, balance: see `EpochSampler`.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        balance: Tensor | None = None,
    ) -> None:
        if batch_size < 1:
            raise SteppingError(explain("bad batch size", got=batch_size, expected="a whole number from 1 up"))
        self.dataset = data
        self.batch_size = batch_size
        self.train = train
        self.seed, self.rank, self.world = seed, rank, world
        self.balance = balance
        self.epoch = self.step = 0
        samples = len(self._sampler(0))
        full, rest = divmod(samples, batch_size)
        self.num_batches = max(full, 1) if train else full + (rest > 0)

    def _sampler(self, epoch: int) -> EpochSampler:
        return EpochSampler(
            len(self.dataset), self.seed, epoch, self.rank, self.world,
            shuffle=self.train, even=self.train, balance=self.balance,
        )  # fmt: skip

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.num_batches

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Go to batch `step` of `epoch` (both from 0); the next iteration starts there."""
        self.epoch, self.step = epoch, step

    def __iter__(self) -> Iterator[Batch]:
        indices = list(self._sampler(self.epoch))
        starts = range(self.step * self.batch_size, self.num_batches * self.batch_size, self.batch_size)
        chunks = [indices[start : start + self.batch_size] for start in starts]
        plan = EpochPlan(chunks, self.seed, self.epoch, self.step, self.rank, self.world, self.train)
        yield from self.dataset.batches(plan)
        self.set_epoch(self.epoch + 1)

    def stream(self, step: int = 0) -> Iterator[Batch]:
        """Batches without end, from batch `step` counted over all epochs: what construction iterates on."""
        self.set_epoch(*divmod(step, self.num_batches))
        while True:
            yield from self
