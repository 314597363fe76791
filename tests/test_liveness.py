"""Levels that earn their MACs: dead units are found and born again, increments of widths are bounded."""

from __future__ import annotations

import copy

import nets
import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from stepping_plugin import verify
from stepping_plugin.construction.config import ConstructionConfig
from stepping_plugin.construction.counts import UnitClasses
from stepping_plugin.construction.flow import Construction
from stepping_plugin.construction.importance import magnitude_scores
from stepping_plugin.construction.plugs import find_plugs, head_units
from stepping_plugin.construction.policies import assign
from stepping_plugin.construction.rebirth import can_be_reborn, give_birth, revive
from stepping_plugin.construction.start import start_network
from stepping_plugin.construction.uniform import uniform_band, uniform_levels
from stepping_plugin.errors import BudgetError
from stepping_plugin.nested.liveness import measure_life
from stepping_plugin.net import SteppingNet
from stepping_plugin.training.loader import EpochLoader, TensorSet
from stepping_plugin.units.analysis import analyse
from stepping_plugin.units.macs import MacModel

N = 3


class Net(nn.Module):
    """Batch norm behind one convolution, a bias in the other, a residual sum, a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 9, 3, stride=2)
        self.hidden = nn.Linear(9 * 4, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.conv2(x)) + x
        x = torch.relu(self.conv3(x)).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


READERS = ("conv2", "conv3", "hidden", "head")
DEAD = {"norm1.bias": [2, 5], "conv3.bias": [0, 4], "hidden.bias": [1, 7, 11]}  # conv1's live on in the residual sum


def net_with_dead_units(seed: int = 0) -> SteppingNet:
    torch.manual_seed(seed)
    model = nets.randomise(Net()).double().eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, channels in DEAD.items():
            parameters[name][channels] = -1e3
    return nets.nested(model, N, seed, (1, 6, 6))


def pictures(batches: int = 2, size: int = 12) -> list[Tensor]:
    return [nets.images((1, 6, 6), size, seed) for seed in range(batches)]


def dead_units(net: SteppingNet) -> Tensor:
    """Those that were made dead, and what chance made so in a random network."""
    dead = measure_life(net, pictures()).fires <= 0.01
    for name in ("conv3.bias", "hidden.bias"):
        assert bool(dead[net.analysis.param_units[name][1][DEAD[name]]].all())
    assert not bool(dead[net.analysis.param_units["norm1.bias"][1]].any())  # the residual sum is alive
    return dead


def masked_model(net: SteppingNet) -> nn.Module:
    """The user's own network with dead synapses set to 0: all that subnet N computes."""
    model = copy.deepcopy(net.model).eval()
    with torch.no_grad():
        for name in net.analysis.weight_units:
            model.get_parameter(name).mul_(net.live_mask(name, net.levels))
    return model


def test_life_is_what_counting_by_hand_says():
    net = net_with_dead_units()
    model, seen = masked_model(net), {name: [] for name in READERS}
    for name in READERS:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: seen[n].append(args[0]))
    batches = pictures()
    with torch.no_grad():
        for images in batches:
            model(images)
    units = {layer.name: layer.in_units for layer in net.analysis.layers}
    fires, carries = np.zeros(net.analysis.num_units), np.zeros(net.analysis.num_units)
    for name in READERS:
        values = torch.cat(seen[name]).movedim(1, 0).flatten(1).numpy()
        weight = model.get_submodule(name).weight.detach().flatten(2).numpy() if "conv" in name else None
        weight = model.get_submodule(name).weight.detach()[..., None].numpy() if weight is None else weight
        taken: dict[int, float] = {}
        for channel, unit in enumerate(units[name].tolist()):
            x = values[channel]
            resting = max(np.sum(x == x.min()), np.sum(x == x.max()))
            fires[unit] = max(fires[unit], 1 - resting / len(x))
            strength = sum(w**2 for w in weight[:, channel].ravel())
            taken[unit] = taken.get(unit, 0.0) + np.var(x) * strength
        for unit, value in taken.items():
            carries[unit] = max(carries[unit], value / np.mean(list(taken.values())))
    life = measure_life(net, batches)
    assert torch.allclose(life.fires, torch.from_numpy(fires), atol=1e-12)
    assert torch.allclose(life.carries, torch.from_numpy(carries), rtol=1e-9)
    assert torch.equal(~life.alive(), dead_units(net))


