"""One optimizer update of all subnets: what a training loop repeats. The loop itself: `loop.fit`.

accelerate gives the processes, their device and the exchange between them. Precision and DDP are torch's own:
accelerate fixes the precision once per Python process, but the stages of a run (training of the original,
construction, retraining) may each have their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stepping_plugin.errors import CheckpointError, SteppingError, explain
from stepping_plugin.graph.device import usable_device
from stepping_plugin.graph.structure import map_tensors
from stepping_plugin.nested.net import NestedNet
from stepping_plugin.tensorfile import not_finite
from stepping_plugin.training.batches import check_target, checked_batch, learns_from_batches, single_image
from stepping_plugin.training.evaluation import AllScores, evaluate
from stepping_plugin.training.losses import SubnetLoss
from stepping_plugin.training.state import TrainerState, check_optimizer, validated
from stepping_plugin.training.suppression import Suppression

__all__ = ["Batch", "TrainConfig", "Trainer", "assert_same_levels", "processes"]

Batch = tuple[Tensor, Any]  # images (B, C, H, W); labels int64 (B,), probabilities (B, classes), or one's own


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters, named as in timm's training script."""

    epochs: int = 10
    opt: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4  # not applied to biases and norms
    opt_kwargs: dict[str, Any] = field(default_factory=dict)
    sched: str = "cosine"
    sched_on_updates: bool = True
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    cooldown_epochs: int = 0
    decay_epochs: float | None = None
    decay_milestones: Sequence[int] = ()
    decay_rate: float = 0.1
    smoothing: float = 0.0
    clip_grad: float | None = None  # largest norm of the gradient
    grad_accum_steps: int = 1
    amp: bool = False
    amp_dtype: str = "bfloat16"  # or float16
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    channels_last: bool = False
    torchcompile: bool = False
    seed: int | None = 0  # of Python, numpy and torch; None: leave their generators alone
    device: str = "auto"
    checkpoint_steps: int | None = None  # save also every so many updates, not only after every epoch

    def __post_init__(self) -> None:
        whole = lambda value, least: type(value) is int and value >= least  # noqa: E731
        number = lambda value: type(value) in (int, float) and math.isfinite(value) and value >= 0  # noqa: E731
        fine = {
            "epochs": (whole(self.epochs, 0), "an integer from 0"),
            "grad_accum_steps": (whole(self.grad_accum_steps, 1), "an integer from 1"),
            "warmup_epochs": (number(self.warmup_epochs), "a number from 0"),
            "cooldown_epochs": (number(self.cooldown_epochs), "a number from 0"),
            "lr": (number(self.lr), "a finite number from 0"),
            "weight_decay": (number(self.weight_decay), "a finite number from 0"),
            "clip_grad": (self.clip_grad is None or number(self.clip_grad), "None or a number from 0"),
            "checkpoint_steps": (
                self.checkpoint_steps is None or whole(self.checkpoint_steps, 0),
                "None or an integer",
            ),
            "amp_dtype": (self.amp_dtype in ("bfloat16", "float16"), "bfloat16 or float16"),
            "seed": (self.seed is None or type(self.seed) is int, "None or an integer"),
            "device": (isinstance(self.device, (str, torch.device)), "a device, such as cpu or cuda:0"),
        }
        for name, (is_fine, expected) in fine.items():
            if not is_fine:
                got = repr(getattr(self, name))
                raise SteppingError(explain("out of range", where=f"config.{name}", got=got, expected=expected))

    @classmethod
    def of(cls, section: Any, **changes: Any) -> TrainConfig:
        """From anything that has some of these attributes, such as a section of a recipe."""
        names = [f.name for f in dataclasses.fields(cls) if hasattr(section, f.name)]
        return cls(**{**{name: getattr(section, name) for name in names}, **changes})


def processes(device: str = "auto") -> PartialState:
    """The processes of this run: `process_index`, `num_processes`, `device`, `is_main_process`.

    accelerate joins processes that have no accelerator only if told that the CPU is meant; without that word
    each of them would train alone.
    """
    on_cpu = device == "cpu" and "LOCAL_RANK" in os.environ
    return PartialState(cpu=on_cpu or not torch.accelerator.is_available())


