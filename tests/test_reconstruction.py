"""Reconstruction: exact where nothing is masked, optimal where something is, and nested as before."""

import copy

import pytest
import timm
import torch
from nets import image_size, images, make, nested, random_levels, randomise, relative
from torch import nn
from torch.nn import functional as F

from stepping_plugin import SteppingError, SteppingNet, apply_steppingnet, verify
from stepping_plugin.construction.widening import widen
from stepping_plugin.reconstruction import fitting
from stepping_plugin.reconstruction import reconstruct as module
from stepping_plugin.reconstruction.leastsquares import Moments, Solver
from stepping_plugin.reconstruction.reconstruct import reconstruct
from stepping_plugin.units.analysis import analyse

# batch norm and residual streams; attention; LayerNorm; depthwise and gates; standardised weights; plain
FAMILIES = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet", "lenet5"]
SIZE = (3, 8, 8)


class Block(nn.Module):
    """Smooth activations, a residual branch, batch norm; small enough that all positions are used."""

    def __init__(self, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 10, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(10)
        self.second = nn.Conv2d(10, 8, 3, padding=1)
        self.act = activation()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.stem(x))
        x = x + self.second(self.act(self.norm(self.first(x))))
        return self.head(self.act(x).mean((2, 3)))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.again, self.head = nn.Linear(192, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = torch.tanh(self.inp(x.flatten(1)))
        return self.head(torch.tanh(self.again(torch.tanh(self.again(x)))))


def block(activation=nn.GELU, kind=Block):
    torch.manual_seed(0)
    return randomise(kind(activation) if kind is Block else kind()).double().eval()


def errors(net: SteppingNet, model: nn.Module, x: torch.Tensor) -> list[float]:
    with torch.no_grad():
        expected = model(x)
        return [float((s - expected).norm() / expected.norm()) for s in net.forward_all(x)]


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    return make(request.param)


@pytest.fixture
def few_samples(monkeypatch):
    monkeypatch.setattr(fitting, "LEAST", 1024)


@pytest.mark.usefixtures("few_samples")
def test_exact_at_level_one(model):
    net, x = nested(model, seed=None), images(image_size(model), batch=4)
    with torch.no_grad():
        before = net.forward_all(x)
        report = reconstruct(net, model, x)
        assert relative(net.forward_all(x), before) < 1e-6
    assert report.layers and all(v is None or v > 1 - 1e-6 for layer in report.layers for v in layer.r2)


@pytest.mark.usefixtures("few_samples")
def test_nearer_to_the_original_and_nested_as_before(model):
    net, x = nested(model, seed=0), images(image_size(model), batch=4)
    levels, gradients = net.levels, [p.requires_grad for p in net.parameters()]
    before = errors(net, model, x)
    reconstruct(net, model, x)
    assert all(a < b for a, b in zip(errors(net, model, x), before))
    assert max(verify(net, engine=False).leak) < 1e-9
    assert torch.equal(net.levels, levels) and [p.requires_grad for p in net.parameters()] == gradients
    assert all(p.dtype == torch.float64 for p in net.parameters())
    for name in net.analysis.weight_units:
        assert torch.equal(getattr(net, net._masks[name]), net.live_mask(name, levels)), name


def test_a_widened_and_compacted_net():
    """Every unit is fitted to the one it descends from, wherever that was."""
    model, x = block(), images(SIZE, batch=12)
    wide = widen(model, analyse(model, SIZE), 1.5, noise=1.0)
    ones = torch.ones(wide.analysis.num_units, dtype=torch.long)
    net = SteppingNet(wide.model, wide.analysis, ones, [1, 2], 1, lineage=[wide.copies]).eval()
    reconstruct(net, model, x)
    assert max(errors(net, model, x)) < 1e-6
    net.set_levels(random_levels(net.analysis, 2, spare=True))
    net = net.compact()
    before = errors(net, model, x)
    reconstruct(net, model, x)
    assert all(a < b for a, b in zip(errors(net, model, x), before))


def test_one_shot_conversion_with_images():
    model, x = block(), images(SIZE, batch=64)
    cut, fitted = (apply_steppingnet(model, [0.3, 0.6], example_inputs=x, calibration=c) for c in (None, x))
    assert torch.equal(cut.levels, fitted.levels)
    assert all(a < b for a, b in zip(errors(fitted, model, x), errors(cut, model, x)))


# ------------------------------------------------------------------------------------------------- optimality


def test_what_is_left_is_orthogonal_to_all_allowed_inputs():
    """The normal equations, with the layers computed by hand."""
    model, x = block(), images(SIZE, batch=12)
    net = nested(model, n=3, size=SIZE)
    reconstruct(net, model, x, ridge=0.0)
    own, masks = net.model, {n: net.live_mask(f"{n}.weight", net.levels) for n in ("stem", "first", "second")}
    with torch.no_grad():
        conv = lambda layer, value, name: F.conv2d(value, layer.weight * masks[name], layer.bias, padding=1)  # noqa: E731
        stem, hidden = F.gelu(conv(own.stem, x, "stem")), F.gelu(model.stem(x))
        first = own.norm(conv(own.first, stem, "first"))
        inner = F.gelu(first)
        total = stem + conv(own.second, inner, "second")
        wanted = model.norm(model.first(hidden))
        _orthogonal(wanted - first, stem, masks["first"])
        _orthogonal(hidden + model.second(F.gelu(wanted)) - total, inner, masks["second"])


def _orthogonal(rest: torch.Tensor, inputs: torch.Tensor, mask: torch.Tensor) -> None:
    rest = rest.transpose(0, 1).flatten(1)
    patches = F.unfold(inputs, 3, padding=1).transpose(0, 1).flatten(1)
    product = (rest @ patches.t() / rest.shape[1]).unflatten(1, (inputs.shape[1], 9))
    scale = rest.square().mean().sqrt() * patches.square().mean().sqrt()
    assert float((product * mask.flatten(1)[:, :, None]).abs().max()) < 1e-7 * float(scale)
    assert float(product.abs().max()) > 1e-4 * float(scale), "dead synapses would help, or the check is vacuous"
    assert float(rest.mean(1).abs().max()) < 1e-9


def test_train_mode_agrees_with_eval_mode():
    model, x = block(), images(SIZE, batch=12)
    net = nested(model, n=3, size=SIZE)
    reconstruct(net, model, x)
    with torch.no_grad():
        expected = net.eval().forward_all(x)
        assert relative(net.train().forward_all(x), expected) < 1e-9


def test_what_a_relu_cuts_off_need_not_be_met(monkeypatch):
    model, x = block(nn.ReLU), images(SIZE, batch=24)
    left = []
    for rounds in (0, 4):
        monkeypatch.setattr(fitting, "ROUNDS", rounds)
        net = nested(model, n=3, size=SIZE)
        reconstruct(net, model, x, ridge=0.0)
        with torch.no_grad():
            own = F.conv2d(x, net.model.stem.weight, net.model.stem.bias, padding=1)
            hidden = torch.relu(net.model.norm(F.conv2d(torch.relu(own), _masked(net, "first"), padding=1)))
            wanted = torch.relu(model.norm(model.first(torch.relu(model.stem(x)))))
        left.append(float((hidden - wanted).square().sum()))
    assert left[1] < left[0]


def _masked(net: SteppingNet, name: str) -> torch.Tensor:
    return net.model.get_submodule(name).weight * net.live_mask(f"{name}.weight", net.levels)


def test_classifier_lowers_the_divergence_of_every_net_together(monkeypatch):
    model, x = block(), images(SIZE, batch=24)
    with torch.no_grad():
        model.head.weight.mul_(50)  # scores that differ
    found = []
    for fit in (lambda *_: None, module.fit_classifier):
        monkeypatch.setattr(module, "fit_classifier", fit)
        net = nested(model, n=3, size=SIZE)
        reconstruct(net, model, x)
        with torch.no_grad():
            wanted = model(x).log_softmax(-1).expand(3, -1, -1)
            found.append(float(F.kl_div(net.forward_all(x).log_softmax(-1), wanted, log_target=True, reduction="sum")))
    assert found[1] < found[0]


# ------------------------------------------------------------------------------------------------- sums


def test_sums_over_blocks_equal_those_of_all_samples():
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.randn(200, 2, d, generator=generator, dtype=torch.float64) for d in (7, 3))
    parts, whole = (Moments(2, 7, 3, True, torch.device("cpu")) for _ in range(2))
    whole.add(x, t)
    for a, b in zip(x.split(33), t.split(33)):
        parts.add(a, b)
    inputs, targets, prior = torch.tensor([0, 2, 5]), torch.tensor([0, 2]), torch.zeros(2, 2, 3)
    solved = [Solver(m, inputs, 0.0).solve(prior, targets) for m in (parts, whole)]
    torch.testing.assert_close(solved[0], solved[1], rtol=1e-10, atol=1e-12)
    design = torch.cat([x[:, 1, inputs], torch.ones(200, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(design, t[:, 1, targets]).solution.t()
    torch.testing.assert_close(solved[0][1], expected[:, :-1], rtol=1e-6, atol=1e-8)


def test_singular_sums_keep_the_prior_where_nothing_is_known():
    x = torch.zeros(50, 1, 4, dtype=torch.float64)
    x[:, 0, :2] = torch.randn(50, 1, dtype=torch.float64)  # two equal inputs, two constant ones
    moments = Moments(1, 4, 1, False, torch.device("cpu"))
    moments.add(x, 2 * x[:, :, :1])
    prior = torch.tensor([[[0.5, 0.5, 3.0, -3.0]]], dtype=torch.float64)
    solved = Solver(moments, torch.arange(4), 0.0).solve(prior, torch.arange(1))
    torch.testing.assert_close(solved, torch.tensor([[[1.0, 1.0, 3.0, -3.0]]], dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_memory_limit_leaves_images_out_and_says_so():
    model, x = block(), images(SIZE, batch=100)
    net = nested(model, n=3, size=SIZE)
    before = errors(net, model, x)
    report = reconstruct(net, model, x, limit=100 * SIZE[1] * SIZE[2] * 8 * 8)
    pictures = [layer.pictures for layer in report.layers]
    assert pictures[0] < 100 and pictures == sorted(pictures) and any("fewer than the 100" in n for n in report.notes)
    assert all(a < b for a, b in zip(errors(net, model, x), before))


# ------------------------------------------------------------------------------------------------- what is said


def test_batches_with_labels_give_the_same_as_one_tensor():
    model, x = block(), images(SIZE, batch=64)
    nets = [nested(model, n=3, size=SIZE) for _ in range(2)]
    lines: list[str] = []
    reconstruct(nets[0], model, x)
    reconstruct(nets[1], model, [(part, torch.zeros(len(part))) for part in x.split(32)], say=lines.append)
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values()):
        torch.testing.assert_close(a, b)
    assert not lines, "nothing is said about what takes less than five seconds"


def test_units_that_never_fire_are_reported():
    model = block(nn.ReLU)
    with torch.no_grad():
        model.norm.bias[3] = -100.0
    report = reconstruct(nested(model, n=3, size=SIZE), model, images(SIZE, batch=8))
    assert report.dead == {"first": [3]} and any("1 in first" in note for note in report.notes)


def test_a_layer_with_two_call_sites_is_left_alone():
    model = block(kind=Reused)
    net = nested(model, n=3, size=SIZE)
    before = copy.deepcopy(net.model.again.state_dict())
    report = reconstruct(net, model, images(SIZE, batch=8))
    assert "several places" in report.left_alone["again"] and "again" in str(report)
    assert all(torch.equal(before[k], v) for k, v in net.model.again.state_dict().items())


def test_few_samples_are_said():
    model = block(kind=Reused)
    report = reconstruct(nested(model, n=3, size=SIZE), model, images(SIZE, batch=8))
    assert any("fewer samples than unknowns" in note for note in report.notes)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (torch.zeros(2, 3, 9, 9), "expected images"),
        ([torch.zeros(3, 8, 8)], "expected images"),
        (["cat.png"], "got str"),
        ([], "there are none"),
        (torch.zeros(0, 3, 8, 8), "there are none"),
        (torch.full((2, 3, 8, 8), torch.nan), "not finite"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8"),
    ],
)
def test_unusable_images(given, text):
    model = block()
    net = nested(model, n=3, size=SIZE)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(SteppingError, match=text):
        reconstruct(net, model, given)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_another_original_is_refused():
    model, other = block(), block()
    other.second = nn.Conv2d(10, 8, 1)
    with pytest.raises(SteppingError, match="second"):
        reconstruct(nested(model, n=3, size=SIZE), other, images(SIZE))
    with pytest.raises(SteppingError, match="ridge"):
        reconstruct(nested(model, n=3, size=SIZE), model, images(SIZE), ridge=-1.0)


def test_branches_that_start_at_zero_are_fitted_too():
    """Residual nets are initialised with a factor of 0 in the last norm of every branch."""
    torch.manual_seed(0)
    model = timm.create_model("resnet_tiny").eval()
    for block in (model.layer1, model.layer2, model.layer3):
        nn.init.zeros_(block.bn2.weight)
    x = torch.randn(24, 3, 32, 32)
    net = apply_steppingnet(model, ["30%", "60%"], example_inputs=x, calibration=x).eval()
    with torch.no_grad():
        assert bool(net.forward_all(x).isfinite().all())
    assert all(bool(p.isfinite().all()) for p in net.parameters())
