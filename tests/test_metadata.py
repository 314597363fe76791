"""Files that production uses alone: pictures prepared as in evaluation, names, thresholds; with torch and without."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from nets import images, make, nested
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from stepping_plugin import CheckpointError, SteppingError
from stepping_plugin.engine import load_engine
from stepping_plugin.engine.pictures import prepared
from stepping_plugin.engine.standalone import Net, prepare
from stepping_plugin.files.headers import EngineHeader, validated
from stepping_plugin.files.metadata import CalibratedExit, Metadata, Preprocessing
from stepping_plugin.net import SteppingNet, load
from stepping_plugin.runs.data import build_data
from stepping_plugin.runs.data.memory import Pictures, _resize
from stepping_plugin.runs.figures import class_names
from stepping_plugin.runs.provenance import described, without_folders
from stepping_plugin.runs.recipe import dump_recipe, load_recipe
from stepping_plugin.runs.recipe_schema import Recipe
from stepping_plugin.training.loader import TensorSet
from stepping_plugin.training.pictures import preprocessing_of

SIZES = [(50, 80), (80, 50), (33, 33), (64, 64), (20, 90), (128, 128), (31, 47)]


def picture(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise in blocks, so that filters and roundings matter."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 3 + 1, size[0] // 3 + 1, 4), dtype=np.uint8)
    return Image.fromarray(noise, "RGBA").convert(mode).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_pct": 0.875, "interpolation": "bicubic"},
        {"crop_pct": 1.0, "interpolation": "bilinear"},
        {"crop_mode": "squash", "interpolation": "lanczos", "crop_pct": 0.9},
        {"crop_mode": "border", "interpolation": "nearest", "crop_pct": 0.9},
        {"crop_mode": "border", "interpolation": "bicubic", "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.3,) * 3},
    ],
)  # fmt: skip
def test_pictures_are_prepared_bit_by_bit_as_timm_does(settings):
    for shape in ((3, 32, 32), (3, 32, 48)):
        transform = create_transform(shape, **settings)
        how = preprocessing_of(transform)
        for size in SIZES:
            for mode in ("RGB", "L", "RGBA", "P"):
                source = picture(size, mode)
                assert torch.equal(prepared(source, how), transform(source.convert("RGB"))), (settings, size, mode)


def test_pictures_are_prepared_bit_by_bit_as_torchvision_does():
    own = transforms.Compose(
        [transforms.Grayscale(), transforms.Resize((40, 30)), transforms.CenterCrop(36), transforms.ToTensor(),
         transforms.Normalize([0.4], [0.2])]
    )  # fmt: skip
    plain = transforms.Compose([transforms.CenterCrop((41, 60)), transforms.ToTensor()])
    for size in SIZES:
        source = picture(size)
        grey = prepared(source, preprocessing_of(own))
        assert torch.equal(grey, own(source.convert("L")))
        assert torch.equal(prepared(source, preprocessing_of(plain)), plain(source))


def test_pictures_are_prepared_as_sets_in_memory_are():
    """torch resizes in another order of sums: where a value lies half way between two bytes it may round otherwise."""
    for channels, mode in ((1, "L"), (3, "RGB")):
        mean, std = (0.3,) * channels, (0.2,) * channels
        for size in SIZES:
            array = np.asarray(picture(size, mode)).reshape(size[1], size[0], channels)
            raw = torch.from_numpy(array.copy()).permute(2, 0, 1)[None]
            data = TensorSet(_resize(Pictures(raw, torch.zeros(1).long()), 32).images, torch.zeros(1).long(), mean, std)
            found = prepared(picture(size, mode), preprocessing_of(data))
            assert found.shape == (channels, 32, 32)
            different = (found - data[0][0]).abs() * 0.2 * 255
            assert different.max() < 1.01 and (different > 0.01).double().mean() < 0.002


def saved(folder, size: tuple[int, int], seed: int) -> None:
    """Pictures of every kind: colours, grey, 16 bits, palettes."""
    folder.mkdir(parents=True, exist_ok=True)
    deep = np.asarray(picture(size, "L", seed)).astype(np.uint16) * 256 + 77
    Image.fromarray(deep).save(folder / "0.png")
    for k, mode in enumerate(("RGB", "L", "P"), start=1):
        picture(size, "RGB", seed).convert(mode).save(folder / f"{k}.png")


@pytest.mark.parametrize(
    "settings",
    [
        {"in_memory": True, "img_size": 24},
        {"in_memory": True, "img_size": 24, "crop_mode": "border", "in_chans": 1},
        {"in_memory": True},
        {"img_size": 24, "workers": 0},
        {"img_size": 24, "workers": 0, "crop_mode": "squash", "in_chans": 1},
    ],
    ids=str,
)
def test_pictures_are_prepared_as_the_folders_of_a_recipe_are(tmp_path, settings):
    for part, label, seed in (("train", "cat", 0), ("train", "dog", 1), ("val", "cat", 2), ("val", "dog", 3)):
        saved(tmp_path / part / label, (24, 24) if len(settings) == 1 else (40, 33), seed)
    settings = {"name": "imagefolder", "root": str(tmp_path), "val_fraction": 0, **settings}
    recipe = Recipe(model={"name": "resnet18"}, data=settings, budgets=[0.5])
    data = build_data(recipe.data, "resnet18")
    found = described(recipe, data, class_names(data, 2), say=pytest.fail)
    assert found.classes == ["cat", "dog"] and found.provenance.data.pictures == 8
    files = [tmp_path / "val" / c / f"{k}.png" for c in ("cat", "dog") for k in range(4)]
    images = torch.cat([x for x, _ in data.loader("test", 3)])
    for image, file in zip(images, files, strict=True):
        assert torch.equal(prepared(file, found.preprocessing), image), file


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([transforms.RandomCrop(32)], "RandomCrop"),
        ([transforms.Resize(40), transforms.Resize(32)], "second resize"),
        ([transforms.Resize(40, max_size=60)], "max_size"),
        ([transforms.Lambda(lambda x: x)], "Lambda"),
        ([transforms.Normalize([0.5] * 5, [1] * 5)], "5 channels"),
    ],
)  # fmt: skip
def test_transforms_that_files_cannot_hold_are_named(steps, words):
    with pytest.raises(SteppingError, match=words):
        preprocessing_of(transforms.Compose(steps))


RULE = CalibratedExit(
    combine="product", temperatures=[1.5, 1.0, 0.8, 0.5], thresholds=[[None], [0.5], [0.0]], target="x",
    chosen_on="y", met=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished() -> SteppingNet:
    net = nested(make("test_resnet"), seed=3).eval().float()
    classes = net(images(net.analysis.image_size, 1).float()).shape[-1]
    transform = create_transform(net.analysis.image_size, interpolation="bicubic", crop_pct=0.9)
    net.metadata = Metadata(
        classes=[f"kind {k}" for k in range(classes)], preprocessing=preprocessing_of(transform), exit=RULE
    )
    return net


def test_nets_and_engines_keep_it(finished, tmp_path):
    finished.save(tmp_path / "net")
    model = make("test_resnet")
    again = load(tmp_path / "net", model)
    assert again.metadata == finished.metadata == again.compact().metadata
    again.deploy().save(tmp_path / "engine")
    engine = load_engine(tmp_path / "engine")
    assert engine.metadata == finished.metadata
    answer = engine.predict(engine.preprocess([picture((70, 50)), picture((90, 200))]), until="calibrated")
    assert answer.subnet.tolist() and all(name.startswith("kind ") for name in answer.labels)
    again.set_levels(again.levels)
    assert again.metadata.exit is None and again.metadata.classes, "thresholds of other subnets"
    for wrong, words in ((Metadata(classes=["a"]), "1 names of classes"), (None, "NoneType")):
        with pytest.raises(SteppingError, match=words):
            again.metadata = wrong
    bare = dataclasses.replace(engine, metadata=Metadata())
    with pytest.raises(SteppingError, match="does not say how"):
        bare.preprocess(picture((8, 8)))
    for wrong, words in ((3, "no picture"), ([], "no picture"), (tmp_path / "engine", "cannot be read")):
        with pytest.raises(SteppingError, match=words):
            engine.preprocess(wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ["a", "a"]}, "of one name"),
        ({"exit": RULE.model_dump() | {"temperatures": [1.0], "thresholds": []}}, "another net"),
        ({"exit": RULE.model_dump() | {"temperatures": [1.0, 0.0, 1.0, 1.0]}}, "greater than 0"),
        ({"exit": RULE.model_dump() | {"thresholds": [[2.0], [0.5], [0.5]]}}, "less than or equal to 1"),
        ({"preprocessing": {"mode": "L", "resize": "none", "mean": [0.0], "std": [1.0]}}, "another size"),
        ({"preprocessing": {"mode": "L", "resize": "exact", "mean": [0.0], "std": [1.0]}}, "do not fit together"),
        ({"preprocessing": {"mode": "RGB", "resize": "none", "mean": [0.0], "std": [1.0]}}, "number of channels"),
        ({"provenance": {"colour": "red"}}, "colour"),
    ],
)  # fmt: skip
def test_metadata_of_files_are_checked(change, words):
    plain = {"format": "", "version": 3, "image_size": [3, 32, 32], "dtype": "float32", "macs": [1, 2, 3, 4],
             "cache_axes": {}, "programs": [], "versions": {}}  # fmt: skip
    assert validated(EngineHeader, plain, "file").metadata == Metadata(), "older files lack it"
    with pytest.raises(CheckpointError, match=words):
        validated(EngineHeader, {**plain, "metadata": change}, "file")


_FRESH = """
import builtins, json, sys
real = builtins.__import__
def guarded(name, *rest):
    if name.split(".")[0] in ("torch", "torchvision", "timm", "stepping_plugin"):
        raise ImportError(name + " is not here")
    return real(name, *rest)
