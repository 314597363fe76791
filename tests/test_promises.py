"""What nets, engines and sessions promise their callers: own images, own structure, copies, modes, clear refusals."""

import copy
import io
import multiprocessing
import pickle
import re

import pytest
import timm
import torch
from nets import Plain
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from stepping_plugin import CaptureError, SteppingError, apply_steppingnet, load, verify
from stepping_plugin.engine import load_engine
from stepping_plugin.graph.images import image_size_of

IMAGE = torch.zeros(1, 3, 16, 16)


def plain(**options):
    torch.manual_seed(0)
    return apply_steppingnet(Plain().eval(), ["30%", "60%"], example_inputs=IMAGE, **options)


@pytest.fixture(scope="module")
def net():
    return plain()


@pytest.fixture(scope="module")
def x():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------- images


def test_a_session_owns_its_images_and_borrows_on_request():
    """The second step reads the images again (those of one channel are not laid out anew in the first)."""
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    model, images = nn.Sequential(*layers).eval(), torch.randn(4, 1, 16, 16)
    engine = apply_steppingnet(model, ["40%", "80%"], example_inputs=images).deploy()
    expected = list(engine.steps(images))[-1]
    for borrow in (False, True):
        buffer = images.clone()
        session = engine.start(buffer, borrow=borrow)
        buffer.zero_()
        assert torch.equal(session.step(), expected) is not borrow


def test_what_is_no_image_is_refused(net, x):
    engine = net.deploy()
    with pytest.raises(SteppingError, match="dense"):
        engine.start(x.to_sparse())
    for options in ({"batch_size": -1}, {"repeats": 0}, {"batch_size": 1.5}):
        with pytest.raises(SteppingError, match="an integer above 0"):
            engine.calibrate(**options)


# ------------------------------------------------------------------------------------------------- structure


def replace_head(net):
    net.model.head = nn.Linear(8, 3)


def patch_forward(net):
    net.model.mix.forward = lambda x: x


def replace_inner(net):
    net.model.norm = nn.Identity()


def replace_model(net):
    net.model = Plain()


def set_value(path, value):
    def change(net):
        owner, _, name = path.rpartition(".")
        setattr(net.model.get_submodule(owner), name, value)

    return change


def hook(net):
    net.model.gate.register_forward_hook(lambda *a: None)


def prune_weights(net):
    prune.l1_unstructured(net.model.left, "weight", 0.5)


def parametrize(net):
    parametrizations.weight_norm(net.model.left)


CHANGES = {  # of the module at a path, or of its attribute
    "head": replace_head,
    "mix": patch_forward,
    "norm": replace_inner,
    "": replace_model,
    "norm.eps": set_value("norm.eps", 0.1),
    "norm.num_groups": set_value("norm.num_groups", 2),
    "left.stride": set_value("left.stride", (2, 2)),
    "left.padding": set_value("left.padding", [0, 0]),
    "left.groups": set_value("left.groups", 2),
    "head.bias": set_value("head.bias", None),
    "head.weight": set_value("head.weight", nn.Parameter(torch.zeros(3, 8))),
    "extra": set_value("extra", nn.Linear(1, 1)),
    "gate": hook,
    "left.weight": prune_weights,
    "left": parametrize,
}

USES = {
    "forward": lambda net, x, path: net.forward_all(x),
    "deploy": lambda net, x, path: net.deploy(),
    "save": lambda net, x, path: net.save(path / "net.safetensors"),
    "state": lambda net, x, path: net.state_dict(),
    "extract": lambda net, x, path: net.extract(1),
    "compact": lambda net, x, path: net.compact(),
    "verify": lambda net, x, path: verify(net, x),
    "copy": lambda net, x, path: copy.deepcopy(net)(x),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.items())
def test_a_net_whose_model_was_changed_says_so(net, x, change, name, tmp_path):
    own = copy.deepcopy(net)
    engine = own.deploy()
    own.forward_all(x)
    change(own)
    for use in USES.values():
        with pytest.raises(SteppingError, match=re.escape(f"{f'net.model.{name}'.rstrip('.')}: this ")):
            use(own, x, tmp_path)
    with pytest.raises(SteppingError, match=r"changed after deploy.*net\.model|its weights differ"):
        engine.start(x)


def test_parts_in_another_mode_than_the_net_are_noticed_and_frozen_ones_stay_frozen():
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 4)
    model, images = nn.Sequential(*layers).train(), torch.randn(4, 1, 8, 8)
    model[1].eval()
    own = apply_steppingnet(model, ["40%", "80%"], example_inputs=images)
    for other in (own, own.compact()):
        for freeze in (False, True):  # frozen before the conversion, whatever train() says
            other.train().model[1].train(not freeze)
            before = other.model[1].running_mean.clone()
            assert other(images).shape == (4, 4) and torch.equal(other.model[1].running_mean, before)
        other.model[4].eval()
        with pytest.raises(SteppingError, match=r"net\.model\.4: this is in eval mode while the net is in train mode"):
            other(images)
        other.eval().model[4].train()  # dropout as a source of samples
        with pytest.raises(SteppingError, match=r"net\.model\.4: this is in train mode while the net is in eval mode"):
            other(images)


