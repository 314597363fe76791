"""`round_to: auto`: the multiple of channels that this machine likes best, measured.

A stack of small convolutions (pointwise, depthwise, 3x3) is timed at widths around 48 channels that are multiples of 1,
2, 4, 8 and 16 and of no more; all take turns, so that they meet the same machine, and the fastest turn of each counts,
because other work only adds to the time. The smallest multiple whose time per MAC is near the best one wins: levels
that need not be coarser fit budgets better.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..integrations.ort import Conv, conv_runner, require_onnxruntime
from .config import ConstructionConfig

__all__ = ["CANDIDATES", "Calibration", "calibrate", "fixed_round_to"]

CANDIDATES = {1: (47, 49), 2: (46, 50), 4: (44, 52), 8: (40, 56), 16: (48,)}  # multiple -> widths of no larger one
NEAR = 1.05  # times the best time per MAC: as good
SIZE = 14  # pixels
TURNS = 31
MANY = 64  # images on an accelerator, which computes few of them in no more time than one


class Calibration(NamedTuple):
    """The multiple to take, and for every candidate its time per MAC as a multiple of the best one's."""

    multiple: int
    times: dict[int, float]


def fixed_round_to(config: ConstructionConfig, place: nn.Module | torch.device) -> int:
    """`round_to` as a number: "auto" is measured, on a device, or that of a model.

    Raises:
        SteppingError: onnxruntime is to be measured and is not installed.
    """
    if isinstance(config.round_to, int):
        return config.round_to
    device = place
    if isinstance(place, nn.Module):
        device = next((p.device for p in place.parameters()), torch.device("cpu"))
    return calibrate(config.latency, str(device), torch.get_num_threads()).multiple


@functools.cache
def calibrate(runtime: str = "torch", device: str = "cpu", threads: int = 1) -> Calibration:
    """Time the candidates; one measurement per process, runtime, device and number of threads.

    Args:
        runtime: "torch", or "onnxruntime" (on the CPU).
        device: of torch.
        threads: of the runtime.
    """
    if runtime == "onnxruntime":
        require_onnxruntime("latency: onnxruntime")
    batch = 1 if runtime == "onnxruntime" or torch.device(device).type == "cpu" else MANY
    widths = sorted({width for widths in CANDIDATES.values() for width in widths})
    runners = {
        width: conv_runner(_stack(width), batch, SIZE, threads)
        if runtime == "onnxruntime"
        else _torch_runner(_stack(width), batch, torch.device(device))
        for width in widths
    }
    seconds = _interleaved(runners)
    macs = {width: sum(c.outputs * c.inputs // c.groups * c.kernel**2 for c in _stack(width)) for width in widths}
    per_mac = {m: sum(seconds[w] for w in ws) / sum(macs[w] for w in ws) for m, ws in CANDIDATES.items()}
    best = min(per_mac.values())
    times = {m: value / best for m, value in per_mac.items()}
    return Calibration(min(m for m, value in times.items() if value <= NEAR), times)


def _stack(width: int) -> list[Conv]:
    """What light and heavy networks consist of, with `width` channels or twice as many."""
    block = [Conv(width, 2 * width), Conv(2 * width, 2 * width, 3, 2 * width), Conv(2 * width, width)]
    return [*block, Conv(width, width, 3), *block]


def _torch_runner(layers: list[Conv], batch: int, device: torch.device) -> Callable[[], Any]:
    modules: list[nn.Module] = []
    for c in layers:
        modules += [nn.Conv2d(c.inputs, c.outputs, c.kernel, padding=c.kernel // 2, groups=c.groups), nn.ReLU()]
    stack = nn.Sequential(*modules).to(device)
    if device.type == "cpu":
        stack = stack.to(memory_format=torch.channels_last)
    x = torch.zeros(batch, layers[0].inputs, SIZE, SIZE, device=device)

    def run() -> None:
        with torch.inference_mode():
            stack(x)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    return run


def _interleaved(runners: dict[int, Callable[[], Any]]) -> dict[int, float]:
    """Seconds of each in its fastest turn; the first ones warm up."""
    times: dict[int, list[float]] = {name: [] for name in runners}
    for turn in range(TURNS + 3):
        for name, run in runners.items():
            began = time.perf_counter()
            run()
            if turn >= 3:
                times[name].append(time.perf_counter() - began)
    return {name: min(values) for name, values in times.items()}
