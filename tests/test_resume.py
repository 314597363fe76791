"""A run that is killed with SIGKILL, again and again, ends with the same bits as an uninterrupted one.

All runs are forks of one process that has imported everything, so that many of them cost little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stepping_plugin.training.checkpoint import load_checkpoint
from stepping_plugin.training.loop import CHECKPOINT, LOG

ROOT = Path(__file__).parents[1]
KINDS = ["epoch loader, accumulation, average", "shuffled data loader", "sequential, own generator"]
KILLS = 4

SCRIPT = '''
import json, os, random, signal, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from stepping_plugin.net import SteppingNet
from stepping_plugin.training.loader import Augment, EpochLoader, TensorSet
from stepping_plugin.training.loop import TrainConfig, fit
from stepping_plugin.units.analysis import analyse

torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = torch.randint(0, 256, (48, 1, 6, 6), dtype=torch.uint8), torch.arange(48) % 4
teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3),
                      nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
analysis = analyse(model, (1, 6, 6))
pipe = None  # where a process that is to be killed tells about every batch


def tell():
    if pipe is not None:
        os.write(pipe, b".")


class Talking(TensorSet):
    def batches(self, plan):
        for batch in super().batches(plan):
            tell()
            yield batch


class Noisy(Dataset):
    """Draws from the same generators as dropout."""

    def __len__(self):
        return len(labels)

    def __getitem__(self, index):
        if index % 8 == 0:
            tell()
        return images[index] / 255 + 0.1 * torch.randn(1, 6, 6) + random.random() / 10, labels[index]


def run(kind, folder):
    net = SteppingNet(model, analysis, torch.arange(analysis.num_units) % 4 + 1, [1] * 3, 1)
    options = dict(checkpoint_dir=folder, teacher=teacher)
    if kind == 0:
        data = Talking(images, labels, (0.5,), (0.25,), Augment(1, 0.5))
        config = TrainConfig(epochs=4, opt="adamw", lr=0.01, warmup_epochs=1, model_ema=True,
                             model_ema_decay=0.9, grad_accum_steps=2, clip_grad=1.0, checkpoint_steps=2)
        fit(net, EpochLoader(data, 8, train=True, seed=3), None, config, **options)
    elif kind == 1:
        batches = DataLoader(Noisy(), 8, shuffle=True)
        fit(net, batches, batches, TrainConfig(epochs=4, lr=0.05, checkpoint_steps=3), **options)
    else:
        batches = DataLoader(Noisy(), 8, shuffle=True, generator=torch.Generator().manual_seed(5))
        config = TrainConfig(epochs=4, opt="lookahead_adamw", lr=0.01)
        fit(net, batches, batches, config, sequential=True, **options)


def forked(kind, folder, batches=None, pause=0.0):
    """Run in a child, killed after so many batches and a pause; whether it was killed."""
    global pipe
    read, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # makes torch's pool anew before several threads ask for it at once
        os.close(read)
        if batches is None:
            pipe = None
        run(kind, folder)
        os._exit(0)
    os.close(pipe)
    if batches is not None:
        while batches > 0 and (got := os.read(read, batches)):
            batches -= len(got)
        time.sleep(pause)  # anywhere in an update, or while it saves
        os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


folder, kinds, kills = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chance, killed = random.Random(0), []
for kind in range(kinds):
    whole, broken = (os.path.join(folder, f"{name}{kind}") for name in ("whole", "killed"))
    forked(kind, whole)
    points = [(chance.randrange(3, 10), chance.random() * 0.02) for _ in range(kills)]
    killed.append(sum(forked(kind, broken, *point) for point in points))
    forked(kind, broken)
print(json.dumps(killed))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(folder), str(len(KINDS)), str(KILLS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "killed.json").write_text(done.stdout.splitlines()[-1])
    return folder


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two checkpoints are not the same to the bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [d for k in a if k != "seconds" for d in differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        return [d for k, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}/{k}")]
    return [] if a == b else [path]


@pytest.mark.parametrize("number", range(len(KINDS)), ids=KINDS)
def test_killed_runs_end_with_the_same_bits(number, folder):
    assert json.loads((folder / "killed.json").read_text())[number] >= 2  # later ones may find nothing left to do
    whole, killed = (load_checkpoint(folder / f"{run}{number}" / CHECKPOINT) for run in ("whole", "killed"))
    assert whole["epoch"] == 4 and whole["trainer"]["updates"] in (12, 24)
    assert differences(whole, killed) == []
    logs = [(folder / f"{run}{number}" / LOG).read_text().splitlines() for run in ("whole", "killed")]
    assert [json.loads(line)["epoch"] for line in logs[1]] == [1, 2, 3, 4]
    assert differences(*([json.loads(line) for line in log] for log in logs)) == []


def test_the_comparison_sees_one_bit(folder):
    state = load_checkpoint(folder / "whole0" / CHECKPOINT)
    other = load_checkpoint(folder / "whole0" / CHECKPOINT)
    name = next(k for k, t in other["trainer"]["net"].items() if t.is_floating_point())
    tensor = other["trainer"]["net"][name]
    tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(9.0))
    assert differences(state, other) == [f"/trainer/net/{name}"]
