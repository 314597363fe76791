"""Levels in multiples of channels: where a width allows them, within the budgets, whoever makes the levels."""

import functools
import itertools
import json
import math

import pytest
import timm
import torch
from nets import image_size, make
from torch import nn

from stepping_plugin import ConstructionConfig, SteppingError, apply_steppingnet, verify
from stepping_plugin.construction import calibration
from stepping_plugin.construction.counts import UnitClasses
from stepping_plugin.construction.importance import magnitude_scores
from stepping_plugin.construction.landing import land
from stepping_plugin.construction.planner import Planner
from stepping_plugin.construction.policies import POLICIES, assign
from stepping_plugin.construction.rounding import Grid, multiples
from stepping_plugin.construction.widening import widen
from stepping_plugin.errors import CheckpointError
from stepping_plugin.integrations import ort
from stepping_plugin.runs.rounding import FILE, with_fixed_rounding
from stepping_plugin.units.analysis import analyse
from stepping_plugin.units.levels import locked_units, parse_budgets
from stepping_plugin.units.macs import MacModel
from stepping_plugin.views.summary import channels_in_multiples_of

# residual; light with gates; heads and LayerNorm; LayerNorm convolutions; groups of channels
MODELS = ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto", "regnety_002"]
BUDGETS = [0.2, 0.35, 0.5]


