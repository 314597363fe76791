"""Eq. 4 and weight-update suppression (III-A2) against independent computations in float64."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stepping_plugin.integrations.timm  # noqa: F401 (registers the paper's networks)
from stepping_plugin.errors import SteppingError
from stepping_plugin.net import SteppingNet
from stepping_plugin.training.losses import SubnetLoss, cross_entropy, distillation
from stepping_plugin.training.suppression import Suppression, parameter_units
from stepping_plugin.units.analysis import Analysis, analyse

N, B, C = 3, 5, 7
ZEROS = (torch.zeros(N, B, C), torch.zeros(B).long())


def scores_and_labels() -> tuple[Tensor, Tensor]:
    return torch.randn(N, B, C, dtype=torch.float64, requires_grad=True), torch.randint(0, C, (B,))


# --- Eq. 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_is_that_of_every_subnet(soft, smoothing):
    scores, labels = scores_and_labels()
    target = torch.rand(B, C, dtype=torch.float64).softmax(-1) if soft else labels
    expected = [F.cross_entropy(s, target, label_smoothing=smoothing) for s in scores]
    torch.testing.assert_close(cross_entropy(scores, target, smoothing), torch.stack(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_divergence_from_teacher_to_subnet(temperature):
    scores, _ = scores_and_labels()
    teacher = torch.randn(B, C, dtype=torch.float64)
    p, q = (teacher / temperature).softmax(-1), (scores / temperature).softmax(-1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean(-1)
    torch.testing.assert_close(distillation(scores, teacher, temperature), expected, rtol=1e-12, atol=0)
    assert distillation(teacher.expand(N, B, C), teacher, temperature).abs().max() < 1e-14


def test_distillation_draws_the_subnets_to_the_teacher_and_the_printed_sign_drives_them_away():
    scores, _ = scores_and_labels()
    teacher = torch.randn(B, C, dtype=torch.float64)

    def distance(s: Tensor) -> Tensor:
        return (s.softmax(-1) - teacher.softmax(-1)).abs().sum((1, 2))

    (gradient,) = torch.autograd.grad(distillation(scores, teacher).sum(), scores)
    assert (distance(scores - 0.1 * gradient) < distance(scores)).all()
    y, y_pre = scores.softmax(-1), teacher.softmax(-1)
    (gradient,) = torch.autograd.grad((y * (y_pre / y).log()).sum(), scores)  # Eq. 4 as printed
    assert (distance(scores - 0.1 * gradient) > distance(scores)).all()


def test_gamma_and_temperature_map_to_timm():
    task = pytest.importorskip("timm.task")
    student, teacher = (timm.create_model("digits_net", num_classes=C).double().eval() for _ in range(2))
    timm_loss = task.LogitDistillationTask(
        student, teacher, criterion=nn.CrossEntropyLoss(), task_loss_weight=0.3, temperature=4.0,
        dtype=torch.float64, verbose=False,
    )  # fmt: skip
    x, labels = torch.randn(B, 1, 8, 8, dtype=torch.float64), torch.randint(0, C, (B,))
    ours = SubnetLoss(gamma=0.3, temperature=4.0)(student(x)[None], labels, teacher(x))
    torch.testing.assert_close(ours[0], timm_loss(x, labels)["loss"], rtol=1e-12, atol=0)


def test_subnet_loss_mixes_both_terms_and_without_a_teacher_ignores_gamma():
    scores, labels = scores_and_labels()
    teacher = torch.randn(B, C, dtype=torch.float64)
    hard, soft = cross_entropy(scores, labels, 0.1), distillation(scores, teacher, 2.0)
    loss = SubnetLoss(gamma=0.4, temperature=2.0, smoothing=0.1)
    torch.testing.assert_close(loss(scores, labels, teacher), 0.4 * hard + 0.6 * soft)
    torch.testing.assert_close(loss(scores, labels), hard)
    weighted = SubnetLoss(smoothing=0.1, weights=[1, 2, 0.5])
    torch.testing.assert_close(weighted(scores, labels), hard * torch.tensor([1, 2, 0.5], dtype=torch.float64))


def test_in_place_distillation_leaves_the_largest_subnet_to_its_labels():
    scores, labels = scores_and_labels()
    losses = SubnetLoss(gamma=0.4, from_largest=True)(scores, labels)
    expected = 0.4 * cross_entropy(scores, labels) + 0.6 * distillation(scores, scores[-1])
    torch.testing.assert_close(losses[:-1], expected[:-1])
    (got,) = torch.autograd.grad(losses.sum(), scores)
    (alone,) = torch.autograd.grad(cross_entropy(scores, labels)[-1], scores)
    assert torch.equal(got[-1], alone[-1])
    assert (got[:-1] != 0).any()


def test_half_precision_scores_give_float32_losses():
    scores, labels = torch.randn(N, B, C), torch.randint(0, C, (B,))
    teacher = torch.randn(B, C)
    loss = SubnetLoss()
    low = loss(scores.bfloat16(), labels, teacher.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss(scores.bfloat16().float(), labels, teacher.bfloat16().float()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SubnetLoss(gamma=1.2), ["gamma", "1.2"]),
        (lambda: SubnetLoss(temperature=0), ["temperature", "above 0"]),
        (lambda: SubnetLoss(smoothing=1.0), ["smoothing"]),
        (lambda: SubnetLoss(weights=[1, 2])(*ZEROS), ["weights", "3 numbers"]),
        (lambda: SubnetLoss()(*ZEROS, torch.zeros(B, 9)), ["teacher", "(5, 9)", "(5, 7)"]),
        (lambda: SubnetLoss(from_largest=True)(*ZEROS, torch.zeros(B, C)), ["from_largest"]),
    ],
)  # fmt: skip
def test_mistakes_are_named(make, words):
    with pytest.raises(SteppingError) as caught:
        make()
    assert all(word in str(caught.value) for word in words)


# --- Suppression


class Gated(nn.Module):
    """Depthwise and transposed convolution, batch norm, squeeze and excitation, residual, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.scale = (
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
            nn.Parameter(torch.randn(12, 1, 1)),
        )
        self.squeeze, self.excite = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.up, self.head = nn.ConvTranspose2d(12, 9, 2), nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.depthwise(x) * self.scale
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(self.up(x + y).tanh().mean((2, 3)))


