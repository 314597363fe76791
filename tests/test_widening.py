"""Widening keeps the function, grows every width as asked, and says where it cannot."""

from __future__ import annotations

import functools

import nets
import pytest
import torch
from timm.layers import ScaledStdConv2d
from torch import nn

from stepping_plugin.construction.widening import copies_for, reinitialise, widen
from stepping_plugin.errors import SteppingError
from stepping_plugin.graph.labels import Role
from stepping_plugin.net import SteppingNet, load
from stepping_plugin.units.analysis import Analysis, analyse
from stepping_plugin.units.macs import MacModel
from stepping_plugin.units.witness import find_units
from stepping_plugin.verify import verify

# residual; depthwise with gates; attention; LayerNorm convolutions; plain convolutions and linears
MODELS = ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "lenet5", "digits_net"]


class Neighbours(nn.Module):
    """A gate from a convolution along the channels (ECA), and a mean over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.gate = nn.Conv1d(1, 1, 3, padding=1)
        self.extra = nn.Conv2d(12, 9, 1)
        self.hidden = nn.Conv2d(9, 10, 3)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3)).unsqueeze(1))).squeeze(1)[:, :, None, None]
        x = torch.tanh(self.hidden(torch.relu(self.extra(x))))
        x = x - x.mean(1, keepdim=True)
        return self.head(x.mean((2, 3)))


class Standardised(nn.Module):
    """A convolution with standardised weights between two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.standard = ScaledStdConv2d(12, 10, 3)
        self.hidden = nn.Conv2d(10, 8, 1)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.standard(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.last(torch.relu(self.hidden(x)))).mean((2, 3)))


OWN = {"plain": nets.Plain, "neighbours": Neighbours, "standardised": Standardised}


@functools.lru_cache
def analysed(name: str) -> tuple[nn.Module, Analysis]:
    if name in OWN:
        torch.manual_seed(0)
        model = OWN[name]().double().eval()
        return model, find_units(model, (3, 8, 8))
    model = nets.make(name, **({"img_size": 32} if name == "test_vit" else {}))
    return model, find_units(model, nets.image_size(model) if name == "digits_net" else (3, 32, 32))


def all_in_one(model: nn.Module, analysis: Analysis, n: int = 2) -> SteppingNet:
    ones = torch.ones(analysis.num_units, dtype=torch.long)
    return SteppingNet(model, analysis, ones, list(range(1, n + 1)), 1)


