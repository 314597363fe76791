"""Stages of a run: what a changed recipe takes over, does anew and keeps aside; nothing that was computed is lost."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from pydantic import BaseModel
from small_runs import SMALL

from stepping_plugin import CheckpointError, load
from stepping_plugin.cli import main
from stepping_plugin.runs import folder as folders
from stepping_plugin.runs import pipeline
from stepping_plugin.runs.folder import MARKER, first_to_do, opened_folder
from stepping_plugin.runs.pipeline import run_recipe
from stepping_plugin.runs.recipe import load_recipe, parse_recipe
from stepping_plugin.runs.recipe_schema import Recipe
from stepping_plugin.runs.stages import STAGES, changes, completed, first_stage, kept_in, settings_of
from stepping_plugin.tensorfile import read_tensors

RETRAINED = sorted([*STAGES[2].files, "retrain/last.safetensors", "retrain/log.jsonl"])


def run(folder, *overrides, said=None, **options):
    said = [] if said is None else said
    return run_recipe(load_recipe("digits", [*SMALL, *overrides]), folder, say=said.append, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(small_run, tmp_path):
    return Path(shutil.copytree(small_run, tmp_path / "run"))


def test_every_section_belongs_to_one_stage():
    sections = [name for stage in STAGES for name in stage.sections]
    assert sorted(sections) == sorted(set(Recipe.model_fields) - {"output", "device", "log_with", "early_exit"})


@pytest.mark.parametrize(
    ("override", "first"),
    [("seed=1", 0), ("data.limit=100", 0), ("train.lr=0.1", 0), ("budgets=0.2,0.7", 1), ("construction.lr=0.1", 1),
     ("retrain.gamma=0.5", 2), ("early_exit.per_class=true", 3), ("data.workers=0", 3), ("output=elsewhere", 3)],
)  # fmt: skip
def test_the_first_stage_that_depends_on_a_key(override, first):
    base = ["data.name=imagefolder", "data.root=x"] if "workers" in override else SMALL
    old = settings_of(load_recipe("digits", [*base]))
    assert first_stage(changes(old, load_recipe("digits", [*base, override]))) == first


def test_settings_of_older_versions_have_the_defaults_of_keys_that_they_lack():
    recipe = load_recipe("digits", SMALL)
    old = settings_of(recipe)
    for section in ("data", "train", "construction", "retrain"):
        kind = Recipe.model_fields[section].annotation
        assert issubclass(kind, BaseModel)
        at_default = [k for k, f in kind.model_fields.items() if k in old[section] and old[section][k] == f.default]
        del old[section][at_default[0]]
    assert old != settings_of(recipe) and completed(old) == settings_of(recipe) and not changes(old, recipe)


def test_a_later_stage_is_done_anew_and_the_old_one_kept(folder):
    """The same as a run of the changed recipe from the beginning, in half the time."""
    before, said = files(folder), []
    again = run(folder, "retrain.epochs=2", said=said)
    text = next(line for line in said if "retrain.epochs was 1, is 2" in line)
    assert "From the earlier run: original, construction." in text and "Anew: retraining" in text
    after, aside = files(folder), files(folder / "earlier" / "1")
    for name in ("original.safetensors", "constructed.safetensors", "construction/state.safetensors"):
        assert after[name] == before[name]
    assert sorted(aside) == sorted([*RETRAINED, "recipe.yaml"]), "whole, with its recipe"
    assert all(aside[name] == before[name] for name in RETRAINED)
    assert parse_recipe(aside["recipe.yaml"].decode()).retrain.epochs == 1
    assert load(folder / "earlier" / "1" / "net.safetensors").macs == load(folder / "net.safetensors").macs
    fresh = run(folder.parent / "fresh", "retrain.epochs=2")
    assert fresh["subnets"] == again["subnets"]
    assert (read_tensors(folder / "net.safetensors")[1].keys()) == read_tensors(
        folder.parent / "fresh" / "net.safetensors"
    )[1].keys()
    assert after["net.safetensors"] == (folder.parent / "fresh" / "net.safetensors").read_bytes(), "to the bit"
    assert "epochs: 2" in (folder / "recipe.yaml").read_text()


def test_construction_is_done_anew_from_the_same_original(folder):
    original, said = (folder / "original.safetensors").read_bytes(), []
    run(folder, "budgets=0.2,0.6", said=said)
    assert (folder / "original.safetensors").read_bytes() == original
    assert "From the earlier run: original." in said[0] and "Anew: construction, retraining" in said[0]
    assert load(folder / "net.safetensors").macs != load(folder / "earlier" / "1" / "net.safetensors").macs
    assert (folder / "earlier" / "1" / "constructed.safetensors").exists()


@pytest.mark.slow
def test_random_numbers_do_not_depend_on_what_was_taken_over(tmp_path):
    """A net with dropout, constructed on an original trained just now or earlier: the same to the bit."""
    model = ["model.name=vgg_tiny", "model.kwargs.drop_rate=0.3"]
    run(tmp_path / "changed", *model)
    run(tmp_path / "changed", *model, "construction.batches=2")
    run(tmp_path / "fresh", *model, "construction.batches=2")
    for name in ("original.safetensors", "constructed.safetensors", "net.safetensors"):
        assert (tmp_path / "changed" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name


def test_what_no_stage_survives_is_refused_with_its_keys(folder):
    before = files(folder)
    with pytest.raises(CheckpointError, match=r"data\.limit was 200, is 100; train\.lr was .*No stage") as caught:
        run(folder, "data.limit=100", "train.lr=0.1", "retrain.epochs=2")
    assert "retrain.epochs was 1, is 2" in str(caught.value) and "output=DIR" in str(caught.value)
    assert {k: v for k, v in files(folder).items() if "lock" not in k} == {
        k: v for k, v in before.items() if "lock" not in k
    }


def test_a_folder_without_results_takes_any_recipe(tmp_path):
    """A run that failed before it computed anything, for a slip in its recipe."""
    with opened_folder(tmp_path / "run", load_recipe("digits", SMALL)):
        pass
    with opened_folder(tmp_path / "run", load_recipe("digits", [*SMALL, "seed=5"])):
        assert "seed: 5" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert not (tmp_path / "run" / "earlier").exists()


def test_budgets_that_cannot_be_are_told_before_anything_is_moved(folder):
    before = files(folder)
    with pytest.raises(Exception, match="Raise budget 1"):
        run(folder, "budgets=0.001,0.5")
    assert {k: v for k, v in files(folder).items() if "lock" not in k} == {
        k: v for k, v in before.items() if "lock" not in k
    }


@pytest.mark.parametrize("dies_at", range(0, 9, 2))
def test_a_kill_between_two_moves_loses_nothing(dies_at, folder, monkeypatch):
    before = files(folder)
    recipe = load_recipe("digits", [*SMALL, "retrain.epochs=2"])
    moves, replace = [], os.replace

    def dies(source, target):
        if "earlier" in str(target) and "recipe" not in str(target):
            if len(moves) == dies_at:
                raise KeyboardInterrupt
            moves.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "replace", dies)
        try:
            with opened_folder(folder, recipe):
                pass
        except KeyboardInterrupt:
            assert len(moves) == dies_at
    with opened_folder(folder, load_recipe("digits", [*SMALL, "retrain.epochs=3"])):  # a third recipe, after the kill
        aside = files(folder / "earlier" / "1")
        assert sorted(aside) == sorted([*RETRAINED, "recipe.yaml"])
        assert all(aside[name] == before[name] for name in RETRAINED)
        assert not (folder / "earlier" / "2").exists() and not any(STAGES[2].left_in(folder))


def test_an_edited_recipe_in_the_folder_may_be_run(folder):
    own = folder / "recipe.yaml"
    own.write_text("# mine\n" + own.read_text().replace("gamma: 0.4", "gamma: 0.5"))
    recipe = load_recipe(own)
    with opened_folder(folder, recipe, inputs={"recipe": own}):
        assert own.read_text().startswith("# mine") and (folder / "earlier" / "1" / "net.safetensors").exists()
    assert first_to_do(folder, recipe) == len(STAGES)


@pytest.mark.parametrize("moving", [{"first": 2, "to": "../../elsewhere"}, {"first": 7, "to": "earlier/1"}, "x", 3])
def test_a_marker_cannot_send_files_elsewhere(moving, folder):
    import json

    marker = json.loads((folder / MARKER).read_text())
    if isinstance(moving, dict):
        moving["recipe"] = marker["recipe"]
    (folder / MARKER).write_text(json.dumps({**marker, "moving": moving}))
    with opened_folder(folder, load_recipe("digits", SMALL)):
        assert (folder / "net.safetensors").exists() and not (folder.parent.parent / "elsewhere").exists()


# --- Ctrl-C


@pytest.mark.skipif(os.name != "posix", reason="sends itself a signal")
@pytest.mark.parametrize(
    ("moment", "stage", "kept"),
    [("iteration 1", "construction", ["original", "a checkpoint of the construction"]),
     pytest.param("epoch 1", "original", ["a checkpoint of the original"], marks=pytest.mark.slow)],
)  # fmt: skip
def test_ctrl_c_says_what_stands_and_how_to_go_on(moment, stage, kept, tmp_path, monkeypatch, capsys):
    tell = pipeline.Run.tell

    def interrupts(self, text):
        tell(self, text)
        if moment in text:
            os.kill(os.getpid(), signal.SIGINT)

    words = ["run", "digits", *SMALL, "train.epochs=2", f"output={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Run, "tell", interrupts)
        assert main(words) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"stopped in: {stage}. Kept in {tmp_path}: {', '.join(kept)}. To go on: stepping {' '.join(words)}"
    assert kept_in(tmp_path) == kept
