"""Networks as users write them, torchvision's smallest, and what cannot be captured."""

import copy

import pytest
import torch
from nets import images, random_levels, randomise, relative
from torch import Tensor, nn

from stepping_plugin import CaptureError, verify
from stepping_plugin.graph.capture import capture
from stepping_plugin.graph.program import copy_model
from stepping_plugin.integrations.fvcore import count_macs
from stepping_plugin.net import SteppingNet
from stepping_plugin.studies.coverage.check import build
from stepping_plugin.studies.coverage.specs import TORCHVISION
from stepping_plugin.units.analysis import analyse
from stepping_plugin.units.macs import MacModel

SIZE = (3, 8, 8)


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 4)

    def tokens(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2)


class WithMultihead(Stem):
    """`nn.MultiheadAttention`, whose projections are one packed parameter."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class WithWeights(WithMultihead):
    """The same with averaged attention weights asked for, and not used."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


class WithEncoder(Stem):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(x)).mean(1))


class Nested(nn.Sequential):
    def __init__(self) -> None:
        block = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()))
        super().__init__(block, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), nn.Linear(24, 7), nn.Linear(7, 4))


class Reused(Stem):
    """One layer called three times, and one of its calls normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for k in range(3):
            x = torch.relu(self.again(x) + k)
        return self.head(self.norm(x).mean((2, 3)))


class Cross(WithMultihead):
    """Queries of other tokens than keys and values; sequence first; averaged weights used."""

    def __init__(self) -> None:
        super().__init__()
        self.later = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        x = x[:, :4] + self.attention(x[:, :4], x, x, need_weights=False)[0]
        x = x.transpose(0, 1)
        y, weights = self.later(x * 2, x, x)
        return self.head((x + y).mean(0)) * weights.mean((1, 2))[:, None]


class Recurrent(Stem):
    """GRU in both directions and two layers, then plain recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 5, 2, batch_first=True, bidirectional=True)
        self.tanh, self.relu = nn.RNN(10, 6, batch_first=True), nn.RNN(6, 8, nonlinearity="relu", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tanh(self.gru(self.tokens(x))[0])[0].transpose(0, 1)
        return self.head(self.relu(x)[0].mean(0))


class Matrices(Stem):
    """Products with matrices of parameters: mm, addmm, einsum, a parameter list, a classifier that is a product."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(8, 8), (8, 6), (6,), (6, 2, 4), (2, 4, 8), (4, 8)]
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(s)) for s in shapes])

    def forward(self, x: Tensor) -> Tensor:
        square, wide, bias, split, joined, last = self.weights
        x = torch.mm(self.tokens(x).mean(1), square).relu()
        x = torch.addmm(bias, x, wide).relu()
        heads = torch.einsum("bc,chd->bhd", x, split)
        return torch.einsum("bhd,hdc->bc", heads, joined) @ last.t()


class Assigned(Stem):
    """Assignments to slices, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu_()
        y = self.again(x)
        y[:, :4] += x[:, 4:]
        y[:, :, 1] = y[:, :, 0] * 2
        return self.head(y.mean((2, 3)))


class Volume(nn.Module):
    """Convolutions in one and three dimensions, transposed ones, instance norm, resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.norm = nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True)
        self.up, self.one = nn.ConvTranspose3d(8, 6, (1, 2, 2), (1, 2, 2)), nn.ConvTranspose1d(6, 8, 2, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool3d(self.norm(self.three(x.unsqueeze(1))), (1, 2, 2)).relu()
        x = nn.functional.adaptive_avg_pool3d(self.up(x), 2).flatten(2)
        x = nn.functional.interpolate(self.one(x), scale_factor=2.0, mode="linear")
        return self.head(nn.functional.pad(x, (1, 1), mode="reflect").amax(2))


class Parametrised(Stem):
    """Weight norm, old and new, spectral norm, an orthogonal weight, a low-rank correction, buffers in arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        new = nn.utils.parametrizations
        self.one, self.two = new.weight_norm(nn.Linear(8, 6)), new.spectral_norm(nn.Linear(6, 8))
        self.three, self.four = new.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 8)
        with pytest.warns(FutureWarning):
            self.old = nn.utils.weight_norm(nn.Linear(8, 8))
        self.up, self.down = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))
        self.register_buffer("scale", torch.rand(8) + 0.5)
        self.register_buffer("step", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.tokens(x)).relu()).relu() * self.scale / (self.step + 1)
        x = nn.functional.linear(self.three(x).relu(), self.four.weight + self.up @ self.down) + self.scale.cumsum(0)
        return self.head(self.old(x).relu().mean(1))


class Dictionary(Stem):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.tokens(x).mean(1)
        return {"logits": self.head(features), "features": features}


class Pick(nn.Module):
    """An output transform: one entry of what the model returns."""

    def __init__(self, model: nn.Module, key: str) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[self.key]


