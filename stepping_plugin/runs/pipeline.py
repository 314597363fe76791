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
from torch import Tensor, nn

from ..construction.flow import Construction
from ..errors import SteppingError, explain
from ..graph.device import usable_device
from ..net import SteppingNet, load
from ..training.batches import learns_from_batches, single_image, smallest_batch
from ..training.checkpoint import random_state, save_checkpoint, seed_generators
from ..training.criteria import criterion_options
from ..training.interrupts import ctrl_c
from ..training.loop import TrainConfig, fit
from ..training.losses import SubnetLoss
from ..verify import verify
from ..views.contribution import idle_levels
from .figures import calibrated_exit, check_exit, collected
from .folder import first_to_do, opened_folder
from .judgement import answers_to, doubts
from .outcome import report_data
from .parts import Parts
from .provenance import described
from .recipe_schema import Recipe
from .report import write_report
from .resume import resume_construction
from .stages import STAGES, completed, settings_of
from .trackers import Trackers, require_trackers
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
        run.check_batches(net)
        return {"reference_macs": net.reference_macs, "start_macs": net.macs[-1], "units": net.analysis.num_units,
                "budgets": net.budgets, "macs": net.macs, "notes": net.notes}  # fmt: skip
    net = run.start(run.build_model(recipe.model, pretrained=False))
    run.check_batches(net)
    start = net.macs[0]
    planned = run.one_shot(net)
    return {"reference_macs": net.reference_macs, "start_macs": start, "units": net.analysis.num_units,
            "budgets": net.budgets, "macs": list(planned.macs),
            "notes": [*run.noted, *run.data.warnings, *net.notes, *planned.notes]}  # fmt: skip