def test_a_unit_that_only_lower_levels_could_read_carries_nothing():
    net = net_with_dead_units()
    levels = torch.ones(net.analysis.num_units, dtype=torch.long)
    lone = int(net.analysis.weight_units["conv3.weight"][0][3])
    levels[lone] = 2
    net.set_levels(levels)
    carries = measure_life(net, pictures()).carries
    assert carries[lone] == 0 and (carries > 0).sum() == len(levels) - 1 - int(dead_units(net).sum())


def test_dead_units_are_born_again_and_nothing_else_changes():
    net = net_with_dead_units()
    dead, before = dead_units(net), {k: v.clone() for k, v in net.model.state_dict().items()}
    life, notes = revive(net, pictures(), seed=1)
    assert bool(life.alive().all()) and float(life.fires[dead].min()) > 0.1
    assert notes == [f"{int(dead.sum())} units of conv3, hidden never fired and got new weights"]
    after = net.model.state_dict()
    for name, old in before.items():
        owners = net.analysis.weight_units[name][0] if name in net.analysis.weight_units else None
        owners = net.analysis.param_units[name][1] if name in net.analysis.param_units else owners
        if owners is None:
            assert torch.equal(after[name], old), name
            continue
        changed = (after[name] != old).flatten(1).any(1) if old.dim() > 1 else after[name] != old
        assert not bool((changed & ~dead[owners]).any()), name
    verify(net)


def test_born_again_behind_batch_norm():
    """The norm's statistics become those of what it reads; its factor that of the other channels, without a shift."""
    torch.manual_seed(0)
    model = nets.randomise(timm.create_model("vgg_tiny", num_classes=4, in_chans=1)).double().eval()
    with torch.no_grad():
        model.features[3][1].bias[[3, 8]] = -1e3
    net = nets.nested(model, N, 0, (1, 16, 16))
    net.set_levels(torch.ones_like(net.levels))
    batches = [nets.images((1, 16, 16), 8, seed) for seed in range(2)]
    life, _ = revive(net, batches)
    assert bool(life.alive().all())
    conv, norm = net.model.features[3][0], net.model.features[3][1]
    read: list[Tensor] = []
    norm.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    with torch.no_grad():
        net.model(batches[0])
    values = read[0].movedim(1, 0).flatten(1)[[3, 8]]
    assert torch.allclose(norm.running_mean[[3, 8]], values.mean(1)) and torch.allclose(
        norm.running_var[[3, 8]], values.var(1, correction=0)
    )
    others = torch.ones(len(norm.weight), dtype=torch.bool)
    others[[3, 8]] = False
    assert torch.allclose(norm.weight[[3, 8]], norm.weight[others].abs().mean()) and bool(
        (norm.bias[[3, 8]] == 0).all()
    )
    assert conv.weight[[3, 8]].isfinite().all()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet"])
def test_life_of_any_model(name):
    model = nets.make(name)
    net = nets.nested(model, 2)
    batches = [nets.images(nets.image_size(model), 2)]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    life = measure_life(net, batches)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert bool(life.fires.isfinite().all()) and float(life.fires.mean()) > 0.4 and float(life.carries.max()) > 0
    chosen = can_be_reborn(net)
    assert name == "test_nfnet" or bool(chosen.any())  # standardised weights bear no new directions
    chosen &= torch.rand(len(chosen), generator=torch.Generator().manual_seed(0)) < 0.3  # of residual streams, too
    give_birth(net, chosen, batches[0], torch.Generator().manual_seed(1))
    assert all(bool(v.isfinite().all()) for v in net.state_dict().values())
    assert max(verify(net, batches[0]).leak) == 0


