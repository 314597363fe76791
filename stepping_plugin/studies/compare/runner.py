"""Run what is missing: the original once per seed, then every variant, one JSON file each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...console.progress import track
from ...errors import BudgetError, CaptureError, SteppingError
from ...runs.folder import locked
from ...runs.machine import describe_machine
from ...runs.pipeline import Run
from ...runs.recipe import load_recipe
from ...runs.recipe_schema import Recipe
from ...training.trainer import processes
from .methods import RUNNERS, Job, Outcome, assert_comparable
from .results import Machine, Reference, Result, differing, read, result_path, write
from .studies import METHODS, REFERENCE, Variant

__all__ = ["Comparison", "compare"]


@dataclass
class Comparison:
    """What to run, and where.

    Attributes:
        recipe: path or name.
        overrides: on top of the recipe, for all variants.
        variants: methods, or the variants of a study.
        seeds: of everything; the splits of the data stay the same.
        results: folder of the JSON files.
        work: folder of originals and of checkpoints of jobs that are not done.
        again: run also what is there already.
        say: told what is going on.

    Raises:
        SteppingError: the overrides set the seed.
    """

    recipe: str
    variants: Sequence[Variant]
    seeds: Sequence[int] = (0, 1, 2)
    overrides: Sequence[str] = ()
    results: Path = Path("runs/compare")
    work: Path = Path("runs/compare-work")
    again: bool = False
    say: Callable[[str], None] = print
    _originals: dict[int, tuple[nn.Module, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(override.partition("=")[0].strip() == "seed" for override in self.overrides):
            raise SteppingError("seed: a comparison sets it for every run. Leave it out and give --seeds.")

    @property
    def name(self) -> str:
        """Folder of the recipe's results."""
        return Path(self.recipe).stem

    def job_folder(self, variant: Variant, seed: int) -> Path:
        """Where a job keeps what it needs to be continued."""
        settings = flat(variant.recipe(self.recipe, self.overrides, seed))
        return self.work / f"{self.name}-{variant.name}-{seed}-{_digest(settings)}"

    def missing(self) -> list[tuple[Variant, int]]:
        """Jobs without a result, seed after seed; a variant that is the reference by another name is not run twice.

        Raises:
            SteppingError: a result was made with other settings.
        """
        jobs = [(variant, seed) for seed in self.seeds for variant in self.variants if not self._repeats(variant)]
        return [(variant, seed) for variant, seed in jobs if self.again or not self._done(variant, seed)]

    def _repeats(self, variant: Variant) -> bool:
        """Whether the recipe makes a variant the same as the reference, which is run too."""
        reference = METHODS[REFERENCE]
        if variant is reference or variant.method != reference.method or reference not in self.variants:
            return False
        settings = (v.recipe(self.recipe, self.overrides) for v in (variant, reference))
        return next(settings) == next(settings)

    def _done(self, variant: Variant, seed: int) -> bool:
        path = result_path(self.results, self.name, variant.name, seed)
        if not path.is_file():
            return False
        changed = differing(read(path), flat(variant.recipe(self.recipe, self.overrides, seed)), variant.ignores)
        if changed:
            raise SteppingError(
                f"{path} was made with other settings: {'; '.join(changed[:3])}. Run it anew with --again, or choose "
                "another folder with --results."
            )
        return True


