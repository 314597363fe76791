"""A recipe from the data to the report: train the original, construct the subnets, retrain them, verify, save.

Every stage leaves its result in the output folder and is taken from there when the same recipe runs again, so a run
that was killed continues where it was:

    recipe.yaml             the resolved recipe; .stepping-run.json says whose folder it is, see `runs.folder`
    original.safetensors    weights of the trained original; original/ has its log and checkpoint
    construction/           log and checkpoint of the construction
    constructed.safetensors the net before retraining; retrain/ has log and checkpoint
    net.safetensors         the result, see `stepping_plugin.load`
    report.json, *.png, index.html
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from ..construction.config import ConstructionConfig
from ..construction.flow import Construction
from ..construction.start import convert, one_shot
from ..errors import SteppingError, explain
from ..graph.device import usable_device
from ..integrations.timm.models import named_model
from ..net import SteppingNet, load
from ..training.checkpoint import random_state, save_checkpoint, seed_generators
from ..training.evaluation import evaluate
from ..training.loop import TrainConfig, fit
from ..training.trainer import processes
from ..verify import verify
from ..views.contribution import idle_levels
from ..views.summary import units_per_level
from .data import DataBundle, build_data
from .early_exit import answers_of, early_exit_curve
from .folder import opened_folder, settings_of
from .machine import describe_machine
from .recipe import dump_recipe
from .recipe_schema import ModelConfig, Recipe, TeacherConfig
from .report import write_report
from .resume import resume_construction
from .weights import load_weights, save_weights

__all__ = ["Run", "plan", "run_recipe"]

RECONSTRUCTION_BATCH = 250
SAVE_EVERY = 30.0  # seconds between checkpoints of the construction


def run_recipe(
    recipe: Recipe,
    folder: str | Path,
    *,
    fresh: bool = False,
    say: Callable[[str], None] = print,
    source: str | Path | None = None,
) -> dict[str, Any]:
    """Run a recipe; returns the report's data (see `report`).

    Args:
        recipe: from `runs.recipe.load_recipe`.
        folder: for all results.
        fresh: discard what an earlier run left in the folder instead of continuing it.
        say: told what is going on (main process only).
        source: file that the recipe comes from; it is not removed or replaced.

    Raises:
        SteppingError: data, budgets, model or an earlier run in the folder do not fit; another run is on in it.
    """
    return Run(recipe, Path(folder), say).everything(fresh, source)


def plan(recipe: Recipe) -> dict[str, Any]:
    """What a recipe would do, without training: units, MACs and the subnets of a one-shot assignment.

    Returns:
        reference_macs, start_macs (of the widened network), units, budgets, macs, levels notes.
    """
    run = Run(recipe, Path("."), lambda text: None)
    if recipe.model.net is not None:
        net = load(recipe.model.net)
        return {"reference_macs": net.reference_macs, "start_macs": net.macs[-1], "units": net.analysis.num_units,
                "budgets": net.budgets, "macs": net.macs, "notes": net.notes}  # fmt: skip
    net = run.start(run.build_model(recipe.model, pretrained=False))
    start = net.macs[0]
    planned = one_shot(net, recipe.construction.policy, seed=recipe.seed)
    return {"reference_macs": net.reference_macs, "start_macs": start, "units": net.analysis.num_units,
            "budgets": net.budgets, "macs": list(planned.macs), "notes": [*net.notes, *planned.notes]}  # fmt: skip


@dataclass
class Run:
    """One recipe in one folder."""

    recipe: Recipe
    folder: Path
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    _data: DataBundle | None = None
    _epochs: int = 0

    def everything(self, fresh: bool, source: str | Path | None = None) -> dict[str, Any]:
        self._check_before(fresh)
        with self._held(fresh, source):
            return self._all_stages()

    def _all_stages(self) -> dict[str, Any]:
        seed_generators(self.recipe.seed)
        original = None
        if self.recipe.model.net is not None:
            net = load(self.recipe.model.net)
            self._check_classes(net)
        else:
            original = self._timed("original", self.train_original)
            net = self._timed("construction", self.construct, original)
        accuracies = {"before": self.accuracy(net)}
        reference = self.accuracy(original)[0] if original is not None else None
        net = self._timed("retraining", self.retrain, net, original)
        accuracies["after"] = self.accuracy(net)
        return self._finish(net, accuracies, reference)

    # --- before anything is written, or removed

    def _check_before(self, fresh: bool) -> None:
        """What can be known in seconds is not found out after hours of training.

        Raises:
            SteppingError: device, data, teacher, model or saved net do not fit.
            BudgetError: budgets that the model cannot meet.
        """
        recipe = self.recipe
        if recipe.device != "auto":
            usable_device(recipe.device)
        for key, path in self._inputs().items():
            if not path.is_file():
                raise SteppingError(explain("no such file", where=key, got=str(path), action="Check the path."))
        if recipe.model.net is not None:
            self._check_classes(load(recipe.model.net))
        elif fresh or not (self.folder / "original.safetensors").is_file():
            self.start(self.build_model(recipe.model, pretrained=False))
        if recipe.retrain.epochs and recipe.retrain.teacher is not None:
            self.build_model(recipe.retrain.teacher, pretrained=False)
        elif recipe.retrain.epochs and recipe.model.net is not None:
            self.teacher(None)

    def _inputs(self) -> dict[str, Path]:
        """Files that the recipe reads, by key."""
        recipe = self.recipe
        named = {"model.net": recipe.model.net, "model.checkpoint_path": recipe.model.checkpoint_path}
        if recipe.retrain.teacher is not None:
            named["retrain.teacher.checkpoint_path"] = recipe.retrain.teacher.checkpoint_path
        return {key: Path(path) for key, path in named.items() if path is not None}

    @contextlib.contextmanager
    def _held(self, fresh: bool, source: str | Path | None) -> Iterator[None]:
        """The output folder, which the main process takes for all of them; what keeps it from that, all raise."""
        inputs = self._inputs()
        if source is not None and Path(source).is_file():
            inputs["recipe"] = Path(source)
        with contextlib.ExitStack() as stack:
            refused: SteppingError | None = None
            if self.main:
                try:
                    folder = opened_folder(self.folder, self.recipe, fresh=fresh, inputs=inputs, say=self._say)
                    stack.enter_context(folder)
                except SteppingError as error:
                    refused = error
            for problem in gather_object([refused]):
                if problem is not None:
                    raise problem
            yield

    # --- stages

    def train_original(self) -> nn.Module:
        """The original network: pretrained, or trained by the recipe, or from an earlier run."""
        recipe, done = self.recipe, self.folder / "original.safetensors"
        settings = settings_of(recipe, "model", "data", "train", "seed")
        model = self.build_model(recipe.model, recipe.model.pretrained)
        if done.is_file():
            self._say("original: from an earlier run")
            load_weights(model, done, settings)
            return model.eval()
        if recipe.train.epochs:
            self._say(f"original: {recipe.model.name}, {recipe.train.epochs} epochs")
            config = TrainConfig.of(recipe.train, seed=recipe.seed, device=recipe.device)
            self._epochs = config.epochs
            log = fit(model, self.loader("train", recipe.train.batch_size), self.validation(recipe.train), config,
                      checkpoint_dir=self.folder / "original", log=self._log)  # fmt: skip
            self.history["original"] = log.epochs
        if self.main:
            save_weights(model, done, settings)
        return model.eval()

    def construct(self, original: nn.Module) -> SteppingNet:
        """The subnets (Fig. 3), or for the other policies their pattern in one shot."""
        done = self.folder / "constructed.safetensors"
        if done.is_file():
            self._say("construction: from an earlier run")
            return load(done)
        net, policy = self.start(original), self.recipe.construction.policy
        if policy == "steppingnet":
            net = self._iterate(net)
        else:
            net.take(one_shot(net, policy, seed=self.recipe.seed))
        net = net.eval().compact()
        self._reconstruct(net, original)
        if self.main:
            net.save(done)
        return net

    def _reconstruct(self, net: SteppingNet, original: nn.Module) -> None:
        """Bring the original's values back as far as the nesting rule allows; all processes see the same pictures."""
        wanted = self.recipe.construction.reconstruct
        if not wanted:
            return
        self._say(f"reconstruction: least squares on {wanted} training pictures")
        batches = self.data.loader("train", RECONSTRUCTION_BATCH, seed=self.recipe.seed, rank=0, world=1)
        images = torch.cat([x for x, _ in itertools.islice(batches, math.ceil(wanted / RECONSTRUCTION_BATCH))])
        say = lambda text: self._say(f"  {text}")  # noqa: E731
        found = net.reconstruct(original, images[:wanted], seed=self.recipe.seed, say=say)
        net.notes += found.notes
        self.seconds["reconstruction"] = round(found.seconds, 3)

    def start(self, original: nn.Module) -> SteppingNet:
        """The network that construction starts from, all units in subnet 1."""
        config = ConstructionConfig.of(self.recipe.construction)
        example, arguments = torch.zeros(1, *self.data.input_size), self.recipe.model.kwargs
        return convert(original, self.recipe.budgets, config, example, arguments=arguments, seed=self.recipe.seed)

    def _iterate(self, net: SteppingNet) -> SteppingNet:
        config = ConstructionConfig.of(self.recipe.construction)
        loader = self.loader("train", self.recipe.construction.batch_size, "construction")
        construction = Construction(net, loader, config, seed=self.recipe.seed, device=self.recipe.device)
        path = self.folder / "construction" / "state.safetensors"
        if path.is_file():
            resume_construction(construction, path)
        self._say(f"construction: {config.flow} flow, iteration {construction.iteration} of {config.iterations}")
        saved = time.monotonic()
        for record in construction:
            self._log(record)
            if self.main and time.monotonic() - saved > SAVE_EVERY:
                save_checkpoint(path, {"construction": construction.state_dict(), "random": random_state()})
                saved = time.monotonic()
        construction.finish()
        self.history["construction"] = construction.records
        return net

    def retrain(self, net: SteppingNet, original: nn.Module | None) -> SteppingNet:
        """Retraining with distillation (III-B, Eq. 4)."""
        settings = self.recipe.retrain
        if not settings.epochs:
            return net
        self._say(f"retraining: {settings.epochs} epochs, distillation from: {settings.distill_from}")
        config = TrainConfig.of(settings, seed=self.recipe.seed, device=self.recipe.device)
        self._epochs = config.epochs
        log = fit(
            net, self.loader("train", settings.batch_size, "retrain"), self.validation(settings), config,
            teacher=self.teacher(original), gamma=settings.gamma, temperature=settings.temperature,
            from_largest=settings.distill_from == "largest", subnet_weights=settings.subnet_weights,
            beta=settings.beta, sequential=settings.updates == "sequential",
            checkpoint_dir=self.folder / "retrain", log=self._log,
        )  # fmt: skip
        self.history["retraining"] = log.epochs
        return net

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

    def _finish(self, net: SteppingNet, accuracies: dict[str, list[float]], reference: float | None) -> dict[str, Any]:
        self._timed("contribution", self.measure, net)
        curve = self._timed("early exit", self.early_exit, net)
        proof = self._timed("verification", verify, net.cpu())
        data = report_data(self.recipe, net, accuracies, reference)
        data.update(early_exit=curve, verify=vars(proof), seconds=self.seconds, history=self.history)
        data["notes"] = [*net.notes, *self.data.notes()]
        if self.main:
            net.save(self.folder / "net.safetensors")
            write_report(self.folder, data)
        return data

    def measure(self, net: SteppingNet) -> None:
        """What every level adds, on validation pictures."""
        batches = itertools.islice(self.data.loader("val", 256, seed=0, rank=0, world=1), 4)
        for text in idle_levels(net.measure(images for images, _ in batches)):
            net.notes.append(text)
            self._say(f"warning: {text}")

    def early_exit(self, net: SteppingNet) -> dict[str, Any]:
        """Accuracy against average MACs of `engine.predict(until={"max_prob": ...})`, see `runs.early_exit`.

        Where nothing is held out for validation, every second test image is, for this purpose.
        """
        engine = net.eval().deploy()
        test = answers_of(engine, self.loader("test", 256))
        if self.data.val is self.data.test:
            held_out, test, where = test[::2], test[1::2], "every other test image"
        else:
            held_out, where = answers_of(engine, self.loader("val", 256)), "the validation split"
        points = early_exit_curve(held_out, test, engine.macs)
        return {"rule": "max_prob", "thresholds_from": where, "points": points}

    # --- parts

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks."""
        return processes(self.recipe.device).is_main_process

    @property
    def data(self) -> DataBundle:
        """The data set, opened on first use."""
        if self._data is None:
            model = self.recipe.model
            pretrained = model.pretrained or model.checkpoint_path is not None
            self._data = build_data(self.recipe.data, model.name, pretrained=pretrained, say=self._say)
        return self._data

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
        if config.checkpoint_path:
            load_weights(model, Path(config.checkpoint_path))
        return model

    def _check_classes(self, net: SteppingNet) -> None:
        size, classes = self.data.input_size, net.analysis.eval_program.output.meta["shape"][1]
        if net.analysis.image_size != size or classes != self.data.num_classes:
            raise SteppingError(
                f"model.net: the net was made for images {net.analysis.image_size} and {classes} classes, data.name="
                f"{self.recipe.data.name} has images {size} and {self.data.num_classes} classes."
            )

    def _timed(self, stage: str, function: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        self.seconds[stage] = round(time.perf_counter() - start, 3)
        return result

    def _say(self, text: str) -> None:
        if self.main:
            self.say(text)

    def _log(self, record: dict[str, Any]) -> None:
        """About ten lines per stage; everything is in the stage's log."""
        if "iteration" in record:
            if _worth_a_line(record["iteration"], self.recipe.construction.iterations):
                self._say(f"  iteration {record['iteration']}: MACs {record['macs']}, moved {record['moved']}")
        elif "accuracy" in record and _worth_a_line(record["epoch"], self._epochs):
            shown = " ".join(f"{100 * a:.1f}" for a in record["accuracy"])
            self._say(f"  epoch {record['epoch']}: loss {_mean(record['train_loss']):.3f}, accuracy {shown} %")


