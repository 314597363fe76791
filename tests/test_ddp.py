"""Two gloo processes agree with one."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepping_plugin.training.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]

TRAINING = """
import json, os, sys
import torch
from torch import nn

from stepping_plugin.errors import SteppingError
from stepping_plugin.net import SteppingNet
from stepping_plugin.training import loop
from stepping_plugin.training.checkpoint import save_checkpoint
from stepping_plugin.training.loader import Augment, EpochLoader, TensorSet
from stepping_plugin.training.loop import TrainConfig, fit
from stepping_plugin.units.analysis import analyse

folder = sys.argv[1]
world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = torch.randint(0, 256, (64, 1, 6, 6), dtype=torch.uint8), torch.arange(64) % 4
train = TensorSet(images[:48], labels[:48], (0.5,), (0.25,), Augment(1, 0.5))
val = TensorSet(images[45:], labels[45:], (0.5,), (0.25,))  # an odd number


def model(norm):
    return nn.Sequential(nn.Conv2d(1, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), norm(8), nn.ReLU(),
                         nn.Flatten(), nn.Linear(32, 4)).double()


def run(norm, name, shift=0, **options):
    torch.manual_seed(1 + rank)  # DDP starts from the weights of rank 0
    net = model(norm)
    analysis = analyses[norm]
    levels = (torch.arange(analysis.num_units) + shift) % 4 + 1
    net = SteppingNet(net, analysis, levels, [1] * 3, 1)
    torch.manual_seed(2)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).double()
    given = options.pop("config", {})
    config = TrainConfig(epochs=3, lr=0.05, warmup_epochs=1, clip_grad=1.0, smoothing=0.1, **given)
    batch = 12 // world
    loaders = (EpochLoader(train, batch, train=True, seed=3, rank=rank, world=world),
               EpochLoader(val, batch, train=False, rank=rank, world=world))
    history = fit(net, *loaders, config, teacher=teacher, **options)
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in history.epochs]
    save_checkpoint(f"{folder}/{name}-{world}-{rank}", {"net": net.state_dict(), "history": records})


plain = lambda width: nn.Identity()
analyses = {norm: analyse(model(norm), (1, 6, 6)) for norm in (plain, nn.BatchNorm2d)}
run(plain, "sgd")
run(plain, "accumulated", config={"grad_accum_steps": 2, "model_ema": True, "model_ema_decay": 0.8})
run(plain, "adamw", config={"opt": "adamw"})
run(plain, "sequential", sequential=True)
run(nn.BatchNorm2d, "norm")
if world > 1:
    try:
        run(plain, "levels", shift=rank)
    except SteppingError as error:
        print(json.dumps(str(error)))
    run(plain, "resumed", config={"checkpoint_steps": 5}, checkpoint_dir=f"{folder}/checkpoints")
    loop._Run.one_epoch = None  # a finished run trains no more
    run(plain, "finished", config={"checkpoint_steps": 5}, checkpoint_dir=f"{folder}/checkpoints")
    torch.distributed.destroy_process_group()
