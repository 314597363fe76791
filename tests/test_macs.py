"""The closed form of MACs against a count of live synapses, one by one, on the original model."""

import functools
import math

import pytest
import timm
import torch
from nets import Plain, random_levels
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from stepping_plugin.units.analysis import analyse
from stepping_plugin.units.macs import MacModel


class Parallel(nn.Module):
    """RepVGG-like blocks add the input, a 1x1 and a 3x3 convolution: in and out are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.wide = nn.ModuleList(nn.Conv2d(10, 10, 3, padding=1) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Conv2d(10, 10, 1) for _ in range(2))
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = (wide(x) + narrow(x) + x).relu()
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """One convolution called twice, a grouped one, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.again(self.again(x).relu()).relu()
        return self.head(self.up(self.grouped(x)).relu().mean((2, 3)))


OWN = {"parallel": Parallel, "shared": Shared, "plain": Plain}
NAMES = ["test_resnet", "test_vit", "test_convnext", "mobilenetv3_small_050", *OWN]


@functools.cache
def case(name):
    """Model, image size, analysis and MACs."""
    torch.manual_seed(0)
    model = (OWN[name]() if name in OWN else timm.create_model(name)).eval()
    size = (3, 12, 12) if name in OWN else tuple(model.default_cfg["input_size"])
    analysis = analyse(model, size, (False,))
    return model, size, analysis, MacModel(analysis)


class _Watch(TorchFunctionMode):
    """Shapes of every attention product that the eager model computes."""

    def __init__(self) -> None:
        super().__init__()
        self.products = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            self.products.append([tuple(t.shape) for t in args[:3]])
        return func(*args, **(kwargs or {}))


def run_eagerly(model, size):
    """(module path, call) -> shape of the output, and the shapes of attention products, for one image."""
    shapes, calls, handles = {}, {}, []
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):

            def hook(_, inputs, output, path=path):
                calls[path] = calls.get(path, 0) + 1
                shapes[path if calls[path] == 1 else f"{path}#{calls[path]}"] = (
                    inputs[0].shape,
                    output.shape,
                )

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad(), _Watch() as watch:
        model(torch.zeros(1, *size))
    for handle in handles:
        handle.remove()
    return shapes, watch.products


def level_of(levels, units):
    return [int(levels[u]) if u >= 0 else 1 for u in units.tolist()]


def count(model, size, analysis, levels, n):
    """MACs of subnets 1..n: every synapse of every layer is looked at."""
    shapes, products = run_eagerly(model, size)
    head = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    macs, seen = [0] * n, set()
    for layer in analysis.layers:
        if layer.weight is None:  # an attention product: heads are units
            query, key, value = products.pop(0)
            per_head = query[0] * query[2] * key[2] * (query[3] + value[3])  # q.k and p.v
            for i in range(n):
                macs[i] += per_head * sum(level <= i + 1 for level in level_of(levels, layer.out_units))
            continue
        seen.add(layer.name)
        module = model.get_submodule(layer.name.split("#")[0])
        source, result = shapes[layer.name]
        transposed = isinstance(module, nn.ConvTranspose2d)
        positions = (source if transposed else result).numel() // (
            module.in_channels if transposed else len(layer.out_units)
        )
        kernel = math.prod(getattr(module, "kernel_size", (1,)))
        outputs, inputs = level_of(levels, layer.out_units), level_of(levels, layer.in_units)
        if layer.name.split("#")[0] == head:
            outputs = [n] * len(outputs)  # class scores read everything
        groups = getattr(module, "groups", 1)
        exists = torch.block_diag(*[torch.ones(len(outputs) // groups, len(inputs) // groups)] * groups).bool()
        live = exists & (torch.tensor(inputs)[None, :] <= torch.tensor(outputs)[:, None])
        if groups > 1:
            assert torch.equal(live, exists), "a group is one unit"
        for i in range(n):
            reached = (
                torch.ones(len(outputs), dtype=torch.bool) if layer.name == head else torch.tensor(outputs) <= i + 1
            )
            here = live & reached[:, None] & (torch.tensor(inputs) <= i + 1)[None, :]
            macs[i] += positions * kernel * int(here.sum())
    assert not products and seen == set(shapes), "every layer that ran is counted"
    return macs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [2, 4])
def test_closed_form_is_the_number_of_live_synapses(name, n):
    model, size, analysis, macs = case(name)
    for seed in range(2):
        levels = random_levels(analysis, n, seed, spare=True)
        assert macs.subnet_macs(levels, n).tolist() == count(model, size, analysis, levels, n)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "mobilenetv3_small_050", *OWN])
def test_all_units_at_level_one_cost_what_the_original_costs(name):
    model, size, analysis, macs = case(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *size))
    everything = torch.ones(analysis.num_units, dtype=torch.long)
    assert macs.subnet_macs(everything, 2).tolist() == [macs.total] * 2
    assert macs.total == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [1, -1])
def test_marginal_macs_are_the_difference_that_a_move_makes(name, shift):
    _, _, analysis, macs = case(name)
    n = 3
    for seed in range(2):
        levels = random_levels(analysis, n, seed, spare=True)
        before, delta = macs.subnet_macs(levels, n), macs.move_delta(levels, n, shift)
        assert delta.shape == (analysis.num_units, n)
        for unit in torch.randperm(analysis.num_units)[:40].tolist():
            moved = levels.clone()
            moved[unit] += shift
            possible = 1 <= int(moved[unit]) <= n + 1
            expected = macs.subnet_macs(moved, n) - before if possible else torch.zeros(n, dtype=torch.long)
            assert torch.equal(delta[unit], expected), (unit, int(levels[unit]))


def test_subnets_only_grow():
    _, _, analysis, macs = case("test_convnext")
    costs = macs.subnet_macs(random_levels(analysis, 5, seed=3, spare=True), 5)
    assert bool((costs.diff() >= 0).all()) and int(costs[-1]) <= macs.total


def test_layers_add_up():
    _, _, analysis, macs = case("shared")
    levels = random_levels(analysis, 3, seed=1)
    per_layer = macs.layer_macs(levels, 3)
    assert per_layer.shape == (len(macs.layer_names), 3)
    rest = macs.subnet_macs(levels, 3) - per_layer.sum(0).cumsum(0)
    owned = torch.stack([macs.unit_cost[levels <= i].sum() for i in (1, 2, 3)])
    assert torch.equal(rest, owned + macs.fixed + macs.per_level * torch.arange(1, 4))