def test_plugs_are_judged_by_live_units():
    net = net_with_dead_units()
    head, dead = head_units(net.analysis), dead_units(net)
    levels = torch.ones(net.analysis.num_units, dtype=torch.long)
    levels[head & dead] = 2
    levels[(head & ~dead).nonzero()[0]] = 3
    assert not find_plugs(net.analysis, levels, N)
    assert [p.subnet for p in find_plugs(net.analysis, levels, N, ~dead)] == [2]


def small_loader(size: int) -> EpochLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 1, size, size), dtype=torch.uint8, generator=generator)
    return EpochLoader(TensorSet(images, torch.arange(64) % 4, (0.5,), (0.25,)), 16, train=True, seed=3)


def constructed(dead: slice = slice(20), **changes) -> SteppingNet:
    torch.manual_seed(0)
    model = timm.create_model("vgg_tiny", num_classes=4, in_chans=1)
    with torch.no_grad():
        for images, _ in small_loader(16):  # statistics of the norms
            model(images)
        model.hidden.bias[dead] = -100.0
    analysis = analyse(model, (1, 16, 16))
    total = MacModel(analysis).total
    config = ConstructionConfig(iterations=5, batches=1, expansion=1.2, importance_batches=1, lr=1e-3, **changes)
    budgets = [int(total * s) for s in (0.1, 0.3, 0.5, 0.85)]
    net = start_network(model, analysis, budgets, config, total)
    return Construction(net, small_loader(16), config, device="cpu").run()


def test_construction_ends_without_dead_units():
    batches = [images for images, _ in small_loader(16)]
    dead = [~measure_life(constructed(rebirth=on, cooldown_iterations=0), batches).alive() for on in (False, True)]
    assert int(dead[0].sum()) >= 20 and int(dead[1].sum()) == 0


def test_a_level_of_dead_units_only_is_refused(monkeypatch):
    monkeypatch.setattr("stepping_plugin.construction.rebirth.can_be_reborn", lambda net: net.levels > 9)
    with pytest.raises(BudgetError, match="dead"):
        constructed(dead=slice(None), importance="magnitude")


@pytest.mark.parametrize("one_shot", [False, True])
def test_levels_add_no_more_and_no_less_than_their_share(one_shot):
    """Every width's units of level i lie within the bounds, recomputed here from the uniform pattern."""
    torch.manual_seed(0)
    model = timm.create_model("resnet_tiny", num_classes=4, in_chans=1)
    analysis = analyse(model, (1, 16, 16))
    total = MacModel(analysis).total
    least, most = 0.5, 1.5
    config = ConstructionConfig(
        iterations=5, batches=0, importance="random", expansion=1.2, increments=(least, most), cooldown_iterations=0
    )
    net = start_network(model, analysis, [int(total * s) for s in (0.1, 0.3, 0.5, 0.85)], config, total)
    macs, budgets = net.macs_model, net.budgets
    if one_shot:
        scores = magnitude_scores(net.model, net.analysis)
        levels = assign(net.analysis, macs, budgets, scores, lineage=net.lineage, increments=(least, most)).levels
    else:
        construction = Construction(net, small_loader(16), config, device="cpu")
        for _ in construction:
            pass
        levels = construction.finish().levels
    classes = UnitClasses(net.analysis, macs, small=4)
    shares = uniform_levels(net.analysis, macs, budgets)[1]
    for width, size in enumerate(classes.width_size.tolist()):
        own = torch.from_numpy(classes.width[classes.of_unit] == width)
        for i, (low, high) in enumerate(zip([0.0, *shares[:-1]], shares, strict=True), start=1):
            step, count = size * (high - low), int((own & (levels == i)).sum())
            assert np.floor(least * step) <= count <= max(1, np.ceil(most * step)), (classes.names[width], i)


def test_no_bounds_on_increments():
    model = timm.create_model("resnet_tiny", num_classes=4, in_chans=1)
    analysis = analyse(model, (1, 16, 16))
    macs = MacModel(analysis)
    budgets = [macs.total // 10, macs.total // 2]
    free, bound = uniform_band(analysis, macs, budgets, increments=None), uniform_band(analysis, macs, budgets)
    assert (free.most == free.upper).all() and (free.new == 0).all()
    assert (bound.most <= bound.upper).all() and (bound.new > 0).any() and (bound.upper == free.upper).all()
