"""Nets come back for inference without being captured again; their train mode is captured when it is asked for."""

import copy

import pytest
import timm
import torch
from nets import images, make, nested
from rewriting import rewrite

from stepping_plugin import CheckpointError, load, serialization
from stepping_plugin.net import SteppingNet


@pytest.fixture
def no_capture(monkeypatch):
    def refuse(*_):
        raise AssertionError("captured")

    with monkeypatch.context() as patched:
        patched.setattr(serialization, "find_units", refuse)
        yield patched


def scores(net, x):
    with torch.no_grad():
        return net.forward_all(x)


@pytest.fixture(scope="module", params=["test_resnet", "test_vit2"])
def saved(request, tmp_path_factory):
    """A compacted net of a timm model, and its file."""
    model = make(request.param)
    net = nested(model, seed=3)
    levels = net.levels
    levels[::7] = torch.where(levels[::7] > 1, 5, levels[::7])  # some spare units
    origin = {"timm": request.param, "kwargs": {}}
    net = SteppingNet(net.model, net.analysis, levels, [10**9] * 4, 10**9, origin).compact().eval()
    path = tmp_path_factory.mktemp("loading") / "net"
    net.save(path)
    return net, path


def facts(node):
    """What is known of a node, but for what is only of use while capturing."""
    kept = {k: v for k, v in node.meta.items() if k not in ("code", "value") and v is not None and v is not False}
    kept = {k: v for k, v in kept.items() if k != "module" or v}
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in kept.items()}


def test_inference_needs_no_capture(saved, no_capture, tmp_path):
    net, path = saved
    loaded = load(path)
    x = images(net.analysis.image_size)
    assert torch.equal(scores(loaded, x), scores(net, x))
    assert loaded.macs == net.macs and torch.equal(loaded.levels, net.levels) and loaded.notes == net.notes
    assert [g.name for g in loaded.analysis.groups] == [g.name for g in net.analysis.groups]
    assert loaded.analysis.why_pinned() == net.analysis.why_pinned()
    for node, before in zip(
        loaded.analysis.eval_program.graph.nodes, net.analysis.eval_program.graph.nodes, strict=True
    ):
        assert facts(node) == facts(before)
    for scored, expected in zip(loaded.deploy().steps(x), net.deploy().steps(x), strict=True):
        assert torch.equal(scored, expected)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert torch.equal(scores(copy.deepcopy(loaded), x), scores(net, x))


def test_train_mode_is_captured_when_asked_for(saved):
    net, path = saved
    x, loaded = images(net.analysis.image_size, 4), load(path)
    assert list(loaded.analysis.programs) == [False]
    results = []
    for one in (copy.deepcopy(net).train(), loaded.train()):
        torch.manual_seed(1)
        result = one.forward_all(x)
        result.sum().backward()
        results.append((result, [p.grad for p in one.parameters()], scores(one.eval(), x)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][2], results[1][2])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)
    assert len(load(path).extract(2).train()(x)) == 4


def test_other_code_is_found_at_once_or_in_training(saved, monkeypatch):
    """timm's code may have changed since: what prints itself differently is captured at once, the rest in training."""
    net, path = saved
    if net.origin["timm"] != "test_resnet":
        pytest.skip("one architecture shows it, and capturing takes time")
    create = timm.create_model

    def other(name, **kwargs):
        model = create(name, **kwargs)
        changed = type(model)
        model.__class__ = type(changed.__name__, (changed,), {"forward": lambda self, x: changed.forward(self, 2 * x)})
        return model

    monkeypatch.setattr(timm, "create_model", other)
    loaded, x = load(path), images(net.analysis.image_size)
    assert torch.equal(scores(loaded, x), scores(net, x)), "the file says what the net computes"
    with pytest.raises(CheckpointError, match=r"computes something else .*mul"):
        loaded.train()
    assert torch.equal(scores(loaded, x), scores(net, x)) and not loaded.training
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **kwargs, act_layer="silu"))
    with pytest.raises(CheckpointError, match="got silu"):
        load(path)


def first(nodes, *names):
    return next(n for n in nodes if any(name in n.get("target", "") for name in names))


CHANGES = {
    "operator": lambda nodes: nodes[-2].update(target="aten.from_file"),
    "argument": lambda nodes: nodes[-2].update(args=[{"node": 0}, {"node": 1}]),
    "another function": lambda nodes: first(nodes, "relu", "gelu").update(target="aten.tanh", kwargs={}),
    "units": lambda nodes: next(n for n in nodes if "units" in n).update(units=10**6),
    "shape": lambda nodes: nodes[-2].update(shape=[10**6, 10**6]),
    "nothing": lambda nodes: nodes.clear(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_stored_analysis_that_is_wrong_is_not_used(saved, no_capture, tmp_path, name):
    rewrite(saved[1], tmp_path / "net", lambda header, _: CHANGES[name](header["analysis"]["nodes"]))
    with pytest.raises(AssertionError, match="captured"):
        load(tmp_path / "net")


def test_a_file_without_analysis_is_captured(saved, tmp_path):
    def older(header, tensors):
        header["analysis"] = None
        for name in [n for n in tensors if n.startswith("analysis.")]:
            del tensors[name]

    net, path = saved
    rewrite(path, tmp_path / "net", older)
    loaded, x = load(tmp_path / "net"), images(net.analysis.image_size)
    assert list(loaded.analysis.programs) == [False, True] and torch.equal(scores(loaded, x), scores(net, x))
