"""The contenders. Each gets the trained original, the budgets and the recipe, and gives back its nets and their scores.

What all of them share: the original that they start from and that teaches them, the order of the data and their
augmentation, the optimizer, the number of updates per network (that of SteppingNet's construction and retraining
together, rounded up to whole epochs), the budgets, and the count of MACs. Nets from scratch get the updates of the
original's training on top: the others inherit those.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...console.progress import track
from ...construction.config import ConstructionConfig
from ...construction.flow import Construction
from ...errors import BudgetError, SteppingError
from ...integrations.fvcore import count_macs
from ...integrations.torch_pruning.to_budget import loss_gradients, prune_to_budget, sparsity_regulariser
from ...net import SteppingNet
from ...runs.pipeline import Run
from ...training.criteria import criterion_options
from ...training.evaluation import evaluate
from ...training.loop import TrainConfig, fit
from ...training.losses import SubnetLoss
from ...training.trainer import Batch, Trainer
from ...units.levels import parse_budgets
from ...units.macs import MacModel
from ...units.witness import find_units
from .dense import dense_net, dense_units
from .results import Answer, Phase, Timing
from .slimmable import Slimmable
from .studies import Variant
from .timing import latency, step_ratio, update_seconds, work_ratios

__all__ = ["RUNNERS", "Job", "Outcome", "shared_sizes"]

GRADIENT_BATCHES = 8  # for importances that read gradients
ROUNDING = 2  # MACs by which shares of a network, and differences of two of them, are off


@dataclass
class Outcome:
    """What a method gives back; fields as in `results.Result`."""

    reuse: bool
    alone: list[Answer]
    executed: list[Answer]
    stored: dict[str, int]
    training: dict[str, list[Phase]]
    latency: dict[str, Timing]
    notes: list[str] = field(default_factory=list)


class Job:
    """One variant of one recipe with one seed: what the methods share.

    Args:
        run: recipe (with the seed and the variant's overrides), data and folder of the job.
        variant: which method.
        original: trained, in eval mode, on the CPU.
        accuracy: of the original on the test set.
    """

    def __init__(self, run: Run, variant: Variant, original: nn.Module, accuracy: float) -> None:
        self.run, self.variant, self.original, self.accuracy = run, variant, original, accuracy
        self.recipe, self.folder = run.recipe, Path(run.folder)
        self.size = run.data.input_size
        self.analysis = find_units(original, self.size)
        self.macs_model = MacModel(self.analysis)
        self.reference = self.macs_model.total
        self.budgets = parse_budgets(self.recipe.budgets, self.reference)
        self.increments = [b - a for a, b in itertools.pairwise([0, *self.budgets])]
        self.net_sizes = shared_sizes([*self.budgets, *self.increments])
        self.teacher = copy.deepcopy(run.teacher(original))  # training moves it to its device
        construction, retrain = self.recipe.construction, self.recipe.retrain
        self.per_epoch = len(run.loader("train", retrain.batch_size, "retrain"))
        per_iteration = math.ceil(construction.batches / construction.grad_accum_steps)
        self.construction_updates = (construction.iterations + construction.cooldown_iterations) * per_iteration
        self.extra_epochs = math.ceil(self.construction_updates * construction.batch_size
                                      / (self.per_epoch * retrain.batch_size))  # fmt: skip

    @property
    def example(self) -> torch.Tensor:
        """One picture (1, C, H, W)."""
        return torch.zeros(1, *self.size)

    def settings(self, epochs: int) -> TrainConfig:
        """The recipe's retraining, stretched to so many epochs."""
        section = self.recipe.retrain
        stretch = epochs / max(1, section.epochs)
        milestones = [round(m * stretch) for m in section.decay_milestones]
        return TrainConfig.of(
            section, epochs=epochs, decay_milestones=milestones, seed=self.recipe.seed, device=self.recipe.device
        )

    def tune(self, net: nn.Module, name: str, epochs: int) -> None:
        """Train a net in place, as SteppingNet is retrained; a run that was killed goes on from its checkpoint."""
        section = self.recipe.retrain
        fit(
            net, self.run.loader("train", section.batch_size, "retrain"), None, self.settings(epochs),
            teacher=self.teacher, gamma=section.gamma, temperature=section.temperature, beta=section.beta,
            from_largest=section.distill_from == "largest", sequential=section.updates == "sequential",
            **criterion_options(section),
            subnet_weights=section.subnet_weights if isinstance(net, SteppingNet) else None,
            checkpoint_dir=self.folder / name,
        )  # fmt: skip

    def score(self, net: nn.Module) -> list[float]:
        """Test accuracy of all subnets."""
        return evaluate(net, self.run.loader("test", 256))["accuracy"]

    def batch(self) -> Batch:
        """A training batch, to time steps with."""
        return next(iter(self.run.loader("train", self.recipe.retrain.batch_size, "retrain")))

    @property
    def still(self) -> TrainConfig:
        """The recipe's optimizer with a learning rate that changes nothing, for timing."""
        return TrainConfig.of(self.recipe.retrain, lr=1e-9, sched="none", epochs=1, device=self.recipe.device)

    def step_ratio(self, nets: Sequence[nn.Module]) -> float:
        """Mean update of the nets over a plain one of the original."""
        sequential = self.recipe.retrain.updates == "sequential"
        batch, teacher = self.batch(), self.teacher
        return round(step_ratio(self.original, nets, batch, self.still, teacher=teacher, sequential=sequential), 3)

    def work_ratio(self, work: Callable[[], Any]) -> float:
        """Any piece of work over a plain update of the original."""
        return round(work_ratios(self.original, [work], self.batch(), self.still)[0], 3)

    def update_seconds(self) -> float:
        """Time of a plain update of the original."""
        return update_seconds(self.original, self.batch(), self.still)

    def step_answers(self, sizes: Sequence[int | None], scores: Sequence[float | None]) -> list[Answer]:
        """View "at equal executed MACs" of nets without reuse: run net i of `sizes` when budget i has arrived.

        The answer at hand is that of the largest net so far. None: there is no net of this size.
        """
        answers: list[Answer] = []
        executed, best = 0, (0, 1.0 / self.run.data.num_classes)  # before any net has run: a guess
        for budget, size, score in zip(self.budgets, sizes, scores):
            if size is not None and score is not None:
                executed += size
                best = max(best, (size, score))
            answers.append(Answer(budget=budget, macs=best[0], executed=executed, accuracy=best[1]))
        return answers


def shared_sizes(wanted: Sequence[int]) -> dict[int, int]:
    """MACs that nets without reuse are made for, by the MACs that are wanted.

    Budgets of 30 and 60 % and the increment between them may differ by one MAC of rounding: one net serves them all, of
    the smallest of these sizes, so that no budget is exceeded.
    """
    sizes: dict[int, int] = {}
    for size in sorted(wanted):
        last = next(reversed(sizes.values()), None)
        sizes[size] = last if last is not None and size - last <= ROUNDING else size
    return sizes


# --- Nets that step -----------------------------------------------------------------------------------------


def stepping(job: Job) -> Outcome:
    """SteppingNet and any-width: construction, or the pattern in one shot, then retraining of all subnets at once."""
    constructed = job.recipe.construction.policy == "steppingnet"
    epochs = job.recipe.retrain.epochs
    net = job.run.construct(job.original)
    notes, phases = list(net.notes), []
    if constructed:
        updates, step = _construction_updates(job), _construction_step(job)
        phases.append(Phase(name="construction", networks=1, updates=updates, step=step))
    else:
        epochs += job.extra_epochs
    if seconds := job.run.seconds.get("reconstruction"):
        step = round(seconds / job.update_seconds(), 1)
        phases.append(Phase(name="reconstruction", networks=1, updates=1, step=step))
    job.tune(net, "retrain", epochs)
    phases.append(Phase(name="retraining", networks=1, updates=epochs * job.per_epoch, step=job.step_ratio([net])))
    answers = [
        Answer(budget=budget, macs=macs, executed=macs, accuracy=accuracy)
        for budget, macs, accuracy in zip(net.budgets, net.macs, job.score(net))
    ]
    numbers = _live_numbers(net)
    return Outcome(True, answers, answers, {"alone": numbers, "executed": numbers},
                   {"alone": phases, "executed": phases}, latency(job.original, net, job.size), notes)  # fmt: skip


def _construction_updates(job: Job) -> int:
    """Updates of the construction: the paper's flow ends as soon as all budgets are met."""
    construction, records = job.recipe.construction, job.run.history.get("construction")
    iterations = len(records) if records else construction.iterations
    planned = construction.iterations + construction.cooldown_iterations
    return job.construction_updates * (iterations + construction.cooldown_iterations) // planned


def _construction_step(job: Job) -> float:
    """A construction update, its share of importance and moves included, over a plain one: the first iterations."""
    config = ConstructionConfig.of(job.recipe.construction, lr=1e-9)
    loader = job.run.loader("train", job.recipe.construction.batch_size, "construction")
    construction = Construction(job.run.start(job.original), loader, config, device=job.recipe.device,
                                criterion=SubnetLoss(**criterion_options(job.recipe.retrain)))  # fmt: skip
    return round(job.work_ratio(construction.step) / max(1, config.batches), 3)


def _live_numbers(net: SteppingNet) -> int:
    """Numbers that the subnets use: live weights, biases, norms with their statistics."""
    total = 0
    tensors = [*net.model.named_parameters(), *((n, b) for n, b in net.model.named_buffers() if b.is_floating_point())]
    for name, tensor in tensors:
        if name in net.analysis.weight_units:
            mask = net.live_mask(name, net.levels)
            total += int(mask.expand(tensor.shape).sum())
        else:
            total += tensor.numel()
    return total


# --- Slimmable ----------------------------------------------------------------------------------------------


def slimmable(job: Job) -> Outcome:
    """One slimmable net whose widths cost the budgets, and one whose widths cost the increments."""
    families = {}
    notes: list[str] = []
    for view, sizes in (("alone", job.budgets), ("executed", job.increments)):
        families[view] = _slimmable_family(job, view, sizes, notes)
    (alone, macs, scores), (executed, step_macs, step_scores) = families["alone"], families["executed"]
    if any(m is None for m in macs):
        raise BudgetError(notes[0])
    nets = [alone.extract(i).eval() for i in range(1, len(job.budgets) + 1)]
    answers = [
        Answer(budget=budget, macs=m, executed=m, accuracy=accuracy)
        for budget, m, accuracy in zip(job.budgets, macs, scores)
    ]
    epochs = job.recipe.retrain.epochs + job.extra_epochs
    phases = {
        view: [Phase(name="training", networks=1, updates=epochs * job.per_epoch, step=job.step_ratio([net]))]
        for view, net in (("alone", alone), ("executed", executed))
    }
    return Outcome(False, answers, job.step_answers(step_macs, step_scores),
                   {"alone": alone.stored(), "executed": executed.stored()}, phases,
                   latency(job.original, nets, job.size), notes)  # fmt: skip


def _slimmable_family(
    job: Job, view: str, sizes: Sequence[int], notes: list[str]
) -> tuple[Slimmable, list[Any], list[Any]]:
    """The trained net, and per size the MACs and the accuracy of its width (None where there is none)."""
    widths: dict[int, torch.Tensor] = {}
    sizes = [job.net_sizes[size] for size in sizes]
    for size in sorted(set(sizes)):
        try:
            widths[size] = dense_units(job.analysis, job.macs_model, size)
        except BudgetError as error:
            notes.append(str(error))
    if not widths:
        raise BudgetError(notes[-1])
    net = Slimmable(job.original, job.analysis, list(widths.values()))
    job.tune(net, f"slimmable-{view}", job.recipe.retrain.epochs + job.extra_epochs)
    scores = dict(zip(widths, job.score(net)))
    macs = {size: int(job.macs_model.subnet_macs(torch.where(kept, 1, 2), 1)[0]) for size, kept in widths.items()}
    return net, [macs.get(size) for size in sizes], [scores.get(size) for size in sizes]


# --- Separate nets ------------------------------------------------------------------------------------------


def toolkit(job: Job) -> Outcome:
    """Every budget and every increment has a net of its own, pruned by torch-pruning and trained with distillation."""
    name = job.variant.pruner
    model, sparse = _sparse_training(job, name)
    loader = job.run.loader("train", job.recipe.retrain.batch_size, "construction")
    gradients = loss_gradients(model, itertools.islice(iter(loader), GRADIENT_BATCHES))

    def make(size: int) -> nn.Module:
        return prune_to_budget(model, job.example, size, name, gradients=gradients, seed=job.recipe.seed)

    epochs = job.recipe.retrain.epochs + (0 if sparse else job.extra_epochs)
    return _separate(job, make, epochs, sparse)


def _sparse_training(job: Job, name: str) -> tuple[nn.Module, list[Phase]]:
    """The model to prune: the original, or one trained towards sparsity for as long as a construction takes."""
    updates = job.construction_updates
    model = copy.deepcopy(job.original)
    hook = sparsity_regulariser(model, job.example, name, updates)
    if hook is None:
        return model, []
    section = job.recipe.construction
    config = TrainConfig.of(section, epochs=1, sched="none", device=job.recipe.device)
    trainer = Trainer(model.train(), config, 1)
    trainer.optimizer.register_step_pre_hook(hook)
    stream = job.run.loader("train", section.batch_size, "construction").stream()
    for batch in track(itertools.islice(stream, updates), "sparse training", updates):
        trainer.update([batch])
    trained, batch = copy.deepcopy(model).cpu().eval(), job.batch()  # timing trains the model on
    step = job.work_ratio(lambda: trainer.update([batch]))
    return trained, [Phase(name="sparse training", networks=1, updates=updates, step=step)]


def scratch(job: Job) -> Outcome:
    """Every budget and every increment has a dense net of one width share, trained from new weights."""

    def make(size: int) -> nn.Module:
        kept = dense_units(job.analysis, job.macs_model, size)
        return dense_net(job.original, job.analysis, kept, seed=job.recipe.seed)

    return _separate(job, make, job.recipe.retrain.epochs + job.extra_epochs + job.recipe.train.epochs, [])


def _separate(job: Job, make: Callable[[int], nn.Module], epochs: int, before: list[Phase]) -> Outcome:
    nets: dict[int, nn.Module] = {}
    notes: list[str] = []
    budgets, increments = ([job.net_sizes[size] for size in sizes] for sizes in (job.budgets, job.increments))
    for size in track(sorted({*budgets, *increments}), "making separate nets"):
        try:
            nets[size] = make(size)
        except BudgetError as error:
            if size in budgets:
                raise
            notes.append(str(error))
    macs = {size: count_macs(net, (job.example,)).total for size, net in nets.items()}
    ratios = {size: job.step_ratio([net]) for size, net in nets.items()}
    scores: dict[int, float] = {}
    for size, net in track(nets.items(), "separate nets", len(nets)):
        job.tune(net, f"net-{size}", epochs)
        scores[size] = job.score(net)[0]
    answers = [
        Answer(budget=budget, macs=macs[size], executed=macs[size], accuracy=scores[size])
        for budget, size in zip(job.budgets, budgets)
    ]
    steps = job.step_answers([macs.get(size) for size in increments], [scores.get(size) for size in increments])
    views = {"alone": sorted(set(budgets)), "executed": sorted(set(increments) & set(nets))}
    phases = {
        view: [*before, Phase(name="training", networks=len(sizes), updates=epochs * job.per_epoch,
                              step=round(sum(ratios[s] for s in sizes) / len(sizes), 3))]
        for view, sizes in views.items()
    }  # fmt: skip
    stored = {view: sum(_numbers(nets[s]) for s in sizes) for view, sizes in views.items()}
    timing = latency(job.original, [nets[size] for size in budgets], job.size)
    return Outcome(False, answers, steps, stored, phases, timing, notes)


def _numbers(net: nn.Module) -> int:
    """Parameters and statistics of a plain network."""
    model = getattr(net, "model", net)
    kept = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    return sum(t.numel() for t in kept)


RUNNERS: dict[str, Callable[[Job], Outcome]] = {
    "stepping": stepping,
    "slimmable": slimmable,
    "toolkit": toolkit,
    "scratch": scratch,
}


def assert_comparable(recipe: Any, method: str) -> None:
    """Refuse recipes that a method could not follow.

    Raises:
        SteppingError: distillation from the largest subnet, or a saved net instead of a model.
    """
    if recipe.model.net is not None:
        raise SteppingError("model.net: a comparison starts from the original network. Give model.name instead.")
    if recipe.log_with:
        raise SteppingError("log_with: a comparison leaves its results as JSON, not with trackers. Remove the key.")
    if recipe.retrain.distill_from == "largest" and method != "stepping":
        raise SteppingError(
            "retrain.distill_from: separate nets have no largest subnet to learn from. Use original, teacher or none."
        )
