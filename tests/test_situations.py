"""Situations from public reports: conversion is exact in both modes, nested, and costs what it executes, or refused."""

import pytest
import situations as models
import torch
import torchvision
from nets import random_levels, relative
from torch import nn
from torch.nn import functional as F

from stepping_plugin import BudgetError, CaptureError, apply_steppingnet, inspect_model, verify
from stepping_plugin.construction.widening import widen
from stepping_plugin.graph.program import copy_model
from stepping_plugin.net import SteppingNet
from stepping_plugin.studies.coverage.executed import executed_macs
from stepping_plugin.units.analysis import analyse

SIZE = (3, 16, 16)
BETWEEN = {  # operators between two layers: channels stay apart
    "sum over channels": lambda x: x * x.sum(1, keepdim=True).sigmoid(),
    "sum of squares": lambda x: x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10),
    "L1 norm": lambda x: F.normalize(x, p=1, dim=1),
    "largest magnitude": lambda x: x / x.norm(p=float("inf"), dim=1, keepdim=True),
    "log of sums": lambda x: x - x.logsumexp(1, keepdim=True),
    "softmax": lambda x: x * x.softmax(1) - x.log_softmax(1),
    "softmax by hand": lambda x: x.exp() / x.exp().sum(1, keepdim=True),
    "einsum of one": lambda x: x * torch.einsum("bchw->bhw", x).unsqueeze(1).sigmoid(),
    "max of two": lambda x: torch.max(x, x.flip(3)) + torch.min(x, x.flip(2)),
    "other pointwise": lambda x: torch.hypot(x, x.flip(3)) + torch.logaddexp(x, x.flip(2)) + torch.fmax(x, -x).erfc(),
    "fft over space": lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:]),
    "fft shifted": lambda x: torch.fft.ifftn(
        torch.fft.fftshift(torch.fft.fftn(x, dim=(2, 3)), dim=(2, 3)), s=(8, 8)
    ).abs(),
    "amplitude and phase": models.amplitude_and_phase,
    "long convolution": models.long_convolution,
    "coordinates": models.coordinates,
    "split of the batch": lambda x: sum(torch.cat([x, x.flip(3)]).split(x.shape[0])),
    "chunks of the batch": lambda x: torch.stack(torch.cat([x, x.flip(3), x.flip(2)]).chunk(3)).amax(0),
    "slices of the batch": lambda x: (lambda y: y[: x.shape[0]] * y[x.shape[0] :])(torch.cat([x, x.flip(3)])),
    "dropout in place": nn.Dropout(0.3, inplace=True),
    "dropout of channels in place": nn.Dropout2d(0.3, inplace=True),
    "alpha dropout": nn.AlphaDropout(0.3),
    "alpha dropout of channels": nn.FeatureAlphaDropout(0.3),
    "random slopes": nn.RReLU(),
}
MODELS = {  # name: (model, pinned channels)
    "siamese": (models.Siamese, 0),
    "two views": (models.TwoViews, 0),
    "state read thrice": (models.Spectral, 0),
    "LSTM cell": (lambda: models.Cells(nn.LSTMCell(8, 6)), 0),
    "LSTM cell, zeros": (lambda: models.Cells(nn.LSTMCell(8, 6), True), 0),
    "GRU cell": (lambda: models.Cells(nn.GRUCell(8, 6)), 0),
    "plain cell, zeros": (lambda: models.Cells(nn.RNNCell(8, 6, nonlinearity="relu"), True), 0),
    "own cell": (lambda: models.OwnCell(False), 0),
    "own cell, learned": (lambda: models.OwnCell(True), 0),
    "ConvLSTM": (models.ConvLstm, 0),
    "coarse to fine": (models.Coarse, 0),
    "coarse to fine, hidden": (lambda: models.Coarse(hidden=True), 0),
    "fine only": (lambda: models.Coarse(both=False), 0),
    "scores refined": (models.Refined, 0),
    "global filter": (models.GlobalFilter, 0),
    "Fourier unit": (models.FourierUnit, 0),
    "mask": (models.Masked, 1),
    "upwards": (models.Upwards, 0),
    "chunks": (models.Cross, 0),
    "spatial transformer": (models.Transformer, 6),
    "deep spatial transformer": (models.DeepTransformer, 6),
    "sorted": (models.Selected, 6),
    "spatial gate": (models.SpatialGate, 0),
    "deformable": (models.Deformable, 26),
    "kernel per picture": (models.PerSample, 72),
}
CASES = {**{name: (lambda op=op: models.Body(op), 0) for name, op in BETWEEN.items()}, **MODELS}


def ready(make) -> nn.Module:
    torch.manual_seed(0)
    return make().double().eval()


