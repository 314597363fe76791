"""Recipes from the command line: the whole story on a small scale, continued runs, faults."""

import itertools
import json

import pytest
import torch
from nets import relative

from stepping_plugin import CheckpointError, SteppingError, load, verify
from stepping_plugin.cli import main
from stepping_plugin.runs.pipeline import plan, run_recipe
from stepping_plugin.runs.recipe import load_recipe

SMALL = [
    "data.limit=400", "train.epochs=2", "construction.iterations=4", "construction.batches=2", "retrain.epochs=2",
    "budgets=0.2,0.5,0.8",
    "device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = run_recipe(load_recipe("digits", SMALL), folder, say=lambda text: None)
    return folder, data


def test_a_run_leaves_everything(done):
    folder, data = done
    report = json.loads((folder / "report.json").read_text())
    assert report["original"]["macs"] == data["original"]["macs"] and 0 < report["original"]["accuracy"] <= 1
    assert [s["subnet"] for s in report["subnets"]] == [1, 2, 3]
    for subnet in report["subnets"]:
        assert 0.97 * subnet["budget"] <= subnet["macs"] <= subnet["budget"]
        assert {"accuracy", "accuracy_before_retraining"} <= set(subnet)
    for name in (
        "index.html",
        "accuracy_vs_macs.png",
        "units_per_layer.png",
        "recipe.yaml",
        "original.safetensors",
    ):
        assert (folder / name).stat().st_size > 0
    net = load(folder / "net.safetensors")
    assert net.macs == [s["macs"] for s in report["subnets"]]
    verify(net)
    points = report["early_exit"]["points"]
    assert net.macs[0] <= points[0]["macs"] and sum(points[0]["subnets"]) == pytest.approx(1)
    assert all(low["macs"] <= high["macs"] <= net.macs[-1] for low, high in itertools.pairwise(points))


def test_running_again_continues_and_another_recipe_is_refused(done):
    folder, data = done
    before = (folder / "original.safetensors").stat().st_mtime_ns
    again = run_recipe(load_recipe("digits", SMALL), folder, say=lambda text: None)
    assert (folder / "original.safetensors").stat().st_mtime_ns == before
    assert [s["accuracy"] for s in again["subnets"]] == [s["accuracy"] for s in data["subnets"]]
    with pytest.raises(CheckpointError, match="another recipe"):
        run_recipe(load_recipe("digits", [*SMALL, "seed=1"]), folder, say=lambda text: None)


def test_distillation_goes_on_from_a_saved_net(done, tmp_path):
    folder, _ = done
    settings = [
        f"model.net={folder / 'net.safetensors'}", "data.name=digits", "data.limit=400", "retrain.epochs=1",
        "retrain.teacher.name=digits_net", f"retrain.teacher.checkpoint_path={folder / 'original.safetensors'}",
        "device=cpu",
    ]  # fmt: skip
    data = run_recipe(load_recipe("distill", settings), tmp_path, say=lambda text: None)
    assert data["original"]["accuracy"] is None and len(data["subnets"]) == 3
    old, new = load(folder / "net.safetensors"), load(tmp_path / "net.safetensors")
    assert torch.equal(old.levels, new.levels)
    x = torch.randn(2, *old.analysis.image_size)
    with torch.no_grad():
        assert relative(new.forward_all(x), old.forward_all(x)) > 1e-6, "nothing was trained"


def test_weights_that_could_hold_code_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "weights.pth")
    settings = [f"model.checkpoint_path={tmp_path / 'weights.pth'}", "train.epochs=0", "data.limit=100", "device=cpu"]
    with pytest.raises(SteppingError, match=r"expected a \.safetensors file: .*stepping convert-weights"):
        run_recipe(load_recipe("digits", settings), tmp_path / "run", say=lambda text: None)


def test_validate_plans_without_training(capsys):
    assert main(["validate", "digits"]) == 0
    text = capsys.readouterr().out
    assert "budgets" in text and "plan:" in text
    facts = plan(load_recipe("digits", []))
    assert all(0.97 * b <= m <= b for m, b in zip(facts["macs"], facts["budgets"]))
    assert facts["start_macs"] > facts["reference_macs"]
    assert main(["validate", "digits", "retrain.batch_size=1"]) == 1
    assert "retrain.batch_size=1: batch norm cannot learn from a batch of one image" in capsys.readouterr().err


def test_five_mistakes_five_messages(capsys):
    wrong = [
        "train.epoch=3",
        "retrain.gamma=2",
        "budgets=0.5,0.3",
        "model.name=digits_nett",
        "construction.flow=straight",
    ]
    assert main(["run", "digits", *wrong]) == 1
    error = capsys.readouterr().err
    assert error.count("\n  - ") == 5
    assert "epochs" in error and "digits_net" in error and "trajectory" in error


def test_missing_data_says_how_to_get_it(tmp_path):
    recipe = load_recipe("fashion_mnist_lenet5", [f"data.root={tmp_path}"])
    with pytest.raises(SteppingError, match="dataset-fashion-mnist"):
        run_recipe(recipe, tmp_path / "out", say=lambda text: None)