@pytest.mark.parametrize(
    "make",
    [
        WithMultihead,
        lambda: WithMultihead(bias=False, kdim=8, vdim=8),
        WithWeights,
        lambda: WithEncoder(True),
        lambda: WithEncoder(False),
        Nested,
        Reused,
        lambda: Pick(Dictionary(), "logits"),
        Cross,
        Recurrent,
        Matrices,
        Assigned,
        Volume,
        Parametrised,
    ],
    ids=[
        "multihead", "separate", "weights", "norm-first", "norm-last", "sequential", "reused", "dictionary", "cross",
        "recurrent", "matrices", "assigned", "volume", "parametrised",
    ],
)  # fmt: skip
def test_user_modules(make):
    torch.manual_seed(0)
    model = randomise(make()).double().eval()
    analysis = analyse(model, SIZE)
    assert analysis.pinned_channels == 0
    levels = torch.ones(analysis.num_units).long()
    net = SteppingNet(copy_model(model), analysis, levels, [1, 2, 3], 1).eval()
    x = images(SIZE, batch=3)
    with torch.no_grad():
        assert relative(net.forward_all(x)[0], model(x)) < 1e-12
        torch.testing.assert_close(net.train().forward_all(x)[0], model.train()(x), rtol=1e-10, atol=1e-12)
    net.eval().set_levels(random_levels(analysis, 3, 0))
    report = verify(net, x)
    assert max(report.leak) == 0 and max(report.extract_error + report.engine_error) < 1e-12


class Sorted(Stem):
    """Operators with several results and no rule, a deviation over channels, attention over batch and heads at once."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True)
        self.product = nn.Bilinear(8, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        x = self.hidden(x + self.attention(x, x, x, need_weights=False)[0])
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
        x = self.last(x).topk(5, 1)[0].relu()
        return self.head(self.product(x, x.flip(1)).mean(1).sort(1)[0])


def test_what_has_no_rule_is_pinned_and_the_rest_moves():
    torch.manual_seed(0)
    model = randomise(Sorted()).double().eval()
    analysis = analyse(model, SIZE)
    assert set(analysis.unknown) == {"topk", "sort"} and analysis.pinned_channels > 0 and analysis.num_units > 0
    assert MacModel(analysis).total == count_macs(model, (images(SIZE, batch=1),)).total
    levels = torch.ones(analysis.num_units).long()
    net = SteppingNet(copy.deepcopy(model), analysis, levels, [1, 2, 3], 1).eval()
    x = images(SIZE, batch=3)
    with torch.no_grad():
        assert relative(net.forward_all(x)[0], model(x)) < 1e-12
    net.set_levels(random_levels(analysis, 3, 0))
    report = verify(net, x)
    assert max(report.leak) == 0 and max(report.extract_error + report.engine_error) < 1e-12


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(s, marks=() if "squeeze" in s.model or "shuffle" in s.model else pytest.mark.slow)
        for s in TORCHVISION
    ],
    ids=lambda s: s.module,
)
def test_torchvision(spec):
    model = build(spec)
    size = (3, spec.image, spec.image)
    analysis = analyse(model, size, (False,))
    assert analysis.pinned_channels < 0.01 * analysis.channels
    levels = torch.ones(analysis.num_units).long()
    net = SteppingNet(copy.deepcopy(model), analysis, levels, [1, 2], 1).eval()
    x = images(size)
    with torch.no_grad():
        assert relative(net.forward_all(x)[0], model(x)) < 1e-9
    net.set_levels(random_levels(analysis, 2, 0))
    report = verify(net, x)
    assert max(report.leak) < 1e-12 and max(report.extract_error + report.engine_error) < 1e-9


# ------------------------------------------------------------------------------------------------- what cannot be


class Branch(Stem):
    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        if x.mean() > 0:  # here
            x = x * 2
        return self.head(x.mean(1))


class Loop(Stem):
    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for _ in range(int(x.sum())):  # here
            x = x + 1
        return self.head(x.mean(1))


class Number(Stem):
    def forward(self, x: Tensor) -> Tensor:
        largest = x.max().item()  # here
        return self.head(self.tokens(x).mean(1)) * largest


class Selection(Stem):
    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        kept = x[x > 0]  # here
        return self.head(kept.reshape(-1, 8))


class Numpy(Stem):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.from_numpy(self.tokens(x).mean(1).numpy()))  # here


@pytest.mark.parametrize(
    ("model", "construct"),
    [
        (Branch, "control flow that depends on the values of a tensor"),
        (Loop, "control flow that depends on the values of a tensor"),
        (Number, "a number that depends on the values of a tensor"),
        (Selection, "a shape that depends on the values of a tensor"),
        (Numpy, "leaves torch for numpy"),
    ],
)
def test_data_dependence_is_refused_with_the_line(model, construct):
    with pytest.raises(CaptureError, match=construct) as caught:
        capture(model(), SIZE)
    assert f"{model.__name__} " in str(caught.value)
    assert "test_user_models.py:" in str(caught.value)
    assert "# here" in str(caught.value)


class TwoInputs(Stem):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.tokens(x * mask).mean(1))


def test_several_inputs_are_refused():
    with pytest.raises(CaptureError, match=r"TwoInputs.forward needs further arguments \(mask\)"):
        capture(TwoInputs(), SIZE)


def test_structure_can_be_analysed_without_weights():
    with torch.device("meta"):
        model = Nested()
    analysis, real = analyse(model.eval(), SIZE, (False,)), analyse(Nested().eval(), SIZE, (False,))
    assert analysis.num_units == real.num_units > 0
    assert MacModel(analysis).total == MacModel(real).total
