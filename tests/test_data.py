"""Data sets and loaders: nothing lost, nothing doubled, every batch reproducible from where it stands."""

import dataclasses
import gzip
import itertools
import struct
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from stepping_plugin.errors import SteppingError
from stepping_plugin.runs.data import build_data
from stepping_plugin.runs.recipe_schema import DataConfig
from stepping_plugin.training.loader import (
    Augment,
    EpochLoader,
    EpochSampler,
    TensorSet,
    TransformSet,
    seeded_generator,
)


def numbered_set(length: int, augment: Augment | None = None) -> TensorSet:
    """Labels are 0, 1, 2, ..., pictures are random."""
    images = torch.randint(0, 256, (length, 2, 6, 6), generator=seeded_generator("test"), dtype=torch.uint8)
    return TensorSet(images, torch.arange(length), (0.5, 0.4), (0.2, 0.3), augment)


def labels_of(batches) -> list[int]:
    return [label for _, labels in batches for label in labels.tolist()]


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_sampler_shares_the_epoch_among_the_ranks(length, world):
    shares = [list(EpochSampler(length, 3, 5, rank, world, even=False)) for rank in range(world)]
    assert sorted(itertools.chain(*shares)) == list(range(length))
    even = [list(EpochSampler(length, 3, 5, rank, world)) for rank in range(world)]
    assert {len(share) for share in even} == {-(-length // world)}
    assert set(itertools.chain(*even)) == set(range(length))


def test_sampler_depends_on_seed_and_epoch_only():
    orders = {tuple(EpochSampler(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    torch.manual_seed(0)
    first = list(EpochSampler(50, 1, 2))
    torch.manual_seed(99)
    assert list(EpochSampler(50, 1, 2)) == first
    assert list(EpochSampler(5, shuffle=False)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("sizes", [[40, 3, 7], [1, 1, 1], [5, 100], [9]])
@pytest.mark.parametrize("world", [1, 2])
def test_balanced_epochs_visit_classes_equally_often_and_samples_of_a_class_in_turns(sizes, world):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    shares = [list(EpochSampler(len(labels), 1, 2, rank, world, balance=labels)) for rank in range(world)]
    visits = torch.bincount(torch.tensor([i for share in shares for i in share][: len(labels)]), minlength=len(labels))
    of_class = [visits[labels == label] for label in range(len(sizes))]
    counts = [int(each.sum()) for each in of_class]
    assert sum(counts) == len(labels) and max(counts) - min(counts) <= 1 + (world > 1)
    assert all(each.max() - each.min() <= 1 + (world > 1) for each in of_class)
    orders = {tuple(EpochSampler(len(labels), 1, epoch, balance=labels)) for epoch in range(3)}
    assert len(orders) == 3 or len(labels) < 5


def test_balanced_batches_are_of_the_training_part_only():
    bundle = build_data(DataConfig(name="digits", limit=300, balance="sampler"))
    rare = torch.cat(
        [(bundle.train_labels == 3).nonzero().flatten()[:2], (bundle.train_labels != 3).nonzero().flatten()]
    )
    data = TensorSet(bundle.train.images[rare], bundle.train.labels[rare], bundle.mean, bundle.std)
    loader = dataclasses.replace(bundle, train=data, train_labels=data.labels).loader("train", len(data))
    ((_, labels),) = loader
    assert torch.bincount(labels).tolist() == pytest.approx([len(data) / 10] * 10, abs=1)
    assert labels_of(bundle.loader("test", 64)) == bundle.test.labels.tolist()


def test_empty_set_and_bad_rank_are_clear_errors():
    with pytest.raises(SteppingError, match="empty"):
        EpochLoader(numbered_set(0), 4, train=True)
    with pytest.raises(SteppingError, match="rank 2 of 2"):
        EpochSampler(10, rank=2, world=2)
    with pytest.raises(SteppingError, match="batch size"):
        EpochLoader(numbered_set(4), 0, train=True)


def test_training_drops_the_incomplete_batch_and_evaluation_does_not():
    train = EpochLoader(numbered_set(50), 8, train=True)
    assert [len(labels) for _, labels in train] == [8] * 6 and len(train) == 6
    val = EpochLoader(numbered_set(50), 8, train=False)
    assert labels_of(val) == list(range(50)) and len(val) == 7
    tiny = EpochLoader(numbered_set(3), 8, train=True)
    assert sorted(labels_of(tiny)) == [0, 1, 2] and len(tiny) == 1


def test_every_epoch_has_its_own_order_and_breaking_off_keeps_the_place():
    loader = EpochLoader(numbered_set(32), 8, train=True)
    first, second = labels_of(loader), labels_of(loader)
    assert first != second and sorted(first) == sorted(second)
    loader.set_epoch(0)
    next(iter(loader))
    assert loader.epoch == 0 and labels_of(loader) == first


@pytest.mark.parametrize("step", [0, 1, 5, 6, 13])
def test_resumed_stream_equals_the_uninterrupted_one(step):
    data = numbered_set(50, Augment(2, 0.5))
    whole = EpochLoader(data, 8, train=True, seed=4).stream()
    expected = [next(whole) for _ in range(step + 4)][step:]
    resumed = EpochLoader(data, 8, train=True, seed=4).stream(step)
    for images, labels in expected:
        again_images, again_labels = next(resumed)
        assert torch.equal(images, again_images) and torch.equal(labels, again_labels)


def test_two_processes_see_what_one_with_the_whole_batch_sees():
    data = numbered_set(48, Augment(2, 0.5))
    one = list(EpochLoader(data, 8, train=True, seed=1))
    ranks = [list(EpochLoader(data, 4, train=True, seed=1, rank=rank, world=2)) for rank in range(2)]
    for (images, labels), *parts in zip(one, *ranks, strict=True):
        assert torch.equal(labels, torch.stack([labels for _, labels in parts], 1).flatten())
        assert torch.equal(images, torch.stack([images for images, _ in parts], 1).flatten(0, 1))


def test_loading_leaves_the_global_generators_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(EpochLoader(numbered_set(16, Augment(1, 0.5)), 4, train=True))
    pictures = [(Image.new("RGB", (8, 8)), 0)] * 8
    list(EpochLoader(TransformSet(pictures, create_transform(8, is_training=True)), 4, train=True))
    assert torch.equal(torch.rand(3), expected)


def test_augmentation_is_a_shift_with_black_and_a_mirror():
    images = torch.randint(1, 256, (64, 3, 5, 5), dtype=torch.uint8)
    shift = 2
    moved = Augment(shift, 0.5)(images, seeded_generator(1))
    assert moved.shape == images.shape and moved.dtype == images.dtype
    padded = torch.nn.functional.pad(images, [shift] * 4)
    found = set()
    for original, result in zip(padded, moved):
        windows = {(t, m): original[:, t : t + 5, m : m + 5] for t in range(5) for m in range(5)}
        matches = [(place, False) for place, window in windows.items() if torch.equal(window, result)]
        matches += [(place, True) for place, window in windows.items() if torch.equal(window.flip(2), result)]
        assert matches
        found.update(matches)
    assert len(found) > 25  # of 50 possible ones
    assert torch.equal(Augment()(images, seeded_generator(1)), images)


def test_pictures_stand_on_their_heads_by_their_probability_and_the_other_draws_stay():
    images = torch.randint(0, 256, (64, 1, 5, 5), generator=seeded_generator(0), dtype=torch.uint8)
    plain, turned = (Augment(2, 0.5, vflip)(images, seeded_generator(1)) for vflip in (0.0, 1.0))
    assert torch.equal(Augment(0, 0, 1.0)(images, seeded_generator(1)), images.flip(2))
    padded_up = Augment(2, 0.5)(images, seeded_generator(1))
    assert torch.equal(plain, padded_up) and torch.equal(turned, plain.flip(2))
    half = Augment(0, 0, 0.5)(images, seeded_generator(1))
    upside = [torch.equal(a, b.flip(1)) for a, b in zip(half, images)]
    assert 16 < sum(upside) < 48


def test_normalisation_is_per_channel():
    data = numbered_set(20)
    image, label = data[3]
    expected = (data.images[3].double() / 255 - torch.tensor([0.5, 0.4])[:, None, None]) / torch.tensor([0.2, 0.3])[
        :, None, None
    ]
    torch.testing.assert_close(image.double(), expected, atol=1e-6, rtol=0)
    assert label == 3


# --- Sets ---------------------------------------------------------------------------------------------------


def test_digits_are_split_by_class_and_never_overlap():
    bundle = build_data(DataConfig(name="digits"))
    assert bundle.input_size == (1, 8, 8) and bundle.num_classes == 10
    parts = [bundle.train, bundle.val, bundle.test]
    assert sum(len(part) for part in parts) == 1797
    rows = [{image.numpy().tobytes() for image in part.images} for part in parts]
    assert not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])
    for part in parts:
        share = torch.bincount(part.labels, minlength=10) / len(part)
        assert share.min() > 0.08 and share.max() < 0.12
    images, _ = next(iter(build_data(DataConfig(name="digits", shift=0)).loader("train", 2000)))
    assert abs(images.mean()) < 1e-4 and abs(images.std(correction=0) - 1) < 1e-4


def test_splits_follow_split_seed_and_limit_counts():
    first, same, other = (build_data(DataConfig(name="digits", split_seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.test.images, same.test.images)
    assert not torch.equal(first.test.images, other.test.images)
    assert len(build_data(DataConfig(name="digits", limit=100)).train) == 100
    without = build_data(DataConfig(name="digits", val_fraction=0))
    assert without.val is without.test


def test_in_memory_pictures_are_resized_on_request():
    bundle = build_data(DataConfig(name="digits", img_size=16, limit=50))
    assert bundle.input_size == (1, 16, 16)
    assert next(iter(bundle.loader("test", 4)))[0].shape == (4, 1, 16, 16)


def test_wrong_number_of_channel_statistics_is_a_clear_error():
    with pytest.raises(SteppingError, match=r"data\.mean.*1 values"):
        build_data(DataConfig(name="digits", mean=[0.1, 0.2, 0.3]))


def write_idx(path, array: np.ndarray) -> None:
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion_folder(tmp_path):
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 20)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", generator.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return tmp_path


def test_fashion_mnist_is_read_from_idx_files(fashion_folder):
    bundle = build_data(DataConfig(name="fashion_mnist", root=str(fashion_folder)))
    assert (len(bundle.train), len(bundle.val), len(bundle.test)) == (50, 10, 20)
    assert bundle.input_size == (1, 28, 28) and bundle.num_classes == 10
    raw = gzip.decompress((fashion_folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    assert bundle.test.images.numpy().tobytes() == raw
    assert bundle.test.labels.tolist() == [index % 10 for index in range(20)]


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path):
    with pytest.raises(SteppingError, match=r"apt-get install dataset-fashion-mnist.*data\.root"):
        build_data(DataConfig(name="fashion_mnist", root=str(tmp_path)))


@pytest.mark.parametrize("damage", [lambda b: b[:300], lambda b: b"junk", lambda b: gzip.compress(b"\0\0\x08\x03\0")])
def test_damaged_idx_files_are_clear_errors(fashion_folder, damage):
    path = fashion_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SteppingError, match="damaged idx file"):
        build_data(DataConfig(name="fashion_mnist", root=str(fashion_folder)))


def test_empty_idx_files_are_a_clear_error(fashion_folder):
    write_idx(fashion_folder / "t10k-images-idx3-ubyte.gz", np.zeros((0, 28, 28)))
    write_idx(fashion_folder / "t10k-labels-idx1-ubyte.gz", np.zeros(0))
    with pytest.raises(SteppingError, match="'fashion_mnist' is empty"):
        build_data(DataConfig(name="fashion_mnist", root=str(fashion_folder)))


@pytest.fixture
def image_folder(tmp_path):
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog", "owl"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_image_folders_are_reproducible_in_any_process(image_folder, workers):
    cfg = DataConfig(name="imagefolder", root=str(image_folder), img_size=32, workers=workers, val_fraction=0.25)
    bundle = build_data(cfg)
    assert (bundle.num_classes, bundle.input_size) == (3, (3, 32, 32))
    assert len(bundle.train) + len(bundle.val) == 18 and len(bundle.test) == 6
    reference = build_data(cfg.model_copy(update={"workers": 0})).loader("train", 4, seed=2)
    loader = bundle.loader("train", 4, seed=2)
    loader.set_epoch(1, step=1)
    reference.set_epoch(1)
    for (images, labels), (again, same) in zip(list(loader), list(reference)[1:], strict=True):
        assert torch.equal(images, again) and torch.equal(labels, same)


def test_image_folders_take_size_and_statistics_from_the_model(image_folder):
    bundle = build_data(DataConfig(name="imagefolder", root=str(image_folder)), model_name="vit_tiny_patch16_384")
    assert bundle.img_size == 384 and bundle.mean == (0.5, 0.5, 0.5)


def test_broken_image_folders_are_clear_errors(image_folder, tmp_path):
    with pytest.raises(SteppingError, match=r"data\.root"):
        build_data(DataConfig(name="imagefolder"))
    with pytest.raises(SteppingError, match="no folder train/"):
        build_data(DataConfig(name="imagefolder", root=str(tmp_path / "nowhere")))
    (image_folder / "val" / "owl").rename(image_folder / "val" / "wolf")
    with pytest.raises(SteppingError, match=r"classes that .* lacks: wolf"):
        build_data(DataConfig(name="imagefolder", root=str(image_folder)))


def test_missing_torchvision_set_says_how_to_get_it(tmp_path):
    with pytest.raises(SteppingError, match=r"data\.root=FOLDER.*data\.download=true"):
        build_data(DataConfig(name="cifar10", root=str(tmp_path)))


@pytest.mark.parametrize("name", ["cifar10", "torch/cifar10"])
def test_torchvision_arrays_become_tensor_sets(name, monkeypatch):
    import timm.data

    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    fake = types.SimpleNamespace(data=pixels, targets=[index % 10 for index in range(30)])
    fake_type = type("Fake", (types.SimpleNamespace,), {"__len__": lambda s: 30, "__getitem__": lambda s, i: None})
    monkeypatch.setattr(timm.data, "create_dataset", lambda *a, **k: fake_type(**vars(fake)))
    bundle = build_data(DataConfig(name=name))
    assert bundle.input_size == (3, 32, 32) and bundle.num_classes == 10
    assert torch.equal(bundle.test.images[3], torch.from_numpy(pixels[3]).permute(2, 0, 1))
    assert bundle.train.augment == Augment(4, 0.5)


def test_sklearn_is_imported_only_for_digits(fashion_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    build_data(DataConfig(name="fashion_mnist", root=str(fashion_folder)))
