"""What a slip of the hand passes: one clear error that says what was expected."""

from __future__ import annotations

import copy

import pytest
import torch
from small_nets import loader, small_model, small_net

from stepping_plugin import SteppingError, apply_steppingnet, verify
from stepping_plugin.training.loop import fit


@pytest.fixture(scope="module")
def net():
    return small_net()


def broken_model():
    model = small_model()
    with torch.no_grad():
        model[3].bias[2] = float("nan")
    return model


SLIPS = {
    "a plain model to verify": (lambda net, _: verify(small_model()), "net: wrong type.*Sequential.*SteppingNet"),
    "a name for the original": (
        lambda net, _: net.reconstruct("resnet18", torch.rand(4, *net.analysis.image_size)),
        "original: wrong type.*str",
    ),
    "words for levels": (lambda net, _: net.set_levels("all"), "levels: wrong type.*str"),
    "nothing to measure": (lambda net, _: net.measure([]), "measure: no images"),
    "a file for a folder": (
        lambda net, path: fit(copy.deepcopy(net), loader(), checkpoint_dir=path, progress=False),
        "checkpoint_dir: a file, not a folder",
    ),
    "a net for a model": (
        lambda net, _: apply_steppingnet(net, [0.5], example_inputs=torch.rand(1, *net.analysis.image_size)),
        "model: a SteppingNet already",
    ),
    "NaN among the weights": (
        lambda net, _: apply_steppingnet(broken_model(), [0.5], example_inputs=torch.rand(1, 1, 6, 6)),
        r"3\.bias: weights that are not numbers",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slip(slip, net, tmp_path):
    (tmp_path / "file").write_text("")
    call, expected = SLIPS[slip]
    with pytest.raises(SteppingError, match=expected):
        call(net, tmp_path / "file")