@pytest.mark.parametrize("factor, noise", [(1.8, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("name", [*MODELS, *OWN])
def test_the_wide_network_is_the_same_function(name, factor, noise):
    model, analysis = analysed(name)
    wide = widen(model, analysis, factor, noise=noise)
    x = nets.images(analysis.image_size)
    for training in (False, True):
        with torch.no_grad():
            expected = all_in_one(model, analysis).train(training).forward_all(x)
            got = all_in_one(wide.model, wide.analysis).train(training).forward_all(x)
        assert nets.relative(got, expected) < 1e-10
    assert wide.analysis.num_units == int(wide.copies.sum()) > analysis.num_units


@pytest.mark.parametrize("name", ["lenet5", "digits_net"])
def test_its_macs_are_those_of_the_model_built_that_wide(name):
    model, analysis = analysed(name)
    wide = widen(model, analysis, 1.8)
    built = analyse(nets.make(name, width_mult=1.8), analysis.image_size, modes=(False,))
    assert MacModel(wide.analysis).total == MacModel(built).total
    assert [len(g.units) for g in wide.analysis.groups] == [len(g.units) for g in built.groups]


def test_copies_are_spread_evenly_and_by_seed():
    _, analysis = analysed("test_resnet")
    copies, notes = copies_for(analysis, 2.3, torch.Generator().manual_seed(0))
    again, _ = copies_for(analysis, 2.3, torch.Generator().manual_seed(0))
    other, _ = copies_for(analysis, 2.3, torch.Generator().manual_seed(1))
    assert torch.equal(copies, again) and not torch.equal(copies, other) and not notes
    for group in analysis.groups:
        own = copies[group.units]
        assert int(own.sum()) == round(2.3 * len(own))
        assert set(own.tolist()) <= {2, 3}


def test_normalised_streams_grow_by_whole_factors():
    model, analysis = analysed("test_vit")
    norms = [n for n in analysis.eval_program.operators() if n.meta.get("role") == Role.PREFIX_NORM]
    stream = torch.unique(torch.cat([n.args[0].meta["units"] for n in norms]))
    for factor, expected in ((1.8, 1), (2.0, 2), (2.9, 2)):
        wide = widen(model, analysis, factor)
        assert set(wide.copies[stream].tolist()) == {expected}
        assert bool(wide.notes) == (factor != 2.0)
        assert wide.copies.max() == round(factor + 0.4999)  # hidden layers and heads do grow


def test_standardised_weights_stay_as_they_are():
    """Their copies would share one parameter, and the standardisation would undo their shares."""
    model, analysis = analysed("standardised")
    wide = widen(model, analysis, 2.0)
    assert {g.name: int(wide.copies[g.units].max()) for g in analysis.groups} == {
        "stem": 1, "standard": 1, "hidden": 2, "last": 2,
    }  # fmt: skip
    assert len(wide.notes) == 1 and "stem, standard" in wide.notes[0] and "transformed" in wide.notes[0]


def test_equal_shares_keep_copies_alike_and_unequal_ones_do_not():
    model, analysis = analysed("lenet5")
    x = nets.images(analysis.image_size)
    differences = {}
    for noise in (0.0, 0.2):
        wide = widen(model, analysis, 2.0, noise=noise)
        all_in_one(wide.model, wide.analysis).train().forward_all(x)[0].square().sum().backward()
        gradient = wide.model.fc2.weight.grad.reshape(84, 2, -1)  # copies lie side by side
        differences[noise] = float((gradient[:, 0] - gradient[:, 1]).abs().max() / gradient.abs().max())
    assert differences[0.0] < 1e-12 < 1e-3 < differences[0.2]


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "neighbours"])
def test_a_wide_network_nests(name):
    model, analysis = analysed(name)
    wide = widen(model, analysis, 2.0, noise=0.5)
    levels = nets.random_levels(wide.analysis, 3)
    verify(SteppingNet(wide.model, wide.analysis, levels, [1, 2, 3], 1).eval(), engine=False)


def test_a_wide_network_is_compacted_and_saved(tmp_path):
    model, analysis = analysed("digits_net")
    wide = widen(model, analysis, 1.8)
    levels = nets.random_levels(wide.analysis, 3, spare=True)
    net = SteppingNet(wide.model, wide.analysis, levels, [1, 2, 3], 1, lineage=[wide.copies]).eval()
    compact = net.compact()
    compact.save(tmp_path / "net.safetensors")
    read = load(tmp_path / "net.safetensors", model=model)
    x = nets.images(analysis.image_size)
    with torch.no_grad():
        assert nets.relative(compact.forward_all(x), net.forward_all(x)) < 1e-10
        assert torch.equal(read.forward_all(x), compact.forward_all(x))


def test_random_weights_come_from_the_seed_alone():
    weights = []
    for seed in (3, 3, 4):
        model = nets.make("digits_net")
        before = torch.get_rng_state()
        reinitialise(model, seed)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], torch.cat([p.flatten() for p in nets.make("digits_net").parameters()]))


@pytest.mark.parametrize(
    "factor, noise, where", [(0.9, 0.0, "expansion"), (float("nan"), 0.0, "expansion"), (2.0, 1.1, "noise")]
)
def test_impossible_factors_are_refused(factor, noise, where):
    model, analysis = analysed("digits_net")
    with pytest.raises(SteppingError, match=where):
        widen(model, analysis, factor, noise=noise)
