"""Folders of pictures: which file is in which part, and in memory the same pixels as on disk."""

import numpy as np
import pytest
import torch
from PIL import Image

from stepping_plugin.errors import SteppingError
from stepping_plugin.runs.data import build_data
from stepping_plugin.runs.recipe_schema import DataConfig
from stepping_plugin.training.loader import Augment

CLASSES = ("cat", "dog", "owl")


def make_folder(root, parts, size=(12, 12)):
    """Random pictures: number of pictures per class by part."""
    generator = np.random.default_rng(0)
    for part, count in parts.items():
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


def pixels_of(root, part):
    """(bytes of a picture as Pillow reads it, label) of every file, whatever the order."""
    return sorted(
        (np.asarray(Image.open(file)).tobytes(), label)
        for label, name in enumerate(CLASSES)
        for file in (root / part / name).iterdir()
    )


def held_by(data):
    return [(image.permute(1, 2, 0).numpy().tobytes(), int(label)) for image, label in zip(data.images, data.labels)]


def in_memory(root, **keys):
    return build_data(DataConfig(name="imagefolder", in_memory=True, root=str(root), **keys))


@pytest.mark.parametrize("workers", [0, 3])
def test_pictures_in_memory_are_those_of_the_files(tmp_path, workers):
    make_folder(tmp_path, {"train": 10, "test": 4})
    bundle = in_memory(tmp_path, workers=workers)
    assert sorted(held_by(bundle.test)) == pixels_of(tmp_path, "test")
    assert sorted(held_by(bundle.train) + held_by(bundle.val)) == pixels_of(tmp_path, "train")
    assert torch.bincount(bundle.val.labels).tolist() == [1, 1, 1] and bundle.classes == CLASSES
    assert bundle.train.augment == Augment(2, 0.5) and bundle.val.augment is None
    whole = bundle.train.images.double() / 255
    assert torch.allclose(torch.tensor(bundle.mean).double(), whole.mean((0, 2, 3)))
    assert torch.allclose(torch.tensor(bundle.std).double(), whole.std((0, 2, 3), correction=0))


def test_val_chooses_and_test_is_measured_where_both_are_there(tmp_path):
    make_folder(tmp_path, {"train": 4, "val": 2, "test": 3})
    bundle = in_memory(tmp_path, limit=5)
    assert sorted(held_by(bundle.val)) == pixels_of(tmp_path, "val")
    assert sorted(held_by(bundle.test)) == pixels_of(tmp_path, "test") and len(bundle.train) == 5
    disk = build_data(DataConfig(name="imagefolder", root=str(tmp_path), img_size=12))
    assert (len(disk.train), len(disk.val), len(disk.test)) == (12, 6, 9)
    with pytest.raises(SteppingError, match=r"data\.val_fraction: has no effect.*val is the validation set"):
        in_memory(tmp_path, val_fraction=0.2)


def test_pictures_of_several_sizes_need_one_in_the_recipe(tmp_path):
    make_folder(tmp_path, {"train": 4, "test": 2})
    Image.new("RGB", (30, 20)).save(tmp_path / "train" / "owl" / "0.png")
    with pytest.raises(SteppingError, match=r"0\.png: pictures of different sizes.*data\.img_size"):
        in_memory(tmp_path)
    Image.new("RGB", (30, 20)).save(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(SteppingError, match=r"0\.png: not square; got 20 x 30.*data\.img_size"):
        in_memory(tmp_path)
    bundle = in_memory(tmp_path, img_size=8, mean=[0.5] * 3, std=[0.25] * 3)
    assert bundle.input_size == (3, 8, 8) and bundle.mean == (0.5, 0.5, 0.5) and bundle.std == (0.25, 0.25, 0.25)


def test_a_damaged_picture_is_named_and_left_out(tmp_path):
    make_folder(tmp_path, {"train": 5, "test": 3})
    said = []
    (tmp_path / "test" / "dog" / "1.png").write_bytes(b"no picture")
    config = DataConfig(name="imagefolder", in_memory=True, root=str(tmp_path))
    bundle = build_data(config, say=said.append)
    assert len(bundle.test) == 8 and bundle.left_out == (str(tmp_path / "test" / "dog" / "1.png"),)
    assert any("cannot be read (1)" in text and "1.png" in text for text in said)


def test_too_many_pictures_for_the_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    import stepping_plugin.runs.data.memory as memory

    make_folder(tmp_path, {"train": 4, "test": 2})
    monkeypatch.setattr(memory, "virtual_memory", lambda: type("Memory", (), {"available": 10_000}))
    with pytest.raises(SteppingError, match=r"data\.img_size: too large.*leave them on disk"):
        in_memory(tmp_path)


def test_a_pretrained_model_sets_the_normalisation_in_memory(tmp_path):
    make_folder(tmp_path, {"train": 4, "test": 2})
    config = DataConfig(name="imagefolder", in_memory=True, root=str(tmp_path))
    assert build_data(config, "vit_tiny_patch16_384", pretrained=True).mean == (0.5, 0.5, 0.5)
    assert build_data(config, "vit_tiny_patch16_384").mean != (0.5, 0.5, 0.5)


def test_torchvisions_sets_are_read_from_folders_too(tmp_path):
    make_folder(tmp_path, {"train": 10, "test": 4})
    bundle = build_data(DataConfig(name="cifar10", root=str(tmp_path)))
    assert sorted(held_by(bundle.test)) == pixels_of(tmp_path, "test") and bundle.train.augment == Augment(4, 0.5)
