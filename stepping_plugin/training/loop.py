"""The training loop: epochs, evaluation, log, checkpoints, resuming.

    fit(net, train_loader, val_loader, TrainConfig(epochs=20), teacher=original, checkpoint_dir="run")

A run that is killed and started again with the same arguments continues from its last checkpoint and, on a
CPU, ends with the same bits as an uninterrupted one. For that its batches must be repeatable. Those of
`training.loader.EpochLoader` are by construction; of an ordinary DataLoader the batches already done are
drawn again from the saved random state.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn

from stepping_plugin.console.progress import Stage, manner, stage
from stepping_plugin.errors import CheckpointError, SteppingError, explain
from stepping_plugin.nested.net import NestedNet
from stepping_plugin.training.batches import check_batch_size
from stepping_plugin.training.checkpoint import (
    differences,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
    seed_generators,
)
from stepping_plugin.training.criteria import OwnCriterion
from stepping_plugin.training.evaluation import evaluate
from stepping_plugin.training.interrupts import ctrl_c
from stepping_plugin.training.loader import EpochLoader
from stepping_plugin.training.losses import SubnetLoss
from stepping_plugin.training.state import RunState, validated
from stepping_plugin.training.trainer import Batch, TrainConfig, Trainer

__all__ = ["History", "TrainConfig", "Trainer", "evaluate", "fit"]

CHECKPOINT, LOG = "last.safetensors", "log.jsonl"
_FREE_SETTINGS = ("device", "checkpoint_steps")  # may differ between a run and its continuation


@dataclass
class History:
    """One record per epoch.

    Attributes:
        epochs: dicts with epoch (from 1), updates, lr (of the last update), train_loss, seconds and, with a
            validation loader, accuracy and val_loss. Losses and accuracies (shares in [0, 1]) are lists with one
            number per subnet.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def accuracy(self) -> list[float] | None:
        """Of every subnet after the last epoch, None without validation."""
        return self.epochs[-1].get("accuracy") if self.epochs else None


def fit(
    net: nn.Module,
    train_loader: Iterable[Batch],
    val_loader: Iterable[Batch] | None = None,
    config: TrainConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    gamma: float = 0.4,
    temperature: float = 1.0,
    from_largest: bool = False,
    subnet_weights: Sequence[float] | None = None,
    criterion: str | OwnCriterion = "cross_entropy",
    class_weights: Sequence[float] | None = None,
    focal_gamma: float = 2.0,
    beta: float = 0.9,
    sequential: bool = False,
    mixup: Callable[[Tensor, Tensor], Batch] | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = True,
    log: Callable[[dict[str, Any]], None] | None = None,
    progress: bool | None = None,
) -> History:
    """Train all subnets of a SteppingNet (Eq. 4, III-A2), or any classifier, in place.

    In a distributed run (`accelerate launch`, `torchrun`) every process calls it with its own share of the
    data (`EpochLoader(rank=, world=)`). Gradients are averaged, so the learning rate belongs to the batch of
    all processes together; batch norm normalises with the statistics of each process's own batch.

    Args:
        net: left in eval mode, on `config.device`; with `model_ema`, holding the averaged weights.
        train_loader: batches of (images, labels); must have a length.
        val_loader: evaluated after every epoch; None: no evaluation.
        config: hyperparameters.
        teacher: for distillation, for example the original network; None: labels only.
        gamma: weight of the labels beside the teacher, see `SubnetLoss`.
        temperature: softness of the teacher's answers.
        from_largest: the largest subnet teaches the others.
        subnet_weights: one factor per subnet; None: all 1.
        criterion: what is learned from labels: "cross_entropy", "binary" (any number of labels per picture), "focal",
            or a function of scores (B, classes) and labels such as `torch.nn.MultiMarginLoss()`; `teacher` adds to it
            as to the cross entropy. Of a model that returns other than class scores, a function of what it returns (of
            one subnet, in its structure) and of the targets as the loader gives them; the history then has no accuracy.
        class_weights: one factor per class, see `criteria.Criterion`; None: all 1.
        focal_gamma: of the focal loss.
        beta: of the weight-update suppression, see `Trainer`; 1: none.
        sequential: the paper's updates, one per subnet and batch; N passes.
        mixup: (images, labels) -> (images, class probabilities), such as `timm.data.Mixup`.
        checkpoint_dir: folder of `last.safetensors` and `log.jsonl`; None: nothing is written.
        resume: continue from the checkpoint in that folder if there is one; False: start anew.
        log: called with the record of every epoch (main process only).
        progress: show how far it is, see `console.progress`; None: as around it.

    Returns:
        The history, epochs before an interruption included.

    Raises:
        SteppingError: data or teacher do not fit the net, or the loss is not finite; the checkpoint stays.
        CheckpointError: a checkpoint cannot be written or read, or belongs to another run.
        KeyboardInterrupt: Ctrl-C, after the current update and a checkpoint. A second one stops at once.
    """
    config = TrainConfig() if config is None else config
    if not isinstance(config, TrainConfig):
        raise SteppingError(explain("wrong type", where="config", got=type(config).__name__, expected="a TrainConfig"))
    if not isinstance(teacher, nn.Module | None):
        expected = "a torch.nn.Module, or None"  # type: ignore[unreachable]
        raise SteppingError(explain("wrong type", where="teacher", got=type(teacher).__name__, expected=expected))
    batches = _length(train_loader)
    if config.epochs == 0:
        return History()
    check_batch_size(net, train_loader)
    loss = SubnetLoss(
        gamma, temperature, config.smoothing, subnet_weights, from_largest, criterion, class_weights, focal_gamma
    )
    updates_per_epoch = math.ceil(batches / config.grad_accum_steps)
    guided = teacher is not None and teacher.training
    trainer = Trainer(
        net,
        config,
        updates_per_epoch,
        criterion=loss,
        teacher=teacher,
        beta=beta,
        sequential=sequential,
        mixup=mixup,
    )
    settings = {
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE_SETTINGS},
        "loss": loss.settings(),
        "beta": beta,
        "sequential": sequential,
        "teacher": teacher is not None,
        "mixup": mixup is not None,
        "batches per epoch": batches,
        "batch size": getattr(train_loader, "batch_size", None),
        "processes": trainer.processes.num_processes,
    }
    folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise SteppingError(explain("a file, not a folder", where="checkpoint_dir", got=str(folder)))
    run = _Run(trainer, train_loader, val_loader, folder, _plain(settings), log)
    seed_generators(config.seed, trainer.processes.process_index)
    run.begin(resume)
    total = trainer.epochs * updates_per_epoch
    try:
        with manner(progress), stage("training", total, done=trainer.updates) as run.shown, ctrl_c() as run.stop:
            while run.epoch < trainer.epochs:
                run.one_epoch()
    finally:
        net.eval()
        if teacher is not None:
            teacher.train(guided)
    if trainer.ema is not None:
        net.load_state_dict(trainer.ema.module.state_dict())
    return run.history