def test_images_of_another_type_are_named(net, x):
    for wrong in (x.half(), x.double(), x.byte()):
        with pytest.raises(SteppingError, match=r"wrong type of images.*expected torch\.float32 on cpu"):
            net(wrong)


def test_timms_reset_classifier_is_noticed():
    images = torch.randn(2, 1, 32, 32)
    net = apply_steppingnet(timm.create_model("lenet5", in_chans=1, num_classes=10), [0.3, 0.6], example_inputs=images)
    net.model.reset_classifier(3)
    with pytest.raises(SteppingError, match=r"net\.model\.fc: this was replaced by another Linear"):
        net(images)


def test_new_weights_in_old_modules_are_no_other_structure(net, x):
    own = copy.deepcopy(net)
    own.model.head.load_state_dict(nn.Linear(8, 5).state_dict())
    own.model.mix.weight = nn.Parameter(torch.zeros_like(own.model.mix.weight))
    with torch.no_grad():
        assert torch.allclose(own.forward_all(x), torch.stack(list(own.deploy().steps(x))), atol=1e-5)


# ------------------------------------------------------------------------------------------------- copies


def test_engines_are_copied_pickled_and_saved(net, x):
    engine = net.deploy()
    expected = torch.stack(list(engine.steps(x)))
    buffer = io.BytesIO()
    torch.save(engine, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine)), saved):
        assert torch.equal(torch.stack(list(other.steps(x))), expected)
        assert other.macs == engine.macs


def _last_scores(engine, images, queue):
    queue.put(list(engine.steps(images))[-1].tolist())


@pytest.mark.slow
def test_engines_reach_other_processes(net, x):
    context = multiprocessing.get_context("spawn")
    queue, engine = context.Queue(), net.deploy()
    process = context.Process(target=_last_scores, args=(engine, x, queue))
    process.start()
    assert torch.allclose(torch.tensor(queue.get(timeout=120)), list(engine.steps(x))[-1])
    process.join()


def test_nets_are_copied_and_what_cannot_be_pickled_says_the_way_out(net, x):
    for module in (net, net.extract(1)):
        assert torch.equal(copy.deepcopy(module)(x), module(x))
        with pytest.raises(SteppingError, match=r"cannot be pickled.*net.save\(path\).*load\(path"):
            pickle.dumps(module)
        with pytest.raises(SteppingError, match="cannot be pickled"):
            torch.save(module, io.BytesIO())
    with pytest.raises(SteppingError, match="a session cannot be copied or pickled"):
        pickle.dumps(net.deploy().start(x))


# ------------------------------------------------------------------------------------------------- modes


def test_conversion_under_autocast_keeps_no_casts(net, x):
    with torch.autocast("cpu"):
        own = plain()
    assert own(x).dtype == own.deploy().start(x).logits.dtype == torch.float32
    assert torch.equal(own.forward_all(x), net.forward_all(x))


def test_a_model_made_in_inference_mode_becomes_a_net_that_trains(x):
    with torch.inference_mode():
        own = plain()
    own.train().forward_all(x).sum().backward()
    assert all(p.grad is not None for p in own.model.parameters())


def test_a_meta_default_device_does_not_matter():
    model = Plain().eval()
    torch.set_default_device("meta")
    try:
        own = apply_steppingnet(model, ["30%", "60%"], example_inputs=IMAGE)
    finally:
        torch.set_default_device(None)
    assert own(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("options", "name"), [({"seed": None}, "seed"), ({"seed": 2**64}, "seed"), ({"device": "banana"}, "device")]
)
def test_arguments_are_checked(options, name):
    with pytest.raises(SteppingError, match=f"^{name}: "):
        plain(**options)


# ------------------------------------------------------------------------------------------------- random nets


class MonteCarlo(nn.Module):
    """Dropout that stays on in eval mode (onnx/onnx #4855), or noise on a weight (blitz-bayesian-deep-learning #20)."""

    def __init__(self, bayesian: bool) -> None:
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 8), nn.Linear(8, 5)
        self.bayesian, self.wide = bayesian, nn.Linear(8, 8)

    def forward(self, x):
        x = F.dropout(torch.relu(self.conv(x)).mean((2, 3)), 0.3)
        noise = 0.1 * torch.randn_like(self.hidden.weight) if self.bayesian else 0
        x = torch.relu(F.linear(x, self.hidden.weight + noise))
        return self.head(torch.relu(self.wide(x)))