class Transposed(nn.Module):
    """Weights that are turned before use, the classifier's too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3)
        self.hidden, self.head = nn.Parameter(torch.randn(12, 9)), nn.Parameter(torch.randn(9, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = (self.stem(x).tanh().mean((2, 3)) @ self.hidden).tanh()
        return nn.functional.linear(x, self.head.t())


NETS: dict[str, tuple] = {
    "transposed weights": (Transposed, {}, (1, 6, 6)),
    "conv and batch norm": ("lenet3c1l", {"width_mult": 0.5}, (3, 32, 32)),
    "depthwise, gates, scales": (Gated, {}, (1, 6, 6)),
    "residual": ("resnet_tiny", {}, (3, 16, 16)),
    "layer norm and attention": (
        "test_vit",
        {"img_size": 32, "depth": 2, "dynamic_img_size": False},
        (3, 32, 32),
    ),
    "no norm": ("lenet5", {"in_chans": 1, "img_size": 28}, (1, 28, 28)),
}
_known: dict[str, tuple[nn.Module, Analysis]] = {}


def random_net(kind: str, n: int) -> SteppingNet:
    """Random levels with spare units, every group having units at level 1."""
    name, kwargs, size = NETS[kind]
    if kind not in _known:
        model = name() if isinstance(name, type) else timm.create_model(name, num_classes=10, **kwargs)
        model = model.double()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # away from zeros and ones
                nn.init.normal_(parameter, std=0.3)
        _known[kind] = model, analyse(model, size)
    model, analysis = _known[kind]
    levels = torch.randint(1, n + 2, (analysis.num_units,))
    for group in analysis.groups:
        levels[group.units[:2]] = 1
        if len(group.units) == 2:  # attention heads: one of level 2, so that no token channel of level 2 is idle
            levels[group.units[1]] = 2
    return SteppingNet(copy.deepcopy(model), analysis, levels, [1] * n, 1).train()


def batch(net: SteppingNet) -> tuple[Tensor, Tensor]:
    return torch.randn(8, *net.analysis.image_size, dtype=torch.float64), torch.randint(0, 10, (8,))


def gradients(net: SteppingNet, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.model.named_parameters()}  # type: ignore[union-attr]


def first_use(per_subnet: list[dict[str, Tensor]], name: str) -> Tensor:
    """Level of every element of a parameter without any bookkeeping: the first loss that depends on it."""
    used = torch.stack([g[name] != 0 for g in per_subnet])
    return torch.where(used.any(0), used.to(torch.uint8).argmax(0) + 1, len(per_subnet)).double()


@pytest.mark.parametrize("kind", NETS)
def test_one_pass_equals_the_sum_of_separate_suppressed_gradients(kind):
    n, beta = 3, 0.9
    net = random_net(kind, n)
    images, labels = batch(net)
    loss = SubnetLoss(smoothing=0.1)
    separate = [gradients(net, loss(net.forward_all(images), labels)[j]) for j in range(n)]
    suppression = Suppression(net, beta, mode="gradient")
    gradients(net, suppression.combine(loss(net.forward_all(images), labels)))
    suppression.scale_gradients()
    size = max(float(g.abs().max()) for gs in separate for g in gs.values())
    levels_seen = set()
    for name, parameter in net.model.named_parameters():
        level = first_use(separate, name)
        levels_seen |= set(level.unique().tolist())
        expected = sum(beta ** (j - level).clamp(min=0) * separate[j - 1][name] for j in range(1, n + 1))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-10 * size, msg=name)
    assert levels_seen == {1.0, 2.0, 3.0}


def test_sequential_form_scales_each_gradient_by_beta_to_the_distance():
    n, beta = 3, 0.5
    net = random_net("no norm", n)
    images, labels = batch(net)
    separate = [gradients(net, cross_entropy(net.forward_all(images), labels)[j]) for j in range(n)]
    suppression = Suppression(net, beta, mode="gradient")
    for j in range(1, n + 1):
        gradients(net, cross_entropy(net.forward_all(images), labels)[j - 1])
        suppression.scale_gradients(j)
        for name, parameter in net.model.named_parameters():
            expected = separate[j - 1][name] * beta ** (j - first_use(separate, name)).clamp(min=0)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-15)


def test_factors_follow_the_levels_and_a_loaded_state():
    net = random_net("no norm", 3)
    images, labels = batch(net)
    suppression = Suppression(net, 0.8, mode="gradient")

    def scaled(tool: Suppression) -> dict[str, Tensor]:
        gradients(net, tool.combine(cross_entropy(net.forward_all(images), labels)))
        tool.scale_gradients()
        return {name: p.grad.clone() for name, p in net.model.named_parameters()}  # type: ignore[union-attr]

    before, state = scaled(suppression), {k: v.clone() for k, v in net.state_dict().items()}
    net.set_levels(random_net("no norm", 3).levels)
    moved = scaled(suppression)
    fresh = scaled(Suppression(net, 0.8, mode="gradient"))
    assert all(torch.equal(moved[k], fresh[k]) for k in fresh)
    assert any(not torch.equal(moved[k], before[k]) for k in fresh)
    net.load_state_dict(state)
    again = scaled(suppression)
    assert all(torch.equal(again[k], before[k]) for k in fresh)


def mean_factor(level: Tensor, n: int, beta: float) -> Tensor:
    table = [sum(beta ** (j - s) for j in range(s, n + 1)) / (n - s + 1) for s in range(1, n + 1)]
    return torch.tensor(table, dtype=torch.float64)[level.long() - 1]


def test_adam_undoes_a_gradient_factor_and_takes_a_scaled_step():
    n, beta, lr = 3, 0.5, 1e-3
    net = random_net("no norm", n)
    images, labels = batch(net)
    separate = [gradients(net, cross_entropy(net.forward_all(images), labels)[j]) for j in range(n)]
    start = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    lengths = {}
    for mode in ("gradient", "auto"):
        net.model.load_state_dict(start, strict=False)
        optimizer = torch.optim.Adam(net.model.parameters(), lr=lr, eps=1e-30)
        suppression = Suppression(net, beta, mode, optimizer)
        gradients(net, suppression.combine(cross_entropy(net.forward_all(images), labels)))
        suppression.scale_gradients()
        with suppression.step():
            optimizer.step()
        lengths[mode] = {name: (p.detach() - start[name]).abs() for name, p in net.model.named_parameters()}
    assert suppression.mode == "step"
    checked = 0
    for name in start:  # Adam's first step is lr * sign(gradient)
        moved = sum(g[name].abs() for g in separate) > 0
        level = first_use(separate, name)[moved]
        torch.testing.assert_close(lengths["gradient"][name][moved], torch.full_like(level, lr), rtol=1e-9, atol=0)
        expected = lr * mean_factor(level, n, beta)
        torch.testing.assert_close(lengths["auto"][name][moved], expected, rtol=1e-9, atol=0)
        checked += len(level)
    assert checked > 1000


def test_step_scaling_keeps_the_largest_level_to_the_bit_and_sequential_steps_stay_inside_their_subnet():
    net = random_net("no norm", 3)
    units = parameter_units(net)
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    suppression = Suppression(net, 0.9, mode="step")
    for subnet in (None, 2):
        net.model.load_state_dict(before, strict=False)
        with suppression.step(subnet), torch.no_grad():
            for p in net.model.parameters():
                p.add_(math.pi)
        for name, p in net.model.named_parameters():
            known = units[name].expand_as(p)
            level = torch.where(known >= 0, net.levels[known.clamp(min=0)], 1)
            if subnet is None:
                top = level >= 3
                assert torch.equal(p.detach()[top], (before[name] + math.pi)[top])
                assert ((p.detach() - before[name])[~top] < math.pi - 1e-3).all()
            else:
                assert torch.equal(p.detach()[level > 2], before[name][level > 2])
                factor = (p.detach() - before[name])[level <= 2] / math.pi
                torch.testing.assert_close(factor, 0.9 ** (2 - level[level <= 2]).double(), rtol=1e-9, atol=0)


def test_beta_one_suppresses_nothing():
    net = random_net("no norm", 3)
    images, labels = batch(net)
    plain = gradients(net, cross_entropy(net.forward_all(images), labels).sum())
    for mode in ("gradient", "step"):
        suppression = Suppression(net, 1.0, mode)
        gradients(net, suppression.combine(list(cross_entropy(net.forward_all(images), labels))))
        suppression.scale_gradients()
        assert all(torch.equal(p.grad, plain[name]) for name, p in net.model.named_parameters())


@pytest.mark.parametrize(
    ("opt", "mode"),
    [("sgd", "gradient"), ("momentum", "gradient"), ("sgdw", "gradient"), ("lookahead_sgd", "gradient"),
     ("adamw", "step"), ("lion", "step"), ("lamb", "step"), ("rmsproptf", "step"),
     ("lookahead_adamw", "step")],
)  # fmt: skip
def test_the_mode_suits_the_optimizer(opt, mode):
    net = random_net("no norm", 2)
    optimizer = timm.optim.create_optimizer_v2(net.model, opt, lr=0.1)
    assert Suppression(net, 0.9, optimizer=optimizer).mode == mode


@pytest.mark.parametrize(("beta", "mode"), [(0.0, "step"), (1.5, "step"), (0.9, "auto"), (0.9, "other")])
def test_impossible_suppression_is_refused(beta, mode):
    with pytest.raises(SteppingError, match=r"beta|mode"):
        Suppression(random_net("no norm", 2), beta, mode)
