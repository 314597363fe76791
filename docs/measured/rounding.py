"""Time of all steps over one dense run, with levels in multiples of some numbers of channels, torch and onnxruntime.

    OMP_NUM_THREADS=1 python docs/measured/rounding.py efficientnet_lite0 --json rounding-speed.json

One net per multiple, in one shot from random weights (time does not depend on them), same budgets; all take turns, so
that they meet the same machine: ratios can be compared, milliseconds of different calls cannot. Time is that of the
process on one thread, without what other processes take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch

from stepping_plugin import ConstructionConfig, SteppingNet, apply_steppingnet
from stepping_plugin.runs.machine import describe_machine
from stepping_plugin.studies.bench.onnx import bench_nets_in_onnxruntime

BUDGETS = (0.1, 0.3, 0.5, 0.85)


def torch_times(nets: dict[str, SteppingNet], dense: torch.nn.Module, batch: int, turns: int) -> dict[str, Any]:
    """As `bench_nets_in_onnxruntime`, in our own engine."""
    engines = {name: net.deploy() for name, net in nets.items()}
    x = torch.randn(batch, *next(iter(engines.values())).image_size)
    times: dict[str, list[list[float]]] = {}

    def clocked(name: str, step: int, run: Any) -> Any:
        began = time.process_time()
        result = run()
        rows = times.setdefault(name, [])
        if len(rows) <= step:
            rows.append([])
        rows[step].append(time.process_time() - began)
        return result

    with torch.inference_mode():
        for turn in range(turns + 2):
            if turn == 2:
                times.clear()
            clocked("dense", 0, lambda: dense(x))
            for name, engine in engines.items():
                session = clocked(name, 0, lambda engine=engine: engine.start(x))
                for step in range(1, engine.num_subnets):
                    clocked(name, step, session.step)
    middle = {name: [1e3 * median(row) for row in rows] for name, rows in times.items()}
    whole = middle.pop("dense")[0]
    return {
        name: {"dense": whole, "steps": steps, "total": sum(steps), "ratio": sum(steps) / whole}
        for name, steps in middle.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--round-to", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for model in options.models:
        torch.manual_seed(0)
        dense = timm.create_model(model).eval()
        images = torch.randn(1, 3, options.size, options.size)
        nets = {
            str(r): apply_steppingnet(
                dense, BUDGETS, example_inputs=images, config=ConstructionConfig(round_to=r)
            ).compact()
            for r in options.round_to
        }
        measured = {
            "torch": {batch: torch_times(nets, dense, batch, options.turns) for batch in options.batch_sizes},
            "onnxruntime": bench_nets_in_onnxruntime(
                nets, dense, options.batch_sizes, turns=options.turns, clock=time.process_time
            ),
        }
        for runtime, batch, (name, net) in itertools.product(measured, options.batch_sizes, nets.items()):
            result = measured[runtime][batch][name]
            entry = {"model": model, "size": options.size, "batch": batch, "runtime": runtime}
            entry |= {"round_to": int(name), "macs": net.macs, "reference_macs": net.reference_macs}
            found.append({**entry, **result})
            print(model, batch, runtime, name, f"{result['ratio']:.2f}", flush=True)
        options.json.write_text(json.dumps({"machine": describe_machine(), "threads": 1, "results": found}, indent=1))


if __name__ == "__main__":
    main()
