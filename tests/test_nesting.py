"""The nested form: identical to the original at level 1, nested at any levels, and sliceable."""

import copy

import pytest
import torch
from nets import (
    ARCHITECTURES,
    FAMILIES,
    Plain,
    image_size,
    images,
    make,
    nested,
    random_levels,
    randomise,
    relative,
)
from torch import nn

from stepping_plugin import NestingError, verify
from stepping_plugin.nested.module import direct_weights
from stepping_plugin.units.analysis import restrict


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    return make(request.param)


def test_all_units_at_level_one_is_the_original(model):
    net = nested(model, seed=None)
    x = images(image_size(model))
    with torch.no_grad():
        expected, scores = model(x), net.forward_all(x)
    for subnet in scores:
        assert relative(subnet, expected) < 1e-10


def test_train_mode_is_the_original_too(model):
    """Same scores, same running statistics after one step, same random numbers (dropout, drop path)."""
    original = copy.deepcopy(model).train()
    net = nested(model, seed=None).train()
    x = images(image_size(model), batch=4)
    torch.manual_seed(1)
    expected = original(x)
    torch.manual_seed(1)
    scores = net.forward_all(x)
    assert relative(scores[-1], expected) < 1e-10
    statistics = dict(net.model.named_buffers())
    for name, buffer in original.named_buffers():
        if buffer.is_floating_point():
            torch.testing.assert_close(statistics[name], buffer, rtol=1e-10, atol=1e-12)
        else:
            assert torch.equal(statistics[name], buffer), name


@pytest.mark.parametrize("seed", [0, 1])
def test_random_levels_are_nested(model, seed):
    report = verify(nested(model, seed=seed), engine=False)
    assert max(report.leak) < 1e-9
    assert report.response[0] > 1e-3, "the noise must reach the largest subnet, or the check is vacuous"
    assert max(report.extract_error) < 1e-10


def test_one_pass_equals_separate_subnets_of_a_copy(model):
    """Subnet i of the one-pass form == the net whose larger units are made spare."""
    net = nested(model, seed=3)
    x = images(image_size(model))
    with torch.no_grad():
        scores = net.forward_all(x)
        for i in (1, 2, 3):
            levels = net.levels
            alone = copy.deepcopy(net)
            alone.set_levels(torch.where(levels > i, 5, levels))
            assert relative(alone.forward_all(x)[-1], scores[i - 1]) < 1e-10


def test_compaction_drops_spare_units_and_changes_nothing(model):
    net = nested(model, seed=None)
    net.set_levels(random_levels(net.analysis, 4, seed=5, spare=True))
    small = net.compact()
    x = images(image_size(model))
    with torch.no_grad():
        assert relative(small.forward_all(x), net.forward_all(x)) < 1e-10
    assert small.macs == net.macs
    assert int(small.levels.max()) <= 4
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


def test_gradients_flow_only_through_live_synapses(model):
    net = nested(model, seed=2)
    net.forward_all(images(image_size(model))).square().sum().backward()
    parameters = dict(net.model.named_parameters())
    direct = direct_weights(net.analysis)
    assert direct or type(model).__name__ == "NormFreeNet", "all weights of normaliser-free nets are standardised"
    dead = {name: ~net.live_mask(name, net.levels) for name in direct}
    assert not direct or any(bool(mask.any()) for mask in dead.values())
    for name, mask in dead.items():
        assert float((parameters[name].grad * mask).abs().max()) == 0, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    model = make(name)
    net = nested(model, seed=None)
    x = images(image_size(model))
    with torch.no_grad():
        assert relative(net.forward_all(x)[-1], model(x)) < 1e-10
    for seed in (1, 2):
        net.set_levels(random_levels(net.analysis, 4, seed))
        report = verify(net, engine=False)
        assert max(report.leak) < 1e-9 and min(report.response[:1]) > 1e-6 and max(report.extract_error) < 1e-10


# ------------------------------------------------------------------------------------ verify must be able to fail


def test_verify_sees_a_flipped_mask():
    net = nested(make("test_resnet"), seed=0)
    name = next(n for n in net._masks if n.endswith("conv2.weight"))
    mask = getattr(net, net._masks[name])
    dead = (~mask).nonzero()[0]
    mask[tuple(dead.tolist())] = True
    with pytest.raises(NestingError) as caught:
        verify(net, engine=False)
    assert caught.value.subnet in (1, 2, 3)
    assert caught.value.layer.startswith(name.removesuffix(".conv2.weight"))