"""


def start(folder: Path, rank: int, port: int) -> subprocess.Popen:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in names.items()}}
    environment.update(MASTER_ADDR="127.0.0.1", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, str(folder / "script.py"), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_in_one_and_two(script: str, folder: Path) -> list[str]:
    """Run a script by this process alone and by two of its own; returns the last line that each of the two printed."""
    (folder / "script.py").write_text(script)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [start(folder, rank, port) for rank in (0, 1)]
    try:
        with pytest.MonkeyPatch.context() as patch:  # one process: this one
            patch.setattr(sys, "argv", ["script.py", str(folder)])
            runpy.run_path(str(folder / "script.py"))
        ended = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, ended):
        assert process.returncode == 0, errors[-3000:]
    return [(out.splitlines() or [""])[-1] for out, _ in ended]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "refused.json").write_text(json.dumps(run_in_one_and_two(TRAINING, folder)))
    return folder


def results(folder: Path, name: str, world: int) -> list[dict]:
    return [load_checkpoint(folder / f"{name}-{world}-{rank}") for rank in range(world)]


@pytest.mark.parametrize("name", ["sgd", "accumulated", "adamw", "sequential"])
def test_two_processes_with_half_the_batch_end_where_one_does(name, folder):
    (one,), both = results(folder, name, 1), results(folder, name, 2)
    for other in both:
        torch.testing.assert_close(other["net"], one["net"], rtol=0, atol=1e-12)
        for mine, theirs in zip(one["history"], other["history"], strict=True):
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                assert theirs[key] == pytest.approx(value, rel=1e-10), key
    assert one["history"][0]["val_loss"] != one["history"][-1]["val_loss"]


def test_batch_norm_statistics_are_the_same_in_all_processes(folder):
    """They are not those of one process: every process normalises with its own half of the batch."""
    (one,), (first, second) = results(folder, "norm", 1), results(folder, "norm", 2)
    torch.testing.assert_close(first["net"], second["net"], rtol=0, atol=0)
    assert first["history"] == second["history"]
    assert any(not torch.equal(first["net"][k], one["net"][k]) for k in one["net"] if "running" in k)


def test_different_levels_are_refused_by_every_process(folder):
    for message in json.loads((folder / "refused.json").read_text()):
        assert "levels differ between the processes" in json.loads(message)


def test_checkpoints_of_several_processes_are_found_again(folder):
    for resumed, finished in zip(results(folder, "resumed", 2), results(folder, "finished", 2)):
        torch.testing.assert_close(finished["net"], resumed["net"], rtol=0, atol=0)
        assert finished["history"] == resumed["history"]
    state = load_checkpoint(folder / "checkpoints" / "last.safetensors")
    assert len(state["random"]) == 2
    assert not torch.equal(state["random"][0]["torch"], state["random"][1]["torch"])


# --- Construction

CONSTRUCTION = """
import os, sys
import torch
from torch import nn
from stepping_plugin.construction.config import ConstructionConfig
from stepping_plugin.construction.flow import Construction
from stepping_plugin.construction.start import start_network
from stepping_plugin.units.macs import MacModel
from stepping_plugin.training.checkpoint import save_checkpoint
from stepping_plugin.training.loader import EpochLoader, TensorSet
from stepping_plugin.units.analysis import analyse

folder, world, rank = sys.argv[1], int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
torch.set_num_threads(1)
torch.manual_seed(0)
data = TensorSet(torch.randint(0, 256, (48, 1, 6, 6), dtype=torch.uint8), torch.arange(48) % 4, (0.5,), (0.25,))
layers = nn.Conv2d(1, 12, 3), nn.Tanh(), nn.Conv2d(12, 12, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)
model = nn.Sequential(*layers).double()
analysis = analyse(model, (1, 6, 6))
total = MacModel(analysis).total
for estimator in ("per-sample", "per-batch"):
    config = ConstructionConfig(importance=estimator, batches=3, iterations=3, expansion=1.5, noise=0.3)
    net = start_network(model, analysis, [int(total * share) for share in (0.2, 0.5, 0.8)], config, total)
    loader = EpochLoader(data, 16 // world, train=True, seed=3, rank=rank, world=world)
    run = Construction(net, loader, config, device="cpu")
    list(run)
    run.finish()
    save_checkpoint(f"{folder}/{estimator}-{world}-{rank}", {"gradients": run.gradients, "net": net.state_dict()})
if world > 1:
    torch.distributed.destroy_process_group()
"""


def test_two_processes_construct_what_one_does(tmp_path):
    run_in_one_and_two(CONSTRUCTION, tmp_path)
    for estimator in ("per-sample", "per-batch"):
        one, *two = (load_checkpoint(tmp_path / f"{estimator}-{name}") for name in ("1-0", "2-0", "2-1"))
        assert len(torch.unique(one["net"]["unit_levels"])) == 4
        for other in two:
            for name, tensor in one["net"].items():
                torch.testing.assert_close(other["net"][name], tensor, rtol=0, atol=1e-9)
            torch.testing.assert_close(other["gradients"], one["gradients"], rtol=0, atol=1e-9)
