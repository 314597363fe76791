"""Folders of Hugging Face's `datasets`: written by `save_to_disk`, or parquet files, or pictures in its layout."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import DataConfig

__all__ = ["dataset_folder"]

_PARTS = {"train": ("train", "training"), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Rows:
    """Pictures in the rows of a table; see `Source`."""

    where: str
    table: Any  # datasets.Dataset, its image column not decoded
    column: str
    labels: Tensor
    classes: tuple[str, ...]
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: Tensor) -> Rows:
        return replace(self, labels=self.labels[indices], indices=self.indices[indices])

    def name(self, index: int) -> str:
        row = int(self.indices[index])
        path = self.table[row][self.column]["path"]
        return f"{self.where}, row {row}" + (f" ({path})" if path else "")

    def open(self, index: int) -> tuple[Any, int]:
        content = self.table[int(self.indices[index])][self.column]
        data = content["bytes"]
        return Image.open(io.BytesIO(data) if data else content["path"]), int(self.labels[index])


def dataset_folder(cfg: DataConfig) -> tuple[Rows, Rows | None, Rows | None]:
    """Training, validation and test rows; None: no such split.

    Raises:
        SteppingError: `datasets` is not installed, the folder is none of its kind, or no column tells the class.
    """
    try:
        import datasets
    except ImportError:
        action = "Run: pip install 'stepping-plugin[datasets]'"
        raise SteppingError(explain("needs the package datasets", where="data.name=hfds", action=action)) from None
    if cfg.root is None or not Path(cfg.root).is_dir():
        raise SteppingError(
            explain("no such folder", where="data.root", got=str(cfg.root), action="Pass data.root=DIR.")
        )
    root = Path(cfg.root)
    saved = any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        found = datasets.load_from_disk(str(root)) if saved else datasets.load_dataset(str(root))
    except Exception as error:  # of many kinds: what its readers of many formats raise
        expected = "a folder of datasets' save_to_disk, or of parquet files or pictures"
        reason = f"datasets cannot read it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise SteppingError(explain(reason, where=str(root), expected=expected)) from None
    tables = found if isinstance(found, dict) else {"train": found}
    parts = {part: next((tables[name] for name in names if name in tables), None) for part, names in _PARTS.items()}
    if parts["train"] is None:
        raise SteppingError(explain("no split train", where=str(root), got=", ".join(tables)))
    train = _rows(f"{root}: train", parts["train"], cfg, None)
    val, test = (parts[p] and _rows(f"{root}: {p}", parts[p], cfg, train) for p in ("val", "test"))
    return train, val, test


def _rows(where: str, table: Any, cfg: DataConfig, train: Rows | None) -> Rows:
    """A split; `train` tells the classes."""
    import datasets

    image = cfg.input_key or _only(table, datasets.Image, "input_key", where)
    label = cfg.target_key or _only(table, datasets.ClassLabel, "target_key", where)
    for column, key in ((image, "input_key"), (label, "target_key")):
        if column not in table.features:
            got, expected = column, f"one of {', '.join(table.features)}"
            raise SteppingError(explain(f"no such column in {where}", where=f"data.{key}", got=got, expected=expected))
    table = table.cast_column(image, datasets.Image(decode=False))
    values = list(table[label])
    names = getattr(table.features[label], "names", None)
    if names is None:  # a column of words or numbers
        names = train.classes if train else tuple(sorted({str(v) for v in values}, key=_natural))
        numbers = {name: number for number, name in enumerate(names)}
        values = [numbers.get(str(v), -1) for v in values]
    if train is not None and tuple(names) != train.classes:
        got, expected = ", ".join(names)[:100], ", ".join(train.classes)[:100]
        raise SteppingError(explain("other classes than for training", where=where, got=got, expected=expected))
    labels = torch.tensor([-1 if v is None else int(v) for v in values], dtype=torch.int64)
    if len(labels) and int(labels.min()) < 0:
        row = int(labels.argmin())
        raise SteppingError(f"{where}: row {row} has no label of the training classes. Leave such rows out.")
    return Rows(where, table, image, labels, tuple(names), torch.arange(len(labels)))


def _only(table: Any, kind: type, key: str, where: str) -> str:
    """The one column of a kind."""
    found = [name for name, feature in table.features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    got = f"{len(found)} in columns {', '.join(table.features)}"
    action = f"Name the column: data.{key}."
    raise SteppingError(explain(f"not one column of {kind.__name__}", where=where, got=got, action=action))


def _natural(name: str) -> Any:
    from timm.utils.misc import natural_key

    return natural_key(name)