builtins.__import__ = guarded
sys.path.insert(0, sys.argv[1])
import run
net = run.Net(sys.argv[1])
print(json.dumps([net.predict(path, until) for path in sys.argv[2:] for until in ("calibrated", 0.4, None)]))
"""


@pytest.mark.slow
def test_the_onnx_folder_alone_gives_the_answers_of_the_engine(finished, tmp_path):
    """A fresh process without torch, the same JPEG files."""
    pytest.importorskip("onnxruntime")
    engine = finished.deploy()
    engine.export(tmp_path / "onnx", "onnx")
    files = [tmp_path / f"{k}.jpg" for k in range(3)]
    for k, path in enumerate(files):
        picture((60 + 20 * k, 90), seed=k).save(path, quality=85)
    command = [sys.executable, "-c", _FRESH, str(tmp_path / "onnx"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    found = iter(json.loads(done.stdout))
    for path in files:
        for until in ("calibrated", {"max_prob": 0.4}, None):
            ours, theirs = engine.predict(engine.preprocess(path), until=until), next(found)
            assert (ours.labels, ours.subnet.tolist()) == ([theirs["label"]], [theirs["subnet"]])
            assert float(ours.confidence) == pytest.approx(theirs["confidence"], rel=1e-4)
            assert ours.macs.tolist() == [theirs["macs"]]


class Step:
    """A step of an export as onnxruntime would run it."""

    def __init__(self, run):
        self.run = run


def test_the_standalone_runner_steps_and_stops(finished, tmp_path):
    """The same as above without ONNX: steps are those of the engine, given by name."""
    engine = finished.deploy()
    manifest = {
        "image_size": list(engine.image_size), "dtype": "float32", "macs": engine.macs, **engine.metadata.model_dump(),
        "steps": [
            {"file": f"{k}", "drop": list(p.released), "inputs": [{"name": c, "cache": c} for c in p.inputs],
             "outputs": [{"name": c + ".new", "cache": c} for c in p.outputs]}
            for k, p in enumerate(engine.programs)
        ],
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    def make_step(path):
        program = engine.programs[int(path.name)]

        def run(names, given):
            assert names == [c + ".new" for c in program.outputs] and list(given) == list(program.inputs)
            return [r.numpy() for r in program.module(*[torch.as_tensor(v) for v in given.values()])]

        return Step(run)

    net = Net(tmp_path, make_step)
    for seed in range(3):
        source = picture((70, 80), seed=seed)
        for until in ("calibrated", 0.3, None):
            rule = {"max_prob": until} if until == 0.3 else until
            ours, theirs = engine.predict(engine.preprocess(source), until=rule), net.predict(source, until)
            assert (ours.labels, ours.subnet.tolist()) == ([theirs["label"]], [theirs["subnet"]])
            assert float(ours.confidence) == pytest.approx(theirs["confidence"], rel=1e-4)


def test_a_picture_is_prepared_whatever_it_comes_from():
    how = Preprocessing(mode="RGB", resize="exact", size=[16, 16], interpolation="bicubic", mean=[0.5] * 3, std=[1] * 3)
    buffer = io.BytesIO()
    picture((40, 30)).save(buffer, "PNG")
    assert np.array_equal(prepare(Image.open(buffer), how.model_dump()), prepare(picture((40, 30)), how.model_dump()))


def test_files_do_not_tell_where_things_lay(tmp_path):
    """A net's file goes to other people: they learn the names of files and folders, not where they are."""
    weights = tmp_path / "weights.safetensors"
    keys = [f"data.root={tmp_path}/photos", "data.name=imagefolder", f"output={tmp_path}/runs/mine",
            f"model.checkpoint_path={weights}", f"retrain.teacher.checkpoint_path={weights}",
            "retrain.teacher.name=resnet18", "retrain.distill_from=teacher"]  # fmt: skip
    kept = dump_recipe(without_folders(load_recipe("digits", keys)))
    assert str(tmp_path) not in kept
    assert all(name in kept for name in ("root: photos", "output: mine", "checkpoint_path: weights.safetensors"))
