"""What every level adds: against a plain recomputation, kept in files, and a warning where it is nothing."""

import pytest
import torch
from nets import images, make, nested

from stepping_plugin import load
from stepping_plugin.cli import main
from stepping_plugin.views.contribution import idle_levels

SIZE = (3, 32, 32)


@pytest.fixture
def net():
    return nested(make("resnet_tiny"), seed=1).eval()


def test_shares_are_those_of_the_increments(net):
    x = images(SIZE, 24)
    found = net.measure(list(x.split(10)))
    with torch.no_grad():
        scores = net.forward_all(x)
    expected = []
    for level in range(net.num_subnets):
        step = scores[level] - (scores[level - 1] if level else 0)
        expected.append(sum(float(step[:, c].var(correction=0)) for c in range(step.shape[1])))
    assert found.pictures == 24 and found.scores == pytest.approx([e / sum(expected) for e in expected])
    moved = [int((scores[k].argmax(1) != scores[k - 1].argmax(1)).sum()) / 24 for k in range(1, len(scores))]
    assert found.changed == pytest.approx([0, *moved])


def test_a_unit_that_never_fires_is_missed(net):
    x = images(SIZE, 8)
    before = net.measure(x).live["layer2.conv1"]
    units = net.analysis.weight_units["layer2.conv1.weight"][0]
    level = net.levels[units] == 1
    with torch.no_grad():
        net.model.layer2.bn1.weight[level] = 0
        net.model.layer2.bn1.bias[level] = -1
    after = net.measure(x).live["layer2.conv1"]
    assert before[0] > 0 and after[0] == 0 and after[1:] == before[1:]


def test_a_level_that_adds_nothing_is_named(net):
    with torch.no_grad():
        head = net.model.fc.weight
        last = net.levels[net.analysis.weight_units["layer3.conv2.weight"][0]] == net.num_subnets
        head[:, last] = 0
    texts, n = idle_levels(net.measure(images(SIZE, 8))), net.num_subnets
    assert len(texts) == 1 and texts[0].startswith(f"subnet {n} answers like subnet {n - 1}")


def test_it_travels_with_the_net_and_ends_with_its_weights(net, tmp_path, capsys):
    found = net.measure(images(SIZE, 8))
    net.save(tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors", make("resnet_tiny"))
    assert again.contribution == found
    net.set_levels(net.levels)
    assert net.contribution is None
    net.save(tmp_path / "net.safetensors")
    assert load(tmp_path / "net.safetensors", make("resnet_tiny")).contribution is None


def test_inspect_shows_a_saved_net(tmp_path, capsys):
    import timm

    from stepping_plugin import apply_steppingnet

    net = apply_steppingnet(timm.create_model("digits_net"), ["20%", "60%"])
    net.measure(torch.randn(16, 1, 8, 8))
    net.save(tmp_path / "net.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "What every level adds" in shown and "carries of the scores" in shown and "live units of conv3.0" in shown
