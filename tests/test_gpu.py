"""Everything on a GPU against the CPU: `pytest -m gpu`.

Each test runs on every device that is there. Without one its GPU variants are skipped, and the CPU stands in, so that
the tests themselves are known to work: what they compare is then the product with itself on another path.
"""

from __future__ import annotations

import copy
import dataclasses
import os

import nets
import pytest
import timm
import torch
from small_nets import PLAIN_SGD, loader, small_model, small_net
from torch import Tensor

from stepping_plugin import ConstructionConfig, apply_steppingnet, load, verify
from stepping_plugin.engine import load_engine
from stepping_plugin.net import SteppingNet
from stepping_plugin.training.loop import fit

BUDGETS = [0.2, 0.5, 0.9]
NAMES = ["test_resnet", "test_vit", "test_convnext"]
CLOSE = {"rtol": 2e-4, "atol": 2e-4}  # float32, sums in another order
HALF = {"rtol": 5e-2, "atol": 5e-2}

DEVICES = [
    pytest.param("cpu", id="stand-in"),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
    pytest.param("mps", marks=[pytest.mark.gpu,
                               pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no MPS")]),
]  # fmt: skip


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> torch.device:
    """Convolutions and products in full float32, or nothing could be compared."""
    if request.param == "cuda":
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


_made: dict[str, SteppingNet] = {}


def reference(name: str) -> tuple[SteppingNet, Tensor]:
    """A net on the CPU, float32, and images."""
    if name not in _made:
        torch.manual_seed(0)
        model = nets.randomise(timm.create_model(name, num_classes=5)).eval()
        _made[name] = apply_steppingnet(model, BUDGETS, example_inputs=torch.rand(1, 3, *_side(name)))
    x = torch.randn(4, *_made[name].analysis.image_size, generator=torch.Generator().manual_seed(1))
    return copy.deepcopy(_made[name]), x


def _side(name: str) -> tuple[int, int]:
    side = timm.get_pretrained_cfg(name).input_size[-1] if "vit" in name else 64
    return side, side


def scores_and_gradients(net: SteppingNet, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    scores = net.train().forward_all(x)
    scores.float().square().mean().backward()
    return scores.detach().cpu(), {n: p.grad.cpu() for n, p in net.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_gradients(name, device):
    net, x = reference(name)
    there = copy.deepcopy(net).to(device)
    with torch.no_grad():
        torch.testing.assert_close(there.forward_all(x.to(device)).cpu(), net.forward_all(x), **CLOSE)
    expected, found = scores_and_gradients(net, x), scores_and_gradients(there, x.to(device))
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    for key, gradient in expected[1].items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert float((found[1][key] - gradient).abs().max() / scale) < 5e-3, key


@pytest.mark.parametrize("name", NAMES)
def test_engine_steps_and_predicts(name, device):
    net, x = reference(name)
    expected = net.forward_all(x).detach()
    engine = net.to(device).deploy()
    for i, scores in enumerate(engine.steps(x.to(device))):
        torch.testing.assert_close(scores.cpu(), expected[i], **CLOSE)
    first_two = lambda scores: torch.arange(len(scores), device=scores.device) < len(scores) - 2  # noqa: E731
    answer = engine.predict(x.to(device), until=first_two)
    assert answer.subnet.cpu().tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(answer.logits.cpu(), torch.cat([expected[0, :2], expected[2, 2:]]), **CLOSE)


def test_a_deadline_is_kept_or_said_to_be_missed(device):
    net, x = reference("test_resnet")
    engine = net.to(device).deploy()
    engine.predict(x.to(device))
    assert engine.predict(x.to(device), deadline=60.0).in_time
    late = engine.predict(x.to(device), deadline=1e-9)
    assert not late.in_time and set(late.subnet.tolist()) == {1}


def test_conversion_where_the_model_is(device):
    model = nets.randomise(timm.create_model("test_resnet", num_classes=5)).eval()
    here = apply_steppingnet(model, BUDGETS, example_inputs=torch.rand(1, 3, 64, 64))
    there = apply_steppingnet(copy.deepcopy(model).to(device), BUDGETS, example_inputs=torch.rand(1, 3, 64, 64))
    assert {p.device.type for p in there.parameters()} == {device.type}
    assert torch.equal(here.levels, there.levels) and here.macs == there.macs
    if device.type != "mps":  # which has no float64
        verify(there)


@pytest.mark.parametrize("direction", ["to the CPU", "from the CPU"])
def test_files_carry_nets_and_engines_between_devices(direction, device, tmp_path):
    net, x = reference("test_convnext")
    first, second = (device, "cpu") if direction == "to the CPU" else ("cpu", device)
    net = net.to(first)
    net.save(tmp_path / "net")
    net.deploy().save(tmp_path / "engine")
    expected = net.forward_all(x.to(first)).detach().cpu()
    again = load(tmp_path / "net", device=second)
    torch.testing.assert_close(again.forward_all(x.to(second)).detach().cpu(), expected, **CLOSE)
    steps = list(load_engine(tmp_path / "engine", device=second).steps(x.to(second)))
    torch.testing.assert_close(steps[-1].cpu(), expected[-1], **CLOSE)


def _trained(net: SteppingNet, device: torch.device, **changes) -> list[list[float]]:
    """Losses per epoch and subnet."""
    torch.manual_seed(3)
    config = dataclasses.replace(PLAIN_SGD, device=str(device), seed=1, **changes)
    teacher = small_model().double().to(device) if not changes.get("amp") else None
    return [e["train_loss"] for e in fit(net, loader(), None, config, teacher=teacher, progress=False).epochs]


def test_training_is_that_of_the_cpu(device):
    if device.type == "mps":
        pytest.skip("no float64")
    torch.manual_seed(0)
    net = small_net()
    there = copy.deepcopy(net)
    expected, found = _trained(net, torch.device("cpu")), _trained(there, device)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    for (key, a), (_, b) in zip(net.state_dict().items(), there.state_dict().items(), strict=True):
        torch.testing.assert_close(b.cpu(), a.cpu(), rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mixed_precision(kind, device):
    if kind == "float16" and device.type == "cpu":
        pytest.skip("half precision convolutions are not meant for CPUs")
    torch.manual_seed(0)
    net = small_net().float()
    plain, mixed = copy.deepcopy(net), copy.deepcopy(net)
    batches = [(x.float(), y) for x, y in loader()]
    results = []
    for trained, amp in ((plain, False), (mixed, True)):
        config = dataclasses.replace(PLAIN_SGD, device=str(device), seed=1, amp=amp, amp_dtype=kind)
        results.append(fit(trained, batches, None, config, progress=False).epochs[-1]["train_loss"])
    torch.testing.assert_close(torch.tensor(results[1]), torch.tensor(results[0]), **HALF)
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}


def test_channels_last(device):
    net, x = reference("test_resnet")
    expected = net.forward_all(x).detach()
    there = net.to(device, memory_format=torch.channels_last)
    found = there.forward_all(x.to(device, memory_format=torch.channels_last)).detach()
    torch.testing.assert_close(found.cpu(), expected, **CLOSE)


def test_compiled_training_and_steps(device):
    """On a CPU stand-in without the code generator: what is tested is that nothing breaks the graph."""
    net, x = reference("test_resnet")
    backend = "eager" if device.type == "cpu" else "inductor"
    net, x = net.to(device), x.to(device)
    expected = scores_and_gradients(copy.deepcopy(net), x)[0]
    found = torch.compile(net.train().forward_all, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(found.detach().cpu(), expected, **CLOSE)
    engine = net.eval().deploy(compile={"backend": backend})
    with torch.no_grad():
        scores = net.forward_all(x)
    for i, own in enumerate(engine.steps(x)):
        torch.testing.assert_close(own, scores[i], **CLOSE)


def test_one_process_of_a_group(device, monkeypatch):
    """NCCL, or gloo for the stand-in; what needs several processes is in test_ddp.py."""
    from torch import distributed

    if device.type == "mps":
        pytest.skip("no process groups")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if distributed.is_initialized():
        pytest.skip("the test process is in a group already")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = distributed.HashStore()
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        value = torch.arange(3.0, device=device)
        distributed.all_reduce(value)
        assert value.tolist() == [0.0, 1.0, 2.0] and "RANK" not in os.environ
    finally:
        distributed.destroy_process_group()


def test_construction(device):
    """Importance, moves, landing and rebirth on the device; the budgets hold there as well."""
    model = timm.create_model("test_resnet", num_classes=4)
    batches = [(torch.rand(4, 3, 32, 32), torch.arange(4))] * 2
    config = ConstructionConfig(iterations=2, batches=1, cooldown_iterations=1)
    net = apply_steppingnet(model, BUDGETS, train_loader=batches, config=config, device=device)
    assert {p.device.type for p in net.parameters()} == {device.type}
    assert all(m <= b for m, b in zip(net.macs, net.budgets, strict=True))
