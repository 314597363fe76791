"""The functions that running steps call: whichever kernel they choose, they compute what the plain operator does."""

import pytest
import torch
from nets import relative
from torch.utils.flop_counter import FlopCounterMode

from stepping_plugin.engine import fast

aten = torch.ops.aten
ONE_DNN = torch.backends.mkldnn.is_available()
ACTIVATIONS = {"none": None, "gelu": aten.gelu.default, "relu": aten.relu.default}


@pytest.mark.skipif(not ONE_DNN, reason="PyTorch without oneDNN")
@pytest.mark.parametrize("limits", [(1, 1), (10**9, 10**9), (1, 10**9)], ids=["apart", "BLAS", "oneDNN"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [(24,), (16, 8), (5, 12, 7)])
@pytest.mark.parametrize("outputs", [3, 40])
@pytest.mark.parametrize("kind", ["linear", "pointwise"])
def test_products_of_slices_side_by_side(monkeypatch, kind, outputs, widths, activation, limits):
    monkeypatch.setattr(fast, "_MANY_NUMBERS", limits[0])
    for name in ("_MANY_ROWS", "_MANY_MACS", "_MANY_MACS_ACTIVE"):
        monkeypatch.setattr(fast, name, limits[1])
    torch.manual_seed(0)
    weight, bias, x = torch.randn(outputs, 24), torch.randn(outputs), torch.randn(2, 5, 6, 24)
    target = ACTIVATIONS[activation]
    given = target and fast.Activation(target)
    run = getattr(fast, kind)(weight, bias, given, True, len(widths))
    parts = x.split(widths, -1) if kind == "linear" else x.permute(0, 3, 1, 2).split(widths, 1)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        results = [run(*(part.clone() for part in parts)) for _ in range(2)]
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    expected = target(expected) if target else expected
    for result in results:
        laid_out = result if kind == "linear" else result.permute(0, 2, 3, 1)
        assert laid_out.shape == expected.shape and relative(laid_out.double(), expected) < 1e-5
    assert counter.get_total_flops() == 2 * 2 * 2 * 5 * 6 * 24 * outputs
