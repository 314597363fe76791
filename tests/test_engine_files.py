"""Engines as files and as exported programs: what is read back computes the same, and nothing else is read."""

import functools
import json
import subprocess
import sys
import zipfile

import pytest
import torch
from nets import images, make, nested, relative
from rewriting import rewrite
from safetensors.torch import load_file, save_file

from stepping_plugin.cli import main
from stepping_plugin.engine import compile_engine, load_engine
from stepping_plugin.errors import CheckpointError, SteppingError
from stepping_plugin.files.graphs import find_operator
from stepping_plugin.files.origin import describe_origin

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


def chain(manifest, x, run):
    """Scores of all subnets from exported steps, moving caches about as the manifest says."""
    caches, scores = {"image": x}, []
    for step in manifest["steps"]:
        for entry in step["inputs"]:
            assert matches(entry["shape"], caches[entry["cache"]].shape, len(x)), entry
        results = run(step, [caches[entry["cache"]] for entry in step["inputs"]])
        for entry, result in zip(step["outputs"], results, strict=True):
            assert matches(entry["shape"], result.shape, len(x)), entry
            assert str(result.dtype) == f"torch.{entry['dtype']}"
            caches[entry["cache"]] = result
        for name in step["drop"]:
            del caches[name]
        scores.append(caches["scores"])
    return scores


def matches(described, shape, size):
    known = [eval(s, {"batch": size}) if isinstance(s, str) else s for s in described]
    return known == list(shape)


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


# ------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("name", ["test_resnet", pytest.param("test_vit", marks=pytest.mark.slow)])
def test_torch_export_equals_the_engine(name, tmp_path):
    engine = engine_of(name)
    manifest = engine.export(tmp_path)
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["batch"] == "dynamic" and manifest["macs"] == engine.macs and not manifest["notes"]
    for step in manifest["steps"]:
        with zipfile.ZipFile(tmp_path / step["file"]) as archive:  # torch's pickles are archives of their own, or .pkl
            members = archive.namelist()
            assert members and not [m for m in members if m.endswith(".pkl") or archive.read(m)[:2] == b"PK"]
    modules = {s["file"]: torch.export.load(tmp_path / s["file"]).module() for s in manifest["steps"]}
    for size in (1, 4):
        x = batch(engine, size)
        with torch.no_grad():
            scores = chain(manifest, x, lambda step, given: modules[step["file"]](*given))
        for ours, theirs in zip(scores, engine.steps(x), strict=True):
            assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", ["test_resnet", pytest.param("test_vit", marks=pytest.mark.slow)])
def test_onnx_equals_the_engine(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    engine = engine_of(name)
    manifest = engine.export(tmp_path, "onnx")
    runners = {
        s["file"]: runtime.InferenceSession(tmp_path / s["file"], providers=["CPUExecutionProvider"])
        for s in manifest["steps"]
    }

    def run(step, given):
        named = {e["name"]: c.numpy() for e, c in zip(step["inputs"], given, strict=True)}
        return [torch.from_numpy(r) for r in runners[step["file"]].run([e["name"] for e in step["outputs"]], named)]

    for size in (1, 4):
        x = batch(engine, size)
        for ours, theirs in zip(chain(manifest, x, run), engine.steps(x), strict=True):
            assert relative(ours, theirs) < 1e-5


def test_bad_export_requests(engine, tmp_path, monkeypatch):
    with pytest.raises(SteppingError, match="did you mean 'onnx'"):
        engine.export(tmp_path, "onxx")
    for wrong in (0, True, 1.5):
        with pytest.raises(SteppingError, match="bad batch size"):
            engine.export(tmp_path, batch_size=wrong)
    monkeypatch.setattr("stepping_plugin.engine.export.PACKAGES", ("onnx_that_is_not_there",))
    with pytest.raises(SteppingError, match="pip install onnx onnxscript onnxruntime"):
        engine.export(tmp_path, "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_cannot_stay_open_is_fixed_with_a_note(tmp_path, monkeypatch):
    engine, capture = engine_of("lenet5"), torch.export.export

    def only_fixed(module, given, dynamic_shapes, **options):
        if any(dynamic_shapes):
            raise ValueError("the batch must be a number")
        return capture(module, given, dynamic_shapes=dynamic_shapes, **options)

    monkeypatch.setattr(torch.export, "export", only_fixed)
    manifest = engine.export(tmp_path)
    assert manifest["batch"] == 1 and "batch size is fixed at 1" in manifest["notes"][0]
    assert manifest["steps"][0]["inputs"][0]["shape"] == [1, *engine.image_size]


def test_a_net_without_increments_exports(tmp_path):
    """Step 2 computes nothing: the scores pass through."""
    engine = compile_engine(nested(model("lenet5"), n=2, seed=None).eval())
    manifest, x = engine.export(tmp_path), batch(engine, 2)
    with torch.no_grad():
        scores = chain(manifest, x, lambda step, given: torch.export.load(tmp_path / step["file"]).module()(*given))
    assert relative(scores[1], engine.start(x).logits) < 1e-5 and manifest["steps"][1]["macs"] == 0


def test_command_line_exports_a_run_folder(tmp_path, capsys):
    net = nested(model("lenet5"), n=2, seed=1)
    net.origin = describe_origin(net.model, net.analysis.image_size)
    net.save(tmp_path / "net.safetensors")
    assert main(["export", str(tmp_path), "--batch-size", "2"]) == 0
    assert "step1.pt2, step2.pt2, manifest.json (batch size: 2)" in capsys.readouterr().out
    folder = tmp_path / "export-torch"
    assert {p.name for p in folder.iterdir()} == {"step1.pt2", "step2.pt2", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    x = images(net.analysis.image_size, 2).float()
    with torch.no_grad():
        scores = chain(manifest, x, lambda step, given: torch.export.load(folder / step["file"]).module()(*given))
        assert relative(torch.stack(scores), net.eval().forward_all(x)) < 1e-5
    assert main(["export", str(tmp_path / "nothing")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_command_line_times_the_engine(capsys):
    assert main(["bench", "engine", "lenet5", "--batch", "1", "--subnets", "2", "--turns", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(r["model"], r["batch_size"], len(r["steps"])) for r in report["results"]] == [("lenet5", 1, 2)]