def compare(comparison: Comparison) -> list[Path]:
    """Run all jobs that are missing; returns the files written.

    A method that cannot do what the recipe asks (a budget below its floor, a model that the toolkit fails on) leaves a
    result that says so. Everything else that goes wrong stops the comparison.

    Raises:
        SteppingError: recipe, data or earlier results do not fit, or several processes run it.
        CheckpointError: another comparison makes one of the results.
    """
    if processes("cpu").num_processes > 1:
        raise SteppingError("compare: start it once, not by a launcher; a comparison runs in one process.")
    written = []
    with contextlib.ExitStack() as held:
        for variant, seed in comparison.missing():
            for place in (result_path(comparison.results, comparison.name, variant.name, seed),
                          comparison.job_folder(variant, seed)):  # fmt: skip
                held.enter_context(_held(place))
        jobs = comparison.missing()  # again: now nobody else writes them
        for number, (variant, seed) in enumerate(track(jobs, f"comparison {comparison.name}"), start=1):
            comparison.say(f"{comparison.name}: {variant.name}, seed {seed} ({number} of {len(jobs)})")
            result = _run_job(comparison, variant, seed)
            written.append(write(comparison.results, result))
            shown = " ".join(f"{100 * a.accuracy:.2f}" for a in result.alone) or result.reason
            comparison.say(f"  alone: {shown}; {result.seconds:.0f} s")
    return written


def _held(place: Path) -> contextlib.AbstractContextManager[None]:
    """Keep other comparisons from a result, or from the folder of a job or an original."""
    lock = place.parent / f".{place.name}.lock"
    return locked(lock, lambda: f"{place} is being made by another comparison. Wait for it to end, or choose other "
                                "folders with --results and --work, or other --seeds or --methods.")  # fmt: skip


def _run_job(comparison: Comparison, variant: Variant, seed: int) -> Result:
    recipe = variant.recipe(comparison.recipe, comparison.overrides, seed)
    assert_comparable(recipe, variant.method)
    settings, torch_seed = flat(recipe), recipe.seed
    folder = comparison.job_folder(variant, seed)
    if comparison.again and folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    original, accuracy = _original(comparison, seed)
    run = Run(recipe, folder, lambda text: comparison.say(f"  {text}"))
    torch.manual_seed(torch_seed)
    began = time.process_time()
    job = Job(run, variant, original, accuracy)
    common = {
        "recipe": comparison.name, "variant": variant.name, "method": variant.method, "seed": seed,
        "settings": json.loads(json.dumps({k: v for k, v in settings.items() if not variant.ignores(k)})),
        "train_samples": len(run.data.train), "test_samples": len(run.data.test),
        "machine": Machine(**describe_machine()),
        "reference": Reference(macs=job.reference, numbers=_numbers(original), accuracy=accuracy,
                               updates=recipe.train.epochs * len(run.loader("train", recipe.train.batch_size))),
    }  # fmt: skip
    try:
        outcome = RUNNERS[variant.method](job)
    except (BudgetError, CaptureError) as error:
        result = Result(**common, status="failed", reason=str(error), seconds=_since(began))
    else:
        result = Result(**common, **_fields(outcome), seconds=_since(began))
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _fields(outcome: Outcome) -> dict[str, Any]:
    return dict(vars(outcome))


def _original(comparison: Comparison, seed: int) -> tuple[nn.Module, float]:
    """The trained original and its test accuracy; every variant of a seed gets the same weights."""
    if seed not in comparison._originals:
        recipe = load_recipe(comparison.recipe, [*comparison.overrides, f"seed={seed}"])
        parts = flat(recipe)
        own = {k: v for k, v in parts.items() if k.split(".")[0] in ("model", "data", "train", "seed")}
        folder = comparison.work / f"{comparison.name}-original-{seed}-{_digest(own)}"
        run = Run(recipe, folder, lambda text: comparison.say(f"  {text}"))
        with _held(folder):
            folder.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(seed)
            model = run.train_original()
        accuracy = run.accuracy(model)[0]
        comparison._originals[seed] = model.cpu(), accuracy
    return comparison._originals[seed]


def flat(recipe: Recipe) -> dict[str, Any]:
    """A recipe by dotted keys."""
    result: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else key, inner)
        else:
            result[prefix] = value

    add("", recipe.model_dump(mode="json"))
    return result


def _numbers(model: nn.Module) -> int:
    return sum(t.numel() for t in [*model.parameters(), *model.buffers()] if t.is_floating_point())


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()


def _since(began: float) -> float:
    return round(time.process_time() - began, 1)
