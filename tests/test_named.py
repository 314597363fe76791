"""One's own net in every command: what NET may be, what is said otherwise, and what commands then do with it."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import SMALL

from stepping_plugin import SteppingError, load
from stepping_plugin.cli import main
from stepping_plugin.runs.prepare import files_of, opened, preparation_of
from stepping_plugin.runs.recipe import load_recipe
from stepping_plugin.studies.bench.own import contender
from stepping_plugin.views.named import named


@pytest.fixture(scope="module")
def run(small_run):
    """A run, whose files are read once: nothing here changes a net."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepping_plugin.views.named.load", functools.cache(load))
        yield small_run


@pytest.fixture(scope="module")
def engine_file(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "engine.safetensors"
    load(run / "net.safetensors").deploy().save(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The data set's own test pictures as files, in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    data = _data()
    for k in range(12):
        place = folder / f"{k % 2}"
        place.mkdir(exist_ok=True)
        Image.fromarray(data.test.images[k, 0].numpy()).save(place / f"{k:02}.png")
    return folder


def _data():
    from stepping_plugin.runs.data import build_data

    return build_data(load_recipe("digits", SMALL).data)


def test_all_that_a_word_can_name(run, engine_file):
    assert (named(str(run)).net, named(str(run)).run) == (run / "net.safetensors", run)
    assert named(str(run / "net.safetensors")).run == run
    other = named(str(run / "constructed.safetensors"))
    assert (other.net, other.run) == (run / "constructed.safetensors", None)
    assert named(str(engine_file)).engine == engine_file
    assert named("resnet18").model == named("resnet18.a1_in1k").model.split(".")[0] == "resnet18"
    zoo = named("zoo:digits")
    assert zoo.net.is_file() and zoo.run is None and zoo.place == Path("zoo-digits")
    assert named(str(run)).place == run and named("resnet18").place == Path("resnet18-untrained")
    for word in (str(run), str(run / "net.safetensors"), str(engine_file)):
        assert named(word).deployed().macs == load(run / "net.safetensors").macs
    with pytest.raises(SteppingError, match="holds an engine"):
        named(str(engine_file)).stepping_net()


@pytest.mark.parametrize(
    ("word", "hint"),
    [("resnett18", "'resnet18'"), ("runs/mene", "'runs/mine'"), ("mine", "'runs/mine'"), ("xyzxyz", "Runs are folders"),
     ("nowhere/net.safetensors", "no such file or folder"), ("empty", "net.safetensors is missing"), ("x" * 5000, "")],
)  # fmt: skip
def test_unknown_names_are_one_short_line(word, hint, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run)
    (tmp_path / "p.png").write_text("")
    for command in ("inspect", "bench engine", "bench deadline", "export", "report", "predict"):
        assert main([*command.split(), word, *(["p.png"] if command == "predict" else [])]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and hint in error and len(error) < 300 + len(word)


def test_a_run_that_is_not_done_says_how_to_go_on(run, tmp_path):
    (tmp_path / ".stepping-run.json").write_text("{}")
    with pytest.raises(SteppingError, match=r"not come to its end.*stepping run .*recipe\.yaml"):
        named(str(tmp_path))


# --- predict


def predicted(capsys, *words):
    status = main(["predict", *map(str, words), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_predict_answers_as_the_evaluation_did(run, pictures, capsys):
    """Files of the test pictures give the scores of the test set, whatever the size of the batch."""
    data, net = _data(), load(run / "net.safetensors").eval()
    with torch.no_grad():
        scores = net.forward_all(torch.stack([data.test[k][0] for k in range(12)]))[-1].softmax(-1)
    order = sorted(range(12), key=lambda k: (k % 2, k))
    for size in (1, 5):
        status, found = predicted(capsys, run, pictures, "--batch-size", size)
        rows = found["pictures"]
        assert status == 0 and [Path(r["file"]).stem for r in rows] == [f"{k:02}" for k in order]
        assert [r["label"] for r in rows] == scores[order].argmax(-1).tolist()
        assert [r["confidence"] for r in rows] == pytest.approx(scores[order].amax(-1).tolist(), abs=1e-5)
        assert {(r["subnet"], r["macs"]) for r in rows} == {(2, net.macs[1])}


def test_predict_stops_by_rule_and_tells_what_it_cost(run, pictures, capsys):
    macs = load(run / "net.safetensors").macs
    _, found = predicted(capsys, run, pictures, "--until", "max_prob=0")
    assert {(r["subnet"], r["macs"]) for r in found["pictures"]} == {(1, macs[0])}
    _, found = predicted(capsys, run, pictures, "--until", "0.2", "entropy=0.1")
    assert all(r["macs"] == macs[r["subnet"] - 1] for r in found["pictures"])
    _, found = predicted(capsys, run, pictures, "--deadline", "60")
    assert all(r["in_time"] and r["subnet"] == 2 for r in found["pictures"])


def test_pictures_that_cannot_be_read_are_named_and_the_others_answered(run, pictures, tmp_path, capsys):
    for k, content in enumerate([b"", b"x", (pictures / "0" / "00.png").read_bytes()[:90]]):
        (tmp_path / f"bad{k}.png").write_bytes(content)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "colour.jpg")
    assert main(["predict", str(run), str(tmp_path), str(pictures / "0" / "00.png")]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split("\t") == ["file", "class", "confidence", "subnet", "MACs"]
    assert [Path(line.split("\t")[0]).name for line in lines[1:]] == ["colour.jpg", "00.png"]
    assert [re.search(r"bad\d\.png: this picture cannot be read", line) is not None for line in err.splitlines()] == [
        True
    ] * 3


@pytest.mark.parametrize("words", ["--until banana", "--until =1", "--until max_prob=x", "--deadline -1"])
def test_rules_that_cannot_be_are_told_with_the_usage(words, run, capsys):
    with pytest.raises(SystemExit):
        main(["predict", str(run), "x.png", *words.split()])
    assert "usage: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "RUN nowhere.png",
        "RUN EMPTY",
        "RUN PICS --until banana=1",
        "RUN PICS --until max_prob=7",
        "resnet18 PICS",
        "RUN PICS --until calibrated max_prob=0.9",
    ],
)
def test_what_cannot_be_predicted_is_one_line_before_a_net_is_loaded(
    words, run, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("stepping_plugin.views.named.load", lambda path: pytest.fail("loaded"))
    (tmp_path / "empty").mkdir()
    words = words.replace("RUN", str(run)).replace("EMPTY", str(tmp_path / "empty")).replace("PICS", str(pictures))
    assert main(["predict", *words.split()]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("memory", [False, True])
def test_folders_of_pictures_and_nets_without_a_run(memory, tmp_path):
    """imagefolder: the evaluation's own transform and class names; a bare file: timm's configuration of its model."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for k in range(3):
                Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(
                    tmp_path / "set" / part / name / f"{k}.png"
                )
    keys = {"data.name": "imagefolder", "data.root": tmp_path / "set", "data.workers": 0, "data.img_size": 32,
            "data.in_memory": str(memory).lower(), "model.name": "resnet_tiny"}  # fmt: skip
    recipe = load_recipe("digits", [f"{key}={value}" for key, value in keys.items()])
    from stepping_plugin.runs.data import build_data
    from stepping_plugin.runs.recipe import dump_recipe

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "net.safetensors").write_text("")
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(recipe))
    source = named(str(tmp_path / "run"))
    found = preparation_of(source, (3, 32, 32))
    test = build_data(recipe.data, "resnet_tiny").test
    files = files_of([str(tmp_path / "set" / "val")])
    for (path, picture), k in zip(opened(files, found), range(6)):
        assert torch.equal(picture, test[k][0]) and path.parent.name == found.name(test[k][1])
    bare = preparation_of(named(str(tmp_path / "run" / "recipe.yaml")), (1, 28, 28), "resnet_tiny")
    assert bare.name(3) == "3" and "timm" in bare.source
    _, picture = next(opened(files[:1], bare))
    assert picture.shape == (1, 28, 28)
    with pytest.raises(SteppingError, match="nor a timm model says how"):
        preparation_of(named(str(tmp_path / "run" / "recipe.yaml")), (1, 28, 28))


def test_files_of_nets_and_engines_say_how_pictures_are_prepared(tmp_path, capsys):
    """The same answers from the packaged net and from nothing but its engine's file, by calibrated thresholds, too."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    engine = load("zoo:digits").deploy()
    engine.save(tmp_path / "engine")
    rows = []
    for word in ("zoo:digits", str(tmp_path / "engine")):
        assert main(["predict", word, str(tmp_path / "picture.png"), "--until", "calibrated", "--json"]) == 0
        rows.append(json.loads(capsys.readouterr().out)["pictures"])
    answer = engine.predict(engine.preprocess(tmp_path / "picture.png"), until="calibrated")
    assert rows[0] == rows[1] and rows[0][0]["label"] == int(answer.classes) and rows[0][0]["macs"] == int(answer.macs)


# --- the other commands


def test_bench_compares_ones_own_net_with_its_dense_original(run, capsys):
    net, dense = contender(named(str(run)))
    assert sum(p.numel() for p in dense.parameters()) > 0 and net.macs == load(run / "net.safetensors").macs
    assert main(["bench", "engine", str(run), "--batch", "1", "--turns", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["results"]
    assert row["model"] == str(run) and row["dense_macs"] == net.reference_macs and sum(row["macs"]) == net.macs[-1]
    assert len(row["steps"]) == 2 and "batch 1" in err
    assert main(["bench", "deadline", str(run), "--requests", "2", "--load", "0", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["results"][0]["quiet_ms"]) == 2


def test_report_shows_a_run_again(run, engine_file, capsys):
    assert main(["report", str(run)]) == 0
    text = capsys.readouterr().out
    assert "subnet 2" in text and "stop at probability" in text and "index.html" in text
    assert main(["report", str(run / "net.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run / "report.json").read_text())
    for other in (engine_file, run / "constructed.safetensors", "resnet18"):
        assert main(["report", str(other)]) == 1
        assert "stepping inspect" in capsys.readouterr().err


def test_export_and_inspect_take_every_kind(run, engine_file, tmp_path, capsys):
    for word in (run, run / "net.safetensors", engine_file, "digits_net"):
        folder = tmp_path / Path(word).name
        assert main(["export", str(word), "--output", str(folder), "--subnets", "2", "--quiet"]) == 0
        assert json.loads((folder / "manifest.json").read_text())["subnets"] == 2
        assert ("untrained" in capsys.readouterr().out) == (word == "digits_net")
    assert main(["inspect", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] == load(run / "net.safetensors").macs