@pytest.mark.parametrize("bayesian", [False, True])
def test_random_nets_are_proved_nested_and_said_to_be_random(bayesian, x):
    torch.manual_seed(0)
    own = apply_steppingnet(MonteCarlo(bayesian).eval(), ["100%"], example_inputs=IMAGE)
    assert any("draws random numbers in eval mode (dropout" in note for note in own.notes)
    if not bayesian:  # the noisy layer is pinned
        own = apply_steppingnet(MonteCarlo(False).eval(), ["30%", "60%"], example_inputs=IMAGE)
    before = torch.get_rng_state()
    report = verify(own, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert max(report.leak, default=0) == 0 and not report.extract_error
    assert "the net is random in eval mode (dropout" in str(report)
    engine = own.deploy()
    assert not torch.equal(*(engine.start(x).logits for _ in range(2))), "the engine draws, too"


# ------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("test_resnet", {"in_chans": 1}, (1, 160, 160)),
        ("test_resnet", {"in_chans": 4}, (4, 160, 160)),
        ("test_vit", {"img_size": 96}, (3, 96, 96)),
        ("test_convnext", {"in_chans": 2}, (2, 160, 160)),
        ("swin_tiny_patch4_window7_224", {"img_size": 448, "in_chans": 1}, (1, 448, 448)),
        ("mixer_s32_224", {"img_size": 96}, (3, 96, 96)),
        ("lenet5", {}, (3, 32, 32)),
    ],
)
def test_a_timm_model_says_its_own_channels_and_size(name, options, size):
    with torch.device("meta"):
        assert image_size_of(timm.create_model(name, **options)) == size


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_models_are_the_models_inside(name, tmp_path):
    inside = timm.create_model("lenet5", in_chans=1).eval()
    wrapped = WRAPPERS[name](inside)
    own = apply_steppingnet(wrapped, ["30%", "60%"], example_inputs=torch.zeros(1, 1, 32, 32))
    assert own.model is not inside and set(dict(own.model.named_parameters())) == set(dict(inside.named_parameters()))
    own.save(tmp_path / "net.safetensors")
    images = torch.randn(2, 1, 32, 32)
    for model in (None, inside, wrapped):
        again = load(tmp_path / "net.safetensors", model)
        assert torch.equal(again.forward_all(images), own.eval().forward_all(images))


class MaxNorm(nn.Conv2d):
    """braindecode/braindecode #680."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1.0)  # here
        return super().forward(x)


class Clamped(nn.Conv2d):
    def forward(self, x):
        self.weight.data.clamp_(-1, 1)  # here
        return super().forward(x)


class Scaled(nn.Conv2d):
    """vlawhern/arl-eegmodels #1."""

    def forward(self, x):
        with torch.no_grad():
            self.weight *= 1 / self.weight.norm().clamp(min=1)  # here
        return super().forward(x)


@pytest.mark.parametrize("kind", [MaxNorm, Clamped, Scaled])
def test_a_forward_that_changes_its_weights_is_refused_with_the_line(kind):
    model = nn.Sequential(kind(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    weight = model[0].weight.detach().clone()
    with pytest.raises(CaptureError, match="changes its parameters in forward") as caught:
        apply_steppingnet(model, ["40%", "80%"], example_inputs=IMAGE)
    assert "test_promises.py:" in str(caught.value) and "# here" in str(caught.value)
    assert torch.equal(model[0].weight, weight)


def test_the_default_device_of_the_process_does_not_matter(tmp_path):
    model, images = timm.create_model("lenet5", in_chans=1), torch.randn(2, 1, 32, 32)
    wanted = apply_steppingnet(model, [0.3, 0.6], example_inputs=images).eval()
    wanted.save(tmp_path / "net")
    torch.set_default_device("meta")
    try:
        nets = [apply_steppingnet(model, [0.3, 0.6], example_inputs=images).eval(), load(tmp_path / "net")]
    finally:
        torch.set_default_device(None)
    for net in nets:
        assert torch.equal(net.forward_all(images), wanted.forward_all(images))


@pytest.mark.parametrize("path", [None, 3, "a\0b", b"net"])
def test_what_is_no_path_is_refused(net, path):
    engine = net.deploy()
    for act in (lambda: load(path), lambda: net.save(path), lambda: load_engine(path), lambda: engine.save(path)):
        with pytest.raises(SteppingError, match="not a path"):
            act()


@pytest.mark.parametrize("x", [None, torch.zeros(1, 3, 8, 8).to_sparse(), [[0.0]]])
def test_what_is_no_image_is_refused_by_the_net(net, x):
    with pytest.raises(SteppingError, match="images expected"):
        net(x)
