"""Real networks whose result is not one vector of class scores, small images, random weights (float64)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import timm
import torch
from nets import images, nested, randomise, relative
from torch import Tensor, nn
from torchvision.models import detection, googlenet, inception_v3, segmentation

from stepping_plugin import verify
from stepping_plugin.graph.structure import map_tensors, tensors_of
from stepping_plugin.studies.coverage.executed import executed_macs

N = 3


class Dense(nn.Module):
    """What a torchvision detector computes before anchors are decoded and boxes suppressed."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, x: Tensor) -> dict[str, object]:
        pyramid = self.backbone(x)
        return {"features": pyramid, "predictions": self.head(list(pyramid.values()))}


def fresh(make: Callable[..., nn.Module], **options) -> nn.Module:
    known = inspect.signature(make).parameters
    weights = {name: None for name in ("weights", "weights_backbone") if name in known}
    return make(**weights, num_classes=4, **options)


def distilled() -> nn.Module:
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=3, num_classes=6)
    model.set_distilled_training(True)  # two vectors of scores in train mode
    return model


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "fcn": (lambda: fresh(segmentation.fcn_resnet50, aux_loss=True), 64),
    "deeplab": (lambda: fresh(segmentation.deeplabv3_mobilenet_v3_large, aux_loss=True), 64),
    "lraspp": (lambda: fresh(segmentation.lraspp_mobilenet_v3_large), 64),
    "retinanet": (lambda: Dense(fresh(detection.retinanet_resnet50_fpn)), 64),
    "fcos": (lambda: Dense(fresh(detection.fcos_resnet50_fpn)), 64),
    "ssdlite": (lambda: Dense(fresh(detection.ssdlite320_mobilenet_v3_large)), 96),
    "faster rcnn": (lambda: Dense(fresh(detection.fasterrcnn_mobilenet_v3_large_320_fpn)), 64),
    "googlenet": (lambda: fresh(googlenet, init_weights=False), 64),
    "inception": (lambda: fresh(inception_v3, init_weights=False), 299),
    "distilled": (distilled, 64),
}
BACKBONES = {
    "resnet10t": 64, "vgg11_bn": 64, "mobilenetv3_small_050": 64, "efficientnet_lite0": 64, "regnetx_002": 64,
    "convnext_atto": 64, "ghostnet_050": 64, "hrnet_w18_small": 64, "pvt_v2_b0": 64, "mambaout_femto": 64,
    "repvgg_a0": 64, "densenet121": 64,
}  # fmt: skip


def check(model: nn.Module, side: int) -> None:
    size = (3, side, side)
    model, x = randomise(model).double().eval(), images((3, side, side), 2)
    whole = nested(model, N, None, size)
    for training in (False, True):
        original, net = copy.deepcopy(model).train(training), copy.deepcopy(whole).train(training)
        torch.manual_seed(1)
        expected = original(x)
        torch.manual_seed(1)
        got = map_tensors(lambda t: t[-1], net.forward_all(x))
        assert type(got) is type(expected)
        for a, b in zip(tensors_of(got), tensors_of(expected), strict=True):
            assert relative(a.double(), b.double()) < 1e-9
    net = nested(model, N, 0, size)
    report = verify(net, x)
    assert min(report.response) > 1e-9 and len(report.engine_error) == N
    engine = net.deploy()
    assert executed_macs(engine, x[:1]) == engine.macs == net.macs


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_networks_with_other_outputs(name):
    torch.manual_seed(0)
    check(NETS[name][0](), NETS[name][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_feature_maps_of_backbones(name):
    torch.manual_seed(0)
    check(timm.create_model(name, features_only=True), BACKBONES[name])