@pytest.mark.parametrize("name", CASES)
def test_situation(name):
    make, pinned = CASES[name]
    model, size = ready(make), (6, 16, 16) if name in ("siamese", "two views") else SIZE
    analysis = analyse(copy_model(model), size)
    assert analysis.pinned_channels == pinned == sum(analysis.pins.values())
    levels = torch.ones(analysis.num_units).long()
    net = SteppingNet(copy_model(model), analysis, levels, [1, 2, 3], 1).eval()
    x = torch.randn(3, *size, dtype=torch.float64)
    with torch.no_grad():
        assert relative(net.forward_all(x)[0], model(x.clone())) < 1e-12
        torch.manual_seed(1)
        expected = model.train()(x.clone())
        torch.manual_seed(1)
        assert relative(net.train().forward_all(x.clone())[0], expected) < 1e-12
    buffers = dict(net.model.named_buffers())
    assert all(relative(buffers[k], b) < 1e-12 for k, b in model.named_buffers())
    net.eval()
    for seed in (0, 1) if name in MODELS else (0,):
        net.set_levels(random_levels(analysis, 3, seed))
        report = verify(net, x)
        assert max(report.leak) == 0 and max(report.extract_error + report.engine_error) < 1e-12
        engine = net.deploy()
        assert executed_macs(engine, x[:1]) == engine.macs == net.macs
    wide = widen(copy_model(model), analysis, 1.5)
    net = SteppingNet(wide.model, wide.analysis, torch.ones(wide.analysis.num_units).long(), [1, 2], 1).eval()
    with torch.no_grad():
        assert relative(net.forward_all(x)[0], model.eval()(x.clone())) < 1e-12
    net.set_levels(random_levels(wide.analysis, 2, 0))
    report = verify(net, x)
    assert max(report.leak) == 0 and max(report.extract_error + report.engine_error) < 1e-12
    assert net.deploy().macs == net.macs


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0"])
def test_torchvision_with_its_dropout(name):
    """`nn.Dropout(p, inplace=True)` before the classifier, in train mode."""
    model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    assert analyse(model, (3, 32, 32)).pinned_channels == 0


@pytest.mark.parametrize("policy", ["steppingnet", "any-width", "random"])
@pytest.mark.parametrize("kind", [models.Transformer, models.DeepTransformer, models.Selected])
def test_units_that_only_pinned_channels_read_are_in_subnet_1_or_in_none(kind, policy):
    """Executed is reported, and the budgets go to what larger subnets can use."""
    model = ready(kind)
    net = apply_steppingnet(model, ["55%", "75%", "95%"], example_inputs=torch.zeros(1, *SIZE), policy=policy)
    dead = net.analysis.dead_ends
    assert dead.any() and not dead.all() and set(net.levels[dead].tolist()) <= {1, 4}
    assert executed_macs(net.deploy(), torch.zeros(1, *SIZE).double()) == net.macs
    assert all(m <= b for m, b in zip(net.macs, net.budgets))
    assert net.macs[0] < net.macs[1] < net.macs[2]
    assert any("Only pinned channels read" in note for note in net.notes)


@pytest.mark.parametrize(
    ("kind", "operator", "channels"),
    [
        (models.Deformable, "deform_conv2d in bend", 26),
        (models.PerSample, "conv2d in", 72),
        (models.Bilinear, "bmm in", 8),
    ],
)
def test_budgets_that_pins_make_impossible_name_them(kind, operator, channels):
    model, image = ready(kind), torch.zeros(1, *SIZE)
    with pytest.raises(BudgetError) as caught:
        apply_steppingnet(model, ["10%", "60%"], example_inputs=image)
    text = str(caught.value)
    assert f"{channels} channels by {operator}" in text and "one unit in every layer" not in text
    assert "inspect_model(model, example_inputs=images)" in text
    facts = inspect_model(model, example_inputs=image)
    assert sum(pin["channels"] for pin in facts["pins"]) == facts["pinned_channels"] == channels


def test_what_cannot_be_is_refused_with_its_line():
    with pytest.raises(CaptureError, match=r"takes a part of the batch.*treat all pictures alike") as caught:
        apply_steppingnet(ready(models.Ghost), ["50%"], example_inputs=torch.zeros(1, *SIZE))
    assert "situations.py:" in str(caught.value) and "# here" in str(caught.value)


def test_scores_per_time_step():
    """(time, B, classes): an output like any other; the batch is found where it is."""
    model = ready(models.Sequence)
    analysis = analyse(copy_model(model), SIZE)
    net = SteppingNet(copy_model(model), analysis, random_levels(analysis, 2, 0), [1, 2], 1).eval()
    x = torch.randn(3, *SIZE, dtype=torch.float64)
    assert net.forward_all(x).shape == (2, 16, 3, 4)
    report = verify(net, x)
    assert max(report.leak) == 0 and max(report.extract_error + report.engine_error) < 1e-12
