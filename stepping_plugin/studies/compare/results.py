"""One JSON file per (recipe, variant, seed): what was run, on what, and what came out.

Accuracies are shares of the test pictures in [0, 1], MACs are of one picture, costs and latencies are ratios to the
original network, measured in turns with it in one process. Files are written beside their place and renamed, so that
a file that exists is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import SteppingError

__all__ = ["FORMAT", "Answer", "Machine", "Phase", "Reference", "Result", "Timing", "differing", "read", "read_all",
           "result_path", "write"]  # fmt: skip

FORMAT = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Answer(_Part):
    """The scores that are at hand when a budget is used up.

    Attributes:
        budget: MACs allowed in all, P_i.
        macs: MACs of the net that gave the answer.
        executed: MACs executed by then.
        accuracy: of that net on the test set.
    """

    budget: int
    macs: int
    executed: int
    accuracy: float = Field(ge=0, le=1)


class Phase(_Part):
    """A part of the training: `networks` nets, `updates` optimizer updates each, `step` times as long as plain ones.

    A plain update is one of the original network, from the same batch, without a teacher.
    """

    name: str
    networks: int
    updates: int
    step: float

    @property
    def cost(self) -> float:
        """In plain updates."""
        return self.networks * self.updates * self.step


class Timing(_Part):
    """CPU time of one batch on the engine, as ratios to the original on the same engine.

    Attributes:
        alone: of net i from scratch.
        steps: of the step from net i - 1 to net i; without reuse, net i from scratch.
    """

    alone: list[float]
    steps: list[float]


class Reference(_Part):
    """The original network."""

    macs: int
    numbers: int
    accuracy: float = Field(ge=0, le=1)
    updates: int


class Machine(_Part):
    """Where it was run."""

    processor: str
    threads: int
    torch: str
    timm: str
    torch_pruning: str
    stepping_plugin: str


class Result(_Part):
    """Everything about one variant of one recipe with one seed.

    Attributes:
        status: "failed": the method cannot do this; `reason` says why, and the numbers are empty.
        settings: the resolved recipe, overrides of the variant included, by dotted key.
        train_samples, test_samples: pictures of the data.
        reuse: whether a larger net takes over the results of a smaller one.
        alone: view "each subnet alone": the net of every budget, chosen once.
        executed: view "at equal executed MACs": budgets arrive one after the other; without reuse the nets are sized to
            the increments P_i - P_{i-1}, and the answer is that of the largest net so far.
        stored: numbers (weights and norm statistics) to be stored, per view.
        training: how the nets of both views were made.
        latency: by batch size.
        seconds: CPU time of the job, since it was last continued.
    """

    format: Literal[1] = 1
    recipe: str
    variant: str
    method: str
    seed: int
    status: Literal["done", "failed"] = "done"
    reason: str | None = None
    settings: dict[str, Any]
    train_samples: int
    test_samples: int
    machine: Machine
    reference: Reference
    reuse: bool = False
    alone: list[Answer] = []
    executed: list[Answer] = []
    stored: dict[str, int] = {}
    training: dict[str, list[Phase]] = {}
    latency: dict[str, Timing] = {}
    notes: list[str] = []
    seconds: float = 0.0


def result_path(folder: Path, recipe: str, variant: str, seed: int) -> Path:
    """Where a result lies under the folder of all results."""
    return folder / recipe / variant / f"seed{seed}.json"


def write(folder: Path, result: Result) -> Path:
    """Write a result atomically; returns its path."""
    path = result_path(folder, result.recipe, result.variant, result.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(result.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def read(path: Path) -> Result:
    """Read and check one result.

    Raises:
        SteppingError: the file is no result of this format.
    """
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError) as error:
        text = " ".join(str(error).split())[:300]
        raise SteppingError(f"{path} is no comparison result of format {FORMAT}: {text}. Remove it.") from None


def read_all(folder: Path) -> list[Result]:
    """All results under a folder, in order of recipe, variant and seed."""
    results = [read(path) for path in sorted(folder.glob("*/*/seed*.json"))]
    return sorted(results, key=lambda r: (r.recipe, r.variant, r.seed))


def differing(result: Result, settings: dict[str, Any], ignored: Callable[[str], bool]) -> list[str]:
    """Keys that a result was made with other values of, `ignored` ones left out, and those that it does not know."""
    plain = json.loads(json.dumps(settings))
    return [
        f"{name}: {value!r} then, {plain.get(name)!r} now"
        for name, value in result.settings.items()
        if name in plain and plain[name] != value and not ignored(name)
    ]
