"""`stepping thresholds` and the recipes' `early_exit` on a finished run."""

import json
import shutil

import pytest
import torch
from small_runs import SMALL

from stepping_plugin import SteppingError, load
from stepping_plugin.cli import main
from stepping_plugin.runs.pipeline import Run
from stepping_plugin.runs.provenance import without_folders
from stepping_plugin.runs.recipe import dump_recipe, load_recipe
from stepping_plugin.runs.threshold_command import thresholds


@pytest.fixture
def run(small_run, tmp_path):
    """A copy, to write to."""
    return shutil.copytree(small_run, tmp_path / "run")


def test_a_run_judges_its_nets_and_keeps_what_production_needs(small_run):
    report, net = json.loads((small_run / "report.json").read_text()), load(small_run / "net.safetensors")
    metrics, chosen = report["metrics"], report["calibrated_exit"]
    for row, found in zip([report["original"], *report["subnets"]], [metrics["original"], *metrics["subnets"]]):
        assert found["accuracy"] == pytest.approx(row["accuracy"]) and len(found["classes"]) == 10
    assert chosen["target"] == "accuracy >= 99 % of the largest subnet"
    assert net.metadata.exit.thresholds == chosen["thresholds"]
    assert net.metadata.classes == [str(k) for k in range(10)]
    told = load_recipe(small_run / "recipe.yaml", [])
    assert net.metadata.provenance.recipe == dump_recipe(without_folders(told))
    assert net.metadata.provenance.data.of == "pictures and labels"
    data = Run(load_recipe("digits", SMALL), small_run, lambda text: None).data
    images, labels = (torch.cat(part) for part in zip(*data.loader("test", 64)))
    prediction = net.deploy().predict(images, until="calibrated")
    assert (prediction.classes == labels).double().mean().item() == pytest.approx(chosen["metrics"]["accuracy"])
    assert prediction.macs.double().mean().item() == pytest.approx(chosen["macs"])


def test_another_target_for_a_finished_run(run, capsys):
    before = json.loads((run / "report.json").read_text())
    assert (
        main(["thresholds", str(run), "--target", "agreement with the original >= 60 %", "--combine", "product"]) == 0
    )
    text = " ".join(capsys.readouterr().out.split())
    after, net = json.loads((run / "report.json").read_text()), load(run / "net.safetensors")
    assert (
        after["calibrated_exit"]["sentence"] in text
        and "agreement with the original" in (run / "index.html").read_text()
    )
    assert net.metadata.exit.combine == "product" and net.metadata.exit.target == "agreement with the original >= 60 %"
    assert {k: v for k, v in after.items() if k != "calibrated_exit"} == {
        k: v for k, v in before.items() if k != "calibrated_exit"
    }


def test_milliseconds_are_measured(run):
    data = thresholds(run, "milliseconds <= 1000", say=lambda text: None)
    assert data["calibrated_exit"]["met"] and 0 < data["calibrated_exit"]["cost"] < 1000


def test_mistakes_are_named_before_anything_is_done(run, tmp_path):
    with pytest.raises(SteppingError, match="no folder of a finished run"):
        thresholds(tmp_path, "accuracy >= 90 %", say=lambda text: None)
    with pytest.raises(SteppingError, match="not a target"):
        thresholds(run, "be quick", say=lambda text: None)
    with pytest.raises(SteppingError, match="no such class"):
        thresholds(run, "recall of cat >= 90 %", say=lambda text: None)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["early_exit.target=fast"], "not a target"),
        (["early_exit.target=null", "early_exit.per_class=true"], "no effect"),
        (["early_exit.combine=mean"], "combine"),
    ],
)
def test_keys_of_recipes(keys, words):
    with pytest.raises(SteppingError, match=words):
        load_recipe("digits", keys)


@pytest.mark.parametrize("target", ["recall of cat >= 90 %", "accuracy >= 99 % of subnet 7"])
def test_targets_that_mean_nothing_are_found_before_training(tmp_path, target):
    run = Run(load_recipe("digits", [*SMALL, f"early_exit.target={target}"]), tmp_path, lambda text: None)
    with pytest.raises(SteppingError, match="no such"):
        run._check_before(fresh=True)
