"""`stepping bench deadline`: do answers come in time when the machine is busy with something else?"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch

from ...console.progress import manner, track
from ...engine.engine import Engine, Prediction
from ...errors import SteppingError, explain

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["bench_deadlines", "deadline_table"]


def bench_deadlines(
    engine: Engine, requests: int = 200, *, batch_size: int = 1, load: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Answer requests with random deadlines, between the time of subnet 1 and a bit over that of all steps.

    The times that bound the deadlines, and the engine's first knowledge of its steps, are measured before the load
    begins: what it must adapt to.

    Args:
        requests: how many.
        batch_size: images per request.
        load: busy processes beside.
        seed: of the deadlines.

    Returns:
        A dict for JSON: quiet_ms (median per step, without load); counts `in_time`, `late_in_subnet_1` (no earlier
        answer exists) and `late_in_a_step` (a step was started that did not end in time); late_by_ms (median and
        largest; 0 without late ones); late_by_share (of the deadline, largest); subnets (how many requests ended with
        subnets 1..N); unused_share (mean share of the deadline that was left).
    """
    if requests < 1:
        raise SteppingError(explain("nothing to measure", where="requests", got=requests, expected="1 or more"))
    x = torch.randn(batch_size, *engine.image_size, dtype=engine.dtype, device=engine.device)
    quiet = engine.calibrate(batch_size, repeats=15)
    generator = random.Random(seed)
    deadlines = [generator.uniform(quiet[0], 1.2 * sum(quiet)) for _ in range(requests)]
    with _busy(load), manner(bars=False):
        shown = track(deadlines, "requests")
        answered = [(deadline, engine.predict(x, deadline=deadline)) for deadline in shown]
    return {"requests": requests, "batch": batch_size, "load": load, "quiet_ms": [1e3 * s for s in quiet],
            **_judged(answered, engine.num_subnets)}  # fmt: skip


def _judged(answered: list[tuple[float, Prediction]], num_subnets: int) -> dict[str, Any]:
    reached = [int(result.subnet.max()) for _, result in answered]
    late = [(deadline, result) for deadline, result in answered if not result.in_time]
    overruns = [1e3 * (result.seconds - deadline) for deadline, result in late]
    first = sum(int(result.subnet.max()) == 1 for _, result in late)
    return {
        "in_time": len(answered) - len(late),
        "late_in_subnet_1": first,
        "late_in_a_step": len(late) - first,
        "late_by_ms": {"median": median(overruns or [0.0]), "largest": max(overruns, default=0.0)},
        "late_by_share": max((result.seconds / deadline - 1 for deadline, result in late), default=0.0),
        "subnets": [reached.count(i) for i in range(1, num_subnets + 1)],
        "unused_share": mean(max(0.0, 1 - result.seconds / deadline) for deadline, result in answered),
    }


@contextmanager
def _busy(processes: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, daemon=True) for _ in range(processes)]
    try:
        for worker in workers:
            worker.start()
        if workers:
            time.sleep(3.0)  # until they have imported torch
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _work() -> None:
    torch.set_num_threads(1)
    a = torch.randn(512, 512)
    while True:
        a = (a @ a).clamp(-1, 1)


def deadline_table(results: list[dict[str, Any]]) -> Table:
    """One column per model, for `rich.print`."""
    from rich.table import Table

    table = Table("random deadlines", *[row["model"] for row in results])
    for title, text in _LINES.items():
        table.add_row(title, *[text(row) for row in results])
    return table


_LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "busy processes beside": lambda row: str(row["load"]),
    "requests": lambda row: str(row["requests"]),
    "images per request": lambda row: str(row["batch"]),
    "steps without load, ms": lambda row: " ".join(f"{ms:.1f}" for ms in row["quiet_ms"]),
    "answered in time": lambda row: str(row["in_time"]),
    "late: subnet 1 alone took longer": lambda row: str(row["late_in_subnet_1"]),
    "late: a later step did": lambda row: str(row["late_in_a_step"]),
    "late by, median / largest": lambda row: "{median:.2f} / {largest:.2f} ms".format(**row["late_by_ms"]),
    "ended at subnet 1 / 2 / ...": lambda row: " / ".join(map(str, row["subnets"])),
    "share of the deadline unused": lambda row: f"{row['unused_share']:.0%}",
}
