"""Grey pictures, pictures of many channels, 16 bits: the numbers of the file, on disk as in memory."""

import numpy as np
import pytest
import torch
from PIL import Image

from stepping_plugin.errors import SteppingError
from stepping_plugin.runs.data import build_data
from stepping_plugin.runs.data.channels import as_channels, open_file
from stepping_plugin.runs.recipe_schema import DataConfig

SIZE = 8


def save(array: np.ndarray, path, kind: str) -> None:
    """Write (H, W, C) bytes so that a reader can find them again."""
    if kind == "npy":
        np.save(path.with_suffix(".npy"), array)
    elif kind == "pages":
        first, *others = [Image.fromarray(array[..., channel]) for channel in range(array.shape[-1])]
        first.save(path.with_suffix(".tif"), save_all=True, append_images=others)
    else:
        modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
        Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array, modes[array.shape[-1]]).save(
            path.with_suffix(".png")
        )


@pytest.fixture(params=[(1, "png"), (2, "png"), (4, "png"), (5, "npy"), (3, "pages"), (6, "pages"), (1, "npy")])
def pictures(request, tmp_path):
    channels, kind = request.param
    generator = np.random.default_rng(0)
    arrays = generator.integers(0, 256, (8, SIZE, SIZE, channels), dtype=np.uint8)
    for number, array in enumerate(arrays):
        place = tmp_path / ("train" if number < 6 else "test") / "ab"[number % 2] / str(number)
        place.parent.mkdir(parents=True, exist_ok=True)
        save(array, place, kind)
    return tmp_path, channels, torch.from_numpy(arrays).permute(0, 3, 1, 2)


def test_channels_are_those_of_the_files(pictures):
    root, channels, arrays = pictures
    keys = {"root": str(root), "in_chans": channels, "img_size": SIZE, "workers": 0}
    memory = build_data(DataConfig(name="imagefolder", in_memory=True, **keys))
    assert torch.equal(memory.test.images, arrays[6:]) and memory.in_chans == channels
    norm = {"mean": [0.5] * channels, "std": [0.25] * channels}
    disk = build_data(DataConfig(name="imagefolder", crop_pct=1, **norm, **keys))
    images, _ = next(iter(disk.loader("test", 4)))
    torch.testing.assert_close(images, (arrays[6:] / 255 - 0.5) / 0.25)
    for augmented, _ in disk.loader("train", 2):
        assert augmented.shape == (2, channels, SIZE, SIZE) and augmented.isfinite().all()
    default = build_data(DataConfig(name="imagefolder", **keys), "resnet18")
    assert len(default.mean) == len(default.std) == channels
    assert channels == 3 or default.mean[0] == pytest.approx((0.485 + 0.456 + 0.406) / 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("high", [2**8, 2**16])
def test_sixteen_bits_become_eight_of_the_same_brightness(tmp_path, channels, high):
    """Pillow's own conversion makes everything above 255 white."""
    wide = np.random.default_rng(0).integers(0, high, (SIZE, SIZE)).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "x.png")
    found = as_channels(open_file(str(tmp_path / "x.png")), channels, "x")
    assert np.array_equal(np.asarray(found).reshape(SIZE, SIZE, -1)[..., 0], wide >> 8)


def test_wrong_channels_and_numbers_are_errors_with_the_file(tmp_path):
    make = lambda array: (np.save(tmp_path / "x.npy", array), open_file(str(tmp_path / "x.npy")))[1]  # noqa: E731
    for array, channels in ((np.zeros((4, 4, 5), np.uint8), 4), (np.zeros((4,), np.uint8), 1)):
        with pytest.raises(SteppingError, match=rf"x: wrong number of channels.*\(H, W, {channels}\)"):
            as_channels(make(array), channels, "x")
    with pytest.raises(SteppingError, match="x: numbers of another kind; got float64"):
        as_channels(make(np.zeros((4, 4))), 1, "x")
    with pytest.raises(SteppingError, match="wrong number of channels"):  # no alpha is invented
        as_channels(Image.new("RGB", (4, 4)), 4, "x")


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4", "original-mstd0.5"])
def test_grey_pictures_are_augmented(tmp_path, aa):
    for number in range(8):
        place = tmp_path / ("train" if number < 6 else "test") / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((SIZE, SIZE), 50).save(place)
    keys = {"root": str(tmp_path), "in_chans": 1, "img_size": SIZE, "workers": 0, "aa": aa, "reprob": 0.5}
    loader = build_data(DataConfig(name="imagefolder", val_fraction=0, **keys)).loader("train", 6)
    assert all(images.shape == (6, 1, SIZE, SIZE) for _ in range(10) for images, _ in loader)
