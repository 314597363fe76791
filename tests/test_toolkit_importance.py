"""SteppingImportance against explicit gates (Eq. 2 and 3 of the paper) in float64, and in a pruner."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner import function

from stepping_plugin.errors import SteppingError
from stepping_plugin.integrations.torch_pruning import SteppingImportance

CLASSES = 4


class Gate(nn.Module):
    """A layer or norm whose output is r * (output without bias) + bias, or r * output if ``whole``."""

    def __init__(self, inner: nn.Module, whole: bool):
        super().__init__()
        self.inner, self.whole = inner, whole
        width = getattr(inner, "out_channels", None) or getattr(inner, "out_features", None) or len(inner.bias)
        self.r = nn.Parameter(torch.ones(width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        shape = (1, -1) + (1,) * (y.dim() - 2)
        bias = 0 if self.whole or self.inner.bias is None else self.inner.bias.view(shape)
        return self.r.view(shape) * (y - bias) + bias


def randomised(*layers: nn.Module) -> nn.Sequential:
    net = nn.Sequential(*layers).double()
    for parameter in net.parameters():  # default norms and biases are special points
        nn.init.normal_(parameter, std=0.7)
    return net.train()


def plain_net() -> nn.Sequential:
    return randomised(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, CLASSES)
    )


def norm_net() -> nn.Sequential:
    return randomised(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(5, 3, 6, 6).double(), torch.randint(CLASSES, (5,))) for _ in range(count)]


def losses(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Three different losses of one net, for three subnets."""
    return [F.cross_entropy(scale * logits, labels) + scale * logits.square().mean() for scale in (0.5, 1, 2)]


def gate_scores(net: nn.Sequential, position: int, whole: bool, data, alpha: float) -> Tensor:
    """Eq. 3 with real gates: sum over batches and losses of alpha^(k-1) |dL_k/dr|."""
    gated = copy.deepcopy(net)
    gated[position] = gate = Gate(gated[position], whole)
    total = torch.zeros_like(gate.r)
    for x, labels in data:
        for k, loss in enumerate(losses(gated(x), labels)):
            (slope,) = torch.autograd.grad(loss, gate.r, retain_graph=True)
            total += alpha**k * slope.abs()
    return total


def accumulated(net: nn.Module, data, **options) -> SteppingImportance:
    importance = SteppingImportance(**options)
    for x, labels in data:
        for k in range(3):
            net.zero_grad()
            losses(net(x), labels)[k].backward()
            importance.accumulate(net, subnet=k + 1)
    return importance


def group_of(net: nn.Module, module: nn.Module, idxs=None, pruning_fn=None, x=None):
    graph = tp.DependencyGraph()
    x = torch.randn(1, 3, 6, 6).double() if x is None else x
    graph.build_dependency(net, example_inputs=(x,), forward_fn=lambda m, args: m(*args), verbose=False)
    net.train()
    pruner = graph.get_pruner_of_module(module)
    idxs = list(range(pruner.get_out_channels(module))) if idxs is None else idxs
    return graph.get_pruning_group(module, pruning_fn or pruner.prune_out_channels, idxs)


# -- Eq. 2 and 3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make, conv, gate", [(plain_net, 0, 0), (plain_net, 2, 2), (norm_net, 0, 1), (norm_net, 3, 4)])
def test_scores_are_gate_gradients(make, conv, gate, bias):
    net, data = make(), batches()
    scores = accumulated(net, data, alpha=1.7, bias=bias)(group_of(net, net[conv]))
    expected = gate_scores(net, gate, bias, data, alpha=1.7)
    assert scores.dtype == torch.float64 and expected.min() > 0
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=0)


