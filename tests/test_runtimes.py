"""Runtimes without torch, on one export: scores, exits and deadlines as in the engine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import images, make, nested, relative

from stepping_plugin.engine import compile_engine
from stepping_plugin.errors import SteppingError

BATCH, TOLERANCE = 5, 1e-5
HERE = Path(__file__).parent
MODULES = Path(os.environ.get("STEPPING_NODE_MODULES", HERE.parent / "node_modules"))


@pytest.fixture(scope="module", params=["test_resnet", pytest.param("test_vit", marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    """An engine, the folder of its export with one file of weights, and images."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = make(request.param, num_classes=10)
    model.get_classifier().weight.data *= 100  # an untrained net answers every image alike
    net = nested(model.float(), n=3, seed=1).eval()
    engine, folder = compile_engine(net), tmp_path_factory.mktemp("export")
    engine.export(folder, "onnx", external_data=True)
    x = 3 * images(engine.image_size, BATCH).float()
    (folder / "images.bin").write_bytes(x.numpy().tobytes())
    return engine, folder, x


def rules(engine, x):
    """Stopping rules, each of which stops some of the images; no measure is near its threshold."""
    shares = torch.stack(list(engine.steps(x))[:-1]).double().softmax(-1)
    best = shares.topk(2, -1).values
    return [
        {},
        {"max_prob": apart(best[..., 0])},
        {"margin": apart(best[..., 0] - best[..., 1])},
        {"entropy": apart(-(shares * shares.log()).sum(-1)), "max_prob": 1.0},
    ]


def apart(values):
    """The middle of the widest gap between values."""
    ordered = values.flatten().sort().values
    widest = int(ordered.diff().argmax())
    return float(ordered[widest : widest + 2].mean())


def near(ours, theirs):
    return relative(torch.as_tensor(np.asarray(ours, dtype=np.float32)), theirs) < TOLERANCE


def check_answer(logits, subnet, macs, expected):
    assert list(subnet) == expected.subnet.tolist() and list(macs) == expected.macs.tolist()
    assert near(logits, expected.logits)


