"""Pictures in one subfolder per class, below train/, val/ and test/ or without such parts."""

from __future__ import annotations

from pathlib import Path

import torch

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import DataConfig

from .channels import EXTENSIONS
from .sources import Files

__all__ = ["image_folders", "is_image_folder", "root_of"]

_PARTS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}


def root_of(cfg: DataConfig) -> Path:
    """Folder of a set."""
    return Path(cfg.root if cfg.root is not None else "data")


def is_image_folder(root: Path) -> bool:
    """Whether a folder is laid out in parts, without a look at the pictures."""
    return _has_folders(root / "train")


def image_folders(cfg: DataConfig) -> tuple[Files, Files | None, Files | None]:
    """Training, validation and test pictures; None: no such folder.

    Classes are numbered by the subfolders of train/. Without train/, the subfolders are the classes.

    Raises:
        SteppingError: a folder is missing or empty, or has classes that train/ lacks.
    """
    if cfg.root is None and cfg.name == "imagefolder":
        raise SteppingError("data.name=imagefolder needs data.root=FOLDER with train/CLASS/*.jpg and val/CLASS/*.jpg")
    root = root_of(cfg)
    found = {part: next((root / n for n in names if (root / n).is_dir()), None) for part, names in _PARTS.items()}
    if not is_image_folder(root):
        if found["val"] or found["test"] or not _has_folders(root):
            raise SteppingError(
                f"{root} has no folder train/ with subfolders. Pass data.root=FOLDER that holds train/CLASS/*.jpg, and "
                "the same in val/, test/ or both; or CLASS/*.jpg."
            )
        return _listed(root, None), None, None
    train = _listed(root / "train", None)
    val, test = (_listed(folder, train) if folder else None for folder in (found["val"], found["test"]))
    return train, val, test


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(place.is_dir() for place in folder.iterdir())


def _listed(folder: Path, train: Files | None) -> Files:
    """Pictures below a folder; `train` tells which classes there are."""
    from timm.data.readers.reader_image_folder import find_images_and_targets

    pairs, numbers = find_images_and_targets(str(folder), types=list(EXTENSIONS))
    pairs = [(file, label) for file, label in pairs if not _hidden(file, folder)]
    if not pairs:
        raise SteppingError(f"no pictures under {folder}: expected {folder}/CLASS/*.jpg, *.png and the like.")
    loose = next((file for file, label in pairs if label == numbers.get("")), None)
    if loose is not None:
        action = "Move it into the folder of its class, or away."
        raise SteppingError(explain("a picture outside of the folders of the classes", where=loose, action=action))
    filled = {label for _, label in pairs}
    names = [name for name, label in numbers.items() if label in filled]
    classes, places = tuple(names), {numbers[name]: place for place, name in enumerate(names)}
    files, labels = [file for file, _ in pairs], torch.tensor([places[label] for _, label in pairs], dtype=torch.int64)
    if train is None:
        return Files(str(folder), files, labels, classes)
    strangers = sorted(set(classes) - set(train.classes))
    if strangers:
        raise SteppingError(f"{folder} has classes that {train.where} lacks: {', '.join(strangers[:5])}")
    theirs = torch.tensor([train.classes.index(name) for name in classes])
    return Files(str(folder), files, theirs[labels], train.classes)


def _hidden(file: str, folder: Path) -> bool:
    """What systems and editors leave behind, such as .ipynb_checkpoints/ and ._cat.jpg."""
    return any(part.startswith((".", "__MACOSX")) for part in Path(file).relative_to(folder).parts)
