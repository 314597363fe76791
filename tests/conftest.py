"""What every test gets: one thread, no network, fixed seeds, torch's defaults restored.

``pytest`` runs the fast tests, ``pytest -m slow`` the slow ones, ``pytest -m ""`` both.
"""

import os

# Before torch is imported, and inherited by subprocesses: xdist workers share the cores, one thread each.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download weights fails at once

import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from stepping_plugin import cli
from stepping_plugin.console.progress import manner

torch.set_num_threads(1)
cli.DELAY = 3600.0  # what commands print must not depend on how long they take

# No deadline: a slow machine is not a defect. Derandomised: the same examples on every run.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Seed every generator before a test; afterwards restore the global switches that it may have turned."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with manner(delay=3600):  # as above
        yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short run of `digits` that is done, for tests to read or copy; its recipe: `small_runs.SMALL`."""
    from small_runs import SMALL

    from stepping_plugin.runs.pipeline import run_recipe
    from stepping_plugin.runs.recipe import load_recipe

    folder = tmp_path_factory.mktemp("small") / "mine"
    run_recipe(load_recipe("digits", SMALL), folder, say=lambda text: None)
    return folder
