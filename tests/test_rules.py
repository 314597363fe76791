"""Label rules, one small network per rule: identity, nesting, standalone subnets and stepping, in float64."""

import copy

import pytest
import torch
from nets import images, random_levels, randomise, relative
from torch import Tensor, nn
from torch.nn import functional as F

from stepping_plugin import apply_steppingnet, verify
from stepping_plugin.graph.decompositions import einsum
from stepping_plugin.integrations.fvcore import count_macs
from stepping_plugin.net import SteppingNet
from stepping_plugin.units.analysis import analyse
from stepping_plugin.units.macs import MacModel, static_macs

SIZE = (3, 8, 8)


def ready(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomise(model).double().eval()


def check(model: nn.Module, modes: tuple[bool, ...] = (False,), seeds: tuple[int, ...] = (0, 1)) -> SteppingNet:
    """Every promise of the conversion on one model."""
    analysis = analyse(model, SIZE, modes)
    net = SteppingNet(copy.deepcopy(model), analysis, torch.ones(analysis.num_units).long(), [1, 2, 3], 1).eval()
    x = images(SIZE, batch=3)
    with torch.no_grad():
        assert relative(net.forward_all(x)[0], model(x)) < 1e-12
    for seed in seeds:
        net.set_levels(random_levels(analysis, 3, seed))
        report = verify(net, x)
        assert max(report.leak) == 0 and max(report.extract_error + report.engine_error) < 1e-12
    return net


class Tokens(nn.Module):
    """Patches as tokens, an inner module on them (B, 16, 12) -> (B, 16, C), and a classifier."""

    def __init__(self, inner: nn.Module, channels: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 2, 2)
        self.inner = inner
        self.hidden = nn.Linear(channels, 9)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(torch.relu(self.hidden(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 5, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        if not self.lstm.batch_first:
            return self.lstm(x.transpose(0, 1))[0].transpose(0, 1)
        return self.lstm(x)[0]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"batch_first": True},
        {"batch_first": False, "bidirectional": True},
        {"batch_first": True, "bidirectional": True, "num_layers": 2, "bias": False},
    ],
)
def test_lstm(kwargs):
    net = check(ready(Tokens(Recurrent(**kwargs), 10 if kwargs.get("bidirectional") else 5)))
    assert net.analysis.pinned_channels == 0 and not net.analysis.unknown


class Attention(nn.Module):
    """Queries of `heads` heads, keys and values of `shared` heads."""

    def __init__(self, heads: int, shared: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.shared, self.fused = heads, shared, fused
        self.q = nn.Linear(12, 4 * heads)
        self.k, self.v = nn.Linear(12, 4 * shared), nn.Linear(12, 4 * shared)
        self.out = nn.Linear(4 * heads, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, 4).transpose(1, 2)
        k = self.k(x).view(b, n, self.shared, 4).transpose(1, 2)
        v = self.v(x).view(b, n, self.shared, 4).transpose(1, 2)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("heads", "shared", "pinned"), [(3, 3, 0), (1, 1, 8), (3, 1, 8)])
def test_attention_pins_only_what_all_heads_share(heads, shared, pinned, fused):
    """One head: its queries and keys are one unit. Shared keys and values: the queries' heads still move."""
    net = check(ready(Tokens(Attention(heads, shared, fused))))
    assert net.analysis.pinned_channels == pinned


class StateSpace(nn.Module):
    """Tokens summed into states and read out again, as in state space models: features and states meet in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.states, self.mix = nn.Linear(12, 8), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        write, read = self.states(x).chunk(2, -1)
        hidden = self.mix(write.softmax(1).transpose(1, 2) @ x)
        return x + torch.tanh(read) @ hidden


def test_a_product_of_features_and_states_keeps_the_features():
    net = check(ready(Tokens(StateSpace())))
    assert net.analysis.pinned_channels == 8


class FocalGates(nn.Module):
    """One-channel gates split off a wider layer, as in FocalNet."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.mix = nn.Linear(12, 26), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        query, context, gates = self.project(x).split([12, 12, 2], -1)
        total = context * gates[..., :1] + torch.tanh(context) * gates[..., 1:]
        return query * self.mix(total)


def test_a_gate_of_one_channel_is_pinned_and_not_what_it_scales():
    assert check(ready(Tokens(FocalGates()))).analysis.pinned_channels == 2


class NoPrefix(nn.Module):
    """Concatenates prefix tokens of which there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :0], self.linear(x)], 1)


def test_empty_pieces_of_a_concatenation():
    assert check(ready(Tokens(NoPrefix()))).analysis.pinned_channels == 0


class Transform(nn.Module):
    """A weight that mixes channels in one place and tokens in another (a separable transform)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.widen = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.widen(x), self.weight)
        return F.linear(x.transpose(1, 2), self.weight).transpose(1, 2)