def test_gate_before_batch_norm_would_say_nothing():
    """Why the norm's term is taken: in train mode batch norm undoes the scale of a channel."""
    net, data = norm_net(), batches()
    behind = gate_scores(net, 1, False, data, 1.5)
    net[1].eps = 1e-300
    before = gate_scores(net, 0, False, data, 1.5)
    assert before.max() < 1e-10 * behind.min()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, 1, bias=False),
    ],
    ids=["grouped", "depthwise", "transposed", "transposed grouped", "no bias"],
)
def test_every_kind_of_convolution(layer):
    net = randomised(nn.Conv2d(3, 4, 1), layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    if layer.out_channels == 4:
        net[5] = nn.Linear(4, CLASSES).double()
    data = batches()
    importance = accumulated(net, data, reduction="first")
    group = group_of(net, net[1])
    # a depthwise convolution is in one group with the layer before it: compare its own term
    scores = importance._terms[net[1]] if layer.groups == 4 else importance(group)
    torch.testing.assert_close(scores, gate_scores(net, 1, False, data, 1.5), rtol=1e-10, atol=0)


# -- coupled layers


class Residual(nn.Module):
    """Two convolutions write to one stream; ``norm`` reads it, with or without a way past."""

    def __init__(self, norm: nn.Module, skip_norm: bool = False):
        super().__init__()
        self.stem, self.branch, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), norm
        self.head, self.skip_norm = nn.Linear(6, CLASSES), skip_norm

    def forward(self, x):
        x = self.stem(x)
        x = x + self.branch(x.relu())
        x = self.norm(x) + x if self.skip_norm else self.norm(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("reduction, combine", [("sum", sum), ("mean", lambda t: sum(t) / len(t)), ("max", None)])
def test_reduction_over_the_layers_of_a_stream(reduction, combine):
    net = Residual(nn.Identity()).double()
    importance = accumulated(net, batches(), reduction=reduction)
    terms = [importance._terms[net.stem], importance._terms[net.branch]]
    expected = torch.maximum(*terms) if combine is None else combine(terms)
    torch.testing.assert_close(importance(group_of(net, net.stem)), expected)
    first = accumulated(net, batches(), reduction="first")
    assert torch.equal(first(group_of(net, net.stem)), first._terms[net.stem])


def test_layers_that_only_a_norm_reads_leave_the_score_to_the_norm():
    net = Residual(nn.BatchNorm2d(6)).double().train()
    importance = accumulated(net, batches(), reduction="sum")
    # the stem is also read by the branch, past no norm
    expected = importance._terms[net.norm] + importance._terms[net.stem]
    torch.testing.assert_close(importance(group_of(net, net.stem)), expected)
    net = Residual(nn.BatchNorm2d(6), skip_norm=True).double().train()
    importance = accumulated(net, batches(), reduction="sum")
    expected = sum(importance._terms[layer] for layer in (net.norm, net.stem, net.branch))
    torch.testing.assert_close(importance(group_of(net, net.stem)), expected)


def test_frozen_norm_gives_the_score_back_to_its_convolution():
    net = norm_net().eval()  # running statistics: the gate before the norm has a gradient
    net[1].requires_grad_(False)
    data = batches()
    importance = accumulated(net, data)
    group = group_of(net, net[0])
    torch.testing.assert_close(importance(group), importance._terms[net[0]])
    assert net[1] not in importance._terms


# -- index bookkeeping


def test_scores_follow_the_order_of_the_root_indices():
    net = norm_net()
    importance = accumulated(net, batches())
    every = importance(group_of(net, net[0]))
    assert torch.equal(importance(group_of(net, net[0], idxs=[6, 2, 3])), every[[6, 2, 3]])


def test_scores_belong_to_root_channels_not_to_the_layers_own():
    net = plain_net()
    importance = accumulated(net, batches())
    every = importance(group_of(net, net[2]))
    # the linear layer as the root: its input 4c + p is position p of channel c
    group = group_of(net, net[5], idxs=[4 * c for c in (5, 0, 3)], pruning_fn=function.prune_linear_in_channels)
    assert torch.equal(importance(group), every[[5, 0, 3]])


def test_concatenated_layers_score_their_own_part():
    class Cat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(6, CLASSES, 1)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1).relu()).mean((2, 3))

    net = Cat().double()
    importance = accumulated(net, batches())
    group = group_of(net, net.c, idxs=[5, 0, 2], pruning_fn=function.prune_conv_in_channels)
    a, b = importance._terms[net.a], importance._terms[net.b]
    assert torch.equal(importance(group), torch.stack([b[3], a[0], b[0]]))


# -- as an importance of the toolkit


@pytest.mark.parametrize("make, gates", [(plain_net, (0, 2)), (norm_net, (1, 4))])
@pytest.mark.parametrize("normalizer", [None, "sum"])
def test_base_pruner_keeps_the_channels_with_the_largest_gates(make, gates, normalizer):
    net, data = make(), batches()
    convs = [k for k, layer in enumerate(net) if isinstance(layer, nn.Conv2d)]
    kept = []
    for conv, gate in zip(convs, gates):
        best = gate_scores(net, gate, False, data, 1.5).topk(net[conv].out_channels // 2).indices
        kept.append(best.sort().values)
    before = copy.deepcopy(net)
    importance = accumulated(net, data, normalizer=normalizer)
    pruner = tp.pruner.BasePruner(
        net,
        data[0][0],
        importance,
        pruning_ratio=0.5,
        ignored_layers=[net[-1]],
        pruning_ratio_dict={},
        num_heads={},
        out_channel_groups={},
        in_channel_groups={},
        customized_pruners={},
    )
    pruner.step()
    first, second = convs
    assert torch.equal(net[first].weight, before[first].weight[kept[0]])
    assert torch.equal(net[second].weight, before[second].weight[kept[1]][:, kept[0]])
    assert net(data[0][0]).shape == (5, CLASSES)
    with pytest.raises(SteppingError, match=r"zero\(\)"):
        importance(group_of(net, net[first]))


def test_normalizers_scale_a_group():
    net, data = plain_net(), batches()
    raw = accumulated(net, data)(group_of(net, net[0]))
    for name in ("mean", "sum", "max"):
        scaled = accumulated(net, data, normalizer=name)(group_of(net, net[0]))
        torch.testing.assert_close(scaled * getattr(raw, name)(), raw)
        torch.testing.assert_close(getattr(scaled, name)(), torch.tensor(1.0).double())


# -- mistakes


def test_mistakes_are_named():
    net = plain_net()
    importance = SteppingImportance()
    group = group_of(net, net[0])
    with pytest.raises(SteppingError, match="accumulate"):
        importance(group)
    with pytest.raises(SteppingError, match=r"loss\.backward"):
        importance.accumulate(net)
    importance = accumulated(net, batches(1))
    assert importance(group) is not None
    importance.zero()
    with pytest.raises(SteppingError, match="nothing has been accumulated"):
        importance(group)
    with pytest.raises(SteppingError, match="count from 1"):
        importance.accumulate(net, subnet=0)
    for options in ({"reduction": "median"}, {"normalizer": "lamp"}, {"alpha": 0.0}):
        with pytest.raises(SteppingError):
            SteppingImportance(**options)


def test_group_without_gradients_has_no_score():
    net = plain_net()
    net[0].requires_grad_(False)
    importance = accumulated(net, batches(1))
    net[0].requires_grad_(True)  # the toolkit traces by autograd
    assert importance(group_of(net, net[0])) is None
