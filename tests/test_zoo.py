"""Trained nets by name: found in the package, in a folder, at an address; never another file than the one listed."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from pathlib import Path

import pytest
import timm
import torch
import yaml

from stepping_plugin import CheckpointError, apply_steppingnet, load
from stepping_plugin.cli import main
from stepping_plugin.files import zoo
from stepping_plugin.runs.data import build_data
from stepping_plugin.runs.recipe import load_recipe
from stepping_plugin.runs.zoo import publish
from stepping_plugin.training.evaluation import evaluate

REPORT = {
    "title": "a net",
    "original": {"macs": 100, "accuracy": 0.9},
    "subnets": [{"macs": 10, "accuracy": 0.5, "share": 0.1}],
    "machine": {"stepping_plugin": "0", "torch": "2", "timm": "1", "threads": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()
    apply_steppingnet(model, ["50%"], example_inputs=torch.randn(1, 1, 32, 32)).save(folder / "net.safetensors")
    (folder / "report.json").write_text(json.dumps(REPORT))
    return folder


@pytest.fixture
def folder(run, tmp_path) -> Path:
    publish(run, "mine", tmp_path / "zoo", "stepping run mine", "public domain")
    return tmp_path / "zoo"


def same(a, b) -> bool:
    x = torch.randn(2, *a.analysis.image_size)
    with torch.no_grad():
        return torch.equal(a.forward_all(x), b.forward_all(x))


def test_packaged_nets_are_what_their_list_says():
    nets = {name: entry for name, entry, place in zoo.list_nets() if place == str(zoo.PACKAGED)}
    assert {"digits"} <= set(nets)
    for name, entry in nets.items():
        net = load(f"zoo:{name}")
        assert net.macs == [s.macs for s in entry.subnets] and net.reference_macs == entry.original.macs
        made = yaml.safe_load(net.metadata.provenance.recipe)
        assert not {"/", "\\"} & set(f"{made['output']}{made['data']['root']}"), "folders of the machine that made it"


def test_listed_accuracy_is_found_again():
    data = build_data(load_recipe("digits", []).data)
    entry = next(entry for name, entry, _ in zoo.list_nets() if name == "digits")
    found = evaluate(load("zoo:digits"), data.loader("test", 500))["accuracy"]
    assert found == pytest.approx([s.accuracy for s in entry.subnets])


def test_a_folder(folder, run, monkeypatch, capsys):
    monkeypatch.setenv(zoo.VARIABLE, str(folder))
    assert same(load("zoo:mine"), load(run / "net.safetensors"))
    assert load("zoo:digits").num_subnets == 4  # those of the package stay
    assert main(["zoo", "--json"]) == 0
    assert {"mine", "digits"} <= set(json.loads(capsys.readouterr().out))


@pytest.fixture
def address(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None: ...

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_an_address(address, folder, run, monkeypatch, tmp_path):
    monkeypatch.setenv(zoo.VARIABLE, address)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    assert same(load("zoo:mine"), load(run / "net.safetensors"))
    (folder / "mine.safetensors").unlink()
    assert load("zoo:mine").num_subnets == 1  # kept


def test_another_file_at_an_address_is_not_kept(address, folder, monkeypatch, tmp_path):
    monkeypatch.setenv(zoo.VARIABLE, address)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (folder / "mine.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"cannot be fetched.*hash"):
        load("zoo:mine")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def swap(folder: Path) -> None:
    (folder / "mine.safetensors").write_bytes(b"other")


def lose(folder: Path) -> None:
    (folder / "mine.safetensors").unlink()


def climb(folder: Path) -> None:
    text = (folder / zoo.LIST).read_text()
    (folder / zoo.LIST).write_text(text.replace('"mine.safetensors"', '"../mine.safetensors"'))


def no_json(folder: Path) -> None:
    (folder / zoo.LIST).write_text("{")


def no_list(folder: Path) -> None:
    (folder / zoo.LIST).unlink()


FAULTS = {swap: "SHA-256", lose: "missing", climb: "not a list of nets", no_json: "no zoo", no_list: "no zoo"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_damage_is_one_clear_error(fault, folder, monkeypatch):
    fault(folder)
    monkeypatch.setenv(zoo.VARIABLE, str(folder))
    with pytest.raises(CheckpointError, match=FAULTS[fault]):
        load("zoo:mine")


@pytest.mark.parametrize("name", ["zoo:digit", "zoo:", "zoo:../digits"])
def test_unknown_names(name):
    with pytest.raises(CheckpointError, match=r"no net .*(did you mean 'digits'|valid: ).*STEPPING_ZOO"):
        load(name)


def test_publishing_does_not_replace(folder, run, tmp_path):
    assert (
        publish(run, "mine", folder, "stepping run mine", "public domain").file == "mine.safetensors"
    )  # the same again
    other = tmp_path / "other"
    other.mkdir()
    (other / "net.safetensors").write_bytes(b"another net")
    (other / "report.json").write_text(json.dumps(REPORT))
    with pytest.raises(CheckpointError, match="another net has this name"):
        publish(other, "mine", folder, "stepping run mine", "public domain")
    assert b"another" not in (folder / "mine.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="no finished run"):
        publish(tmp_path, "empty", folder, "x", "y")
    with pytest.raises(CheckpointError, match="a b"):
        publish(run, "a b", folder, "x", "y")
