"""Trackers of a run: every epoch and iteration once, whatever was killed, in files that belong to their stages."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from stepping_plugin import RecipeError, SteppingError
from stepping_plugin.runs import pipeline, trackers
from stepping_plugin.runs.folder import opened_folder
from stepping_plugin.runs.pipeline import run_recipe
from stepping_plugin.runs.recipe import load_recipe
from stepping_plugin.runs.stages import STAGES
from stepping_plugin.runs.trackers import CsvTracker, Trackers
from stepping_plugin.studies.compare.methods import assert_comparable
from stepping_plugin.training.trainer import TrainConfig

SMALL = ["data.limit=200", "train.epochs=2", "construction.iterations=3", "construction.batches=1", "retrain.epochs=2",
         "budgets=0.3,0.7", "device=cpu"]  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_epoch_and_iteration_is_logged_once(tmp_path, monkeypatch):
    """Stopped in the middle of construction and continued: the table is that of the log."""
    recipe = load_recipe("digits", [*SMALL, "log_with=csv"])
    said = []

    def say(text):
        said.append(text)
        if "iteration 2" in text and len([t for t in said if "iteration 2" in t]) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "SAVE_EVERY", 1e9)  # iterations 1 and 2 are done again
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path, say=say)
    data = run_recipe(recipe, tmp_path, say=say)
    tables = {stage.name: rows(tmp_path / next(iter(stage.folders)) / "log.csv") for stage in STAGES}
    assert {name: [int(r["step"]) for r in table] for name, table in tables.items()} == {
        "original": [1, 2], "construction": [3, 4, 5], "retraining": [6, 7]}  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "retrain" / "log.jsonl").read_text().splitlines()]
    assert [[float(r[f"accuracy/subnet{i}"]) for i in (1, 2)] for r in tables["retraining"]] == [
        r["accuracy"] for r in log
    ]
    macs = [[int(r["macs/subnet1"]), int(r["macs/subnet2"])] for r in tables["construction"]]
    assert macs == [record["macs"] for record in data["history"]["construction"]]


def test_tables_belong_to_their_stages(tmp_path):
    """Replaced with them, and discarded with --fresh."""
    recipe = load_recipe("digits", SMALL)
    with opened_folder(tmp_path, recipe):
        for stage in STAGES:
            for inner in ("log.csv", "tensorboard/events.out.tfevents.1.host.2"):
                path = tmp_path / next(iter(stage.folders)) / inner
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(stage.name)
    with opened_folder(tmp_path, load_recipe("digits", [*SMALL, "retrain.epochs=3"])):
        assert not (tmp_path / "retrain" / "log.csv").exists() and (tmp_path / "construction" / "log.csv").exists()
        assert len(list((tmp_path / "earlier" / "1").rglob("*.host.2"))) == 1
    with opened_folder(tmp_path, recipe, fresh=True):
        left = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if not p.name.startswith(".")]
        assert [name for name in left if not name.startswith("earlier")] == ["recipe.yaml"]


def test_rows_of_steps_that_are_done_again_are_replaced(tmp_path):
    table = CsvTracker(tmp_path / "log.csv")
    for step in (1, 2, 3, 2):
        table.log({"loss": step / 10, **({"late": 1} if step == 3 else {})}, step=step)
    found = [{key: value for key, value in row.items() if value} for row in rows(table.tracker)]
    assert found == [{"step": "1", "loss": "0.1"}, {"step": "2", "loss": "0.2"}]


def test_tensorboard_gets_the_same(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    own = Trackers(load_recipe("digits", [*SMALL, "log_with=[tensorboard]"]), tmp_path)
    for epoch in (1, 2):
        own.log("retraining", "retrain", {"epoch": epoch, "accuracy": [0.5, epoch / 4], "train_loss": [0.1]}, 5 + epoch)
    own.finish()
    found = EventAccumulator(str(tmp_path / "retrain" / "tensorboard")).Reload()
    events = found.Scalars("retraining/accuracy/subnet2")
    assert [(e.step, e.value) for e in events] == [(6, 0.25), (7, 0.5)]
    assert len(found.Scalars("retraining/train_loss")) == 2
    assert "model:" in str(found.Tensors("recipe/text_summary")[0].tensor_proto.string_val)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_missing_packages_are_told_before_anything_is_trained(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(trackers._AVAILABLE, kind, lambda: False)
    with pytest.raises(SteppingError, match=rf"pip install 'stepping-plugin\[{kind}\]'"):
        run_recipe(load_recipe("digits", [*SMALL, f"log_with={kind}"]), tmp_path / "new", say=print)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", ["wandbb", "csv,csv", "3", "[csv, [csv]]"])
def test_other_words_are_mistakes(value):
    with pytest.raises(RecipeError, match="log_with"):
        load_recipe("digits", [f"log_with={value}"])


def test_a_comparison_has_no_trackers():
    with pytest.raises(SteppingError, match="log_with"):
        assert_comparable(load_recipe("digits", ["log_with=csv"]), "stepping")


def test_keys_of_the_training_reach_it_and_are_refused_in_vain():
    keys = ["checkpoint_steps=7", "channels_last=true", "torchcompile=true"]
    recipe = load_recipe("digits", [f"{section}.{key}" for section in ("train", "retrain") for key in keys])
    for section in (recipe.train, recipe.retrain):
        config = TrainConfig.of(section)
        assert (config.checkpoint_steps, config.channels_last, config.torchcompile) == (7, True, True)
    for key in keys:
        with pytest.raises(RecipeError, match=rf"retrain\.{key.split('=')[0]}: has no effect with epochs: 0"):
            load_recipe("digits", [f"retrain.{key}", "retrain.epochs=0"])
