"""What a run's net says about itself: classes, preprocessing, and where it comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from .. import __version__
from ..errors import SteppingError
from ..files.metadata import DataOrigin, Metadata, Preprocessing, Provenance
from ..training.loader import TensorSet
from ..training.pictures import preprocessing_of
from .data import DataBundle
from .data.sources import Source
from .recipe import dump_recipe
from .recipe_schema import Recipe

__all__ = ["described", "without_folders"]


def described(recipe: Recipe, data: DataBundle, classes: Sequence[str], say: Callable[[str], None]) -> Metadata:
    """Metadata of a net that a recipe made.

    Args:
        say: told where the preprocessing has no form that files can hold.
    """
    preprocessing: Preprocessing | None = None
    try:
        preprocessing = _preprocessing(data)
    except SteppingError as error:
        say(f"note: files of this net do not say how pictures are prepared. {error}")
    versions = {"stepping-plugin": __version__, "torch": torch.__version__, "timm": timm.__version__}
    provenance = Provenance(recipe=dump_recipe(without_folders(recipe)), data=_origin(recipe, data), versions=versions)
    return Metadata(classes=list(classes), preprocessing=preprocessing, provenance=provenance)


def without_folders(recipe: Recipe) -> Recipe:
    """A recipe that says which files were used, but not where they lie: a net's file goes to other people."""
    last = lambda path: path and Path(path).name  # noqa: E731
    model, retrain = recipe.model, recipe.retrain
    if (teacher := retrain.teacher) is not None:
        named = teacher.model_copy(update={"checkpoint_path": last(teacher.checkpoint_path)})
        retrain = retrain.model_copy(update={"teacher": named})
    files = {"net": last(model.net), "checkpoint_path": last(model.checkpoint_path)}
    return recipe.model_copy(
        update={
            "output": last(recipe.output),
            "model": model.model_copy(update=files),
            "data": recipe.data.model_copy(update={"root": last(recipe.data.root)}),
            "retrain": retrain,
        }
    )


def _preprocessing(data: DataBundle) -> Preprocessing:
    """From the evaluation transform; of folders in memory, from what made their bytes."""
    if data.to_bytes is not None:
        return preprocessing_of(data.to_bytes, (data.mean, data.std))
    return preprocessing_of(data.test)


def _origin(recipe: Recipe, data: DataBundle) -> DataOrigin:
    """A hash of the training pictures in memory; of the names and labels of those on disk."""
    digest, train = hashlib.sha256(), data.train
    if isinstance(train, TensorSet):
        digest.update(str(tuple(train.images.shape)).encode())
        for tensor in (train.images, train.labels):
            digest.update(tensor.contiguous().numpy().data)
        return DataOrigin(
            name=recipe.data.name, pictures=len(train), sha256=digest.hexdigest(), of="pictures and labels"
        )
    lines = _lines(getattr(getattr(train, "base", None), "source", None))
    digest.update("\n".join(sorted(lines)).encode("utf-8", "surrogateescape"))
    what: Any = "names and labels" if lines else "nothing"
    return DataOrigin(name=recipe.data.name, pictures=len(train), sha256=digest.hexdigest(), of=what)


def _lines(source: Source | None) -> list[str]:
    """One line per training picture: its label, and its name within the set; none where the set does not tell."""
    if source is None or source.labels is None:
        return []
    names = [source.name(i).removeprefix(source.where) for i in range(len(source))]
    return [f"{label} {name}" for label, name in zip(source.labels.tolist(), names)]
