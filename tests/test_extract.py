"""Subnets cut out: the same scores, and the MACs that are reported, by counters of what is executed."""

import io

import pytest
import torch
from nets import images, make, nested
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepping_plugin.errors import SteppingError
from stepping_plugin.integrations.fvcore import count_macs
from stepping_plugin.views.named import equal_levels
from stepping_plugin.views.summary import human_macs

LAYERS = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.bmm)  # sums of prefix norms are mm, addmm_
FAMILIES = ["test_resnet", "test_vit", "test_convnext2", "test_efficientnet"]


@pytest.fixture(scope="module")
def models():
    return {name: make(name) for name in FAMILIES}


@pytest.mark.parametrize("seed", [2, None])
@pytest.mark.parametrize("name", FAMILIES)
def test_extracted_subnets_execute_what_is_reported(models, name, seed):
    """With equal shares of all widths every unit matters; random levels leave units that only larger subnets need."""
    net = nested(models[name], seed=seed).eval()
    if seed is None:
        net.set_levels(equal_levels(net.analysis, 4))
    x = images(net.analysis.image_size, 2)
    with torch.no_grad():
        expected = net.forward_all(x)
        for i in range(1, 5):
            exact, dense = net.extract(i, exact=True), net.extract(i)
            for module in (exact, dense):
                torch.testing.assert_close(module(x), expected[i - 1], rtol=1e-9, atol=1e-9)
            assert count_macs(exact, (x[:1],)).total == exact.macs
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                dense(x[:1])
            assert sum(counter.get_flop_counts()["Global"].get(o, 0) for o in LAYERS) == 2 * net.dense_macs[i - 1]
            assert exact.macs == net.macs[i - 1] if seed is None else exact.macs <= net.macs[i - 1]
    assert net.macs[3] < net.dense_macs[3]


def test_exact_subnets_are_ordinary_modules(models):
    net = nested(models["test_resnet"], seed=2).eval()
    exact, x = net.extract(2, exact=True), images(net.analysis.image_size, 3)
    program = torch.export.export(exact, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    torch.testing.assert_close(program.module()(x[:2]), exact(x[:2]))
    content = io.BytesIO()
    torch.save(exact.state_dict(), content)
    other = net.extract(2, exact=True)
    other.load_state_dict(torch.load(io.BytesIO(content.getvalue()), weights_only=True))
    assert torch.equal(other(x), exact(x)) and not list(exact.parameters())
    assert exact.float()(x.float()).dtype == torch.float32
    with pytest.raises(SteppingError, match="image"):
        exact(x[..., 1:])


def test_summary_has_both_numbers(models):
    net = nested(models["test_resnet"], seed=2).eval()
    console = Console(file=io.StringIO(), width=160)
    console.print(net.summary())
    text = console.file.getvalue()
    assert "extract(i)" in text and "exact=True" in text and human_macs(net.dense_macs[3]) in text