class _Run:
    """Where a run stands (`epoch`, batches of it `done`, history), and how that is saved and found again."""

    shown: Stage
    stop: threading.Event

    def __init__(
        self,
        trainer: Trainer,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None,
        folder: Path | None,
        settings: dict[str, Any],
        log: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.trainer, self.train_loader, self.val_loader = trainer, train_loader, val_loader
        self.folder, self.settings, self.log = folder, settings, log
        self.main, self.rank = trainer.processes.is_main_process, trainer.processes.process_index
        self.history = History()
        self.epoch = self.done = 0  # epochs completed, batches of the next one completed
        self.losses: Tensor | None = None  # sum over those batches, Tensor[N]
        self.start: dict[str, Any] = {}  # random state at the start of the epoch

    # --- Epochs

    def one_epoch(self) -> None:
        began = time.perf_counter()
        if self.done == 0:
            self.start = self._random_state()
        self.trainer.net.train()
        for group in self._groups():
            losses = self.trainer.update(group) * len(group)
            self.losses = losses if self.losses is None else self.losses + losses
            self.done += len(group)
            self._after_update(self.losses)
        if self.losses is None:
            raise SteppingError("the training loader gives no batch, although its length is not 0.")
        self._close_epoch(self.losses / self.done, began)

    def _groups(self) -> Iterator[list[Batch]]:
        """Batches that are left in this epoch, `grad_accum_steps` at a time."""
        group: list[Batch] = []
        for batch in self._remaining():
            group.append(batch)
            if len(group) == self.trainer.config.grad_accum_steps:
                yield group
                group = []
        if group:
            yield group

    def _remaining(self) -> Iterator[Batch]:
        loader: Any = self.train_loader
        if isinstance(loader, EpochLoader):
            loader.set_epoch(self.epoch, self.done)
            yield from loader
            return
        parts: list[Any] = [loader, getattr(loader, "sampler", None)]
        for part in parts:  # timm's loaders, DistributedSampler
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)
        if self.done == 0:
            yield from loader
            return
        now = random_state()
        self._restore_random_state(self.start)
        batches = iter(loader)
        for _ in range(self.done):
            next(batches)
        restore_random_state(now)
        yield from batches

    def _after_update(self, losses: Tensor) -> None:
        updates, every = self.trainer.updates, self.trainer.config.checkpoint_steps
        text = f"epoch {self.epoch + 1}/{self.trainer.epochs}"
        if updates % 20 == 0:  # not every time: it waits for the device
            text += "  loss " + " ".join(f"{v / self.done:.3f}" for v in losses.tolist())
        self.shown.advance(text=text)
        if self.stop.is_set():
            if self.trainer.processes.num_processes == 1:  # several do not stop at the same update
                self.save()
            raise KeyboardInterrupt
        if every and updates % every == 0:
            self.save()

    def _close_epoch(self, losses: Tensor, began: float) -> None:
        trainer = self.trainer
        record: dict[str, Any] = {"epoch": self.epoch + 1, "updates": trainer.updates, "lr": trainer.lr}
        record["train_loss"] = reduce(losses, "mean").tolist()
        trainer.end_epoch(self.epoch + 1)
        self._assert_good()
        if self.val_loader is not None:
            result = trainer.evaluate(self.val_loader)
            record.update({{"loss": "val_loss"}.get(name, name): values for name, values in result.items()})
        record["seconds"] = round(time.perf_counter() - began, 2)
        self.history.epochs.append(record)
        self.epoch, self.done, self.losses = self.epoch + 1, 0, None
        self.save()
        if self.main:
            self._write_log("a", [record])
            if self.log is not None:
                self.log(record)
        if self.stop.is_set():
            raise KeyboardInterrupt

    def _assert_good(self) -> None:
        """A checkpoint of a diverged net must not replace a good one."""
        if self.losses is not None and not bool(self.losses.isfinite().all()):
            raise self.trainer.diverged(f"mean losses {(self.losses / self.done).tolist()}")
        tensors = self.trainer.net.state_dict()
        bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if bad:
            raise self.trainer.diverged(f"{bad[0]} is not finite")

    def _write_log(self, mode: str, records: list[dict[str, Any]]) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / LOG, mode) as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    # --- Saving and resuming

    def save(self) -> None:
        if self.folder is None:
            return
        self._assert_good()
        if self.done:
            self.trainer.share_buffers()
        state = {
            "settings": self.settings,
            "trainer": self.trainer.state_dict(),
            "epoch": self.epoch,
            "done": self.done,
            "losses": self.losses,
            "history": self.history.epochs,
            "random": gather_object([self._random_state()]),  # one per process
            "start": gather_object([self.start if self.done else self._random_state()]),
        }
        if self.main:
            save_checkpoint(self.folder / CHECKPOINT, state)
        self.trainer.processes.wait_for_everyone()

    def begin(self, resume: bool) -> None:
        """Continue from the checkpoint, or start a new log."""
        path = self.folder / CHECKPOINT if self.folder is not None else None
        found = resume and path is not None and path.is_file()
        if len(set(gather_object([(found, json.dumps(self.settings, sort_keys=True))]))) > 1:
            raise SteppingError(
                "the processes disagree: settings, batches per epoch and the contents of checkpoint_dir must "
                "be the same for all of them."
            )
        if found and path is not None:
            self._resume(path)
        if self.main:
            self._write_log("w", self.history.epochs)

    def _resume(self, path: Path) -> None:
        content = load_checkpoint(path)
        try:
            self._take_over(validated(RunState, content), path)
        except CheckpointError as error:
            raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from None

    def _take_over(self, state: RunState, path: Path) -> None:
        changed = differences(state.settings, self.settings)
        if changed:
            action = "Use the old values, resume=False, or another checkpoint_dir."
            raise CheckpointError(f"{path} belongs to another run: {'; '.join(changed)}. {action}")
        trainer = self.trainer
        subnets = trainer.net.num_subnets if isinstance(trainer.net, NestedNet) else 1
        accumulated, together = trainer.config.grad_accum_steps, trainer.processes.num_processes
        state.check(trainer.epochs, self.settings["batches per epoch"], accumulated, together, subnets)
        trainer.load_state_dict(state.trainer)
        self.epoch, self.done, self.history.epochs = state.epoch, state.done, state.history
        self.losses = None if state.losses is None else state.losses.to(trainer.device)
        self.start = state.start[self.rank]
        self._restore_random_state(self.start)  # for the loader's own generators
        restore_random_state(state.random[self.rank])

    def _random_state(self) -> dict[str, Any]:
        return {**random_state(), "loader": [g.get_state() for g in self._loader_generators()]}

    def _restore_random_state(self, state: dict[str, Any]) -> None:
        restore_random_state(state)
        try:
            for generator, saved in zip(self._loader_generators(), state["loader"]):
                generator.set_state(saved)
        except (TypeError, RuntimeError) as error:
            raise CheckpointError(f"damaged: the state of the loader's generators ({error}).") from None

    def _loader_generators(self) -> list[torch.Generator]:
        """Generators that an ordinary DataLoader was given."""
        parts = (self.train_loader, getattr(self.train_loader, "sampler", None))
        found = [getattr(part, "generator", None) for part in parts]
        return [g for k, g in enumerate(found) if isinstance(g, torch.Generator) and g not in found[:k]]


def _length(loader: Iterable[Batch]) -> int:
    if not isinstance(loader, Sized):
        raise SteppingError("the training loader has no length; the schedule needs the batches per epoch.")
    if len(loader) == 0:
        action = "Check the data set; with drop_last=True it must hold one whole batch."
        raise SteppingError(explain("the training loader is empty", got="0 batches", action=action))
    return len(loader)


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples become lists, numbers used as keys become strings."""
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise SteppingError(f"config: {error}. Use numbers, strings, lists and dicts only.") from None
