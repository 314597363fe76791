"""What a run says about its nets after training, from one pass over the data: metrics, the curve, calibrated exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..engine.engine import Engine
from ..errors import SteppingError
from ..net import load
from ..training.exits import ExitChoice, choose_exit, judge_exit
from ..training.metrics import metrics_of, named_classes
from ..training.predictions import Predictions, predict_all, predictions_of
from ..training.targets import Target, parse_target
from .data import DataBundle
from .early_exit import Answers, early_exit_curve
from .recipe_schema import Recipe

__all__ = ["Figures", "calibrated_exit", "check_exit", "class_names", "collected"]

BATCH = 256
TIMED = 10  # passes from which the time of every step is taken


class Source(Protocol):
    """A run, as far as its data are concerned."""

    @property
    def data(self) -> DataBundle: ...

    def loader(self, part: str, batch_size: int, stage: str = ...) -> Any: ...


@dataclass(frozen=True)
class Figures:
    """What the subnets, and the original where there is one, say about test pictures and held-out ones.

    Attributes:
        all: about all test pictures; the original's share of it is `original_all`.
        test, held_out: what early exit is judged by, and chosen by.
        held_out_from: where the latter are from, in words.
        classes: names.
    """

    all: Predictions
    test: Predictions
    held_out: Predictions
    held_out_from: str
    classes: list[str]
    original_all: Predictions | None = None
    original_test: Predictions | None = None
    original_held_out: Predictions | None = None

    def metrics(self) -> dict[str, Any]:
        """The report's `metrics`: of original and subnets on all test pictures."""
        original = None if self.original_all is None else metrics_of(self.original_all, self.classes)[0].as_dict()
        subnets = [metrics.as_dict() for metrics in metrics_of(self.all, self.classes)]
        return {"pictures": len(self.all), "original": original, "subnets": subnets}

    def curve(self, macs: Sequence[int]) -> dict[str, Any] | None:
        """The report's `early_exit`: accuracy against average MACs of `predict(until={"max_prob": ...})`."""
        if self.all.multi_label:
            return None
        points = early_exit_curve(Answers.of(self.held_out), Answers.of(self.test), macs)
        return {"rule": "max_prob", "thresholds_from": self.held_out_from, "points": points}


def collected(run: Source, engine: Engine, original: nn.Module | None) -> Figures:
    """Step up all pictures of the validation and the test part.

    Where nothing is held out for validation, every second test picture is, for the choice of thresholds.
    """
    data = run.data

    def scores(images: torch.Tensor) -> torch.Tensor:
        return torch.stack(list(engine.steps(images.to(engine.device, engine.dtype))))

    every = predict_all(scores, run.loader("test", BATCH))
    others = None if original is None else predictions_of(original, run.loader("test", BATCH))
    names = class_names(data, every.scores.shape[-1])
    if data.val is data.test:
        halves = (None, None) if others is None else (others[1::2], others[::2])
        return Figures(every, every[1::2], every[::2], "every other test image", names, others, *halves)
    held_out = predict_all(scores, run.loader("val", BATCH))
    guide = None if original is None else predictions_of(original, run.loader("val", BATCH))
    return Figures(every, every, held_out, "the validation split", names, others, others, guide)


def calibrated_exit(
    figures: Figures,
    engine: Engine,
    target: str | Target,
    reference_macs: int,
    *,
    per_class: bool = False,
    combine: str = "last",
) -> tuple[ExitChoice, dict[str, Any]]:
    """Thresholds for a target from held-out pictures, and the report's `calibrated_exit`, judged on test pictures.

    Args:
        figures: of the engine's net.
        engine: whose steps are timed (one picture at a time), for a target in milliseconds.
        target, per_class, combine: see `training.exits.choose_exit`.
        reference_macs: of the original.

    Raises:
        SteppingError: the target means nothing for this net.
    """
    target = parse_target(target) if isinstance(target, str) else target
    costs: Sequence[float] = engine.macs
    if target.kind == "milliseconds":
        costs = [1000 * seconds for seconds in _cumulated(engine.calibrate(batch_size=1, repeats=TIMED))]
    pictures = f"{len(figures.held_out):,} pictures of {figures.held_out_from}"
    choice = choose_exit(
        figures.held_out,
        costs,
        target,
        original=figures.original_held_out,
        original_macs=reference_macs,
        classes=figures.classes,
        per_class=per_class,
        combine=combine,
        chosen_on=pictures,
    )
    judged = judge_exit(
        choice, figures.test, costs, engine.macs, original=figures.original_test, classes=figures.classes
    )
    return choice, judged


def check_exit(recipe: Recipe, data: DataBundle) -> None:
    """Whether the target of a recipe means something, before hours of training.

    Raises:
        SteppingError: it refers to what there is not.
    """
    if recipe.early_exit.target is None:
        return
    subnets = len(recipe.budgets) or load(str(recipe.model.net)).num_subnets
    target, names = parse_target(recipe.early_exit.target), class_names(data, data.num_classes)
    target.check(subnets, names, has_original=recipe.model.net is None)


def _cumulated(values: Sequence[float]) -> list[float]:
    return torch.tensor(values, dtype=torch.float64).cumsum(0).tolist()


def class_names(data: DataBundle, count: int) -> list[str]:
    """Names of the classes; numbers where the data set has none, or others than the net."""
    try:
        return named_classes(data.classes or None, count)
    except SteppingError:
        return named_classes(None, count)
