"""Steps for other runtimes: what is read back computes the same."""

import functools
import json
import shutil
import zipfile

import pytest
import torch
from nets import images, make, nested, relative

from stepping_plugin.cli import main
from stepping_plugin.engine import compile_engine, torch_files
from stepping_plugin.engine.torch_files import load_torch
from stepping_plugin.errors import SteppingError
from stepping_plugin.files.origin import describe_origin

SLOW_VIT = ["test_resnet", pytest.param("test_vit", marks=pytest.mark.slow)]


@functools.cache
def model(name):
    """One model per name, in float32: finding its units is what takes time here."""
    return make(name).float()


def engine_of(name, n=2, seed=3):
    return compile_engine(nested(model(name), n=n, seed=seed).eval())


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


def check(manifest, engine, run, sizes=(1, 4)):
    for size in sizes:
        x = batch(engine, size)
        with torch.no_grad():
            for ours, theirs in zip(chain(manifest, x, run), engine.steps(x), strict=True):
                assert relative(ours, theirs) < 1e-5


def programs(folder):
    """Runs the steps of a torch export."""
    modules = {name: program.module() for name, program in load_torch(folder / "programs.pt2").items()}
    return lambda step, given: modules[step["program"]](*given)


@pytest.mark.parametrize("name", SLOW_VIT)
def test_torch_export_equals_the_engine(name, tmp_path):
    engine = engine_of(name)
    manifest = engine.export(tmp_path)
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["batch"] == "dynamic" and manifest["macs"] == engine.macs and not manifest["notes"]
    assert {p.name for p in tmp_path.iterdir()} == {"programs.pt2", "manifest.json"}
    with zipfile.ZipFile(tmp_path / "programs.pt2") as archive:  # torch's pickles are archives of their own, or .pkl
        members = archive.namelist()
        assert members and not [m for m in members if m.endswith(".pkl") or archive.read(m)[:2] == b"PK"]
    check(manifest, engine, programs(tmp_path))


@pytest.mark.parametrize("name", SLOW_VIT)
def test_onnx_equals_the_engine(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    engine = engine_of(name)
    manifest = engine.export(tmp_path, "onnx")
    assert "weights" not in manifest
    runners = {
        s["file"]: runtime.InferenceSession(tmp_path / s["file"], providers=["CPUExecutionProvider"])
        for s in manifest["steps"]
    }

    def run(step, given):
        named = {e["name"]: c.numpy() for e, c in zip(step["inputs"], given, strict=True)}
        return [torch.from_numpy(r) for r in runners[step["file"]].run([e["name"] for e in step["outputs"]], named)]

    check(manifest, engine, run)


@pytest.mark.slow
def test_compiled_programs_equal_the_engine(tmp_path):
    try:
        torch_files.check_compiler()
    except SteppingError as error:
        pytest.skip(str(error))
    engine = engine_of("lenet5")
    manifest = engine.export(tmp_path, "aoti")
    runners = torch_files.load_aoti(tmp_path / "kernels.pt2")
    check(manifest, engine, lambda step, given: runners[step["program"]](*given))


@pytest.mark.slow
def test_executorch_equals_the_engine(tmp_path):
    runtime = pytest.importorskip("executorch.runtime", reason="executorch is not installed")
    engine = engine_of("test_resnet")
    manifest = engine.export(tmp_path, "executorch")
    assert manifest["batch"] == 1
    loaded = runtime.Runtime.get().load_program(tmp_path / "programs.pte")
    methods = {step["program"]: loaded.load_method(step["program"]) for step in manifest["steps"]}

    def run(step, given):
        return [r.clone() for r in methods[step["program"]].execute([c.contiguous() for c in given])]

    check(manifest, engine, run, sizes=(1,))


def test_bad_export_requests(tmp_path, monkeypatch):
    engine = engine_of("lenet5")
    with pytest.raises(SteppingError, match="did you mean 'onnx'"):
        engine.export(tmp_path, "onxx")
    for wrong in (0, True, 1.5):
        with pytest.raises(SteppingError, match="bad batch size"):
            engine.export(tmp_path, batch_size=wrong)
    with pytest.raises(SteppingError, match="are for format"):
        engine.export(tmp_path, external_data=True)
    monkeypatch.setattr("stepping_plugin.engine.onnx_files.PACKAGES", ("onnx_that_is_not_there",))
    with pytest.raises(SteppingError, match="pip install onnx onnxscript onnxruntime"):
        engine.export(tmp_path, "onnx")
    monkeypatch.setattr(torch_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SteppingError, match=r"\[executorch\]"):
        engine.export(tmp_path, "executorch")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SteppingError, match=r"C\+\+ compiler"):
        engine.export(tmp_path, "aoti")
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
    engine = engine_of("lenet5", seed=None)
    manifest, x = engine.export(tmp_path), batch(engine, 2)
    with torch.no_grad():
        scores = chain(manifest, x, programs(tmp_path))
    assert relative(scores[1], engine.start(x).logits) < 1e-5 and manifest["steps"][1]["macs"] == 0


def test_command_line_exports_a_run_folder(tmp_path, capsys):
    net = nested(model("lenet5"), n=2, seed=1)
    net.origin = describe_origin(net.model, net.analysis.image_size)
    net.save(tmp_path / "net.safetensors")
    assert main(["export", str(tmp_path), "--batch-size", "2"]) == 0
    assert "programs.pt2, manifest.json (batch size: 2)" in capsys.readouterr().out
    folder = tmp_path / "export-torch"
    assert {p.name for p in folder.iterdir()} == {"programs.pt2", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    x = images(net.analysis.image_size, 2).float()
    with torch.no_grad():
        scores = chain(manifest, x, programs(folder))
        assert relative(torch.stack(scores), net.eval().forward_all(x)) < 1e-5
    assert main(["export", str(tmp_path), "--format", "onnx", "--int8", "8"]) == 1
    assert "no pictures to calibrate int8 on" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing")]) == 1
    assert "no such file" in capsys.readouterr().err
