"""`apply_steppingnet`, the net's own face, and its files."""

import copy

import pytest
import timm
import timm.optim
import torch
from nets import Plain, image_size, images, make, nested, random_levels, relative
from rewriting import rewrite
from safetensors.torch import save_file
from torch import nn

from stepping_plugin import (
    BudgetError,
    CaptureError,
    CheckpointError,
    SteppingError,
    apply_steppingnet,
    load,
    verify,
)
from stepping_plugin.integrations.fvcore import count_macs

BUDGETS = [0.1, 0.25, 0.4, 0.6]  # the triangular mask cannot spend much more without widening


@pytest.fixture(scope="module")
def model():
    return make("test_resnet", num_classes=7)


@pytest.fixture(scope="module")
def net(model):
    return apply_steppingnet(model, BUDGETS)


def test_the_story_of_the_readme(model, net):
    before = copy.deepcopy(model.state_dict())
    x = images(image_size(model))
    assert net.num_subnets == 4 and len(net.macs) == 4
    assert net.reference_macs == count_macs(model, (x[:1],)).total
    for macs, budget, share in zip(net.macs, net.budgets, BUDGETS, strict=True):
        assert budget == int(share * net.reference_macs)
        assert 0.99 * budget <= macs <= budget
    verify(net, engine=False)
    with torch.no_grad():
        everything = net.forward_all(x)
        assert everything.shape == (4, 2, 7)
        assert torch.equal(net(x), everything[-1]), "the largest subnet is the default"
        for i in range(1, 5):
            net.active_subnet = i
            assert torch.equal(net(x), everything[i - 1])
            assert relative(net.extract(i)(x), everything[i - 1]) < 1e-10
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "the user's model is not modified"


def test_subnets_differ(net):
    report = verify(net, engine=False)
    assert min(report.step_gain) > 1e-6


@pytest.mark.parametrize("policy", ["steppingnet", "any-width", "random"])
def test_policies_meet_the_budgets(model, policy):
    net = apply_steppingnet(model, ["20%", "60%"], policy=policy, seed=3)
    assert all(m <= b for m, b in zip(net.macs, net.budgets, strict=True))
    again = apply_steppingnet(model, ["20%", "60%"], policy=policy, seed=3)
    assert torch.equal(net.levels, again.levels)


def test_what_timm_users_call(model, net):
    assert net.num_classes == 7
    assert net.default_cfg["input_size"] == model.default_cfg["input_size"]
    assert net.get_classifier().weight.shape[0] == 7
    assert net.group_matcher() == model.group_matcher()
    names = {n.removeprefix("model.") for n, _ in net.named_parameters()}
    assert names == {n for n, _ in model.named_parameters()}
    vit = nested(make("test_vit"))
    assert vit.no_weight_decay() == make("test_vit").no_weight_decay()
    optimizer = timm.optim.create_optimizer_v2(vit, opt="adamw", lr=1e-3, weight_decay=0.05)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(vit.parameters()))


def test_a_users_own_training_loop(model):
    net = apply_steppingnet(model, [0.3, 0.8]).train()
    dead = {n: ~net.live_mask(n, net.levels) for n in net._masks}
    optimizer = torch.optim.SGD(net.parameters(), 0.01, weight_decay=0.1)
    x, y = images(image_size(model), batch=4), torch.tensor([0, 1, 2, 3])
    first = None
    for _ in range(5):
        loss = sum(nn.functional.cross_entropy(scores, y) for scores in net.forward_all(x))
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    assert any(bool(d.any()) for d in dead.values())
    assert max(verify(net.eval(), engine=False).leak) < 1e-9, "no optimizer step can break the nesting rule"


def test_summary_names_budgets_and_groups(net):
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(net.summary())
    text = console.export_text()
    assert "budget" in text and "level 4" in text and "layer1.0.conv1" in text


def test_state_dict_brings_its_levels(net):
    other = copy.deepcopy(net)
    other.set_levels(random_levels(net.analysis, 4, seed=9))
    x = images(net.analysis.image_size)
    with torch.no_grad():
        assert relative(other.forward_all(x), net.forward_all(x)) > 1e-6
        other.load_state_dict(net.state_dict())
        assert torch.equal(other.forward_all(x), net.forward_all(x))


def test_half_precision_autocast_runs(model):
    net = apply_steppingnet(make("test_vit", num_classes=7).float(), [0.3, 0.8])
    x = images(net.analysis.image_size).float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        scores = net.forward_all(x)
    with torch.no_grad():
        assert relative(scores.float(), net.forward_all(x)) < 0.1