def test_verify_sees_an_ordinary_layer_norm():
    net = nested(make("test_vit"), seed=0)
    graph = net._graphs[False].module
    node = next(n for n in graph.graph.nodes if getattr(n.target, "__name__", "") == "prefix_norm")
    x, _, _, _, _, weight, bias, eps, _ = node.args
    width = net.analysis.groups[0].units.numel()
    with graph.graph.inserting_before(node):
        plain = graph.graph.call_function(torch.ops.aten.layer_norm.default, (x, [width], weight, bias, eps))
        plain.meta = dict(node.meta)
    node.replace_all_uses_with(plain)
    graph.recompile()
    with pytest.raises(NestingError) as caught:
        verify(net, engine=False)
    assert "norm1" in caught.value.layer


def test_verify_sees_a_missing_coupling():
    """The branch of a residual block gets levels of its own, as if the addition did not tie it to the stream."""
    net = nested(make("test_resnet"), seed=0)
    name = next(n for n in net.analysis.weight_units if n.endswith("layer2.0.conv2.weight"))
    outputs, inputs = net.analysis.weight_units[name]
    net.analysis.weight_units[name] = (outputs.flip(0), inputs)
    net.refresh(net.levels)
    with pytest.raises(NestingError):
        verify(net, engine=False)


# ------------------------------------------------------------------------------------------------- plain user networks


class Reused(nn.Module):
    """One layer called twice: its call sites share units."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(3 * 16, 12)
        self.again = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.inp(x.flatten(1)))
        x = torch.relu(self.again(x))
        return self.head(torch.relu(self.again(x)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.InstanceNorm2d(8, affine=True)
        self.act = nn.PReLU(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x):
        x = self.grouped(self.up(self.act(self.norm(self.down(x)))))
        return self.head(x).mean((2, 3))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class TokenMixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 10, 4, 4)
        self.tokens = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(10))
        self.norm = nn.RMSNorm(10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2)
        x = x + self.tokens(x) * self.scale[:, None]
        return self.head(self.norm(x.transpose(1, 2)).amax(1))


USER_NETS = {
    "functional": (Plain, (3, 8, 8)),
    "reused": (Reused, (3, 4, 4)),
    "transposed": (Transposed, (3, 8, 8)),
    "attention": (Attending, (3, 8, 8)),
    "token mixing": (TokenMixing, (3, 8, 8)),
}


@pytest.mark.parametrize("kind", USER_NETS)
def test_user_networks(kind):
    make_net, size = USER_NETS[kind]
    torch.manual_seed(0)
    model = randomise(make_net()).double().eval()
    net = nested(model, seed=None, size=size)
    x = images(size, batch=3)
    with torch.no_grad():
        assert relative(net.forward_all(x)[-1], model(x)) < 1e-10
    for seed in range(3):
        net.set_levels(random_levels(net.analysis, 4, seed))
        report = verify(net, engine=False)
        assert max(report.leak) < 1e-9 and report.response[0] > 1e-6 and max(report.extract_error) < 1e-10


def test_call_sites_of_one_layer_share_units():
    net = nested(Reused().double().eval(), size=(3, 4, 4))
    outputs, inputs = net.analysis.weight_units["again.weight"]
    assert torch.equal(outputs, inputs)


def test_heads_are_units():
    analysis = nested(make("test_vit"), seed=None).analysis
    model = make("test_vit")
    heads = {m.num_heads for m in model.modules() if hasattr(m, "num_heads")}
    per_block = [g for g in analysis.groups if g.name.endswith("qkv")]
    assert per_block and {len(g.units) for g in per_block} == heads


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_duplicated_units_keep_their_order(name):
    """Every unit twice: the tensors double, views and heads included, and each copy behaves like its original."""
    model = make(name)
    analysis = nested(model, seed=None).analysis
    doubled, slices = restrict(analysis, torch.full((analysis.num_units,), 2))
    assert doubled.num_units == 2 * analysis.num_units
    for weight, (outputs, _) in analysis.weight_units.items():
        assert len(doubled.weight_units[weight][0]) == 2 * len(outputs)
    assert slices
