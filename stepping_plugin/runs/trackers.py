"""Figures of every epoch and iteration for the tools with which people watch training, by accelerate's trackers.

    log_with: [csv, tensorboard, wandb]

`csv` writes log.csv and `tensorboard` its event files into the folder of every stage; `wandb` makes one run of the
project $WANDB_PROJECT (stepping-plugin). Steps count the epochs and iterations of all stages.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available

from ..errors import SteppingError
from ..tensorfile import write_bytes
from .recipe import dump_recipe
from .recipe_schema import Recipe

__all__ = ["Trackers", "require_trackers"]

_AVAILABLE = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
CSV, TENSORBOARD = "log.csv", "tensorboard"


def require_trackers(recipe: Recipe) -> None:
    """Refuse those whose packages are missing.

    Raises:
        SteppingError: names the extra to install.
    """
    for kind in recipe.log_with:
        if kind in _AVAILABLE and not _AVAILABLE[kind]():
            raise SteppingError(f"log_with: {kind} is not installed. Run: pip install 'stepping-plugin[{kind}]'")


class CsvTracker(GeneralTracker):
    """One row per step. Steps that are done again, after a kill, replace their rows."""

    name = "csv"
    requires_logging_directory = True

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        return self.path

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The recipe lies beside the table."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        row = {"step": step, **values}
        kept = [r for r in self._rows() if int(r["step"]) < int(step or 0)]
        columns = list(dict.fromkeys([*(key for r in kept for key in r), *row]))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, row])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, text.getvalue().encode())

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if str(row.get("step")).isdigit()]


class Trackers:
    """All trackers of one run, made when they are first needed.

    Args:
        recipe: says which.
        folder: of the run.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self._open: dict[tuple[str, str], GeneralTracker] = {}

    def log(self, stage: str, stage_folder: str, values: Mapping[str, Any], step: int) -> None:
        """Log numbers, and lists with one number per subnet."""
        flat = _flat(values)
        for kind in self.recipe.log_with:
            tracker = self._tracker(kind, stage_folder)
            tracker.log(
                flat if kind == "csv" else {f"{stage}/{name}": value for name, value in flat.items()}, step=step
            )

    def finish(self) -> None:
        """Close them all."""
        for tracker in self._open.values():
            tracker.finish()
        self._open.clear()

    def _tracker(self, kind: str, stage_folder: str) -> GeneralTracker:
        key = (kind, "" if kind == "wandb" else stage_folder)
        if key not in self._open:
            tracker = self._new(kind, self.folder / stage_folder)
            if hasattr(tracker, "start"):  # newer versions of accelerate do not begin by themselves
                tracker.start()
            if kind != "csv":
                _describe(tracker, self.recipe)
            self._open[key] = tracker
        return self._open[key]

    def _new(self, kind: str, place: Path) -> GeneralTracker:
        if kind == "csv":
            return CsvTracker(place / CSV)
        if kind == "tensorboard":
            place.mkdir(parents=True, exist_ok=True)
            return TensorBoardTracker(TENSORBOARD, place)
        project = os.environ.get("WANDB_PROJECT", "stepping-plugin")
        return WandBTracker(project, dir=str(self.folder), group=self.folder.name, name=self.folder.name)


def _describe(tracker: GeneralTracker, recipe: Recipe) -> None:
    """Which recipe the figures belong to."""
    if isinstance(tracker, WandBTracker):
        tracker.store_init_configuration(recipe.model_dump(mode="json"))
    else:
        tracker.log({"recipe": f"```\n{dump_recipe(recipe)}```"}, step=0)


def _flat(values: Mapping[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and len(value) > 1:
            flat.update({f"{name}/subnet{i}": v for i, v in enumerate(value, start=1)})
        else:
            flat[name] = value[0] if isinstance(value, (list, tuple)) else value
    return {name: value for name, value in flat.items() if isinstance(value, (int, float))}
