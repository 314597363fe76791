"""`verify` reaches what every operator reads, however the model makes its weights from its parameters."""

import copy

import pytest
import torch
from nets import images, random_levels, randomise, relative
from torch import Tensor, nn
from torch.nn import functional as F

from stepping_plugin import NestingError, verify
from stepping_plugin.construction.importance import magnitude_scores
from stepping_plugin.nested.module import direct_weights
from stepping_plugin.net import SteppingNet
from stepping_plugin.units.analysis import analyse
from stepping_plugin.units.ownership import NEVER, first_readers

SIZE = (3, 8, 8)


class Weights(nn.Module):
    """Tokens (B, 16, 8), one layer whose weight is made in some way, a classifier."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 4)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.layer(x, *self.weights).mean(1))


class Transposed(Weights):
    """A square matrix: its rows and its columns differ only in what they mean."""

    def layer(self, x: Tensor, w: Tensor, last: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, w.t())), last)


class Tied(Weights):
    """One matrix, used as it is and transposed."""

    def layer(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, w)), w.t())


class Halves(Weights):
    def layer(self, x: Tensor, w: Tensor) -> Tensor:
        value, gate = w.chunk(2)
        return F.linear(x, value) * torch.sigmoid(F.linear(x, gate))


class Uneven(Weights):
    def layer(self, x: Tensor, w: Tensor, last: Tensor) -> Tensor:
        few, many = w.split([4, 12])
        return F.linear(torch.cat([F.linear(x, few), F.relu(F.linear(x, many))], -1), last)


class Joined(Weights):
    def layer(self, x: Tensor, one: Tensor, two: Tensor, last: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, torch.cat([one, two]))), last)


class Scaled(Weights):
    """One vector scales channels and, summed up, all of them: its elements belong to two levels."""

    def layer(self, x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x * scale, w) + scale.cumsum(0)


class SelfAttention(Weights):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def layer(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class CrossAttention(SelfAttention):
    """Queries of other tokens than keys and values: in_proj is cut into pieces of 8 and 16 rows."""

    def layer(self, x: Tensor) -> Tensor:
        query = x[:, :4]
        return query + self.attention(query, x, x, need_weights=False)[0]


class Parametrised(Weights):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.inner, self.last = wrap(nn.Linear(8, 6)), nn.Linear(6, 8)

    def layer(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.inner(x)))


MAKERS = {
    "transposed": lambda: Transposed((8, 8), (8, 8)),
    "tied": lambda: Tied((8, 8)),
    "tied-narrow": lambda: Tied((6, 8)),
    "halves": lambda: Halves((16, 8)),
    "uneven": lambda: Uneven((16, 8), (8, 16)),
    "joined": lambda: Joined((5, 8), (7, 8), (8, 12)),
    "scaled": lambda: Scaled((8, 8), (8,)),
    "self-attention": SelfAttention,
    "cross-attention": CrossAttention,
    "weight-norm": lambda: Parametrised(nn.utils.parametrizations.weight_norm),
    "spectral-norm": lambda: Parametrised(nn.utils.parametrizations.spectral_norm),
}


def converted(name: str) -> tuple[SteppingNet, nn.Module]:
    torch.manual_seed(0)
    model = randomise(MAKERS[name]()).double().eval()
    analysis = analyse(model, SIZE)
    levels = torch.ones(analysis.num_units).long()
    return SteppingNet(copy.deepcopy(model), analysis, levels, [1, 2, 3], 1).eval(), model


@pytest.mark.parametrize("name", MAKERS)
def test_weights_made_from_parameters(name):
    net, model = converted(name)
    x = images(SIZE, batch=3)
    with torch.no_grad():
        assert relative(net.forward_all(x)[0], model(x)) < 1e-12
    assert net.analysis.pinned_channels == 0
    for seed in (0, 1):
        net.set_levels(random_levels(net.analysis, 3, seed))
        report = verify(net, x)
        assert max(report.leak) == 0 and max(report.extract_error + report.engine_error) < 1e-12


def _dead(net: SteppingNet, weight: str) -> tuple[Tensor, Tensor]:
    """The mask of a weight, and the places of its dead synapses whose ends are in subnets 1..N."""
    mask = getattr(net, net._masks[weight])
    return mask, (~mask).nonzero()


@pytest.mark.parametrize("name", MAKERS)
def test_a_planted_leak_is_seen_in_every_weight(name):
    """One dead synapse of each weight is revived in turn."""
    net, _ = converted(name)
    net.set_levels(random_levels(net.analysis, 3, 2))
    x = images(SIZE, batch=3)
    planted = 0
    for weight in net.analysis.weight_units:
        mask, places = _dead(net, weight)
        if not len(places):
            continue
        place = tuple(places[0].tolist())
        mask[place] = True
        with pytest.raises(NestingError):
            verify(net, x, engine=False)
        mask[place] = False
        planted += 1
    verify(net, x, engine=False)
    assert planted >= 1


def test_every_element_of_a_packed_projection_has_a_first_reader():
    net, _ = converted("self-attention")
    net.set_levels(random_levels(net.analysis, 3, 0))
    first = first_readers(net.analysis, net.levels)
    packed = [n for n in first if n.meta.get("tensor") == "attention.in_proj_weight"]
    units = net.analysis.weight_units["attention.in_proj_weight"][0]
    assert len(packed) == 1 and first[packed[0]].shape == (24, 8)
    assert torch.equal(first[packed[0]].amin(1), net.levels[units])
    assert int(first[packed[0]].amax()) == NEVER


def test_an_element_with_two_readers_belongs_to_the_smaller_subnet():
    net, _ = converted("scaled")
    net.set_levels(random_levels(net.analysis, 3, 0))
    operands = {n.name: f for n, f in first_readers(net.analysis, net.levels).items() if n.meta["shape"] == (8,)}
    assert sorted(int(f.numel()) for f in operands.values()) == [8, 8, 8]  # scale, its sums, the bias of the stem


def test_only_parameters_that_nothing_else_is_made_of_take_masks():
    assert direct_weights(converted("tied")[0].analysis) == {"stem.weight"}
    assert "inner.parametrizations.weight.original" not in direct_weights(converted("spectral-norm")[0].analysis)


@pytest.mark.parametrize("name", ["transposed", "uneven", "joined", "cross-attention"])
def test_magnitudes_of_weights_made_from_parameters(name):
    """The rows of what the layer reads, not those of the parameter."""
    net, model = converted(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand(parameter.shape).double() + 0.1)
    scores = magnitude_scores(model, net.analysis)
    made = [units for key, (units, _) in net.analysis.weight_units.items() if "(" in key]
    assert made and all(len(scores[u[u >= 0]].unique()) == len(u[u >= 0].unique()) for u in made)
