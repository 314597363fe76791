"""Engines as files and as exported programs: what is read back computes the same, and nothing else is read."""

import functools
import json
import subprocess
import sys

import pytest
import torch
from nets import images, make, nested, relative
from rewriting import rewrite
from safetensors.torch import load_file, save_file

from stepping_plugin.cli import main
from stepping_plugin.engine import compile_engine, load_engine
from stepping_plugin.errors import CheckpointError, SteppingError
from stepping_plugin.files.graphs import find_operator

MODELS = ("test_resnet", "test_vit")


@functools.cache
def model(name):
    """One model per name, in float32: finding its units is what takes time here."""
    return make(name).float()


def engine_of(name):
    """An engine of two subnets."""
    return compile_engine(nested(model(name), n=2, seed=1).eval())


@pytest.fixture(scope="module", params=MODELS)
def engine(request):
    """Not to be changed."""
    return engine_of(request.param)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved engine."""
    path = tmp_path_factory.mktemp("engine") / "engine.safetensors"
    engine_of("test_resnet").save(path)
    return path


def batch(engine, size):
    return images(engine.image_size, size).to(engine.dtype)


# ------------------------------------------------------------------------------------------ files


def test_a_loaded_engine_computes_the_same_bits(engine, tmp_path):
    path = tmp_path / "folder" / "engine.safetensors"
    engine.save(path)
    loaded = load_engine(path)
    assert loaded.macs == engine.macs and loaded.cache_axes == engine.cache_axes
    assert [p.released for p in loaded.programs] == [p.released for p in engine.programs]
    for size in (1, 3):
        x = batch(engine, size)
        for ours, theirs in zip(engine.steps(x), loaded.steps(x), strict=True):
            assert torch.equal(ours, theirs)
    session = loaded.start(batch(engine, 3))
    session.keep(torch.tensor([True, False, True]))
    assert relative(session.step(), list(engine.steps(batch(engine, 3)))[-1][[0, 2]]) < 1e-5
    again = tmp_path / "again.safetensors"
    loaded.save(again)  # in place of a file, and from a loaded engine
    loaded.save(again)
    assert load_file(again).keys() == load_file(path).keys()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_loading_needs_no_model_library(saved):
    code = (
        "import sys, torch; from stepping_plugin.engine import load_engine; "
        f"engine = load_engine({str(saved)!r}); "
        "scores = list(engine.steps(torch.zeros(1, *engine.image_size))); "
        "print(len(scores), [m for m in ('timm', 'torchvision', 'torch_pruning') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "[]"]


def test_missing_truncated_and_foreign_files_are_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_engine(tmp_path / "nothing")
    whole = saved.read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
            load_engine(tmp_path / "cut")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match=r"not one that Engine\.save wrote"):
        load_engine(tmp_path / "foreign")
    nested(model("test_resnet"), n=2, seed=1).save(tmp_path / "net")
    with pytest.raises(CheckpointError, match="holds a net, not an engine"):
        load_engine(tmp_path / "net")


def change(header, what):
    """Plant one defect in the description of an engine."""
    first = header["programs"][0]
    call = next(n for n in first["nodes"] if n["op"] == "call_function")
    constant = next(n for n in first["nodes"] if n["op"] == "get_attr")
    match what:
        case "version":
            header["version"] = 99
        case "old version":
            header["version"] = 1
        case "operator" | "mutating" | "python" | "kernel":
            call["target"] = {"operator": "aten.from_file", "mutating": "aten.relu_", "python": "os.system",
                              "kernel": "kernels.math.exp"}[what]  # fmt: skip
        case "method":
            call["op"] = "call_method"
        case "keyword":
            call["kwargs"] = {"x=print('run'), y": 1}
        case "constant":
            constant["target"] = "t0; print('run')"
        case "missing constant":
            constant["target"] = "t999999"
        case "node":
            call["args"] = [{"node": 10**6}]
        case "argument":
            call["args"] = [{"eval": "1"}]
        case "steps":
            header["programs"].reverse()
        case "macs":
            first["macs"] += 1
        case "caches":
            header["programs"][1]["inputs"][0] = "unknown"
        case "outputs":
            first["outputs"].pop()
        case "programs":
            header["programs"] = {}
        case "dtype":
            header["dtype"] = "load"
        case "nodes":
            first["nodes"] = []
        case "output":
            first["nodes"].pop()
        case "unsuitable":  # every operator is allowed, and none of them can run like this
            call["args"] = []
        case "sizes":
            first["nodes"].insert(0, {"op": "call_function", "target": "aten.ones", "args": [[10**6, 10**6]]})


DEFECTS = {
    "version": "unknown version.*Update",
    "old version": "unknown version.*Make it again",
    "operator": r"step 1: operator that files may not call; got aten\.from_file",
    "mutating": r"may not call; got aten\.relu_",
    "python": r"may not call; got os\.system",
    "kernel": "may not call; got kernels",
    "method": "node of kind 'call_method'",
    **dict.fromkeys(
        ("keyword", "constant", "missing constant", "node", "argument", "steps", "macs", "caches", "outputs",
         "programs", "dtype", "nodes", "output", "unsuitable", "sizes"),
        "description (of the engine )?is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DEFECTS)
def test_planted_defects_are_one_clear_error(saved, tmp_path, what, capsys):
    rewrite(saved, tmp_path / "planted", lambda header, tensors: change(header, what))
    with pytest.raises(CheckpointError, match=DEFECTS[what]) as caught:
        load_engine(tmp_path / "planted")
    assert str(caught.value).startswith(f"{tmp_path / 'planted'}: ")
    assert capsys.readouterr().out == ""  # nothing of the file ran


def test_only_functional_operators_are_allowed():
    assert find_operator("aten.conv2d") is torch.ops.aten.conv2d.default
    assert find_operator("aten.add.Tensor") is torch.ops.aten.add.Tensor
    for name in ("aten.add_.Tensor", "aten.add.out", "aten.set_", "prims.add", "getattr", "kernels.", "aten.", ""):
        assert find_operator(name) is None


def test_operators_without_a_name_are_refused_on_saving(tmp_path):
    engine = engine_of("lenet5")
    node = next(n for n in engine.programs[0].module.graph.nodes if n.target is torch.ops.aten.max_pool2d.default)
    node.target = torch.ops.aten.relu_.default
    with pytest.raises(SteppingError, match=r"aten\.relu_"):
        engine.save(tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_command_line_times_the_engine(capsys):
    assert main(["bench", "engine", "lenet5", "--batch", "1", "--subnets", "2", "--turns", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(r["model"], r["batch_size"], len(r["steps"])) for r in report["results"]] == [("lenet5", 1, 2)]
