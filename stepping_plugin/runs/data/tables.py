"""Labels from a table: `file,label` with a header, files relative to a folder."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import torch

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import DataConfig

from .sources import Files

__all__ = ["labelled_files"]

_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
Row = tuple[str, str, str]  # file, class, part


def labelled_files(cfg: DataConfig) -> tuple[Files, Files | None, Files | None]:
    """Training, validation and test pictures of a table; None: it has no such part.

    One table, `data.labels` or labels.csv in the folder, with a column `split` (train, val, test) or without, or the
    tables train.csv, val.csv and test.csv. Classes are numbered in natural order of their names.

    Raises:
        SteppingError: no table, columns or files are missing, or a file is listed twice.
    """
    if cfg.root is None and cfg.labels is None:
        action = "Pass data.root=FOLDER that holds labels.csv and the pictures, or data.labels=FILE too."
        raise SteppingError(explain("needs a table", where="data.name=csv", action=action))
    root = Path(cfg.root) if cfg.root is not None else Path(str(cfg.labels)).parent
    tables = _tables(cfg, root)
    rows = [row for path, part in tables for row in _rows(path, part, cfg)]
    where = ", ".join(str(path) for path, _ in tables)
    _check_files(rows, root, where)
    from timm.utils.misc import natural_key

    classes = tuple(sorted({label for _, label, _ in rows}, key=natural_key))
    numbers = {name: number for number, name in enumerate(classes)}

    def part(name: str) -> Files | None:
        chosen = [(str(root / file), numbers[label]) for file, label, split in rows if split == name]
        labels = torch.tensor([label for _, label in chosen], dtype=torch.int64)
        return Files(where, [file for file, _ in chosen], labels, classes) if chosen else None

    train = part("train")
    if train is None:
        raise SteppingError(f"{where}: no training pictures; expected rows, or rows whose split is train.")
    return train, part("val"), part("test")


def _tables(cfg: DataConfig, root: Path) -> list[tuple[Path, str]]:
    """(table, part of its rows; "" if a column tells)."""
    single = Path(cfg.labels) if cfg.labels is not None else root / "labels.csv"
    if single.is_file() or cfg.labels is not None:
        return [(single, "")]
    found = [(root / f"{name}.csv", part) for name, part in _SPLITS.items() if (root / f"{name}.csv").is_file()]
    if not any(part == "train" for _, part in found):
        raise SteppingError(
            f"{root} has no labels.csv and no train.csv. Pass data.labels=FILE, a table with the header "
            f"{cfg.input_key or 'file'},{cfg.target_key or 'label'}."
        )
    return found


def _rows(path: Path, part: str, cfg: DataConfig) -> list[Row]:
    file_key, label_key = cfg.input_key or "file", cfg.target_key or "label"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SteppingError(f"data.labels: {path} cannot be read: {error}") from None
    header = lines[0] if lines else ""
    separator = max(",;\t", key=header.count)
    table = csv.DictReader(lines, delimiter=separator)
    names = list(table.fieldnames or [])
    missing = [name for name in (file_key, label_key) if name not in names]
    if missing:
        action = "Write such a header, or name the columns: data.input_key, data.target_key."
        expected = f"columns {file_key} and {label_key}"
        raise SteppingError(
            explain("no such column", where=str(path), got=header[:200], expected=expected, action=action)
        )
    rows = []
    for number, row in enumerate(table, start=2):
        file, label, split = (str(row.get(key) or "").strip() for key in (file_key, label_key, "split"))
        if not file or not label:
            raise SteppingError(f"{path}, line {number}: file or label is missing; got {lines[number - 1][:100]!r}")
        if not part and "split" in names and split.lower() not in _SPLITS:
            expected = "train, val or test"
            raise SteppingError(explain("unknown split", where=f"{path}, line {number}", got=split, expected=expected))
        rows.append((file, label, part or (_SPLITS[split.lower()] if "split" in names else "train")))
    return rows


def _check_files(rows: list[Row], root: Path, where: str) -> None:
    """Single files that are missing are left out when they are met; all of them are a wrong folder."""
    twice = [file for file, count in Counter(file for file, _, _ in rows).items() if count > 1]
    if twice:
        raise SteppingError(
            f"{where}: {len(twice)} files are listed more than once, such as {twice[0]}; one picture would be in two "
            "parts. Keep one row of each."
        )
    if rows and not any((root / file).is_file() for file, _, _ in rows):
        action = "Pass data.root=FOLDER that the names in the table start from."
        raise SteppingError(
            explain("none of the files is there", where=where, got=str(root / rows[0][0]), action=action)
        )
