"""`expansion: auto`: the least widening with which the last budget can be used up."""

import pytest
import torch
from nets import make

from stepping_plugin import BudgetError, ConstructionConfig, SteppingError, apply_steppingnet
from stepping_plugin.construction.expansion import STEP, least_expansion
from stepping_plugin.construction.start import convert
from stepping_plugin.units.levels import parse_budgets
from stepping_plugin.units.macs import MacModel
from stepping_plugin.units.witness import find_units

MODELS = ["vgg_tiny", "resnet_tiny", "vit_pico", "test_convnext", "mobilenetv3_small_050"]
BUDGETS = ["10%", "30%", "50%", "85%"]


def build(name: str) -> torch.nn.Module:
    return make(name).eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_last_budget_is_used_up_and_with_much_less_it_is_not(name):
    model = build(name)
    size = tuple(model.default_cfg["input_size"])
    x = torch.zeros(1, *size)
    net = apply_steppingnet(model, BUDGETS, example_inputs=x)
    assert all(0.97 * budget <= macs <= budget for macs, budget in zip(net.macs, net.budgets))
    less = least_expansion(find_units(model, size), net.budgets) - 3 * STEP  # there is room for rounding in it
    narrow = apply_steppingnet(model, BUDGETS, example_inputs=x, config=ConstructionConfig(expansion=max(1.0, less)))
    assert narrow.macs[-1] < 0.97 * narrow.budgets[-1]


def test_what_needs_no_widening_gets_none():
    model = build("vgg_tiny")
    net = apply_steppingnet(model, ["10%", "25%", "60%"], example_inputs=torch.zeros(1, 3, 32, 32))
    assert net.lineage == [] and net.analysis.num_units == find_units(model, (3, 32, 32)).num_units


def test_the_widened_start_is_the_original_function():
    model, x = build("resnet_tiny").double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    net = convert(model, BUDGETS, ConstructionConfig(), x).eval()
    assert net.macs[-1] > 1.2 * net.reference_macs and "widened by" in " ".join(net.notes)
    torch.testing.assert_close(net.forward_all(x)[-1], model(x), rtol=1e-9, atol=1e-9)


def test_fractions_stay_fractions_of_the_original():
    model = build("resnet_tiny")
    reference = MacModel(find_units(model, (3, 32, 32))).total
    net = apply_steppingnet(model, BUDGETS, example_inputs=torch.zeros(1, 3, 32, 32))
    assert net.reference_macs == reference and net.budgets == parse_budgets(BUDGETS, reference)
    with pytest.raises(BudgetError):  # only a number of one's own allows more than the original
        apply_steppingnet(model, [0.1, 2 * reference], example_inputs=torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("value", ["automatic", 0.5, 17, float("nan"), True])
def test_other_values_are_refused(value):
    with pytest.raises(SteppingError, match="expansion"):
        ConstructionConfig(expansion=value)
