"""How much of a picture crops show, against pictures whose pixels are counted; resizes; turns."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from stepping_plugin.runs.data import build_data
from stepping_plugin.runs.data.crops import shown_by_evaluation, shown_by_training
from stepping_plugin.runs.recipe_schema import DataConfig


@pytest.fixture
def wide_photos(tmp_path):
    """16 pictures of 96 x 64: red on the left, blue on the right, grey between."""
    for number in range(16):
        place = tmp_path / ("train" if number < 12 else "test") / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((64, 96, 3), 128, np.uint8)
        pixels[:, :8] = (255, 0, 0)
        pixels[:, -8:] = (0, 0, 255)
        Image.fromarray(pixels).save(place)
    return tmp_path


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("size", [(400, 300), (300, 400), (256, 256)])
def test_share_of_evaluation_crops_is_what_timm_leaves_of_a_gradient(size, crop_pct, crop_mode):
    """Pixels that are left, in units of the original ones: range of a horizontal times that of a vertical gradient."""
    width, height = size
    across = np.broadcast_to(np.linspace(1, 255, width, dtype=np.float32), (height, width))
    down = np.broadcast_to(np.linspace(1, 255, height, dtype=np.float32)[:, None], (height, width))
    cut = create_transform(
        64, crop_pct=crop_pct, crop_mode=crop_mode, interpolation="nearest", normalize=False, mean=(0,)
    )
    share = 1.0
    for gradient in (across, down):
        left = cut(Image.fromarray(gradient.astype(np.uint8), "L"))
        seen = left[left > 0].float()  # 0: border
        share *= float(seen.max() - seen.min()) / 254
    assert shown_by_evaluation([size], 64, crop_pct, crop_mode)[0] == pytest.approx(share, abs=0.06)


def test_random_crops_show_areas_between_their_bounds():
    shown = shown_by_training([(100, 100)] * 20)
    assert 0.07 < shown.min() < 0.17 and shown.max() <= 1 and shown.mean() == pytest.approx(0.54, abs=0.04)
    assert np.array_equal(shown, shown_by_training([(100, 100)] * 20))


def test_crops_that_cut_much_away_are_told_with_numbers(wide_photos):
    said = []
    keys = {"name": "imagefolder", "root": str(wide_photos), "img_size": 32}
    warnings = lambda **more: [text.split(" show")[0] for text in build_data(DataConfig(**keys, **more)).warnings]  # noqa: E731
    build_data(DataConfig(**keys), "resnet18", say=said.append)
    training, evaluation = (text for text in said if text.startswith("warning: "))
    assert "training crops show" in training and "[0.08, 1.0]" in training
    assert "crops show 60% of a picture" in evaluation and "96 x 64" in evaluation  # 0.95 ** 2 * 64 / 96
    assert warnings(scale=[0.5, 1.0], crop_pct=0.9) == []
    assert warnings(train_crop_mode="rkrc", crop_mode="border") == []
    assert warnings(in_memory=True) == ["validation and test crops"]  # 64 / 96
    assert warnings(in_memory=True, crop_mode="squash") == []


def test_keep_aspect_and_squash_show_both_ends(wide_photos):
    for crop_mode, both in (("center", False), ("squash", True), ("border", True)):
        for in_memory in (False, True):
            cfg = DataConfig(name="imagefolder", root=str(wide_photos), img_size=32, crop_pct=1.0, crop_mode=crop_mode,
                             in_memory=in_memory, mean=[0, 0, 0], std=[1, 1, 1], workers=0)  # fmt: skip
            images, _ = next(iter(build_data(cfg).loader("test", 1)))
            red, blue = images[0, 0] - images[0, 1], images[0, 2] - images[0, 1]
            assert (float(red.max()) > 0.7 and float(blue.max()) > 0.7) == both, (crop_mode, in_memory)


def test_turned_pictures_get_the_mean_in_their_corners_and_vflip_turns_over(wide_photos):
    keys = {"name": "imagefolder", "root": str(wide_photos), "img_size": 32, "scale": [1, 1], "color_jitter": 0.0}
    cfg = DataConfig(**keys, workers=0, rotation=180, mean=[0.2] * 3, std=[1] * 3)
    images = torch.cat([images for images, _ in build_data(cfg).loader("train", 5)])
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.abs() < 0.01).all(1).any() and images.std() > 0.1
    diagonal = Image.fromarray(np.eye(8, dtype=np.uint8) * 200).convert("RGB")
    plain, turned = (build_data(DataConfig(**keys, hflip=0, vflip=v)).train.transform(diagonal)[0] for v in (0.0, 1.0))
    assert (turned.flip(0) - plain).abs().mean() < 0.5 * (turned - plain).abs().mean()
