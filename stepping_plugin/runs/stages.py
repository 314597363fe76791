"""The stages of a run: what each depends on, and what it leaves in the run's folder.

A stage depends on its own sections of the recipe and on the stages before it. So a recipe that differs from that of the
results at hand in `retrain` only takes the original and the construction from there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..training.checkpoint import differences
from .recipe_schema import Recipe

__all__ = ["STAGES", "Stage", "changes", "completed", "first_stage", "kept_in", "settings_of"]

# May differ between a run and its continuation: where, how often something is written, how fast pictures are read.
_FREE = (
    "output",
    "device",
    "log_with",
    "data.workers",
    "data.download",
    "train.checkpoint_steps",
    "retrain.checkpoint_steps",
)
_AFTERWARDS = {"early_exit"}  # of what is done anew whenever a run comes to its end


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: for people.
        sections: of the recipe that it depends on, besides those of the stages before.
        files: that it leaves.
        folders: of its log and checkpoints, with patterns of what it writes there.
    """

    name: str
    sections: tuple[str, ...]
    files: tuple[str, ...]
    folders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def left_in(self, folder: Path) -> Iterator[Path]:
        """What the stage has left in a folder; links are not followed."""
        names = [*self.files, *(f"{outer}/{inner}" for outer, inside in self.folders.items() for inner in inside)]
        for name in names:
            if "*" in name:
                yield from sorted(folder.glob(name))
            elif os.path.lexists(folder / name):
                yield folder / name


_LOGS = ("log.jsonl", "log.csv", "tensorboard/events.out.tfevents.*")

STAGES = (
    Stage("original", ("model", "data", "train", "seed"), ("original.safetensors",),
          {"original": ("last.safetensors", *_LOGS)}),
    Stage("construction", ("budgets", "construction"), ("constructed.safetensors",),
          {"construction": ("state.safetensors", "round_to.json", *_LOGS)}),
    Stage("retraining", ("retrain",),
          ("net.safetensors", "report.json", "accuracy_vs_macs.png", "units_per_layer.png", "index.html"),
          {"retrain": ("last.safetensors", *_LOGS)}),
)  # fmt: skip


def kept_in(folder: Path) -> list[str]:
    """What a run that was stopped has left, for people: stages that are done, and how far the next one is."""
    texts = []
    for stage in STAGES:
        if (folder / stage.files[0]).is_file():
            texts.append(stage.name)
        elif any(path.suffix == ".safetensors" for path in stage.left_in(folder)):
            texts.append(f"a checkpoint of the {stage.name}")
    return texts


def settings_of(recipe: Recipe, *sections: str) -> dict[str, Any]:
    """What results depend on: the whole recipe, or some of its sections."""
    values = recipe.model_dump(mode="json")
    return _without_free({k: v for k, v in values.items() if not sections or k in sections})


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an earlier run as `settings_of` gives them now: keys that it did not have yet have their defaults."""
    result = dict(settings)
    for name, values in settings.items():
        kind = Recipe.model_fields[name].annotation if name in Recipe.model_fields else None
        if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(values, Mapping):
            with contextlib.suppress(ValidationError):
                result[name] = kind.model_validate(dict(values)).model_dump(mode="json")
    return _without_free(result)


def changes(old: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Where the settings of an earlier run differ from a recipe, one text per key."""
    return differences(completed(old), settings_of(recipe))


def first_stage(changed: Iterable[str]) -> int:
    """Index of the first stage that depends on one of these `changes`; as many as there are stages: none does."""
    keys = {text.split(" ")[0].split(".")[0] for text in changed}
    dependent = [number for number, stage in enumerate(STAGES) if keys & set(stage.sections)]
    known = {name for stage in STAGES for name in stage.sections} | _AFTERWARDS
    return 0 if keys - known else min(dependent, default=len(STAGES))


def _without_free(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in settings.items():
        if name in _FREE:
            continue
        inside = isinstance(value, Mapping)
        kept[name] = {k: v for k, v in value.items() if f"{name}.{k}" not in _FREE} if inside else value
    return kept
