"""Two runs in one folder, and one that is killed twenty times: forks of a process that has imported everything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepping_plugin import load

ROOT = Path(__file__).parents[1]

KILLS = """
import os, random, signal, sys, time
import torch
from stepping_plugin.runs import pipeline
from stepping_plugin.runs.recipe import load_recipe

torch.set_num_threads(1)
pipeline.SAVE_EVERY = -1.0
folder, settings = sys.argv[1], sys.argv[2:]
chance, killed = random.Random(0), 0
recipe = load_recipe("digits", settings)


def forked(folder, lines=None, pause=0.0):
    # In a child, killed after so many lines of its talk and a pause; gives its exit status (minus the signal).
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.close(read)
        try:
            pipeline.run_recipe(recipe, folder, say=lambda text: os.write(write, b"."))
        except BaseException as error:
            print(error, flush=True)
            os._exit(7)
        os._exit(0)
    os.close(write)
    if lines is None:
        return child, read
    while lines > 0 and (got := os.read(read, lines)):
        lines -= len(got)
    time.sleep(pause)  # anywhere in a stage, or while it saves
    os.kill(child, signal.SIGKILL)
    return ended(child, read)


def ended(child, read):
    while os.read(read, 100):
        pass
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


whole, broken = (os.path.join(folder, name) for name in ("whole", "killed"))
first = forked(whole)
assert os.read(first[1], 1)
assert ended(*forked(whole)) == 7
assert ended(*first) == 0
while killed < 20 and forked(broken, chance.randint(1, 4), chance.uniform(0, 0.1)) == -signal.SIGKILL:
    killed += 1
assert ended(*forked(broken)) == 0
print("killed", killed)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_two_runs_at_once_and_twenty_kills(tmp_path):
    """The second of two is refused, the first ends; a run killed twenty times ends with the same bits."""
    settings = ["data.limit=600", "train.epochs=10", "construction.iterations=20", "construction.batches=2",
                "retrain.epochs=10", "budgets=0.2,0.5,0.8", "device=cpu"]  # fmt: skip
    script = tmp_path / "kills.py"
    script.write_text(KILLS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path), *settings]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = ended.stdout.splitlines()
    assert "in use by another run" in lines[0] and lines[-1] == "killed 20"
    assert len(lines) == 2, "a continued run complained"
    for name in ("original.safetensors", "constructed.safetensors", "net.safetensors"):
        whole, killed = (load_file(tmp_path / run / name) for run in ("whole", "killed"))
        assert whole.keys() == killed.keys() and all(torch.equal(whole[k], killed[k]) for k in whole), name
    assert load(tmp_path / "killed" / "net.safetensors").macs == load(tmp_path / "whole" / "net.safetensors").macs
