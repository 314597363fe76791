"""Eq. 2 and 3 against networks written out by hand, with explicit factors r_j."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepping_plugin.construction.gradient_importance import GradientImportance
from stepping_plugin.net import SteppingNet
from stepping_plugin.training.losses import cross_entropy
from stepping_plugin.units.analysis import analyse

N, BATCH, CLASSES = 3, 5, 4


class ByHand(nn.Module):
    """conv - norm - tanh - conv - norm - tanh - linear, as an ordinary model and as subnets with factors."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        norms = {"plain": nn.Identity, "batch": nn.BatchNorm2d, "layer": nn.LayerNorm}
        self.kind = kind
        self.conv1, self.norm1 = nn.Conv2d(2, 6, 3), norms[kind](6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3), norms[kind](8)
        self.head = nn.Linear(8, CLASSES)

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.movedim(1, -1)).movedim(-1, 1) if self.kind == "layer" else norm(x)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self._norm(self.norm1, self.conv1(x)))
        x = torch.tanh(self._norm(self.norm2, self.conv2(x)))
        return self.head(x.mean((2, 3)))

    def subnet(self, x: Tensor, k: int, levels: list[Tensor], factors: list[Tensor]) -> Tensor:
        """Scores of subnet k; `factors` are r_j per sample, Tensor[B, channels] for both layers (Eq. 1)."""
        level = torch.ones(x.shape[1])
        for conv, norm, own, r in zip((self.conv1, self.conv2), (self.norm1, self.norm2), levels, factors):
            live = level[None, :] <= own[:, None]
            z = F.conv2d(x, conv.weight * live[:, :, None, None])
            bias = conv.bias[:, None, None]
            if self.kind == "plain":
                x = r[:, :, None, None] * z + bias
            else:
                normal = self._normal(z + bias, own, norm.eps) * norm.weight[:, None, None]
                x = r[:, :, None, None] * normal + norm.bias[:, None, None]
            x, level = torch.tanh(x), own
        return (x.mean((2, 3)) * (level <= k)) @ self.head.weight.T + self.head.bias

    def _normal(self, x: Tensor, levels: Tensor, eps: float) -> Tensor:
        if self.kind == "batch":
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
            return (x - mean) / (var + eps).sqrt()
        channels = []
        for channel, level in enumerate(levels.tolist()):  # each with the statistics of what it may read
            seen = x[:, levels <= level]
            centred = x[:, channel] - seen.mean(1)
            channels.append(centred / (seen.var(1, correction=0) + eps).sqrt())
        return torch.stack(channels, 1)


def prepared(kind: str) -> tuple[ByHand, SteppingNet, list[Tensor], Tensor, Tensor]:
    model = nets.randomise(ByHand(kind)).double()
    analysis = analyse(model, (2, 7, 7))
    levels = torch.arange(analysis.num_units) % (N + 1) + 1  # every level in both layers, spare units too
    net = SteppingNet(copy.deepcopy(model), analysis, levels, [1, 2, 3], 1).train()
    units = [analysis.weight_units[f"conv{layer}.weight"][0] for layer in (1, 2)]
    labels = torch.arange(BATCH) % CLASSES
    return model, net, units, nets.images((2, 7, 7), BATCH), labels


def measured(net: SteppingNet, estimator: str, images: Tensor, labels: Tensor, reduce=None) -> Tensor:
    importance = GradientImportance(net, estimator, reduce)
    importance.add(images, lambda scores: cross_entropy(scores, labels))
    return importance.gradients