def report_data(
    recipe: Recipe, net: SteppingNet, accuracies: dict[str, list[float]], reference: float | None
) -> dict[str, Any]:
    """The report's data: see `report`."""
    subnets = [
        {
            "subnet": i + 1,
            "macs": net.macs[i],
            "share": net.macs[i] / net.reference_macs,
            "budget": net.budgets[i],
            "accuracy": accuracies["after"][i],
            "accuracy_before_retraining": accuracies["before"][i],
        }
        for i in range(net.num_subnets)
    ]
    layers = [
        {"name": g.name, "units_per_level": units_per_level(net.levels, g, net.num_subnets)}
        for g in net.analysis.groups
    ]
    return {
        "title": f"{recipe.model.name or recipe.model.net} on {recipe.data.name}",
        "original": {"macs": net.reference_macs, "accuracy": reference},
        "subnets": subnets,
        "layers": layers,
        "contribution": net.contribution and net.contribution.model_dump(),
        "notes": net.notes,
        "recipe": dump_recipe(recipe),
        "seed": recipe.seed,
        "machine": describe_machine(),
    }


def _worth_a_line(number: int, total: int) -> bool:
    return number % max(1, total // 10) == 0 or number == total


def _mean(values: list[float] | float) -> float:
    return sum(values) / len(values) if isinstance(values, list) else values
