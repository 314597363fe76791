"""The command line."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepping_plugin.cli import _parsed, main
from stepping_plugin.runs.commands import _speaker


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


def test_a_word_behind_an_option_is_its_value():
    arguments = _parsed(["compare", "--results", "a=b", "digits", "data.limit=3", "--work", "c.d=e", "train.epochs=1"])
    assert (arguments.results, arguments.work, arguments.recipe) == ("a=b", "c.d=e", "digits")
    assert arguments.overrides == ["data.limit=3", "train.epochs=1"]


# --- Mistakes of users: one line each, status 2 where the words cannot be, else 1

USAGE = [
    "", "nothing", "run", "validate", "inspect", "bench", "export",
    "inspect digits_net --img-size -5", "inspect digits_net --img-size 0", "inspect digits_net --img-size 1e3",
    "inspect digits_net --img-size 100000", 
    "inspect digits_net --num-classes 1000000000000",
    "inspect digits_net --num-classes 0", "inspect digits_net --time-limit nan", "inspect digits_net --time-limit -1",
    "bench engine digits_net --turns 0", "bench engine digits_net --subnets 0",
    "bench engine digits_net --subnets 100000",
    "bench engine digits_net --batch 0", "bench engine digits_net --threads -1", "bench engine digits_net --threads x",
    "bench training --rounds 0", "bench training --device banana", "bench training --device cuda:99",
    "bench training --device meta", "bench deadline --requests 0", "bench deadline --load -1",
    "coverage --all-variants-under nan", "coverage --all-variants-under inf", "coverage --fuzz -1", "coverage --jobs 0",
    "coverage --time-limit nan", "coverage --memory-limit 0", "coverage --seed -1", "coverage --output FOLDER",
    "coverage --output FILE/c.json", "coverage --table FOLDER", "compare digits --seeds x", "compare digits --seeds -1",
    "compare --page FOLDER", "compare digits --results FILE", "export NET --output FILE", "export NET --batch-size 0",
    "export NET --format tar",
]  # fmt: skip
FAILURES = [
    "inspect nonsense", "inspect lenet5.bad_tag", "bench engine nonsense", "bench deadline nonsense",
    "coverage --models non*",
    "coverage --json", "compare", "compare digits --resume --again", "compare digits --study banana",
    "compare digits --methods banana", "export nowhere", "export FILE", "export FOLDER", "run nowhere", "run FOLDER",
    "run FILE", "validate FILE", "run digits output=FILE", "run digits output=FILE/x", "run digits device=cuda:99",
    "run digits device=banana", "run digits seed=18446744073709551616", "run digits model.kwargs.foo=3 output=NEW",
    "run digits model.name='' output=NEW", "run digits train.lr=1e308", "run digits data.img_size=100000",
    "run digits budgets=[2] output=NEW", "run digits model.net=nowhere model.name=null budgets=[] output=NEW",
    "validate digits model.kwargs.width_mult=abc",
    "validate digits model.kwargs.width_mult=1e9",
    "validate digits budgets=[2]",
    "validate digits data.name=imagefolder data.root=FOLDER", "validate digits data.name=cifar10 data.root=FOLDER",
    "validate digits data.name=hfds/nowhere data.root=FOLDER", "validate digits model.name=resnet18.bad_tag",
    "run digits --fresh a=b",
    "run digits data.name=fashion_mnist data.root=FOLDER output=NEW",
]  # fmt: skip


def words(line, tmp_path):
    places = {
        "FOLDER": tmp_path / "folder",
        "FILE": tmp_path / "file",
        "NEW": tmp_path / "new",
        "NET": tmp_path / "net",
    }
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("hello")
    for name, path in places.items():
        line = line.replace(name, str(path))
    return line.split()


@pytest.mark.parametrize("line", USAGE)
def test_words_that_cannot_be_are_told_with_the_usage(line, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(words(line, tmp_path))
    error = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and error[0].startswith("usage: ") and ": error: " in error[-1], error


@pytest.mark.parametrize("line", FAILURES)
def test_a_mistake_is_one_line(line, tmp_path, capsys):
    assert main(words(line, tmp_path)) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ") or error[0].startswith("error: "), error
    assert len(error) == 1 and len(error[0]) < 1200, error
    assert not (tmp_path / "new").exists() and (tmp_path / "file").read_text() == "hello"


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (OSError(28, "No space left on device", "/a/b"), 1, "error: /a/b: No space left on device\n"),
        (PermissionError(13, "Permission denied", "x"), 1, "error: x: Permission denied\n"),
        (MemoryError(), 1, "error: the memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "error: no memory is left"),
    ],
)
def test_the_edge_has_one_line_for_what_the_system_refuses(raised, status, text, monkeypatch, capsys):
    def command(_):
        raise raised

    monkeypatch.setattr("stepping_plugin.cli._silence_output", lambda: None)
    monkeypatch.setattr("stepping_plugin.runs.recipe.load_recipe", lambda *_: command(None))
    assert main(["validate", "digits"]) == status
    error = capsys.readouterr().err
    assert error.startswith(text) and error.count("\n") == bool(text)


@pytest.mark.parametrize("raised", [KeyError("x"), ZeroDivisionError(), RuntimeError("a mistake in the package")])
def test_our_own_mistakes_still_show_themselves(raised, monkeypatch):
    def broken(*_):
        raise raised

    monkeypatch.setattr("stepping_plugin.runs.recipe.load_recipe", broken)
    with pytest.raises(type(raised)):
        main(["validate", "digits"])


class Closed(io.StringIO):
    """An output whose reader has gone after the first line, or whose disk is full."""

    def __init__(self, error: OSError, lines: int) -> None:
        super().__init__()
        self.error, self.lines = error, lines

    def write(self, text: str) -> int:
        if self.getvalue().count("\n") >= self.lines:
            raise self.error
        return super().write(text)


def test_a_run_goes_on_without_its_reader_and_not_with_a_full_disk(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Closed(BrokenPipeError(), 1))
    say = _speaker()
    for text in ("one", "two", "three"):
        say(text)
    assert sys.stdout.getvalue() == "one\n"
    monkeypatch.setattr(sys, "stdout", Closed(OSError(28, "No space left on device"), 0))
    with pytest.raises(OSError, match="No space left"):
        _speaker()("one")


SMALL = ["data.limit=100", "train.epochs=1", "construction.iterations=1", "construction.batches=1", "retrain.epochs=1"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_cannot_be_written(tmp_path):
    """A closed pipe is no error, and no end of a run; a full disk is one line."""
    line = " ".join([sys.executable, "-W", "ignore", "-m", "stepping_plugin"])
    run = f"{line} run digits --quiet {' '.join(SMALL)} budgets=0.4,0.8 device=cpu output={tmp_path / 'run'}"
    validate = f"{line} validate digits --quiet > /dev/full"
    script = f"{line} inspect digits_net --json | head -1; {run} | head -1; {validate}; echo $?"
    root = str(Path(__file__).parents[1])
    ended = subprocess.run(script, shell=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    assert ended.stdout.splitlines()[0] == "{" and ended.stdout.splitlines()[-1] == "1"
    assert (tmp_path / "run" / "net.safetensors").exists()
    assert "No space left on device" in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
