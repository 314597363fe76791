"""Checkpoints as training scripts write them, as safetensors: every tensor, no code, nothing unsaid."""

import os
import random

import pytest
import timm
import torch
from safetensors.torch import load_file

from stepping_plugin.cli import main
from stepping_plugin.errors import CheckpointError, SteppingError
from stepping_plugin.runs.conversion import convert_weights


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("resnet_tiny", num_classes=4)


def wrapped(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (lambda s: s, []),
        (lambda s: {"state_dict": wrapped(s, "module."), "best_prec1": 91.7, "epoch": 3},
         ["left out: best_prec1, epoch", "taken from state_dict", "module. removed"]),
        (lambda s: {"model": s, "optimizer": {"state": {0: torch.ones(2)}}}, ["left out: optimizer"]),
        (lambda s: {"state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": s},
         ["left out: state_dict", "taken from state_dict_ema"]),
        (lambda s: {"checkpoint": 1, "model": {"module": wrapped(s, "module._orig_mod.")}},
         ["taken from model.module", "module. removed", "_orig_mod. removed"]),
        (lambda s: {"state_dict": {**wrapped(s, "model."), "model.extra": "words"}}, ["model. removed"]),
    ],
)  # fmt: skip
def test_tensors_are_found_and_everything_else_is_named(model, tmp_path, pack, said):
    torch.save(pack(model.state_dict()), tmp_path / "w.pth")
    written, notes = convert_weights(tmp_path / "w.pth")
    found = load_file(written)
    assert written == tmp_path / "w.safetensors" and found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in model.state_dict().items())
    assert all(any(text in note for note in notes) for text in said), notes


class Harm:
    def __reduce__(self):
        return os.mkdir, ("/tmp/this-must-not-be-made-by-a-test",)


@pytest.mark.parametrize("content", [Harm(), {"state_dict": Harm()}, torch.nn.Linear(2, 2)])
def test_code_is_refused_and_not_run(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"holds more than tensors and plain containers.*never does") as caught:
        convert_weights(tmp_path / "w.pth")
    assert "\n" not in str(caught.value) and not os.path.exists("/tmp/this-must-not-be-made-by-a-test")
    assert list(tmp_path.iterdir()) == [tmp_path / "w.pth"]


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(2)], torch.ones(2), {"state_dict": {}}, 5])
def test_what_holds_no_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"no tensors|no weights by name"):
        convert_weights(tmp_path / "w.pth")


def test_damaged_files_are_one_clear_error(model, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    for length in [0, 1, *random.Random(0).sample(range(len(whole)), 15)]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"w\.pth"):
            convert_weights(path)
    path.write_text("text")
    with pytest.raises(CheckpointError):
        convert_weights(path)
    with pytest.raises(CheckpointError, match="no such file"):
        convert_weights(tmp_path / "none.pth")


def test_nothing_is_replaced_and_no_nan_passes(model, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(model.state_dict(), path)
    (tmp_path / "w.safetensors").write_text("mine")
    with pytest.raises(SteppingError, match="exists already"):
        convert_weights(path)
    assert (tmp_path / "w.safetensors").read_text() == "mine"
    torch.save({**model.state_dict(), "fc.bias": torch.full((4,), float("nan"))}, path)
    with pytest.raises(CheckpointError, match=r"fc\.bias holds NaN"):
        convert_weights(path, tmp_path / "out.safetensors")


def test_names_of_another_package_are_replaced_by_order_and_by_nothing_else(model, tmp_path, capsys):
    path = tmp_path / "w.pth"
    state = model.state_dict()
    torch.save({f"_layer{k}": v for k, v in enumerate(state.values())}, path)
    assert main(["convert-weights", str(path), "--model", "resnet_tiny"]) == 0
    text = capsys.readouterr().out
    assert "the same shapes in the same order" in text and f"model.checkpoint_path={tmp_path / 'w.safetensors'}" in text
    found = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(found[k], v) for k, v in state.items())
    items = list(state.items())
    torch.save({f"_layer{k}": v for k, (_, v) in enumerate(items[1:] + items[:1])}, path)
    with pytest.raises(CheckpointError, match="nor its shapes in the same order"):
        convert_weights(path, tmp_path / "other.safetensors", "resnet_tiny")
