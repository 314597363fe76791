"""Where pictures come from: files with their labels, or a set that timm opens. They are opened one at a time."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image
from torch import Tensor

from stepping_plugin.training.loader import Unreadable

from .channels import as_channels, open_file

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["UNREADABLE", "Files", "LeftOut", "Opened", "Source", "TimmSet"]

# What Pillow raises for files that are no pictures, or damaged ones.
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, IndexError, struct.error, Image.DecompressionBombError)
_NAMED = 10  # pictures that are named one by one


class Source(Protocol):
    """Pictures of one part of a set.

    Attributes:
        where: folder or name, for texts.
        labels: int64 (M,); None where only opening the pictures tells.
        classes: names in the order of the labels; empty where the set has none.
    """

    @property
    def where(self) -> str: ...

    @property
    def labels(self) -> Tensor | None: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Self:
        """Some of the pictures, in this order."""
        ...

    def name(self, index: int) -> str:
        """Of a picture, for texts."""
        ...

    def open(self, index: int) -> tuple[Any, int]:
        """A picture as `channels.as_channels` takes it, and its label."""
        ...


@dataclass(frozen=True)
class Files:
    """Files of pictures; see `Source`."""

    where: str
    files: list[str]
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: Tensor) -> Files:
        return replace(self, files=[self.files[i] for i in indices.tolist()], labels=self.labels[indices])

    def name(self, index: int) -> str:
        return self.files[index]

    def open(self, index: int) -> tuple[Any, int]:
        return open_file(self.files[index]), int(self.labels[index])


@dataclass(frozen=True)
class TimmSet:
    """A set that timm opened, `dataset[i]` being (picture, label); see `Source`."""

    where: str
    dataset: Any
    labels: Tensor | None
    classes: tuple[str, ...]
    indices: Tensor | None = None

    def __len__(self) -> int:
        return len(self.dataset) if self.indices is None else len(self.indices)

    def take(self, indices: Tensor) -> TimmSet:
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, labels=labels, indices=indices if self.indices is None else self.indices[indices])

    def name(self, index: int) -> str:
        place = index if self.indices is None else int(self.indices[index])
        filename: Callable[[int], str] | None = getattr(self.dataset, "filename", None)
        return f"picture {place} of {self.where}" if filename is None else filename(place)

    def open(self, index: int) -> tuple[Any, int]:
        place = index if self.indices is None else int(self.indices[index])
        reader = getattr(self.dataset, "reader", None)
        if reader is None:
            picture, label, *_ = self.dataset[place]
            return picture, int(label)
        file, label, *_ = reader[place]  # timm's own access gives the next picture for one that cannot be read
        return Image.open(file), int(label)


@dataclass(frozen=True)
class Opened:
    """A source as an indexable set of (decoded picture, label).

    Args:
        source: of the pictures.
        channels: of the model, see `as_channels`.

    Raises:
        Unreadable: on access, with the name of the file.
    """

    source: Source
    channels: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        try:
            picture, label = self.source.open(index)
            return as_channels(picture, self.channels, self.source.name(index)), label
        except UNREADABLE as error:
            raise Unreadable(self.source.name(index), str(error) or type(error).__name__) from None


@dataclass
class LeftOut:
    """Pictures that could not be read, over all parts of a set. They are in no batch and in no figure.

    Attributes:
        names: of the files so far: pictures on disk are met one by one.
    """

    say: Callable[[str], None]
    names: dict[str, None] = field(default_factory=dict)  # in the order in which they were met

    def __call__(self, problem: Unreadable) -> None:
        if problem.name in self.names:
            return
        self.names[problem.name] = None
        if len(self.names) <= _NAMED:
            self.say(f"left out of everything: {problem}")

    def notes(self) -> list[str]:
        """For a report: how many, which."""
        count = len(self.names)
        more = f" and {count - _NAMED} more" if count > _NAMED else ""
        listed = ", ".join(list(self.names)[:_NAMED])
        return [f"pictures that cannot be read, left out of every figure: {count} ({listed}{more})"] if count else []