def test_a_weight_of_mixed_use_is_pinned():
    net = check(ready(Tokens(Transform(), 16)))
    assert net.analysis.pinned_channels == 32
    assert any("used in another way" in reason for reason, _, _ in net.analysis.pins)


class FreeAndUnits(nn.Module):
    """A layer that reads the image in one place and units in another."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)
        self.own = nn.Conv2d(3, 6, 3, padding=1)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        return self.last(self.own(x).mean((2, 3)))


def test_a_layer_reused_on_image_and_units_is_pinned():
    assert check(ready(FreeAndUnits())).analysis.pinned_channels == 3


class Repeated(nn.Module):
    """Global queries repeated for every window, as in GCViT."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(3, 3, True)
        self.query = nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.query(x.mean(1, keepdim=True)).repeat_interleave(16, 1)
        return self.attention(x + queries)


def test_repeated_tokens():
    assert check(ready(Tokens(Repeated()))).analysis.pinned_channels == 0


def test_macs_of_pinned_products_are_those_of_the_model():
    for inner in (Attention(1, 1, True), Attention(3, 1, False), StateSpace()):
        analysis = analyse(ready(Tokens(inner)), SIZE, (False,))
        model = MacModel(analysis)
        assert int(model.subnet_macs(torch.ones(analysis.num_units).long(), 1)[0]) == model.total


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("byhwc,hkc->byhwk", [(2, 3, 4, 5, 6), (4, 7, 6)]),
        ("bhwc,wkc->bhwk", [(2, 3, 4, 6), (4, 5, 6)]),
        ("bnk,bnv->bkv", [(2, 5, 3), (2, 5, 4)]),
        ("bhqk,bnkhv->bhqnv", [(2, 3, 4, 5), (2, 7, 5, 3, 2)]),
        ("bcd,bcd->b", [(2, 3, 4), (2, 3, 4)]),
        ("ij,jk->ki", [(2, 3), (3, 4)]),
    ],
)
def test_einsum_as_a_product(equation, shapes):
    operands = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    torch.testing.assert_close(einsum(equation, operands), torch.einsum(equation, operands), rtol=1e-12, atol=1e-12)


class PooledHeads(nn.Module):
    """Keys pooled by a depthwise convolution that all heads share, folded into the batch, as in MViTv2."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.pool = nn.Conv2d(4, 4, 3, 2, 1, groups=4)
        self.bias = nn.Parameter(torch.randn(4, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        b = len(x)
        q, k, v = self.qkv(x).reshape(b, 16, 3, 3, 4).permute(2, 0, 3, 1, 4)
        k = self.pool(k.reshape(b * 3, 4, 4, 4).permute(0, 3, 1, 2)).reshape(b, 3, 4, 4)
        v = self.pool(v.reshape(b * 3, 4, 4, 4).permute(0, 3, 1, 2)).reshape(b, 3, 4, 4)
        weights = (q @ k).reshape(b, 3, 4, 4, 4)
        weights[:] = weights + torch.einsum("byhwc,hkc->byhwk", q.reshape(b, 3, 4, 4, 4), self.bias)[..., :4]
        y = weights.reshape(b, 3, 16, 4).softmax(-1) @ v.transpose(-2, -1)
        return x + self.out(y.transpose(1, 2).reshape(b, 16, 12))


def test_heads_folded_into_the_batch():
    net = check(ready(Tokens(PooledHeads())))
    assert net.analysis.pinned_channels == 0
    assert net.deploy().macs == net.macs


class PackedAttention(nn.Module):
    """One head whose queries, keys and values come from one layer and are told apart by an axis of a view."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), 16, 3, 1, 12).permute(2, 0, 3, 1, 4)
        return x + self.out((q @ k.transpose(-2, -1)).softmax(-1) @ v).reshape(x.shape)