def test_weights_are_stored_once(exported):
    import onnx

    engine, folder, _ = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = folder / manifest["weights"]
    numbers = {t.numpy().tobytes() for p in engine.programs for t in p.module.buffers() if t.numel() >= 256}
    assert weights.stat().st_size <= sum(-(-len(n) // 4096) * 4096 for n in numbers) + 65_536
    for step in manifest["steps"]:
        graph = onnx.load(folder / step["file"], load_external_data=False).graph
        inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert all(t.ByteSize() < 1200 for t in inside) and len(inside) < len(graph.initializer)


@pytest.mark.parametrize("bind", [False, True])
def test_python_equals_the_engine(exported, bind):
    from stepping_plugin.runtimes.ort import SteppingModel

    engine, folder, x = exported
    model = SteppingModel(folder)
    model._bind = bind
    session = model.start(x.numpy())
    for expected in engine.steps(x):
        assert near(session.logits, expected) and session.macs == engine.macs[session.subnet - 1]
        if session.subnet < model.num_subnets:
            session.step()
    with pytest.raises(SteppingError, match="no larger one"):
        session.step()
    for until in rules(engine, x):
        answer = model.predict(x.numpy(), until=until or None)
        check_answer(answer.logits, answer.subnet, answer.macs, engine.predict(x, until=until or None))
    mask = np.array([True, False, True, False, True])
    session = model.start(x.numpy())
    session.keep(mask)
    assert near(session.step(), list(engine.steps(x))[1][torch.from_numpy(mask)])


def test_python_keeps_deadlines(exported, monkeypatch):
    from stepping_plugin.runtimes.ort import SteppingModel

    engine, folder, x = exported
    model = SteppingModel(folder)
    for seconds, subnet in ((10.0, 1), (1e-3, engine.num_subnets)):
        monkeypatch.setattr(model.clock, "estimate", lambda level, size, last, t=seconds: t)
        assert model.predict(x.numpy(), deadline=5.0).subnet.tolist() == [subnet] * BATCH
    assert not model.predict(x.numpy(), deadline=0.0).in_time


def test_python_needs_no_torch(exported):
    """Nothing but onnxruntime and numpy may be imported."""
    folder = exported[1]
    code = (
        "import sys\n"
        "for name in ('torch', 'timm', 'torchvision', 'safetensors', 'pydantic', 'onnx'): sys.modules[name] = None\n"
        "import numpy as np\n"
        "from stepping_plugin.runtimes.ort import SteppingModel\n"
        f"model = SteppingModel({str(folder)!r})\n"
        f"x = np.fromfile({str(folder / 'images.bin')!r}, np.float32).reshape(-1, *model.image_size)\n"
        "print(model.predict(x, until={'max_prob': 0.0}).subnet.tolist())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [1] * BATCH


def test_python_refuses_what_it_cannot_run(exported, tmp_path):
    from stepping_plugin.runtimes.ort import SteppingModel

    _, folder, x = exported
    with pytest.raises(SteppingError, match="no manifest"):
        SteppingModel(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "stepping-plugin torch export", "version": 1}')
    with pytest.raises(SteppingError, match="not an ONNX export"):
        SteppingModel(tmp_path)
    model = SteppingModel(folder)
    for wrong in (x.double().numpy(), x[:0].numpy(), x[0].numpy(), x[:, :, 1:].numpy()):
        with pytest.raises(SteppingError, match="image"):
            model.start(wrong)
    with pytest.raises(SteppingError, match="did you mean 'max_prob'"):
        model.predict(x.numpy(), until={"max_prop": 0.5})


def test_int8_steps_share_the_scales_of_cached_values(tmp_path):
    """What a step gives on a grid is read on the same grid; scores stay near those of float steps."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from stepping_plugin.runtimes.ort import SteppingModel

    engine = compile_engine(nested(make("lenet5").float(), n=2, seed=1).eval())
    x = images(engine.image_size, 64).float()
    manifest = engine.export(tmp_path, "onnx", calibration=x[:32], external_data=True)
    assert manifest["quantised"] == "int8"
    grids = [grids_of(onnx, tmp_path / step["file"], step) for step in manifest["steps"]]
    made, read = grids[0][1], grids[1][0]
    assert len(made.keys() & read.keys()) > 2
    assert all(read[cache] == made[cache] for cache in made.keys() & read.keys())
    answer = SteppingModel(tmp_path).predict(x.numpy())
    assert relative(torch.from_numpy(answer.logits), engine.predict(x).logits) < 0.1
    for wrong in (x.double(), x[0], x[:0], "pictures"):
        with pytest.raises(SteppingError, match="calibration"):
            engine.export(tmp_path, "onnx", calibration=wrong)


def grids_of(onnx, path, step):
    """Scale and zero point of inputs and outputs in int8, by cache."""
    graph = onnx.load(path).graph
    numbers = {t.name: onnx.numpy_helper.to_array(t).tolist() for t in graph.initializer}
    reads = {n.input[0]: n for n in graph.node if n.op_type == "QuantizeLinear"}
    makes = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
    return [
        {e["cache"]: [numbers[k] for k in found[e["name"]].input[1:3]] for e in step[side] if e["name"] in found}
        for side, found in (("inputs", reads), ("outputs", makes))
    ]


def test_javascript_equals_the_engine(exported):
    if shutil.which("node") is None or not (MODULES / "onnxruntime-web").is_dir():
        pytest.skip("needs node, and onnxruntime-web in ./node_modules or $STEPPING_NODE_MODULES (npm install it)")
    engine, folder, x = exported
    options = [{"until": until} for until in rules(engine, x)] + [{"deadline": 0}]
    (folder / "request.json").write_text(json.dumps({"batch": BATCH, "rules": options}))
    command = ["node", HERE / "stepping_node.mjs", MODULES, folder, folder / "request.json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = json.loads(result.stdout)
    for scores, expected in zip(answer["scores"], engine.steps(x), strict=True):
        assert near(np.reshape(scores, (BATCH, -1)), expected)
    for found, until in zip(answer["answers"], rules(engine, x)):
        check_answer(**found, expected=engine.predict(x, until=until or None))
    check_answer(**answer["answers"][-1], expected=engine.predict(x, deadline=0.0))
    assert answer["macs"] == engine.macs[-1]
    assert answer["allowed"] == [False] * 16 + [True] * 24, "deadlines cannot lock in"


@pytest.mark.slow
def test_cpp_equals_the_engine(exported, tmp_path):
    root = os.environ.get("ONNXRUNTIME_ROOT")
    if not root or shutil.which("cmake") is None:
        pytest.skip("needs cmake, nlohmann-json, and $ONNXRUNTIME_ROOT, an unpacked release of onnxruntime")
    engine, folder, x = exported
    configure = ["cmake", "-S", HERE.parent / "examples" / "cpp", "-B", tmp_path, f"-DONNXRUNTIME_ROOT={root}"]
    for command in (configure, ["cmake", "--build", tmp_path]):
        subprocess.run(command, capture_output=True, check=True)
    for until in [*rules(engine, x), {"deadline": 0.0}]:
        named = [f"{name}={limit!r}" for name, limit in until.items()]
        command = [tmp_path / "stepping", folder, folder / "images.bin", str(BATCH), *named]
        answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        for scores, expected in zip(answer["scores"], engine.steps(x), strict=True):
            assert near(np.reshape(scores, (BATCH, -1)), expected)
        options = until if "deadline" in until else {"until": until or None}
        check_answer(answer["logits"], answer["subnet"], answer["macs"], engine.predict(x, **options))