@dataclass
class Run(Parts):
    """The stages of one recipe in one folder."""

    warnings: list[str] = field(default_factory=list)
    trackers: Trackers | None = None
    _epochs: int = 0

    def everything(self, fresh: bool, source: str | Path | None = None) -> dict[str, Any]:
        self._check_before(fresh)
        with self._held(fresh, source), contextlib.ExitStack() as stack:
            if self.main and self.recipe.log_with:
                self.trackers = Trackers(self.recipe, self.folder)
                stack.callback(self.trackers.finish)
            return self._all_stages()

    def _all_stages(self) -> dict[str, Any]:
        seed_generators(self.recipe.seed)
        original = None
        if self.recipe.model.net is not None:
            net = load(self.recipe.model.net)
            self.check_classes(net)
        else:
            original = self.timed("original", self.train_original)
            net = self.timed("construction", self.construct, original)
        before, labels = answers_to(net, self.loader("test", 256))
        reference = self.accuracy(original)[0] if original is not None else None
        shares = [macs / net.reference_macs for macs in net.macs]
        if self.recipe.retrain.epochs:
            self._warn(doubts(before, labels, shares, reference, retrained=False))
        net = self.timed("retraining", self.retrain, net, original)
        after, labels = answers_to(net, self.loader("test", 256))
        net.notes += self._warn(doubts(after, labels, shares, reference))
        accuracies = {name: _accuracies(answers, labels) for name, answers in (("before", before), ("after", after))}
        return self._finish(net, original, accuracies, reference)

    def _warn(self, texts: list[str]) -> list[str]:
        """Tell at once, and keep for the report."""
        self.warnings += texts
        for text in texts:
            self.tell(f"warning: {text}")
        return texts

    # --- before anything is written, or removed

    def _check_before(self, fresh: bool) -> None:
        """What can be known in seconds is not found out after hours of training.

        Raises:
            SteppingError: device, data, teacher, model or saved net do not fit.
            BudgetError: budgets that the model cannot meet.
        """
        recipe = self.recipe
        require_trackers(recipe)
        if recipe.device != "auto":
            usable_device(recipe.device)
        for section in (recipe.train, recipe.retrain):
            criterion_options(section)
        check_exit(recipe, self.data)
        for key, path in self.inputs.items():
            if not path.is_file():
                raise SteppingError(explain("no such file", where=key, got=str(path), action="Check the path."))
        if recipe.model.net is not None:
            net = load(recipe.model.net)
            self.check_classes(net)
            self.check_batches(net)
        elif fresh or first_to_do(self.folder, recipe) < 2 or not (self.folder / "original.safetensors").is_file():
            self.check_batches(self.start(self.build_model(recipe.model, pretrained=False)))
        if recipe.retrain.epochs and recipe.retrain.teacher is not None:
            self.build_model(recipe.retrain.teacher, pretrained=False)
        elif recipe.retrain.epochs and recipe.model.net is not None:
            self.teacher(None)

    def check_batches(self, net: SteppingNet) -> None:
        """Refuse batches of one image where batch norm learns from them; every stage would find out when it begins."""
        recipe, made = self.recipe, self.recipe.model.net is None
        stages = {
            "train": made and recipe.train.epochs > 0,
            "construction": made and recipe.construction.policy == "steppingnet",
            "retrain": recipe.retrain.epochs > 0,
        }
        sizes = {name: getattr(recipe, name).batch_size for name, comes in stages.items() if comes}
        wrong = [f"{name}.batch_size={n}" for name, n in sizes.items() if smallest_batch(self.loader("train", n)) == 1]
        if wrong and learns_from_batches(net):
            raise single_image(", ".join(wrong))

    @contextlib.contextmanager
    def _held(self, fresh: bool, source: str | Path | None) -> Iterator[None]:
        """The output folder, which the main process takes for all of them; what keeps it from that, all raise."""
        inputs = dict(self.inputs)
        if source is not None and Path(source).is_file():
            inputs["recipe"] = Path(source)
        with contextlib.ExitStack() as stack:
            refused: SteppingError | None = None
            if self.main:
                try:
                    folder = opened_folder(self.folder, self.recipe, fresh=fresh, inputs=inputs, say=self.tell)
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
            self.tell("original: from an earlier run")
            load_weights(model, done, settings, completed)
            return model.eval()
        if recipe.train.epochs:
            self.tell(f"original: {recipe.model.name}, {recipe.train.epochs} epochs")
            config = TrainConfig.of(recipe.train, seed=recipe.seed, device=recipe.device)
            self._epochs = config.epochs
            log = fit(
                model, self.loader("train", recipe.train.batch_size), self.validation(recipe.train), config,
                **criterion_options(recipe.train), checkpoint_dir=self.folder / "original", log=self._log,
            )  # fmt: skip
            self.history["original"] = log.epochs
        if self.main:
            save_weights(model, done, settings)
        return model.eval()

    def construct(self, original: nn.Module) -> SteppingNet:
        """The subnets (Fig. 3), or for the other policies their pattern in one shot."""
        done = self.folder / "constructed.safetensors"
        if done.is_file():
            self.tell("construction: from an earlier run")
            return load(done)
        self.settings(keep=True)
        seed_generators(self.recipe.seed)  # the same numbers whether the original was trained just now or earlier
        net, policy = self.start(original), self.recipe.construction.policy
        if policy == "steppingnet":
            net = self._iterate(net)
        else:
            net.take(self.one_shot(net))
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
        self.tell(f"reconstruction: least squares on {wanted} training pictures")
        batches = self.data.loader("train", RECONSTRUCTION_BATCH, seed=self.recipe.seed, rank=0, world=1)
        images = torch.cat([x for x, _ in itertools.islice(batches, math.ceil(wanted / RECONSTRUCTION_BATCH))])
        say = lambda text: self.tell(f"  {text}")  # noqa: E731
        found = net.reconstruct(original, images[:wanted], seed=self.recipe.seed, say=say)
        net.notes += found.notes
        self.seconds["reconstruction"] = round(found.seconds, 3)

    def _iterate(self, net: SteppingNet) -> SteppingNet:
        config = self.settings()
        loader = self.loader("train", self.recipe.construction.batch_size, "construction")
        construction = Construction(net, loader, config, seed=self.recipe.seed, device=self.recipe.device,
                                    criterion=SubnetLoss(**criterion_options(self.recipe.retrain)))  # fmt: skip
        path = self.folder / "construction" / "state.safetensors"
        if path.is_file():
            resume_construction(construction, path)
        self.tell(f"construction: {config.flow} flow, iteration {construction.iteration} of {config.iterations}")
        saved = time.monotonic()
        with ctrl_c("stopping after this iteration; Ctrl-C again stops at once" if self.main else "") as stop:
            for record in construction:
                self._log(record)
                due = stop.is_set() or construction.done or time.monotonic() - saved > SAVE_EVERY
                if self.main and due:
                    save_checkpoint(path, {"construction": construction.state_dict(), "random": random_state()})
                    saved = time.monotonic()
                if stop.is_set():
                    raise KeyboardInterrupt
        construction.finish()
        self.history["construction"] = construction.records
        return net

    def retrain(self, net: SteppingNet, original: nn.Module | None) -> SteppingNet:
        """Retraining with distillation (III-B, Eq. 4)."""
        settings = self.recipe.retrain
        if not settings.epochs:
            return net
        self.tell(f"retraining: {settings.epochs} epochs, distillation from: {settings.distill_from}")
        config = TrainConfig.of(settings, seed=self.recipe.seed, device=self.recipe.device)
        self._epochs = config.epochs
        log = fit(
            net, self.loader("train", settings.batch_size, "retrain"), self.validation(settings), config,
            teacher=self.teacher(original), gamma=settings.gamma, temperature=settings.temperature,
            from_largest=settings.distill_from == "largest", subnet_weights=settings.subnet_weights,
            **criterion_options(settings),
            beta=settings.beta, sequential=settings.updates == "sequential",
            checkpoint_dir=self.folder / "retrain", log=self._log,
        )  # fmt: skip
        self.history["retraining"] = log.epochs
        return net

    def _finish(
        self,
        net: SteppingNet,
        original: nn.Module | None,
        accuracies: dict[str, list[float]],
        reference: float | None,
    ) -> dict[str, Any]:
        self.timed("contribution", self.measure, net)
        found = self.timed("evaluation", self.judge, net, original)
        proof = self.timed("verification", verify, net.cpu())
        data = report_data(self.recipe, net, accuracies, reference)
        data.update(**found, warnings=self.warnings, verify=vars(proof), seconds=self.seconds, history=self.history)
        data["notes"] = [*net.notes, *self.data.notes()]
        if self.main:
            net.save(self.folder / "net.safetensors")
            write_report(self.folder, data)
        return data

    def measure(self, net: SteppingNet) -> None:
        """What every level adds, on validation pictures."""
        batches = itertools.islice(self.data.loader("val", 256, seed=0, rank=0, world=1), 4)
        net.notes += self._warn(idle_levels(net.measure(images for images, _ in batches)))

    def judge(self, net: SteppingNet, original: nn.Module | None) -> dict[str, Any]:
        """Metrics, early-exit curve and calibrated exit, see `runs.figures`; the last is kept in the net."""
        engine, wanted = net.eval().deploy(), self.recipe.early_exit
        figures = collected(self, engine, original)
        found: dict[str, Any] = {"metrics": figures.metrics(), "early_exit": figures.curve(engine.macs)}
        net.metadata = described(self.recipe, self.data, figures.classes, self.tell)
        if wanted.target is not None and not figures.all.multi_label:
            choice, found["calibrated_exit"] = calibrated_exit(
                figures, engine, wanted.target, net.reference_macs, per_class=wanted.per_class, combine=wanted.combine
            )
            net.metadata = net.metadata.updated(exit=choice.rule)
            self.tell(f"early exit: {choice.sentence()}")
        return found

    def _track(self, record: dict[str, Any]) -> None:
        if self.trackers is None:
            return
        recipe, number = self.recipe, record.get("epoch", record.get("iteration", 0))
        planned = {"original": recipe.train.epochs, "construction": recipe.construction.iterations}
        before = list(itertools.takewhile(lambda stage: stage.name != self.stage, STAGES))
        folder = next(iter(STAGES[len(before)].folders))
        step = number + sum(planned[stage.name] for stage in before if recipe.model.net is None)
        self.trackers.log(self.stage, folder, record, step)

    def _log(self, record: dict[str, Any]) -> None:
        """About ten lines per stage; everything is in the stage's log, and goes to the trackers."""
        self._track(record)
        if "iteration" in record:
            if _worth_a_line(record["iteration"], self.recipe.construction.iterations):
                self.tell(f"  iteration {record['iteration']}: MACs {record['macs']}, moved {record['moved']}")
        elif "accuracy" in record and _worth_a_line(record["epoch"], self._epochs):
            shown = " ".join(f"{100 * a:.1f}" for a in record["accuracy"])
            self.tell(f"  epoch {record['epoch']}: loss {_mean(record['train_loss']):.3f}, accuracy {shown} %")


def _accuracies(answers: Tensor, labels: Tensor) -> list[float]:
    return (answers == labels).double().mean(1).tolist()


def _worth_a_line(number: int, total: int) -> bool:
    return number % max(1, total // 10) == 0 or number == total


def _mean(values: list[float] | float) -> float:
    return sum(values) / len(values) if isinstance(values, list) else values