@functools.cache
def case(name):
    """Analysis, MACs and magnitude scores of a freshly initialised model."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    analysis = analyse(model, tuple(model.default_cfg["input_size"]), (False,))
    return analysis, MacModel(analysis), magnitude_scores(model, analysis)


def new_channels(analysis, levels, n):
    """Of every layer: output channels that may move, those that each level adds, and whether all are in a subnet."""
    for name, (outputs, _) in analysis.weight_units.items():
        movable = outputs[outputs >= 0]
        counts = torch.bincount(levels[movable], minlength=n + 2)[1:].tolist()
        yield name, len(movable), counts[:n], counts[n] == 0


def assert_multiples(analysis, levels, n, round_to, least):
    """What a level adds to a layer of at least so many channels is a multiple; the last may take the rest along."""
    wide = 0
    for name, channels, added, complete in new_channels(analysis, levels, n):
        if channels >= least:
            wide += 1
            assert all(c % round_to == 0 for c in (added[:-1] if complete else added)), (name, added)
    assert wide > 3


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_levels_are_multiples_and_budgets_hold(name, policy):
    analysis, macs, scores = case(name)
    budgets = parse_budgets(BUDGETS, macs.total)
    result = assign(analysis, macs, budgets, scores, policy, round_to=8)
    assert result.macs == macs.subnet_macs(result.levels, 3).tolist()
    assert all(0.99 * b <= m <= b for m, b in zip(result.macs, budgets, strict=True)), result.notes
    assert not result.notes
    assert_multiples(analysis, result.levels, 3, 8, least=128)


@pytest.mark.parametrize("name", MODELS)
def test_every_width_has_the_largest_multiple_that_gives_each_level_a_block(name):
    analysis, macs, _ = case(name)
    budgets = parse_budgets(BUDGETS, macs.total)
    block, size = multiples(analysis, macs, budgets, 8), UnitClasses(analysis, macs, small=3).width_size
    for b, units in zip(block.tolist(), size.tolist(), strict=True):
        assert 8 % b == 0 and (b == 1 or 3 * b <= units)
    assert (multiples(analysis, macs, budgets, 1) == 1).all()


def test_a_unit_of_many_channels_is_a_block_by_itself():
    analysis, macs, _ = case("vit_tiny_patch16_224")  # 3 heads of 64 channels, 192 channels, 768 hidden ones
    classes = UnitClasses(analysis, macs, small=3)
    found = dict(zip(classes.width_size.tolist(), multiples(analysis, macs, parse_budgets(BUDGETS, macs.total), 16)))
    assert found == {3: 1, 192: 16, 768: 16}


@pytest.mark.parametrize("seed", range(3))
def test_any_levels_land_in_blocks(seed):
    analysis, macs, scores = case("mobilenetv3_small_050")
    budgets = parse_budgets(BUDGETS, macs.total)
    levels = torch.randint(1, 5, (analysis.num_units,), generator=torch.Generator().manual_seed(seed))
    blocks, locked = multiples(analysis, macs, budgets, 8), locked_units(analysis, scores)
    planner = Planner(analysis, macs, levels, 3, scores, locked, multiples=blocks)
    counts = planner.width_counts()
    assert (counts[:, 1:3] % blocks[:, None] == 0).all(), "a planner begins with whole blocks"
    result = land(analysis, macs, levels, budgets, scores, locked, multiples=blocks)
    assert all(m <= b for m, b in zip(result.macs, budgets, strict=True))
    assert_multiples(analysis, result.levels, 3, 8, least=128)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_the_cost_of_a_block_is_exact(name):
    analysis, macs, scores = case(name)
    blocks = multiples(analysis, macs, parse_budgets(BUDGETS, macs.total), 8)
    levels = torch.randint(1, 5, (analysis.num_units,), generator=torch.Generator().manual_seed(0))
    planner = Planner(analysis, macs, levels, 3, scores, locked_units(analysis, scores), multiples=blocks)
    before = macs.subnet_macs(planner.levels, 3)
    for level, other in ((2, 3), (3, 2)):
        units = planner._ranked((planner.unit_levels == level) & ~planner.locked)
        found = planner._blocks(units, planner.scores[units])
        marginal = (planner.model.saved if level == 2 else planner.model.added)(planner.counts, 2)
        cost = (planner._saving if level == 2 else planner._cost)(found, marginal, 2)
        for index in range(0, len(found.ends), 7):
            moved = planner.levels
            moved[torch.from_numpy(found.only(index).units)] = other
            after = macs.subnet_macs(moved, 3)
            assert abs(int(after[1] - before[1])) == cost[index]


def test_budgets_come_before_multiples():
    """Few and expensive units: what whole blocks cannot do, smaller ones must, and no budget is given up for speed."""
    analysis, macs, scores = case("lenet5")
    budgets = parse_budgets([0.12, 0.3, 0.5], macs.total)
    free, rounded = (assign(analysis, macs, budgets, scores, "any-width", round_to=r) for r in (1, 64))
    for result in (free, rounded):
        assert all(m <= b for m, b in zip(result.macs, budgets, strict=True))
    assert len(rounded.notes) <= len(free.notes)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_rounded_nets_are_exact(name):
    model = make(name)
    net = apply_steppingnet(model, [0.2, 0.4, 0.7], config=ConstructionConfig(round_to=4, expansion=1.2))
    verify(net)
    assert all(m <= b for m, b in zip(net.macs, net.budgets, strict=True))
    assert_multiples(net.analysis, net.levels, 3, 4, least=48)


class Stack(nn.Module):
    """Plain convolutions, some of whose widths are no multiples."""

    def __init__(self):
        super().__init__()
        widths = [1, 48, 72, 100, 128]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(128, 4)

    def forward(self, x):
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("flow", ["trajectory", "paper"])
def test_construction_keeps_multiples(flow):
    images, labels = torch.randn(16, 1, 16, 16), torch.arange(16) % 4
    config = ConstructionConfig(
        flow=flow, iterations=6, batches=1, lr=0.01, round_to=4, expansion=1.3, threshold=1e-3, rebirth=True
    )
    budgets = [0.2, 0.45, 0.8]
    net = apply_steppingnet(
        Stack(), budgets, example_inputs=images[:1], train_loader=[(images, labels)] * 2, config=config
    )
    assert all(0.97 * b <= m <= b for m, b in zip(net.macs, net.budgets, strict=True))
    found = [math.gcd(*added) % 4 == 0 for _, _, added, _ in new_channels(net.analysis, net.levels, 3)]
    assert sum(found) >= 3, "one width may make up for the rest of a budget"
    verify(net)


def test_widened_widths_are_multiples():
    model = make("test_resnet")
    analysis = analyse(model, image_size(model), (False,))
    wide = widen(model, analysis, 1.3, grid=Grid(8, 3))
    for old, new in zip(analysis.groups, wide.analysis.groups, strict=True):
        multiple = 8 if len(old.units) >= 24 else 4  # every one of three levels must have a block
        assert len(new.units) % multiple == 0 and abs(len(new.units) - 1.3 * len(old.units)) <= multiple / 2
    unchanged = widen(model, analysis, 1.0, grid=Grid(8, 3))
    assert unchanged.analysis.num_units == analysis.num_units
    x = torch.randn(2, *image_size(model), dtype=torch.float64)
    torch.testing.assert_close(wide.model(x), model(x), rtol=0, atol=1e-9)


def test_summary_says_what_levels_are_multiples_of():
    net = apply_steppingnet(make("test_resnet"), [0.3, 0.6], config=ConstructionConfig(round_to=8, expansion=1.0))
    for group in net.analysis.groups:
        counts = torch.bincount(net.levels[group.units], minlength=4)[1:3].tolist()
        assert channels_in_multiples_of(net, group) == math.gcd(*counts)  # one channel per unit in this model
        assert not counts[0] % 8 or len(group.units) < 32


# ---------------------------------------------------------------------------------------- settings, "auto"


@pytest.mark.parametrize("value", [0, -8, 2.5, "best", True, 4096])
def test_bad_multiples_are_refused(value):
    with pytest.raises(SteppingError, match="round_to"):
        ConstructionConfig(round_to=value)


@pytest.mark.parametrize(("slow", "expected"), [({1: 2.0, 2: 1.5}, 4), ({1: 2, 2: 2, 4: 2, 8: 2}, 16), ({}, 1)])
def test_auto_takes_the_smallest_multiple_near_the_best(monkeypatch, slow, expected):
    def seconds(runners):
        of = {width: m for m, widths in calibration.CANDIDATES.items() for width in widths}
        macs = {w: sum(c.outputs * c.inputs // c.groups * c.kernel**2 for c in calibration._stack(w)) for w in runners}
        return {width: slow.get(of[width], 1.0) * macs[width] for width in runners}

    monkeypatch.setattr(calibration, "_interleaved", seconds)
    calibration.calibrate.cache_clear()
    assert calibration.calibrate().multiple == expected
    calibration.calibrate.cache_clear()


def test_auto_runs_what_it_times():
    for layers in map(calibration._stack, (8, 9)):
        assert calibration._torch_runner(layers, 1, torch.device("cpu"))() is None


def test_missing_onnxruntime_names_the_extra(monkeypatch):
    monkeypatch.setattr(ort.importlib.util, "find_spec", lambda name: None)
    calibration.calibrate.cache_clear()
    with pytest.raises(SteppingError, match=r"stepping-plugin\[onnx\]"):
        calibration.calibrate("onnxruntime")


def test_a_run_keeps_what_it_measured(monkeypatch, tmp_path):
    monkeypatch.setattr("stepping_plugin.runs.rounding.calibrate", lambda *a: calibration.Calibration(8, {8: 1.0}))
    auto, cpu = ConstructionConfig(round_to="auto"), torch.device("cpu")
    assert with_fixed_rounding(auto, cpu, tmp_path, keep=True, main=True).round_to == 8
    assert json.loads((tmp_path / FILE).read_text())["round_to"] == 8
    monkeypatch.setattr("stepping_plugin.runs.rounding.calibrate", lambda *a: calibration.Calibration(16, {16: 1.0}))
    assert with_fixed_rounding(auto, cpu, tmp_path, keep=True, main=True).round_to == 8
    assert with_fixed_rounding(ConstructionConfig(round_to=4), cpu, tmp_path, keep=True, main=True).round_to == 4
    (tmp_path / FILE).write_text('{"round_to": "many"}')
    with pytest.raises(CheckpointError, match="damaged"):
        with_fixed_rounding(auto, cpu, tmp_path, keep=True, main=True)


@pytest.mark.slow
def test_bench_in_onnxruntime_runs_every_step():
    pytest.importorskip("onnxruntime")
    from stepping_plugin.studies.bench.onnx import bench_nets_in_onnxruntime

    dense = timm.create_model("test_resnet").eval()
    nets = {
        str(r): apply_steppingnet(dense, [0.3, 0.6], config=ConstructionConfig(round_to=r, expansion=1.0))
        for r in (1, 8)
    }
    found = bench_nets_in_onnxruntime(nets, dense, (1, 3), turns=1)
    assert set(found) == {1, 3} and all(set(own) == {"1", "8"} for own in found.values())
    for entry in (e for own in found.values() for e in own.values()):
        assert len(entry["steps"]) == 2 and entry["ratio"] == pytest.approx(sum(entry["steps"]) / entry["dense"])
