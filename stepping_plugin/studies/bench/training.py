"""`stepping bench training`: what a training step of all N subnets costs, as ratios measured in one run.

Per model, alternating in one process: a plain step of the original network, the joint step of the nested net (one
forward and one backward for all subnets, with suppression), and N separate steps, one per standalone subnet.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ...api import apply_steppingnet
from ...console.progress import manner, track
from ...integrations.timm.models import named_model
from ...training.trainer import TrainConfig, Trainer

__all__ = ["CASES", "bench_training", "training_table"]

CASES: list[tuple[str, int, int]] = [
    ("resnet18", 64, 32),
    ("resnet18", 128, 32),
    ("lenet5", 28, 128),
]  # model, pixels, batch
BUDGETS = (0.1, 0.25, 0.4, 0.6)


def bench_training(
    cases: Sequence[tuple[str, int, int]] = CASES, *, rounds: int = 7, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Median step times.

    Args:
        cases: (timm model, image height and width, batch size).
        rounds: repetitions of every kind of step, in turn.
        device: where to train.

    Returns:
        One dict per case: model, img_size, batch_size, milliseconds and ratios to the plain step.
    """
    with manner(bars=False):
        return [_case(*case, rounds=rounds, device=device) for case in cases]


def _case(name: str, pixels: int, batch: int, rounds: int, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    channels = 1 if name.startswith("lenet5") else 3
    images = torch.randn(batch, channels, pixels, pixels, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)
    model = named_model(name, pixels, num_classes=10, in_chans=channels)
    net = apply_steppingnet(model, BUDGETS, example_inputs=images[:1].cpu(), device=device)
    trainers = [_step(m, images, labels, device) for m in (model, net)]
    separate = [_step(net.extract(i), images, labels, device) for i in range(1, net.num_subnets + 1)]
    kinds: dict[str, Callable[[], None]] = {
        "plain": trainers[0],
        "joint": trainers[1],
        "separate": lambda: _all(separate),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in track(range(rounds + 2), f"rounds of {name} at {pixels} pixels"):
        for kind, step in kinds.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            if number >= 2:  # warm-up
                times[kind].append(1e3 * (time.perf_counter() - start))
    median = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        "model": name, "img_size": pixels, "batch_size": batch, "subnets": net.num_subnets,
        "threads": torch.get_num_threads(),
        "device": device, "milliseconds": median, "ratio": {k: v / median["plain"] for k, v in median.items()},
    }  # fmt: skip


def _all(steps: Sequence[Callable[[], None]]) -> None:
    for step in steps:
        step()


def _step(net: nn.Module, images: Tensor, labels: Tensor, device: str) -> Callable[[], None]:
    trainer = Trainer(net.train(), TrainConfig(device=device, lr=1e-3), 1)

    def step() -> None:
        trainer.update([(images, labels)])

    return step


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def training_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Printable form of `bench_training`'s result."""
    table = Table(title="training step, ratio to a plain step of the same network (milliseconds)")
    for column in ("model", "pixels", "batch", "plain", "joint, N subnets", "N separate steps"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        shown = [f"{row['ratio'][k]:.2f} ({row['milliseconds'][k]:.1f})" for k in ("plain", "joint", "separate")]
        table.add_row(row["model"], str(row["img_size"]), str(row["batch_size"]), *shown)
    return table
