"""`stepping bench engine`: what stepping costs, beside the dense original and beside starting from scratch.

All contenders run in one process and take turns, so that they meet the same machine; medians of many turns
are reported. Ratios of one run can be compared, milliseconds of different runs cannot.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...console.progress import manner, track
from ...engine.engine import Engine, compile_engine
from ...errors import SteppingError, explain
from ...net import SteppingNet
from ...views.named import equal_net

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["MODELS", "bench_engine", "bench_net", "bench_table"]

MODELS = ("resnet18", "efficientnet_lite0", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050")


def bench_engine(
    models: Sequence[str] | Mapping[str, nn.Module | tuple[SteppingNet, nn.Module]] = MODELS,
    batch_sizes: Sequence[int] = (1, 8),
    *,
    num_subnets: int = 4,
    turns: int = 15,
    seconds: float | None = None,
    compile: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time dense original, subnets from scratch and steps of one or more models.

    Args:
        models: names of timm models; or by name, modules (their `default_cfg` gives the image size), or nets with the
            dense originals that they are compared with, in eval mode.
        batch_sizes: images per batch.
        num_subnets: N of models; every subnet adds an equal share of every width.
        turns: times that every contender runs; the median counts.
        seconds: stop taking turns for one model and batch size after so long (at least 3 turns).
        compile: run the step programs through `torch.compile`, and the others too.
        progress: called with one line per measurement.

    Returns:
        A dict for JSON: threads, torch version, and one entry per model and batch size (see `bench_net`).
    """
    if not batch_sizes or any(not isinstance(b, int) or b < 1 for b in batch_sizes):
        raise SteppingError(explain("bad batch sizes", got=list(batch_sizes), expected="positive integers"))
    named: Mapping[str, Any] = models if isinstance(models, Mapping) else {name: _timm_model(name) for name in models}
    results = []
    for name, model in named.items():
        if isinstance(model, tuple):
            net, dense = model
        else:
            dense = copy.deepcopy(model).eval()
            net = equal_net(dense, num_subnets)
        for batch_size in batch_sizes:
            entry = bench_net(net, dense, batch_size, turns=turns, seconds=seconds, compile=compile)
            results.append({"model": name, **entry})
            progress(
                f"{name}, batch {batch_size}: sum of steps / dense {entry['ratio']:.2f}, "
                f"from scratch {entry['scratch_ratio']:.2f}, MACs {entry['macs_ratio']:.2f}"
            )
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compiled": compile,
        "results": results,
    }


def _timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def bench_net(
    net: SteppingNet,
    dense: nn.Module,
    batch_size: int,
    *,
    turns: int = 15,
    seconds: float | None = None,
    compile: bool = False,
) -> dict[str, Any]:
    """Time one net at one batch size.

    Args:
        net: in eval mode.
        dense: the original model in eval mode, same image size.

    Returns:
        Milliseconds: `dense`, `subnets` (each from scratch), `steps`, `total` (sum of the steps); `ratio` =
        total / dense, `scratch_ratio` = sum of subnets / dense; `macs` (per step) and `dense_macs` per
        sample, `macs_ratio`; `cache_bytes` after every step.
    """
    engine = compile_engine(net, compile=compile)
    x = torch.randn(batch_size, *engine.image_size, dtype=engine.dtype, device=engine.device)
    subnets: list[Callable[..., Any]] = [net.extract(i) for i in range(1, net.num_subnets + 1)]
    original: Callable[..., Any] = dense
    if compile:
        original, *subnets = [torch.compile(m) for m in (original, *subnets)]
    single = {"dense": original, **{f"subnet{i}": s for i, s in enumerate(subnets, start=1)}}
    times: dict[str, list[float]] = {}
    with torch.inference_mode(), manner(bars=False):
        began = time.perf_counter()
        for turn in track(range(turns + 2), f"turns at batch {batch_size}"):
            for name, module in single.items():
                _add(times, name, partial(module, x), engine, turn)
            cache = _turn_of_steps(engine, x, times, turn)
            if seconds is not None and turn > 4 and time.perf_counter() - began > seconds:
                break
    middle = {name: 1e3 * median(values) for name, values in times.items()}
    steps = [middle[f"step{i}"] for i in range(1, net.num_subnets + 1)]
    scratch = [middle[f"subnet{i}"] for i in range(1, net.num_subnets + 1)]
    increments = [b - a for a, b in zip([0, *engine.macs], engine.macs)]
    total = sum(steps)
    return {
        "batch_size": batch_size,
        "turns": len(times["dense"]),
        "dense": middle["dense"],
        "subnets": scratch,
        "steps": steps,
        "total": total,
        "ratio": total / middle["dense"],
        "scratch_ratio": sum(scratch) / middle["dense"],
        "macs": increments,
        "dense_macs": net.reference_macs,
        "macs_ratio": engine.macs[-1] / net.reference_macs,
        "subnet_macs": list(net.macs),
        "cache_bytes": cache,
    }


def _turn_of_steps(engine: Engine, x: Tensor, times: dict[str, list[float]], turn: int) -> list[int]:
    session = _add(times, "step1", lambda: engine.start(x), engine, turn)
    cache = [session.cache_bytes]
    for level in range(2, engine.num_subnets + 1):
        _add(times, f"step{level}", session.step, engine, turn)
        cache.append(session.cache_bytes)
    return cache


def _add(times: dict[str, list[float]], name: str, run: Callable[[], Any], engine: Engine, turn: int) -> Any:
    """Run once; the first two turns warm up."""
    began = time.perf_counter()
    result = run()
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    if turn >= 2:
        times.setdefault(name, []).append(time.perf_counter() - began)
    return result


def bench_table(report: Mapping[str, Any]) -> Table:
    """The result of `bench_engine` as a table."""
    from rich.table import Table

    title = f"Engine, {report['threads']} thread(s), medians in ms" + (", compiled" if report["compiled"] else "")
    table = Table(title=title)
    for heading in (
        "model",
        "batch",
        "dense",
        "steps",
        "sum",
        "sum/dense",
        "MACs/dense",
        "subnets from scratch",
        "all/dense",
        "cache MiB",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for entry in report["results"]:
        table.add_row(
            entry["model"],
            str(entry["batch_size"]),
            f"{entry['dense']:.2f}",
            _listed(entry["steps"]),
            f"{entry['total']:.2f}",
            f"{entry['ratio']:.2f}",
            f"{entry['macs_ratio']:.2f}",
            _listed(entry["subnets"]),
            f"{entry['scratch_ratio']:.2f}",
            f"{max(entry['cache_bytes']) / 2**20:.1f}",
        )
    return table


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{v:.2f}" for v in values)
