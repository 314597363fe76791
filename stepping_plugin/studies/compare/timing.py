"""What training steps and single pictures cost, as ratios to the original network.

All contenders take turns in one process and medians count. On a CPU the clock is that of the process, which other
programs on the machine disturb less than they disturb the wall clock.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ...console.progress import manner, track
from ...engine.engine import Engine, compile_engine
from ...nested.subnet import Subnet
from ...net import SteppingNet
from ...training.trainer import Batch, TrainConfig, Trainer
from ...units.analysis import analyse
from .results import Timing

__all__ = ["latency", "single_engine", "step_ratio", "update_seconds", "work_ratios"]

Work = Callable[[], Any]
BATCHES = (1, 32)
PICTURE_TURNS, STEP_TURNS, WARM = 40, 9, 3  # runs of everything; the first ones do not count


def in_turns(works: Mapping[str, Work], device: str = "cpu", *, turns: int) -> dict[str, float]:
    """Median seconds of every piece of work; they are done in turns."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    times: dict[str, list[float]] = {name: [] for name in works}
    with manner(bars=False):
        for turn in track(range(turns + WARM), f"timing of {', '.join(works)}"):
            for name, work in works.items():
                began = clock()
                work()
                if device.startswith("cuda"):
                    torch.cuda.synchronize()
                if turn >= WARM:
                    times[name].append(clock() - began)
    return {name: median(values) for name, values in times.items()}


# --- Training -----------------------------------------------------------------------------------------------


def plain_step(original: nn.Module, batch: tuple[Tensor, Tensor], config: TrainConfig) -> Work:
    """An update of (a copy of) the original network, without a teacher."""
    trainer = Trainer(copy.deepcopy(original).train(), config, 1)
    return lambda: trainer.update([batch])


def step_ratio(
    original: nn.Module,
    nets: Sequence[nn.Module],
    batch: Batch,
    config: TrainConfig,
    *,
    teacher: nn.Module | None = None,
    sequential: bool = False,
) -> float:
    """Mean update of the nets over an update of the original.

    Args:
        original: the plain network.
        nets: nets that are trained one after the other; copies of them are trained here.
        batch: images and labels.
        config: optimizer, with a learning rate that changes nothing.
        teacher: of the nets.
        sequential: see `Trainer`.
    """
    trainers = [Trainer(copy.deepcopy(net).train(), config, 1, teacher=teacher, sequential=sequential) for net in nets]
    ratios = work_ratios(original, [partial(trainer.update, [batch]) for trainer in trainers], batch, config)
    return sum(ratios) / len(ratios)


def work_ratios(original: nn.Module, works: Sequence[Work], batch: Batch, config: TrainConfig) -> list[float]:
    """Time of every piece of work over an update of the original, without a teacher."""
    plain = Trainer(copy.deepcopy(original).train(), config, 1)
    named: dict[str, Work] = {str(k): work for k, work in enumerate(works)}
    seconds = in_turns({"plain": lambda: plain.update([batch]), **named}, str(plain.device), turns=STEP_TURNS)
    return [seconds[name] / seconds["plain"] for name in named]


def update_seconds(original: nn.Module, batch: Batch, config: TrainConfig) -> float:
    """Seconds of an update of (a copy of) the original network, without a teacher."""
    return in_turns({"plain": plain_step(original, batch, config)}, str(config.device), turns=STEP_TURNS)["plain"]


# --- Inference ----------------------------------------------------------------------------------------------


def single_engine(model: nn.Module, image_size: tuple[int, ...]) -> Engine:
    """Any classifier on the same engine that steps SteppingNets, as one subnet."""
    if isinstance(model, Subnet):
        owner, analysis = model.cpu().model, model.analysis
    else:
        owner = copy.deepcopy(model).cpu().eval()
        analysis = analyse(owner, image_size, modes=(False,))
    ones = torch.ones(analysis.num_units, dtype=torch.long)
    return compile_engine(SteppingNet(owner, analysis, ones, [1], 1).eval())


def latency(
    original: nn.Module, nets: Sequence[nn.Module] | SteppingNet, image_size: tuple[int, ...]
) -> dict[str, Timing]:
    """CPU time of the nets, and where they are a SteppingNet of its steps, over that of the original.

    Args:
        original: the original network.
        nets: standalone nets, ascending, or a SteppingNet.
        image_size: (C, H, W).

    Returns:
        By batch size: "1", where calling kernels takes most of the time in small nets, and "32".
    """
    stepping = compile_engine(nets.cpu().eval()) if isinstance(nets, SteppingNet) else None
    alone: Sequence[nn.Module] = (
        [nets.extract(i) for i in range(1, nets.num_subnets + 1)] if isinstance(nets, SteppingNet) else nets
    )
    reference, engines = single_engine(original, image_size), [single_engine(net, image_size) for net in alone]
    return {str(size): _timing(reference, engines, stepping, size) for size in BATCHES}


def _timing(reference: Engine, engines: Sequence[Engine], stepping: Engine | None, size: int) -> Timing:
    images = torch.randn(size, *reference.image_size, generator=torch.Generator().manual_seed(0))
    works = {"original": _start(reference, images)}
    works.update({f"net{k}": _start(engine, images) for k, engine in enumerate(engines)})
    if stepping is not None:
        session: list[Any] = [None]
        works["step0"] = lambda: session.__setitem__(0, stepping.start(images))
        works.update({f"step{k}": lambda: session[0].step() for k in range(1, len(engines))})
    with torch.inference_mode():
        seconds = in_turns(works, turns=PICTURE_TURNS)
    ratio = {name: round(value / seconds["original"], 4) for name, value in seconds.items()}
    alone = [ratio[f"net{k}"] for k in range(len(engines))]
    return Timing(alone=alone, steps=[ratio.get(f"step{k}", value) for k, value in enumerate(alone)])


def _start(engine: Engine, images: Tensor) -> Work:
    return lambda: engine.start(images).logits