def by_factors(model: ByHand, net: SteppingNet, units: list[Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """dL_k/dr_j per sample, (N, B, num_units)."""
    result = torch.zeros(N, len(images), net.analysis.num_units, dtype=torch.float64)
    levels = [net.levels[u] for u in units]
    for k in range(1, N + 1):
        factors = [torch.ones(len(images), len(u), dtype=torch.float64, requires_grad=True) for u in units]
        loss = F.cross_entropy(model.subnet(images, k, levels, factors), labels)
        for u, gradient in zip(units, torch.autograd.grad(loss, factors)):
            result[k - 1][:, u] = gradient
    return result


@pytest.mark.parametrize("kind", ["plain", "batch", "layer"])
def test_gradients_are_those_of_explicit_factors(kind):
    model, net, units, images, labels = prepared(kind)
    expected = by_factors(model, net, units, images, labels)
    per_sample = measured(net, "per-sample", images, labels)
    per_batch = measured(net, "per-batch", images, labels)
    torch.testing.assert_close(per_sample, expected.abs().sum(1), rtol=0, atol=1e-10)
    torch.testing.assert_close(per_batch, expected.sum(1).abs(), rtol=0, atol=1e-10)
    inside = torch.stack([net.levels <= k for k in range(1, N + 1)])
    assert bool((per_sample[inside] > 1e-6).all()) and not bool(per_sample[~inside].any())


@pytest.mark.parametrize("kind", ["plain", "batch", "layer"])
def test_they_are_sums_over_weights(kind):
    """sum of w * dL/dw over the incoming weights, or gamma * dL/dgamma."""
    _, net, units, images, labels = prepared(kind)
    got = measured(net, "per-batch", images, labels)
    losses = cross_entropy(net.forward_all(images), labels)
    for k in range(N):
        for layer, u in zip((1, 2), units):
            weight = net.model.get_submodule(f"{'conv' if kind == 'plain' else 'norm'}{layer}").weight
            (gradient,) = torch.autograd.grad(losses[k], weight, retain_graph=True)
            expected = (weight * gradient).flatten(1).sum(1) if weight.dim() > 1 else weight * gradient
            torch.testing.assert_close(got[k, u], expected.abs(), rtol=0, atol=1e-10)


def test_before_a_batch_norm_a_factor_has_no_gradient():
    """Why the factor stands behind the norm."""
    _, net, units, images, labels = prepared("batch")
    losses = cross_entropy(net.forward_all(images), labels)
    (gradient,) = torch.autograd.grad(losses[-1], net.model.conv2.weight)
    before = (net.model.conv2.weight * gradient).flatten(1).sum(1).abs()
    behind = measured(net, "per-batch", images, labels)[-1, units[1]]
    assert float(before.detach().max()) < 1e-3 * float(behind.max())  # not 0 because of eps


def test_a_unit_of_several_layers_has_the_sum_of_their_gradients():
    net = nets.nested(nets.make("resnet_tiny", num_classes=CLASSES), N, size=(3, 8, 8)).train()
    images, labels = nets.images((3, 8, 8), BATCH), torch.arange(BATCH) % CLASSES
    got = measured(net, "per-batch", images, labels)
    losses = cross_entropy(net.forward_all(images), labels)
    expected = torch.zeros_like(got)
    names = [name for name, module in net.model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(names) == 9  # the units of a stream have two or three of them
    for name in names:
        gamma = net.model.get_submodule(name).weight
        units = net.analysis.param_units[f"{name}.weight"][1]
        for k in range(N):
            (gradient,) = torch.autograd.grad(losses[k], gamma, retain_graph=True)
            expected[k].index_add_(0, units, (gamma * gradient).detach())
    torch.testing.assert_close(got, expected.abs(), rtol=0, atol=1e-10)


def test_a_head_has_the_sum_over_its_rows():
    model = nets.make("test_vit", img_size=32, num_classes=CLASSES)
    net = nets.nested(model, N, size=(3, 32, 32)).train()
    images, labels = nets.images((3, 32, 32), BATCH), torch.arange(BATCH) % CLASSES
    got = measured(net, "per-batch", images, labels)
    losses = cross_entropy(net.forward_all(images), labels)
    weight = net.model.blocks[1].attn.qkv.weight
    units = net.analysis.weight_units["blocks.1.attn.qkv.weight"][0]
    assert len(torch.unique(units)) == model.blocks[1].attn.num_heads
    for k in range(N):
        (gradient,) = torch.autograd.grad(losses[k], weight, retain_graph=True)
        rows = (weight * gradient).detach().sum(1)
        expected = torch.zeros(net.analysis.num_units, dtype=torch.float64).index_add_(0, units, rows)
        heads = torch.unique(units)
        torch.testing.assert_close(got[k, heads], expected[heads].abs(), rtol=0, atol=1e-10)


def test_evaluation_leaves_the_net_as_it_is():
    _, net, _, images, labels = prepared("batch")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    importance = GradientImportance(net)
    for _ in range(2):
        importance.add(images, lambda scores: cross_entropy(scores, labels))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(importance.gradients, measured(net, "per-sample", images, labels))
    importance.reset()
    assert not bool(importance.gradients.any())


def test_frozen_parameters_do_not_matter():
    _, net, _, images, labels = prepared("plain")
    expected = measured(net, "per-sample", images, labels)
    net.requires_grad_(False)
    assert torch.equal(measured(net, "per-sample", images, labels), expected)


def test_absolute_values_are_not_taken_of_sums_over_batches():
    _, net, _, images, labels = prepared("plain")
    importance = GradientImportance(net, "per-batch")
    for part in (slice(0, 2), slice(2, 4)):
        importance.add(images[part], lambda scores, part=part: cross_entropy(scores, labels[part]))
    each = [measured(net, "per-batch", images[part], labels[part]) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(importance.gradients, (each[0] + each[1]) / 2)
    whole = measured(net, "per-batch", images[:4], labels[:4])
    assert bool((whole < importance.gradients - 1e-6).any())


@pytest.mark.parametrize("estimator", ["per-sample", "per-batch"])
def test_processes_with_shares_of_a_batch_get_what_one_gets(estimator):
    _, net, _, images, labels = prepared("layer")
    sent: list[list[Tensor]] = []
    for part in (slice(0, 2), slice(2, 4)):
        sent.append([])
        measured(net, estimator, images[part], labels[part], lambda t: sent[-1].append(t) or t)
    means = iter([(a + b) / 2 for a, b in zip(*sent)])
    got = measured(net, estimator, images[:2], labels[:2], lambda t: next(means))
    torch.testing.assert_close(got, measured(net, estimator, images[:4], labels[:4]), rtol=0, atol=1e-12)
