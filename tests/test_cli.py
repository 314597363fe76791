"""The command line."""

import json

import pytest

from stepping_plugin.cli import _parsed, main


def test_inspect_prints_units_and_floor(capsys):
    assert main(["inspect", "test_resnet"]) == 0
    text = capsys.readouterr().out
    assert "672 made of 1,040 output channels" in text and "floor of subnet 1" in text and "layer1.0.conv1" in text


def test_inspect_json_is_complete(capsys):
    assert main(["inspect", "test_vit", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["macs"] == facts["macs_fvcore"] and facts["units"] == sum(g["units"] for g in facts["groups"])
    assert 0 < facts["floor_macs"] < facts["macs"]
    assert facts["pinned_channels"] == 0 and not facts["operators_without_rule"]
    assert facts["couplings"]["agreed_units"] + facts["couplings"]["only_channel_graph_units"] > 0
    assert set(facts["seconds"]) == {"capture", "units", "torch-pruning", "fvcore"}


def test_unknown_model_names_the_nearest(capsys):
    assert main(["inspect", "resnett18"]) == 1
    error = capsys.readouterr().err
    assert "resnet18" in error and error.count("\n") == 1


def test_overrides_may_stand_anywhere(capsys):
    words = [
        "compare",
        "train.epochs=3",
        "digits",
        "--methods",
        "scratch",
        "budgets=0.2,0.5",
        "--seeds",
        "4",
        "device=cpu",
    ]
    arguments = _parsed(words)
    assert (arguments.recipe, arguments.methods, arguments.seeds) == ("digits", ["scratch"], [4])
    assert arguments.overrides == ["train.epochs=3", "budgets=0.2,0.5", "device=cpu"]
    assert main(["run", "digits", "--fresh", "retrain.epoch=2"]) == 1
    assert "retrain.epoch" in (error := capsys.readouterr().err) and "did you mean" in error
    with pytest.raises(SystemExit):
        main(["run", "digits", "--fresh", "nonsense", "more"])
    assert main(["inspect", "a=b"]) == 1, "a model's name, whatever it looks like"
