"""What the stages of a run are made of: data, loaders, models, teachers, all as the recipe says."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..construction.calibration import fixed_round_to
from ..construction.config import ConstructionConfig
from ..construction.landing import LandingResult
from ..construction.start import convert, one_shot
from ..errors import SteppingError
from ..integrations.timm.models import named_model
from ..net import SteppingNet
from ..training.evaluation import evaluate
from ..training.trainer import processes
from .data import DataBundle, build_data
from .pretrained import take_over
from .recipe_schema import ModelConfig, Recipe, TeacherConfig
from .rounding import with_fixed_rounding

__all__ = ["Parts"]


@dataclass
class Parts:
    """One recipe in one folder."""

    recipe: Recipe
    folder: Path
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    stage: str = "the checks before the start"  # what is being done
    noted: dict[str, None] = field(default_factory=dict)  # what was said about weights
    _data: DataBundle | None = None
    _settings: ConstructionConfig | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks."""
        return processes(self.recipe.device).is_main_process

    @property
    def pretrained(self) -> bool:
        """Whether the original comes with weights."""
        return self.recipe.model.pretrained or self.recipe.model.checkpoint_path is not None

    @property
    def data(self) -> DataBundle:
        """The data set, opened on first use."""
        if self._data is None:
            self._data = build_data(self.recipe.data, self.recipe.model.name, pretrained=self.pretrained, say=self.tell)
        return self._data

    @property
    def inputs(self) -> dict[str, Path]:
        """Files that the recipe reads, by key."""
        recipe = self.recipe
        named = {"model.net": recipe.model.net, "model.checkpoint_path": recipe.model.checkpoint_path}
        if recipe.retrain.teacher is not None:
            named["retrain.teacher.checkpoint_path"] = recipe.retrain.teacher.checkpoint_path
        return {key: Path(path) for key, path in named.items() if path is not None}

    def loader(self, part: str, batch_size: int, stage: str = "original") -> Any:
        """This process's share of the batches; every stage has its own order."""
        state = processes(self.recipe.device)
        seed = self.recipe.seed * 3 + ["original", "construction", "retrain"].index(stage)
        return self.data.loader(part, batch_size, seed=seed, rank=state.process_index, world=state.num_processes)

    def validation(self, settings: Any) -> Any:
        return self.loader("val", settings.validation_batch_size or settings.batch_size)

    def accuracy(self, net: nn.Module) -> list[float]:
        """Test accuracy of every subnet."""
        return evaluate(net, self.loader("test", 256))["accuracy"]

    def build_model(self, config: ModelConfig | TeacherConfig, pretrained: bool) -> nn.Module:
        """A timm model for the data set."""
        assert config.name is not None
        data = self.data
        own = {"num_classes": data.num_classes, "in_chans": data.in_chans, "pretrained": pretrained}
        model = named_model(config.name, data.img_size, **{**own, **config.kwargs})
        is_original = config is self.recipe.model
        for note in take_over(model, config, "model" if is_original else "retrain.teacher",
                              trained=is_original and self.recipe.train.epochs > 0):  # fmt: skip
            if note not in self.noted:
                self.tell(f"{config.name}: {note}")
            self.noted[note] = None
        return model

    def start(self, original: nn.Module) -> SteppingNet:
        """The network that construction starts from, all units in subnet 1."""
        config = self.settings()
        example, arguments = torch.zeros(1, *self.data.input_size), self.recipe.model.kwargs
        return convert(original, self.recipe.budgets, config, example, arguments=arguments, seed=self.recipe.seed)

    def settings(self, keep: bool = False) -> ConstructionConfig:
        """Of the construction, with a number in `round_to`: measured once, and kept in the folder if so told."""
        if self._settings is None:
            config, device = ConstructionConfig.of(self.recipe.construction), processes(self.recipe.device).device
            self._settings = with_fixed_rounding(config, device, self.folder, keep, self.main)
            if config != self._settings:
                self.tell(f"round_to: {self._settings.round_to} channels, as measured in {config.latency}")
        return self._settings

    def one_shot(self, net: SteppingNet) -> LandingResult:
        """Levels by the recipe's policy, without data."""
        round_to = fixed_round_to(self.settings(), net.model)
        return one_shot(net, self.recipe.construction.policy, round_to=round_to, seed=self.recipe.seed)

    def teacher(self, original: nn.Module | None) -> nn.Module | None:
        """Who guides the retraining, if anybody does."""
        settings = self.recipe.retrain
        if settings.distill_from == "teacher" and settings.teacher is not None:
            return self.build_model(settings.teacher, settings.teacher.pretrained).eval()
        if settings.distill_from == "original" and original is None:
            raise SteppingError(
                "retrain.distill_from: the original network is not at hand when model.net is given. Name one with "
                "retrain.distill_from=teacher retrain.teacher.name=..., or use largest or none."
            )
        return original if settings.distill_from == "original" else None

    def check_classes(self, net: SteppingNet) -> None:
        """Refuse a saved net that was made for other pictures or classes."""
        size, classes = self.data.input_size, net.analysis.eval_program.num_classes
        if net.analysis.image_size != size or classes != self.data.num_classes:
            raise SteppingError(
                f"model.net: the net was made for images {net.analysis.image_size} and {classes} classes, data.name="
                f"{self.recipe.data.name} has images {size} and {self.data.num_classes} classes."
            )

    def timed(self, stage: str, function: Callable[..., Any], *args: Any) -> Any:
        start, self.stage = time.perf_counter(), stage
        result = function(*args)
        self.seconds[stage] = round(time.perf_counter() - start, 3)
        return result

    def tell(self, text: str) -> None:
        if self.main:
            self.say(text)