def test_a_net_may_be_cast_after_conversion():
    """Also where the model casts a resampled position embedding to the type that it had at capture."""
    net = nested(make("test_vit"))
    x = images(net.analysis.image_size)
    with torch.no_grad():
        exact = net.forward_all(x)
        assert relative(copy.deepcopy(net).float().forward_all(x.float()), exact) < 1e-4


def test_models_that_were_used_before():
    """Cached results of a forward pass (LeViT keeps its biases), frozen parameters, inference mode: no matter."""
    model = timm.create_model("levit_128s", num_classes=4).eval()
    model(torch.zeros(1, 3, 224, 224))
    net = apply_steppingnet(model, [0.3, 0.5])
    assert "blocks" in " ".join(net.analysis.param_units), "biases per head are parameters, not constants"
    assert any(name.endswith("attention_biases") for name in net.analysis.param_units)
    frozen = timm.create_model("test_resnet", num_classes=4)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        net = apply_steppingnet(frozen, [0.3, 0.5])
    assert not any(p.requires_grad or p.is_inference() for p in net.parameters())
    session = net.deploy().start(torch.zeros(1, 3, 160, 160))
    session.step()
    assert session.macs == net.macs[-1]


def test_conversion_in_float32_and_channels_last(model):
    net = apply_steppingnet(copy.deepcopy(model).float(), [0.3, 0.8])
    x = images(net.analysis.image_size).float()
    with torch.no_grad():
        plain = net.forward_all(x)
        packed = net.to(memory_format=torch.channels_last).forward_all(x.to(memory_format=torch.channels_last))
    assert relative(packed, plain) < 1e-4


# ------------------------------------------------------------------------------------------------- files


def test_save_and_load(net, tmp_path):
    net.save(tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors")
    x = images(net.analysis.image_size)
    with torch.no_grad():
        assert relative(loaded.double().forward_all(x), net.forward_all(x)) < 1e-6
    assert loaded.macs == net.macs and loaded.budgets == net.budgets and torch.equal(loaded.levels, net.levels)
    assert loaded.reference_macs == net.reference_macs


def test_save_and_load_of_a_compacted_net_keeps_every_bit(net, tmp_path):
    small = net.compact().float()
    small.save(tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors")
    x = images(net.analysis.image_size).float()
    with torch.no_grad():
        assert torch.equal(loaded.forward_all(x), small.eval().forward_all(x))


def test_users_models_are_loaded_into_an_instance(tmp_path):
    net = apply_steppingnet(Plain(), [0.4, 0.9], example_inputs=torch.zeros(1, 3, 16, 16))
    net.save(tmp_path / "plain.safetensors")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "plain.safetensors", Plain()).forward_all(x), net.eval().forward_all(x))
    with pytest.raises(CheckpointError, match="Pass load"):
        load(tmp_path / "plain.safetensors")


def test_files_that_are_not_ours(net, tmp_path):
    good = tmp_path / "net.safetensors"
    net.save(good)
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "missing")
    (tmp_path / "short").write_bytes(good.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "short")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "text")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle")
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "pickle")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="not one that SteppingNet"):
        load(tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="another model"):
        load(good, timm.create_model("test_convnext"))
    with pytest.raises(CheckpointError, match="another model"):
        load(good, timm.create_model("test_resnet", in_chans=1))


def test_files_that_were_changed(net, tmp_path):
    good = tmp_path / "net.safetensors"
    net.save(good)
    for changes, text in [
        ({"version": 99}, "version"),
        ({"origin": {"timm": "hf-hub:somebody/something", "kwargs": {}}}, "timm cannot build"),
        ({"macs": [1, 2, 3, 4]}, "damaged"),
        ({"fingerprint": "0" * 64}, "another model"),
    ]:
        rewrite(good, tmp_path / "changed", lambda header, tensors: header.update(changes))  # noqa: B023
        with pytest.raises(CheckpointError, match=text):
            load(tmp_path / "changed")


def test_an_interrupted_save_keeps_the_old_file(net, tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    net.save(path)
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stepping_plugin.tensorfile.save_file", full_disk)
    with pytest.raises(OSError):
        net.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("budgets", "text"),
    [
        ([0.5, 0.3], "ascend"),
        ([0.3, 0.3], "equal"),
        ([0.3, 1.5], "above 0 and at most 1"),
        ([0.0, 0.5], "above 0"),
        ([], "empty"),
        (["1 potato"], "cannot read"),
        ([1e-6, 0.5], "smallest subnet"),
    ],
)
def test_bad_budgets(model, budgets, text):
    with pytest.raises(BudgetError, match=text):
        apply_steppingnet(model, budgets)


