"""Pictures in one subfolder per class, below train/ and below val/, test/ or both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import DataConfig

__all__ = ["Listing", "image_folders", "is_image_folder"]

_PARTS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class Listing:
    """Files of pictures and their labels.

    Attributes:
        folder: that all of them lie in, for texts.
        files, labels: one each per picture.
        classes: names in the order of the labels.
    """

    folder: Path
    files: list[str]
    labels: list[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)


def is_image_folder(root: Path) -> bool:
    """Whether a folder is laid out as one, without a look at the pictures."""
    folder = root / "train"
    return folder.is_dir() and any(place.is_dir() for place in folder.iterdir())


def image_folders(cfg: DataConfig) -> tuple[Listing, Listing | None, Listing]:
    """Training, validation (None: to be held out of the training part) and test pictures.

    Classes are numbered by the subfolders of train/. Where only one of val/ and test/ is there, it is for testing.

    Raises:
        SteppingError: a folder is missing or empty, or has classes that train/ lacks.
    """
    if cfg.root is None and cfg.name == "imagefolder":
        raise SteppingError("data.name=imagefolder needs data.root=FOLDER with train/CLASS/*.jpg and val/CLASS/*.jpg")
    root = Path(cfg.root if cfg.root is not None else "data")
    found = {part: next((root / n for n in names if (root / n).is_dir()), None) for part, names in _PARTS.items()}
    if found["train"] is None or not (found["val"] or found["test"]):
        missing = "train/" if found["train"] is None else "val/ or test/"
        raise SteppingError(
            f"{root} has no folder {missing}. Pass data.root=FOLDER that holds train/ and val/, test/ or both."
        )
    train = _listing(found["train"], None)
    val, test = (_listing(folder, train) if folder else None for folder in (found["val"], found["test"]))
    if val is not None and test is not None and cfg.val_fraction is not None:
        action = f"Remove the key: {found['val']} is the validation set."
        raise SteppingError(explain("has no effect", where="data.val_fraction", got=cfg.val_fraction, action=action))
    if test is None:
        assert val is not None
        return train, None, val
    return train, val, test


def _listing(folder: Path, train: Listing | None) -> Listing:
    """Pictures below a folder; `train` tells which classes there are."""
    from timm.data.readers.reader_image_folder import find_images_and_targets

    pairs, numbers = find_images_and_targets(str(folder))
    if not pairs:
        raise SteppingError(f"no pictures under {folder}: expected {folder}/CLASS/*.jpg, *.png and the like.")
    classes = tuple(numbers)
    if train is not None:
        strangers = sorted(set(classes) - set(train.classes))
        if strangers:
            raise SteppingError(f"{folder} has classes that {train.folder} lacks: {', '.join(strangers[:5])}")
        places = {name: number for number, name in enumerate(train.classes)}
        pairs, classes = [(file, places[classes[label]]) for file, label in pairs], train.classes
    return Listing(folder, [file for file, _ in pairs], [label for _, label in pairs], classes)