def test_pinned_channels_and_units_across_two_axes():
    assert check(ready(Tokens(PackedAttention()))).analysis.pinned_channels == 36


class Shuffled(nn.Module):
    """Channel shuffle between convolutions, a few times over (ShuffleNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(3)])
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv in self.convs:
            first, second = x.chunk(2, 1)
            x = torch.cat([first, conv(second)], 1)
            b, c, h, w = x.shape
            x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(x.mean((2, 3)))


def test_channel_shuffles_keep_all_units_apart():
    model = ready(Shuffled())
    net = check(model)
    assert net.analysis.pinned_channels == 0
    assert net.analysis.num_units == 8 + 3 * 4, "one unit per channel of the stem and of every convolution"


class GatedLinear(nn.Module):
    """A linear layer of which one half gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.glu(self.up(x)))


def test_glu():
    net = check(ready(Tokens(GatedLinear())))
    assert not net.analysis.unknown and net.analysis.pinned_channels == 0


class Clipped(nn.Module):
    """A linear layer between learned bounds, as in Gemma's encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.low, self.high = nn.Parameter(torch.tensor(-0.5)), nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.clamp(self.linear(x), self.low, self.high)


def test_clamp_between_tensors():
    assert check(ready(Tokens(Clipped()))).analysis.pinned_channels == 0


class PositionBias(nn.Module):
    """A network that makes position biases of attention from coordinates alone, as in Swin V2."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.network = (
            Attention(3, 3, False),
            nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3)),
        )
        self.register_buffer("places", torch.randn(16, 16, 2))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.network(self.places).permute(2, 0, 1)
        attention, (b, n, _) = self.attention, x.shape
        q, k, v = (f(x).view(b, n, 3, 4).transpose(1, 2) for f in (attention.q, attention.k, attention.v))
        y = (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        return x + attention.out(y.transpose(1, 2).reshape(b, n, -1))


def test_position_bias_networks_cost_no_macs_per_image():
    model = ready(Tokens(PositionBias()))
    net = check(model)
    static = static_macs(net.analysis.eval_program)
    assert static == 16 * 16 * (2 * 6 + 6 * 3)
    assert count_macs(model, (images(SIZE, 1),)).total == MacModel(net.analysis).total + static
    assert "depend on parameters only" in apply_steppingnet(model, ["30%", "60%"], example_inputs=images(SIZE)).notes[0]


class TokenScores(nn.Module):
    """One score per token, from a product with a parameter, as in SwiftFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.wide = nn.Linear(12, 12), nn.Parameter(torch.randn(12, 7))
        self.score, self.narrow = nn.Parameter(torch.randn(12, 1)), nn.Parameter(torch.randn(7, 12))

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        pooled = (F.normalize(q @ self.score, dim=1) * q).sum(1, keepdim=True)
        return x + (torch.relu(pooled * x) @ self.wide) @ self.narrow


def test_products_with_a_parameter_are_layers():
    net = check(ready(Tokens(TokenScores())))
    assert net.analysis.pinned_channels == 1, "the score"
    assert len(net.analysis.weight_units["t(inner.wide)"][0]) == 7


class Folded(nn.Module):
    """Windows weighted and added up again, as in VOLO's outlook attention."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(12, 9)

    def forward(self, x: Tensor) -> Tensor:
        windows = F.unfold(x.transpose(1, 2).reshape(-1, 12, 4, 4), 3, padding=1)  # (B, 12 * 9, 16)
        weights = self.weights(torch.tanh(x)).softmax(-1).transpose(1, 2)  # (B, 9, 16)
        weighted = windows.view(-1, 12, 9, 16) * weights.mean(1, keepdim=True).unsqueeze(1)
        return F.fold(weighted.reshape(-1, 108, 16), 4, 3, padding=1).flatten(2).transpose(1, 2)


def test_fold_adds_up_windows():
    net = check(ready(Tokens(Folded())))
    assert not net.analysis.unknown and net.analysis.num_units > 20