def test_budget_below_the_floor_states_the_floor(model, net):
    from stepping_plugin.units.levels import floor_macs

    floor = floor_macs(net.analysis, net.macs_model)
    with pytest.raises(BudgetError, match=f"{floor:,}"):
        apply_steppingnet(model, [floor - 1, 0.5])


def test_more_subnets_than_units():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(48, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(torch.relu(self.hidden(x.flatten(1))))

    with pytest.raises(BudgetError, match="at most 3"):
        apply_steppingnet(Tiny(), [0.4, 0.5, 0.6, 0.7, 0.8], example_inputs=torch.zeros(1, 3, 4, 4))


def test_unsuitable_models(model):
    with pytest.raises(CaptureError, match="cannot be captured"):
        apply_steppingnet(model, [0.5], example_inputs=torch.zeros(1, 5, 64, 64))
    with pytest.raises(SteppingError, match="expected one Tensor of images"):
        apply_steppingnet(model, [0.5], example_inputs=torch.zeros(3, 64, 64))
    with pytest.raises(SteppingError, match="half-precision"):
        apply_steppingnet(copy.deepcopy(model).half(), [0.5])
    with pytest.raises(SteppingError, match="meta device"):
        apply_steppingnet(copy.deepcopy(model).to("meta"), [0.5])
    with pytest.raises(SteppingError, match="which image size"):
        apply_steppingnet(Plain(), [0.5])
    with pytest.raises(SteppingError, match="not a model"):
        apply_steppingnet("resnet18", [0.5])
    with pytest.raises(CaptureError, match="no layer but the last one"):
        apply_steppingnet(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), [0.5], example_inputs=torch.zeros(1, 3, 4, 4))


def test_data_dependent_control_flow_is_refused():
    class Branching(Plain):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    with pytest.raises(CaptureError, match="control flow"):
        apply_steppingnet(Branching(), [0.5], example_inputs=torch.zeros(1, 3, 8, 8))


def test_wrong_use_of_a_net(net):
    with pytest.raises(SteppingError, match="wrong image shape"):
        net(torch.zeros(1, 3, 32, 32))
    with pytest.raises(SteppingError, match="no such subnet"):
        net.active_subnet = 5
    with pytest.raises(SteppingError, match="no such subnet"):
        net.extract(0)
    with pytest.raises(SteppingError, match="wrong shape"):
        net.set_levels(torch.ones(3))
    with pytest.raises(SteppingError, match="out of range"):
        net.set_levels(torch.full((net.analysis.num_units,), 6))
    with pytest.raises(SteppingError, match="empty layer"):
        net.set_levels(torch.full((net.analysis.num_units,), 2))


# ------------------------------------------------------------------------------------------------- data at hand


def test_construction_on_data_then_retraining():
    """The user-code story: apply_steppingnet on a loader, then net.fit; subnets learn, budgets hold, nesting holds."""
    from torch.utils.data import DataLoader, TensorDataset

    from stepping_plugin import ConstructionConfig, TrainConfig

    torch.manual_seed(0)
    labels = torch.randint(0, 4, (128,))
    pictures = 0.3 * torch.randn(128, 1, 8, 8)
    for k in range(4):  # class k: a bright quadrant
        pictures[labels == k, 0, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] += 1
    loader = DataLoader(TensorDataset(pictures, labels), 32, shuffle=True)
    model = timm.create_model("digits_net", num_classes=4, in_chans=1, img_size=8)
    config = ConstructionConfig(iterations=4, batches=3, expansion=1.5)
    net = apply_steppingnet(model, [0.2, 0.5, 0.8], train_loader=loader, config=config, device="cpu")
    assert all(0.97 * b <= m <= b for m, b in zip(net.macs, net.budgets, strict=True))
    assert int(net.levels.max()) == 3, "spare units are gone"
    history = net.fit(loader, loader, TrainConfig(epochs=12, lr=0.05, device="cpu"), teacher=model, progress=False)
    assert min(history.epochs[-1]["accuracy"]) > 0.8
    verify(net, engine=False)


def test_widening_lets_the_largest_subnet_use_its_budget(model):
    from stepping_plugin import ConstructionConfig

    budgets = [0.1, 0.3, 0.5, 0.85]
    narrow = apply_steppingnet(model, budgets, config=ConstructionConfig(expansion=1.0))
    assert narrow.macs[-1] < 0.99 * narrow.budgets[-1] and any("widen" in note for note in narrow.notes)
    wide = apply_steppingnet(model, budgets, config=ConstructionConfig(expansion=1.25))
    assert all(0.99 * b <= m <= b for m, b in zip(wide.macs, wide.budgets, strict=True))
