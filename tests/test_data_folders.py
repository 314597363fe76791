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
    with pytest.raises(SteppingError, match=r"data\.val_fraction: has no effect.*a val part of its own, 6 pictures"):
        in_memory(tmp_path, val_fraction=0.2)


def test_what_systems_leave_behind_is_no_class_and_a_picture_without_a_class_is_named(tmp_path):
    make_folder(tmp_path, {"train": 4, "test": 2})
    for place in (
        "train/.ipynb_checkpoints/0.png",
        "train/dog/._0.png",
        "test/__MACOSX/dog/1.png",
        "test/empty/notes.txt",
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12)).save(tmp_path / place, "png")
    bundle = in_memory(tmp_path, val_fraction=0)
    assert bundle.classes == CLASSES and sorted(held_by(bundle.test)) == pixels_of(tmp_path, "test")
    assert len(bundle.train) == 12
    Image.new("RGB", (12, 12)).save(tmp_path / "train" / "lone.png")
    with pytest.raises(SteppingError, match=r"lone\.png: a picture outside of the folders of the classes"):
        in_memory(tmp_path)


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
    bad = tmp_path / "test" / "dog" / "1.png"
    assert len(bundle.test) == 8 and list(bundle.left_out.names) == [str(bad)]
    assert any(text.startswith(f"left out of everything: {bad}: this picture cannot be read") for text in said)


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


# --- On disk


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_on_disk_that_cannot_be_read_are_in_no_batch_and_are_told_once(tmp_path, workers):
    make_folder(tmp_path, {"train": 6, "test": 4})
    said, bad = [], [tmp_path / "test" / "dog" / "1.png", tmp_path / "train" / "cat" / "2.png"]
    for file in bad:
        file.write_bytes(file.read_bytes()[:-40])  # cut short: its head is good
    config = DataConfig(name="imagefolder", root=str(tmp_path), img_size=12, workers=workers, val_fraction=0)
    bundle = build_data(config, say=said.append)
    for _ in range(2):
        found = torch.cat([labels for _, labels in bundle.loader("test", 2)])
        assert torch.bincount(found).tolist() == [4, 3, 4]
        assert sum(len(labels) for _, labels in bundle.loader("train", 6)) == 17
    assert list(bundle.left_out.names) == [str(file) for file in bad]
    assert len([text for text in said if "cannot be read" in text]) == 2
    assert bundle.left_out.notes()[0].startswith("pictures that cannot be read, left out of every figure: 2 (")


def test_a_training_batch_without_a_picture_stops_the_training_and_one_of_a_test_is_empty(tmp_path):
    make_folder(tmp_path, {"train": 2, "test": 2})
    for file in [*(tmp_path / "train").rglob("*.png"), *(tmp_path / "test" / "cat").iterdir()]:
        file.write_bytes(b"")
    bundle = build_data(DataConfig(name="imagefolder", root=str(tmp_path), img_size=12, workers=0, val_fraction=0))
    with pytest.raises(SteppingError, match=r"none of the 3 pictures of a batch can be read: .*png"):
        list(bundle.loader("train", 3))
    assert [len(labels) for _, labels in bundle.loader("test", 1)] == [1] * 4


def test_what_is_held_out_is_a_share_of_every_class_and_overlaps_in_nothing(tmp_path):
    """Classes of 3, 10 and 40 pictures, not divided into parts."""
    for name, count in zip(CLASSES, (3, 10, 40)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
    bundle = build_data(DataConfig(name="imagefolder", root=str(tmp_path), img_size=4, test_fraction=0.3))
    files = {part: set(getattr(bundle, part).base.source.files) for part in ("train", "val", "test")}
    assert len(set.union(*files.values())) == sum(map(len, files.values())) == 53
    count = lambda part: torch.bincount(getattr(bundle, part).base.source.labels).tolist()  # noqa: E731
    assert count("test") == [1, 3, 12] and count("val") == [1, 1, 3] and count("train") == [1, 6, 25]


def test_a_share_of_nothing_means_that_the_test_pictures_choose_too(tmp_path):
    make_folder(tmp_path, {"train": 4, "val": 2})
    held = build_data(DataConfig(name="imagefolder", root=str(tmp_path), img_size=12))
    assert (len(held.train), len(held.val), len(held.test)) == (9, 3, 6)
    same = build_data(DataConfig(name="imagefolder", root=str(tmp_path), img_size=12, val_fraction=0))
    assert same.val is same.test and len(same.train) == 12
    with pytest.raises(SteppingError, match=r"data\.test_fraction: has no effect"):
        build_data(DataConfig(name="imagefolder", root=str(tmp_path), img_size=12, test_fraction=0.5))
