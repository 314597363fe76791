"""The networks that the package registers with timm: shapes, timm's conventions, and independent MACs."""

import pytest
import timm
import torch
from torch import nn

import stepping_plugin.integrations.timm  # noqa: F401 (registers the models)
from stepping_plugin.errors import SteppingError

CASES = [
    ("lenet3c1l", {}),
    ("lenet3c1l", {"img_size": 24, "in_chans": 1, "width_mult": 0.5, "num_classes": 7}),
    ("lenet5", {}),
    ("lenet5", {"img_size": 28, "in_chans": 1, "width_mult": 2.0}),
    ("vgg16_cifar", {"width_mult": 0.125}),
    ("resnet_tiny", {"in_chans": 1, "img_size": 28}),
    ("digits_net", {}),
]


def macs_by_hooks(model: nn.Module, images: torch.Tensor) -> int:
    """MACs per image: output positions times the size of one filter, for every conv and linear."""
    total = 0

    def count(module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model.eval()(images)
    return total


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_follows_timms_conventions(name, kwargs):
    model = timm.create_model(name, **kwargs).eval()
    size = model.default_cfg["input_size"]
    assert size[0] == kwargs.get("in_chans", size[0]) and size[1] == kwargs.get("img_size", size[1])
    assert len(model.default_cfg["mean"]) == len(model.default_cfg["std"]) == size[0]
    images = torch.randn(2, *size)
    features = model.forward_features(images)
    logits = model(images)
    assert features.shape[1] == model.num_features
    assert logits.shape == (2, model.num_classes)
    assert model.num_classes == model.default_cfg["num_classes"] == kwargs.get("num_classes", model.num_classes)
    torch.testing.assert_close(model.forward_head(features), logits)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.get_classifier() is model.get_submodule(model.default_cfg["classifier"])
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == size[0]
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert model(images).shape == (2, model.head_hidden_size)


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_trains(name, kwargs):
    model = timm.create_model(name, **kwargs)
    model(torch.randn(2, *model.default_cfg["input_size"])).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_lenet3c1l_is_the_network_of_the_any_width_paper():
    model = timm.create_model("lenet3c1l")
    n, images = 32, torch.randn(1, 3, 32, 32)
    by_hand = 30 * 30 * n * 27 + 28 * 28 * n * 9 * n + 10 * 10 * n * 25 * n + n * 25 * 10
    assert by_hand == 10_570_944
    assert macs_by_hooks(model, images) == by_hand
    assert sum(parameter.numel() for parameter in model.parameters()) == 43_978
    assert all(m.bias is not None for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def test_expansion_widens_every_layer_but_the_last():
    wide = timm.create_model("lenet3c1l", width_mult=1.8)
    assert [m.out_channels for m in wide.modules() if isinstance(m, nn.Conv2d)] == [58, 58, 58]
    assert wide.fc.out_features == 10


def test_lenet5_widths_and_macs():
    model = timm.create_model("lenet5")
    by_hand = 28 * 28 * 6 * 75 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
    assert macs_by_hooks(model, torch.randn(1, 3, 32, 32)) == by_hand
    padded = timm.create_model("lenet5", img_size=28, in_chans=1)
    assert padded.fc1.in_features == model.fc1.in_features == 400


def test_vgg16_has_13_convs_and_2_linears():
    model = timm.create_model("vgg16_cifar", width_mult=0.25)
    kinds = [type(m) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert kinds == [nn.Conv2d] * 13 + [nn.Linear] * 2
    assert model.fc.out_features == 100


def test_too_small_images_and_absent_weights_are_clear_errors():
    with pytest.raises(SteppingError, match=r"img_size 12x12.*16x16"):
        timm.create_model("lenet5", img_size=12)
    with pytest.raises(SteppingError, match="no pretrained weights"):
        timm.create_model("lenet3c1l", pretrained=True)
