"""One optimizer update of all subnets: what a training loop repeats. The loop itself: `loop.fit`.

accelerate gives the processes, their device and the exchange between them; precision and DDP are torch's own, because
accelerate fixes the precision once per Python process and a run may train its stages (original, construction,
retraining) with different ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
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
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from stepping_plugin.errors import CheckpointError, SteppingError, explain
from stepping_plugin.net import SteppingNet
from stepping_plugin.training.losses import SubnetLoss, cross_entropy
from stepping_plugin.training.suppression import Suppression

__all__ = ["TrainConfig", "Trainer", "evaluate"]

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W); labels int64 (B,) or class probabilities (B, classes)


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
    seed: int | None = 0  # of Python, numpy and torch; None: leave the generators alone
    device: str = "auto"
    checkpoint_steps: int | None = None  # save also every so many updates, not only after every epoch

    @classmethod
    def of(cls, section: Any, **changes: Any) -> TrainConfig:
        """From anything that has some of these attributes, such as a section of a recipe."""
        found = {
            f.name: getattr(section, f.name) for f in dataclasses.fields(cls) if hasattr(section, f.name)
        }
        return cls(**{**found, **changes})


class Trainer:
    """A net with its optimizer, schedule, suppression and teacher.

    `net` stays the caller's module: its parameters are trained in place, on `config.device`.

    Args:
        net: a SteppingNet, whose N subnets are trained together, or any classifier (N = 1).
        config: hyperparameters.
        updates_per_epoch: optimizer updates per epoch, for the schedule.
        criterion: (scores[N, B, C], target, teacher scores) -> Tensor[N]; default: `SubnetLoss` with the config's smoothing.
        teacher: gives class scores (B, C); evaluated without gradient.
        beta: of the weight-update suppression; 1: none.
        sequential: the paper's updates, one per subnet in ascending order, for every batch. Costs N passes.
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
        self.processes = PartialState(cpu=config.device == "cpu" and "WORLD_SIZE" in os.environ)
        self.device = self.processes.device if config.device == "auto" else torch.device(config.device)
        net.to(self.device)
        self.layout = torch.preserve_format
        if config.channels_last:
            self.layout = torch.channels_last
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.teacher = teacher.to(self.device).eval() if teacher is not None else None
        self.criterion = criterion or SubnetLoss(smoothing=config.smoothing)
        owner = (
            net.model if isinstance(net, SteppingNet) else net
        )  # names and timm's rules are the original's
        self.optimizer = create_optimizer_v2(
            owner, config.opt, config.lr, config.weight_decay, config.momentum, **config.opt_kwargs
        )
        self.scheduler, self.epochs = _schedule(self.optimizer, config, updates_per_epoch)
        self.suppression = self._suppression(beta)
        self.subnets = (
            range(1, net.num_subnets + 1) if sequential and isinstance(net, SteppingNet) else [None]
        )
        half = config.amp and config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        ema = {"decay": config.model_ema_decay, "use_warmup": config.model_ema_warmup}
        self.ema = ModelEmaV3(net, **ema) if config.model_ema else None
        self.scores = self._wrapped()
        self.updates = 0

    def _suppression(self, beta: float) -> Suppression | None:
        if not isinstance(self.net, SteppingNet):
            return None
        assert_same_levels(self.net)
        return Suppression(self.net, beta, optimizer=self.optimizer)

    def _wrapped(self) -> nn.Module:
        scores: nn.Module = _Scores(self.net)
        if self.processes.num_processes > 1:
            # Buffers are not broadcast at every step (masks among them); `share_buffers` evens out the statistics.
            ids = [self.device] if self.device.type == "cuda" else None
            scores = DistributedDataParallel(scores, device_ids=ids, broadcast_buffers=False)
        self._ddp = scores if isinstance(scores, DistributedDataParallel) else None
        return torch.compile(scores) if self.config.torchcompile else scores  # type: ignore[return-value]

    # ------------------------------------------------------------------------------------------- one update

    def update(self, batches: Sequence[Batch]) -> Tensor:
        """One optimizer update from one batch, or from several whose gradients are averaged.

        The net must be in train mode.

        Returns:
            Mean loss of every subnet, Tensor[N].

        Raises:
            SteppingError: a loss is not finite, or the batch does not fit the net.
        """
        moved = [self._moved(*batch) for batch in batches]
        guides = [self._teach(images) for images, _ in moved]
        total: Tensor | None = None
        for subnet in self.subnets:
            losses = torch.stack([
                self._backward(images, target, guide, subnet, len(moved), last=k == len(moved))
                for k, ((images, target), guide) in enumerate(zip(moved, guides), start=1)
            ]).mean(0)  # fmt: skip
            if total is None:
                total = losses
            elif subnet is not None:
                total[subnet - 1] = losses[subnet - 1]
            self._step(subnet)
        assert total is not None
        self.updates += 1
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)
        if self.ema is not None:
            self.ema.update(self.net, self.updates)
        return total

    def _moved(self, images: Tensor, target: Tensor) -> Batch:
        kind = next(self.net.parameters()).dtype
        images = images.to(self.device, kind, non_blocking=True, memory_format=self.layout)
        target = target.to(self.device, non_blocking=True)
        if len(images) == 1 and any(isinstance(m, _BatchNorm) and m.training for m in self.net.modules()):
            action = "Use batch_size >= 2 (per process); a DataLoader with a last batch of one image needs drop_last=True."
            raise SteppingError(
                explain("batch norm cannot be trained on a batch of one image", action=action)
            )
        return self.mixup(images, target) if self.mixup is not None else (images, target)

    def _teach(self, images: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        kind = next((p.dtype for p in self.teacher.parameters()), images.dtype)
        with torch.no_grad(), self._autocast():
            return self.teacher(images.to(kind))

    def _backward(
        self, images: Tensor, target: Tensor, guide: Tensor | None, subnet: int | None, count: int, last: bool
    ) -> Tensor:
        alone = self._ddp.no_sync() if self._ddp is not None and not last else contextlib.nullcontext()
        with alone:
            with self._autocast():
                scores = self.scores(images)
            if self.updates == 0:
                _check_labels(target, scores)
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
            return  # looking at a number on another device stops the queue; a NaN does not go away
        if not bool(losses.isfinite().all()):
            raise self.not_finite(f"losses {[round(v, 4) for v in losses.tolist()]}")

    def not_finite(self, what: str) -> SteppingError:
        lr = self.optimizer.param_groups[0]["lr"]
        return SteppingError(
            f"training diverged: {what} at update {self.updates + 1}, lr {lr:.3g}. "
            f"Lower lr, set clip_grad or warmup_epochs, and check that the images are finite numbers."
        )

    # ------------------------------------------------------------------------------------------- epochs, state

    @property
    def averaged(self) -> nn.Module:
        """The net to evaluate: the moving average of the weights where one is kept."""
        return self.ema.module if self.ema is not None else self.net

    def end_epoch(self, epochs_done: int) -> None:
        """What happens once per epoch: schedules that count epochs, statistics of the processes evened out."""
        if hasattr(self.optimizer, "sync_lookahead"):
            self.optimizer.sync_lookahead()
        if self.scheduler is not None:
            self.scheduler.step(epochs_done)
        self.share_buffers()

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Batch norm statistics: every process gets the mean over the processes."""
        if self.processes.num_processes > 1:
            for module in {self.net, self.averaged}:
                for buffer in module.buffers():
                    if buffer.is_floating_point():
                        buffer.copy_(reduce(buffer.clone(), "mean"))

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on, apart from the random generators."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.net.state_dict()
        same = {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in state["net"].items()}
        if not same or not torch.equal(
            own.get("unit_levels", _NONE).cpu(), state["net"].get("unit_levels", _NONE)
        ):
            raise CheckpointError("the checkpoint belongs to another net: its tensors or its levels differ.")
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.updates = state["updates"]

    def evaluate(self, loader: Iterable[Batch]) -> dict[str, list[float]]:
        with self._autocast():
            return evaluate(self.averaged, loader)


_NONE = torch.zeros(0)


class _Scores(nn.Module):
    """Class scores (N, B, classes) through `forward`, as DDP and torch.compile need it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return (
            self.net.forward_all(images)
            if isinstance(self.net, SteppingNet)
            else self.net(images).unsqueeze(0)
        )


@torch.no_grad()
def evaluate(net: nn.Module, loader: Iterable[Batch]) -> dict[str, list[float]]:
    """Accuracy (a share in [0, 1]) and mean cross entropy of every subnet, in one pass, over all processes.

    Args:
        net: a SteppingNet, or any classifier (N = 1); evaluated where it is, its mode is restored.
        loader: batches of (images, labels); in a distributed run, this process's share.

    Returns:
        {"accuracy": [N floats], "loss": [N floats]}

    Raises:
        SteppingError: no batch.
    """
    first, mode, scores = next(net.parameters()), net.training, _Scores(net)
    kind = torch.float32 if first.device.type == "mps" else torch.float64
    sums: Tensor | None = None
    net.eval()
    try:
        for images, labels in loader:
            found = scores(images.to(first.device, first.dtype))
            labels = labels.to(first.device)
            correct = (found.argmax(-1) == labels).sum(1).to(kind)
            loss = cross_entropy(found, labels).to(kind) * len(labels)
            counts = torch.stack([correct, loss, torch.full_like(loss, len(labels))])
            sums = counts if sums is None else sums + counts
    finally:
        net.train(mode)
    if sums is None:
        raise SteppingError(
            "the validation loader gives no batch: its data set is empty, or smaller than a dropped batch."
        )
    correct, loss, count = reduce(sums, "sum")
    return {"accuracy": (correct / count).tolist(), "loss": (loss / count).tolist()}


def assert_same_levels(net: SteppingNet) -> None:
    """Every process must train the same subnets.

    Raises:
        SteppingError: the level vectors differ.
    """
    digest = hashlib.blake2b(net.levels.numpy().tobytes(), digest_size=8).hexdigest()
    if len(set(gather_object([digest]))) > 1:
        raise SteppingError(
            "the levels differ between the processes. Construct the net with the same seed and data in every process, or "
            "construct it once, save it and load it everywhere."
        )


def _schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int
) -> tuple[Any, int]:
    """timm's scheduler (None for sched="none") and the number of epochs, warm-up and cooldown included."""
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


def _check_labels(target: Tensor, scores: Tensor) -> None:
    """Before the first update: labels that the net has no score for would fail deep inside of torch."""
    classes = scores.shape[-1]
    if target.is_floating_point():
        wrong = "" if target.shape == scores.shape[1:] else f"shape {tuple(target.shape)}"
    else:
        low, high = int(target.min()), int(target.max())
        wrong = "" if low >= 0 and high < classes else f"labels {low} to {high}"
    if wrong:
        action = (
            f"Make the model with num_classes={int(target.max()) + 1} or more." if "labels" in wrong else None
        )
        raise SteppingError(
            explain(
                "labels do not fit the net",
                got=wrong,
                expected=f"0 to {classes - 1}, the net's classes",
                action=action,
            )
        )