class Trainer:
    """A net with its optimizer, schedule, suppression and teacher.

    `net` stays the caller's module: its parameters are trained in place, on `config.device`. Call
    `net.train()` before the first update.

    Args:
        net: a SteppingNet, whose N subnets are trained together, or any classifier (N = 1).
        config: hyperparameters.
        updates_per_epoch: optimizer updates per epoch, for the schedule.
        criterion: (scores[N, B, C], target, teacher scores or None) -> Tensor[N]; None: `SubnetLoss`.
        teacher: gives class scores (B, C); evaluated without gradient.
        beta: of the weight-update suppression; 1: none.
        sequential: the paper's updates, for every batch one per subnet in ascending order. Costs N passes.
        mixup: (images, labels) -> (images, class probabilities), such as `timm.data.Mixup`.

    Raises:
        SteppingError: levels differ between processes.
    """

    def __init__(
        self,
        net: nn.Module,
        config: TrainConfig,
        updates_per_epoch: int,
        *,
        criterion: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
        teacher: nn.Module | None = None,
        beta: float = 0.9,
        sequential: bool = False,
        mixup: Callable[[Tensor, Tensor], Batch] | None = None,
    ) -> None:
        self.net, self.config, self.mixup = net, config, mixup
        self.processes = processes(config.device)
        self.device = self.processes.device if config.device == "auto" else usable_device(config.device)
        if not any(p.requires_grad for p in net.parameters()):
            action = "Call requires_grad_(True) on those that are to learn."
            raise SteppingError(explain("nothing to train: no parameter requires a gradient", action=action))
        net.to(self.device)
        self.layout = torch.preserve_format
        if config.channels_last:
            self.layout = torch.channels_last
            net.to(memory_format=torch.channels_last)
        self.teacher = teacher.to(self.device).eval() if teacher is not None else None
        self.criterion = criterion or SubnetLoss(smoothing=config.smoothing)
        own = getattr(self.criterion, "criterion", self.criterion)
        self.free = not isinstance(own, str)  # targets are what the criterion makes of them
        if isinstance(own, nn.Module):  # weights of classes, for example, are buffers
            own.to(self.device)
        owner = net.model if isinstance(net, NestedNet) else net  # knows what timm asks a model about
        self.optimizer = _optimizer(owner, config)
        self.scheduler, self.epochs = _schedule(self.optimizer, config, updates_per_epoch)
        self.suppression: Suppression | None = None
        self.subnets: Sequence[int | None] = [None]
        if isinstance(net, NestedNet):
            assert_same_levels(net)
            self.suppression = Suppression(net, beta, optimizer=self.optimizer)
            self.subnets = range(1, net.num_subnets + 1) if sequential else [None]
        half = config.amp and config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.scores = self._wrapped()
        self.ema: ModelEmaV3 | None = None
        if config.model_ema:  # a copy of what DDP has made equal on all processes
            self.ema = ModelEmaV3(net, config.model_ema_decay, use_warmup=config.model_ema_warmup)
        self.updates = 0
        self.lr = config.lr  # of the last update

    def _wrapped(self) -> Callable[[Tensor], Tensor]:
        scores: nn.Module = AllScores(self.net)
        self._ddp: DistributedDataParallel | None = None
        if self.processes.num_processes > 1:
            # No buffer is broadcast at every step (masks are buffers); `share_buffers` evens out statistics.
            ids = [self.device] if self.device.type == "cuda" else None
            scores = self._ddp = DistributedDataParallel(scores, device_ids=ids, broadcast_buffers=False)
        return torch.compile(scores) if self.config.torchcompile else scores

    # --- One update

    def update(self, batches: Sequence[Batch]) -> Tensor:
        """One optimizer update from one batch, or from several whose gradients are averaged.

        Returns:
            Mean loss of every subnet, Tensor[N].

        Raises:
            SteppingError: a loss is not finite, or the batch does not fit the net.
        """
        moved = [self._moved(*checked_batch(batch, self.free)) for batch in batches]
        guides = [self._teach(images) for images, _ in moved]
        total: Tensor | None = None
        for subnet in self.subnets:
            losses = torch.zeros((), device=self.device)
            for k, ((images, target), guide) in enumerate(zip(moved, guides), start=1):
                with self._local(k < len(moved)):
                    losses = losses + self._backward(images, target, guide, subnet, len(moved)) / len(moved)
            self._step(subnet)
            if total is None or subnet is None:
                total = losses
            else:
                total[subnet - 1] = losses[subnet - 1]
        assert total is not None
        self.updates += 1
        self.lr = self.optimizer.param_groups[0]["lr"]
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)
        if self.ema is not None:
            self.ema.update(self.net, self.updates)
        return total

    def _moved(self, images: Tensor, target: Any) -> Batch:
        kind = next(self.net.parameters()).dtype
        images = images.to(self.device, kind, non_blocking=True, memory_format=self.layout)
        target = map_tensors(lambda t: t.to(self.device, non_blocking=True), target)
        if len(images) == 1 and learns_from_batches(self.net):
            raise single_image()
        return self.mixup(images, target) if self.mixup is not None else (images, target)

    def _teach(self, images: Tensor) -> Any:
        if self.teacher is None:
            return None
        kind = next((p.dtype for p in self.teacher.parameters()), images.dtype)
        with torch.no_grad(), self._autocast():
            return self.teacher(images.to(kind))

    def _local(self, more: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are exchanged once per update, with the last batch."""
        return self._ddp.no_sync() if self._ddp is not None and more else contextlib.nullcontext()

    def _backward(self, images: Tensor, target: Any, guide: Any, subnet: int | None, count: int) -> Tensor:
        """Add a batch's gradient, of all subnets or of one; returns the losses."""
        with self._autocast():
            scores = self.scores(images)
        if not self.free and isinstance(scores, Tensor):
            check_target(target, scores)
        losses = self.criterion(scores, target, guide)
        self._assert_finite(losses)
        if subnet is not None:
            loss = losses[subnet - 1]
        else:
            loss = self.suppression.combine(losses) if self.suppression is not None else losses.sum()
        self.scaler.scale(loss / count).backward()
        return losses.detach()

    def _step(self, subnet: int | None) -> None:
        self.scaler.unscale_(self.optimizer)
        scaled: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.suppression is not None:
            self.suppression.scale_gradients(subnet)
            scaled = self.suppression.step(subnet)
        if self.config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip_grad)
        with scaled:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _autocast(self) -> torch.autocast:
        kind = getattr(torch, self.config.amp_dtype)
        return torch.autocast(self.device.type, kind, enabled=self.config.amp)

    def _assert_finite(self, losses: Tensor) -> None:
        if self.device.type != "cpu" and self.updates % 20:
            return  # looking at a number of another device stops its queue; a NaN does not go away
        if not bool(losses.isfinite().all()):
            raise self.diverged(f"losses {[round(v, 4) for v in losses.tolist()]}")

    def diverged(self, what: str) -> SteppingError:
        """The error for a net that is lost."""
        lr = self.optimizer.param_groups[0]["lr"]
        return SteppingError(
            f"training diverged: {what} at update {self.updates + 1}, lr {lr:.3g}. Lower lr, set clip_grad "
            "or warmup_epochs, and check that the images are finite numbers."
        )

    # --- Epochs and state

    @property
    def averaged(self) -> nn.Module:
        """The net to evaluate: the moving average of the weights where one is kept."""
        return self.ema.module if self.ema is not None else self.net

    def evaluate(self, loader: Iterable[Batch]) -> dict[str, list[float]]:
        by_loss = isinstance(self.net, NestedNet) and not self.net.returns_class_scores
        with self._autocast():
            return evaluate(self.averaged, loader, getattr(self.criterion, "of_labels", None) if by_loss else None)

    def end_epoch(self, epochs: int) -> None:
        """After so many epochs: schedules that count them; the statistics of all processes."""
        if hasattr(self.optimizer, "sync_lookahead"):
            self.optimizer.sync_lookahead()
        if self.scheduler is not None:
            self.scheduler.step(epochs)
        self.share_buffers()

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Batch norm statistics: every process gets the mean over the processes."""
        if self.processes.num_processes == 1:
            return
        for module in [self.net] if self.ema is None else [self.net, self.ema.module]:
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(reduce(buffer, "mean"))

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on, apart from the random generators."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "updates": self.updates,
            "lr": self.lr,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the net must have the same levels already.

        Raises:
            CheckpointError: the state belongs to another net.
        """
        known: TrainerState = validated(TrainerState, state)
        theirs = [known.net] if self.ema is None else [known.net, known.ema or {}]
        if not all(map(self._same_net, theirs)):
            raise CheckpointError("the checkpoint belongs to another net: its tensors or its levels differ.")
        check_optimizer(self.optimizer, known.optimizer)
        try:
            self.optimizer.load_state_dict(known.optimizer)
            self.scaler.load_state_dict(known.scaler)
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"damaged: the state of the optimizer ({error}).") from None
        self.net.load_state_dict(known.net)
        if self.ema is not None:
            self.ema.module.load_state_dict(theirs[1])
        self.updates, self.lr = known.updates, known.lr

    def _same_net(self, theirs: dict[str, Tensor]) -> bool:
        """Whether tensors are those of the net in name, shape, type and levels, and finite."""
        own = self.net.state_dict()
        same = {k: (v.shape, v.dtype) for k, v in own.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
        if same and "unit_levels" in own:
            same = torch.equal(own["unit_levels"].cpu(), theirs["unit_levels"].cpu())
        return same and not_finite(theirs) is None


def assert_same_levels(net: NestedNet) -> None:
    """Every process must train the same subnets.

    Raises:
        SteppingError: the level vectors differ.
    """
    digest = hashlib.blake2b(net.levels.numpy().tobytes(), digest_size=8).hexdigest()
    if len(set(gather_object([digest]))) > 1:
        raise SteppingError(
            "the levels differ between the processes. Construct the net with the same seed and data in every "
            "process, or construct it once, save it and load it everywhere."
        )


def _optimizer(owner: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    try:
        return create_optimizer_v2(
            owner, config.opt, config.lr, config.weight_decay, config.momentum, **config.opt_kwargs
        )
    except (ValueError, TypeError, KeyError, AssertionError, RuntimeError) as error:
        action = "Names and arguments are those of timm.optim.create_optimizer_v2."
        raise SteppingError(
            explain(f"no such optimizer ({error})", where=f"opt={config.opt}", action=action)
        ) from error


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int) -> tuple[Any, int]:
    """timm's scheduler (None for sched="none") and the number of epochs, cooldown included."""
    return create_scheduler_v2(
        optimizer,
        config.sched,
        num_epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        decay_milestones=list(config.decay_milestones),
        cooldown_epochs=config.cooldown_epochs,
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_epochs=config.warmup_epochs,
        step_on_epochs=not config.sched_on_updates,
        updates_per_epoch=updates_per_epoch,
    )
