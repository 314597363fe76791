"""Construction: both flows against naive ones, landing, pruning, resuming, faults."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import nets
import pytest
import torch
from torch import Tensor, nn

from stepping_plugin.construction.config import ConstructionConfig
from stepping_plugin.construction.flow import Construction
from stepping_plugin.construction.importance import discount_copies
from stepping_plugin.construction.plugs import find_plugs
from stepping_plugin.construction.start import endless, start_network
from stepping_plugin.construction.unstructured import UnstructuredPruning
from stepping_plugin.errors import BudgetError, CheckpointError, SteppingError
from stepping_plugin.net import SteppingNet
from stepping_plugin.runs.recipe_schema import Construction as Section
from stepping_plugin.training.checkpoint import load_checkpoint, save_checkpoint
from stepping_plugin.training.loader import EpochLoader, TensorSet
from stepping_plugin.units.analysis import Analysis, analyse
from stepping_plugin.units.macs import MacModel

SHARES = (0.1, 0.3, 0.5, 0.85)
N = len(SHARES)


class Small(nn.Module):
    """Two convolutions with batch norm, a residual sum, dropout, a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.norm2 = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 16, 3, stride=2)
        self.drop = nn.Dropout(0.1)
        self.hidden = nn.Linear(64, 20)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(x + self.norm2(self.conv2(x)))
        x = self.drop(torch.relu(self.conv3(x)).flatten(1))
        return self.head(torch.tanh(self.hidden(x)))


class Pinned(nn.Module):
    """The classifier reads running sums over the channels, which keeps them all at level 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.last(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)).cumsum(1))


@functools.lru_cache
def analysed() -> tuple[nn.Module, Analysis, int]:
    with torch.random.fork_rng(devices=[]):  # whoever calls first must not find other random numbers than the next
        torch.manual_seed(0)
        model = nets.randomise(Small())
        analysis = analyse(model, (1, 6, 6))
    return model, analysis, MacModel(analysis).total


def loader(world: int = 1, rank: int = 0) -> EpochLoader:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (48, 1, 6, 6), dtype=torch.uint8, generator=generator)
    data = TensorSet(pictures, torch.arange(48) % 4, (0.5,), (0.25,))
    return EpochLoader(data, 16 // world, train=True, seed=3, rank=rank, world=world)


def start(config: ConstructionConfig, shares=SHARES) -> SteppingNet:
    model, analysis, total = analysed()
    return start_network(model, analysis, [int(total * share) for share in shares], config, total)


def construction(shares=SHARES, data=None, **options) -> Construction:
    """Without training and by magnitude, unless said otherwise."""
    config = ConstructionConfig(**{"batches": 0, "importance": "magnitude", **options})
    return Construction(start(config, shares), data if data is not None else loader(), config, device="cpu")


def macs(run: Construction, levels: Tensor) -> list[int]:
    return run.net.macs_model.subnet_macs(levels, N).tolist()


# --------------------------------------------------------------------------------------- the paper's flow


def anchored(analysis: Analysis, levels: Tensor, unit: int) -> bool:
    """Whether a unit is the last one at level 1 in some tensor."""
    return any(unit in a.tolist() and int((levels[a] == 1).sum()) == 1 for a in analysis.anchors)


@pytest.mark.parametrize("expansion", [1.0, 1.8])
def test_paper_flow_moves_one_unit_after_the_other_by_its_rules(expansion):
    """Against loops over single units; the guard of subnet 1 differs only in which unit it keeps."""
    run = construction(flow="paper", band=None, importance="random", iterations=12, expansion=expansion)
    budgets, scores = run.net.budgets, run.importance(1)
    quota = (run.net.macs[0] - budgets[0]) / 12
    assert run.net.macs[0] > 1.5 * run.net.reference_macs or expansion == 1.0
    while not run.done:
        levels = run.net.levels
        for i in range(1, N + 1):
            now, waiting = macs(run, levels), levels == i
            if i >= 2 and not now[i - 1] - now[i - 2] > budgets[i - 1] - budgets[i - 2]:
                continue
            moved = 0
            while now[i - 1] - moved > budgets[i - 1] and moved < quota and bool(waiting.any()):
                unit = int(torch.where(waiting, scores, torch.inf).argmin())
                waiting[unit] = False
                if i > 1 or not anchored(run.net.analysis, levels, unit):
                    levels[unit] = i + 1
                moved = now[i - 1] - macs(run, levels)[i - 1]
        run.step()
        assert torch.equal(run.net.levels, levels)
    assert all(m <= b for m, b in zip(run.net.macs, budgets))
    assert 2 <= run.iteration <= 12


# ---------------------------------------------------------------------------------------- the trajectory


@pytest.mark.parametrize("band", [None, (0.8, 1.25)])
@pytest.mark.parametrize("expansion", [1.0, 1.7])
def test_trajectory_meets_its_targets(band, expansion):
    run = construction(iterations=8, band=band, expansion=expansion)
    top = run.net.macs[0]
    before = run.net.levels
    for record in run:
        progress = record["iteration"] / 8
        targets = [top * (budget / top) ** progress for budget in run.net.budgets]
        assert all(m <= max(t, b) for m, t, b in zip(record["macs"], targets, run.net.budgets))
        assert record["macs"] == run.net.macs == macs(run, run.net.levels)
        assert bool((run.net.levels >= before).all()) and record["moved"] == int((run.net.levels != before).sum())
        before = run.net.levels
    assert run.iteration == 8


def test_band_narrows_to_the_final_one():
    widths = {}
    for band in (None, (0.8, 1.25)):
        run = construction(iterations=8, band=band)
        final = run.band
        list(run)
        cumulative = torch.stack([(run.net.levels <= i).long() for i in range(1, N + 1)], 1)
        widths[band] = torch.stack([cumulative[g.units].sum(0) for g in run.net.analysis.groups])
    assert final is not None
    banded, free = widths[0.8, 1.25].numpy(), widths[None].numpy()
    assert bool(((banded >= final.lower) & (banded <= final.upper)).all())
    assert bool((free < final.lower).any())  # without a band, layers leave it


def assert_landed(net: SteppingNet) -> None:
    """Every subnet is within 1 % below its budget, or a note says why not."""
    for i, (cost, budget) in enumerate(zip(net.macs, net.budgets), start=1):
        assert cost <= budget
        assert cost >= 0.99 * budget or any(note.startswith(f"subnet {i} costs") for note in net.notes)


@pytest.mark.parametrize("flow, band", [("trajectory", (0.8, 1.25)), ("trajectory", None), ("paper", None)])
@pytest.mark.parametrize("importance", ["magnitude", "random", "per-sample", "per-batch"])
def test_every_subnet_lands_on_its_budget(flow, band, importance):
    run = construction(flow=flow, band=band, importance=importance, iterations=4, expansion=1.7)
    net = run.run()
    assert_landed(net)
    about_macs = [note for note in net.notes if "new weights" not in note]
    assert len(about_macs) <= (flow == "paper")  # which leaves subnet 4 too few units
    assert net.macs == run.net.macs and int(net.levels.max()) == N and not net.training
    assert not find_plugs(net.analysis, net.levels, N)
    with torch.no_grad():
        scores = net.forward_all(torch.randn(3, 1, 6, 6))
    assert all(float((a - b).abs().max()) > 1e-4 for a, b in itertools.pairwise(scores))


def test_cool_down_trains_without_moves_at_a_falling_learning_rate(monkeypatch):
    run = construction(batches=3, iterations=2, cooldown_iterations=2, lr=0.03)
    rates: list[float] = []
    update = run.trainer.update

    def observed(group):
        rates.append(run.trainer.optimizer.param_groups[0]["lr"])
        return update(group)

    monkeypatch.setattr(run.trainer, "update", observed)
    for _ in run:
        pass
    landed = run.finish().levels
    assert torch.equal(run.net.levels, landed) and run.batches == 3 * (2 + 2)
    assert rates == pytest.approx([0.03] * 6 + [0.02] * 3 + [0.01] * 3)


def test_a_layer_without_new_units_gets_some():
    run = construction(shares=(0.3, 0.6), iterations=1)
    group = next(g for g in run.net.analysis.groups if g.name == "hidden")
    levels = torch.full((run.net.analysis.num_units,), 2)
    levels[group.units] = 1  # all that the classifier reads
    for anchor in run.net.analysis.anchors:
        levels[anchor[:2]] = 1
    run.net.set_levels(levels)
    assert [p.groups for p in find_plugs(run.net.analysis, levels, 2)] == [["hidden"]]
    run.finish()
    assert not find_plugs(run.net.analysis, run.net.levels, 2)
    assert_landed(run.net)


def test_neighbouring_budgets_still_give_different_subnets():
    _, _, total = analysed()
    net = construction(shares=(0.5, 0.5 + 1.5 / total), iterations=2).run()
    assert net.budgets[1] == net.budgets[0] + 1
    assert net.macs[0] < net.macs[1] and not find_plugs(net.analysis, net.levels, 2)
    assert_landed(net)


def test_subnets_that_cannot_differ_are_refused_before_training():
    model = Pinned()
    analysis = analyse(model, (1, 6, 6))
    total = MacModel(analysis).total
    budgets = [int(0.5 * total), int(0.9 * total)]
    with pytest.raises(BudgetError, match="head: the classifier reads 0 units"):
        start_network(model, analysis, budgets, ConstructionConfig(), total)


def test_importance_is_equation_3():
    run = construction(importance="per-sample", alpha=3.0)
    run.gradients = torch.rand(N, run.net.analysis.num_units, dtype=torch.float64)
    g = run.gradients
    torch.testing.assert_close(run.importance(1), g[0] + 3 * g[1] + 9 * g[2] + 27 * g[3])
    torch.testing.assert_close(run.importance(3), 9 * g[2] + 27 * g[3])


# ------------------------------------------------------------------------------------ training and state

TRAINED = {"importance": "per-sample", "batches": 3, "iterations": 4, "threshold": 3e-3, "expansion": 1.5}


@pytest.mark.parametrize("flow", ["trajectory", "paper"])
def test_copies_are_ranked_lower_but_not_in_the_papers_flow(flow):
    run = construction(flow=flow, band=None, importance="random", expansion=1.7)
    scores, copies = run.importance(1), run.net.lineage[0]
    assert int(copies.max()) == 2
    expected = scores if flow == "paper" else discount_copies(scores, copies)
    assert torch.equal(run.ranking(1), expected)
    for options in (
        {"expansion": 1.0},
        {"expansion": 1.7, "copy_importance": 1.0},
        {"expansion": 1.7, "init": "random"},
    ):
        plain = construction(flow=flow, band=None, importance="random", **options)
        assert torch.equal(plain.ranking(1), plain.importance(1))


def test_a_resumed_construction_ends_with_the_same_bits(tmp_path):
    def finish(run: Construction) -> dict[str, Tensor]:
        list(run)
        run.finish()
        return run.net.state_dict()

    torch.manual_seed(5)
    expected = construction(**TRAINED)
    whole = finish(expected)
    torch.manual_seed(5)
    first = construction(**TRAINED)
    first.step(), first.step()
    random = torch.get_rng_state()
    save_checkpoint(tmp_path / "state", first.state_dict())
    assert first.pruning.pruned
    second = construction(**TRAINED)
    second.load_state_dict(load_checkpoint(tmp_path / "state"))
    torch.set_rng_state(random)
    resumed = finish(second)
    assert second.records == expected.records and len(second.records) == 4
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert torch.equal(second.gradients, expected.gradients)


def test_a_state_of_another_construction_is_refused():
    state = construction(iterations=3).state_dict()
    with pytest.raises(CheckpointError, match="iterations was 3, is 5"):
        construction(iterations=5).load_state_dict(state)
    with pytest.raises(CheckpointError, match="expansion"):
        construction(iterations=3, expansion=1.5).load_state_dict(state)


@pytest.mark.parametrize("change", [{"iteration": 7}, {"batches": 1}, {"levels": None}, {"trainer": {}}, {"pruned": 3}])
def test_a_damaged_state_is_refused(change):
    with pytest.raises(CheckpointError, match="damaged"):
        construction(iterations=3).load_state_dict({**construction(iterations=3).state_dict(), **change})


def test_training_lowers_the_losses_and_evaluation_sees_m_batches():
    run = construction(importance="per-batch", batches=20, iterations=3, importance_batches=5, lr=0.02, flow="paper")
    records = [run.step(), run.step()]
    assert run.batches == 40
    assert records[1]["losses"][-1] < records[0]["losses"][-1]
    untrained = construction(importance="per-batch", batches=0, importance_batches=5)
    weights = [p.clone() for p in untrained.net.parameters()]
    untrained.step()
    assert untrained.batches == 5 and all(map(torch.equal, weights, untrained.net.parameters()))


def test_sequential_updates_train_other_weights_than_joint_ones():
    states = []
    for updates in ("joint", "sequential"):
        torch.manual_seed(0)
        run = construction(updates=updates, batches=2, iterations=2, beta=0.5)
        list(run)
        states.append(torch.cat([p.detach().flatten() for p in run.net.parameters()]))
    assert float((states[0] - states[1]).abs().max()) > 1e-4


def test_mixed_precision_finds_nearly_the_same_importance():
    found = []
    for amp in (False, True):
        torch.manual_seed(0)
        run = construction(importance="per-sample", importance_batches=3, amp=amp, iterations=2)
        run.net.model.drop.p = 0.0
        run.step()
        found.append(run.gradients)
    assert not torch.equal(*found)
    assert float(torch.corrcoef(torch.stack(found).flatten(1))[0, 1]) > 0.99


def test_spare_units_keep_their_importance():
    run = construction(shares=(0.1, 0.2), importance="per-sample", iterations=2, batches=1)
    run.step()
    spare = run.net.levels == 3
    before = run.gradients.clone()
    run.step()
    assert bool(spare.any()) and torch.equal(run.gradients[:, spare], before[:, spare])
    assert bool(before[:, spare].any())
    assert not torch.equal(run.gradients[:, ~spare], before[:, ~spare])


@pytest.mark.parametrize("batches", [[], iter([])])
def test_a_loader_without_batches_is_an_error(batches):
    with pytest.raises(SteppingError, match="empty"):
        construction(importance="per-sample", data=batches).step()


def test_plain_loaders_start_anew():
    stream = endless([1, 2, 3], start=4)
    assert [next(stream) for _ in range(4)] == [2, 3, 1, 2]


def test_diverged_training_stops():
    def poisoned():
        while True:
            yield torch.full((4, 1, 6, 6), torch.nan), torch.arange(4)

    run = construction(batches=2)
    run.stream = poisoned()
    with pytest.raises(SteppingError, match="diverged"):
        run.step()


# --------------------------------------------------------------------------------------------- pruning


def pruned_net() -> tuple[SteppingNet, dict[str, Tensor]]:
    """A net with random levels, and what is live in its weights, by loops over the nesting rule."""
    net = start(ConstructionConfig())
    net.set_levels(nets.random_levels(net.analysis, N, spare=True))
    live = {}
    for name, (outputs, inputs) in net.analysis.weight_units.items():
        rows = [1 if u < 0 else int(net.levels[u]) for u in outputs]
        columns = [1 if u < 0 else int(net.levels[u]) for u in inputs]
        live[name] = torch.tensor([[c <= r <= N for c in columns] for r in rows])
    head = next(layer for layer in net.analysis.layers if layer.weight == "head.weight")
    live["head.weight"] = torch.tensor([[int(net.levels[u]) <= N for u in head.in_units]] * 4)
    return net, live


def test_small_live_weights_are_pruned():
    net, live = pruned_net()
    before = {name: net.model.get_parameter(name).detach().clone() for name in live}
    pruning = UnstructuredPruning(net, 0.03)
    pruning.round(torch.zeros(net.analysis.num_units, dtype=torch.bool))
    count = total = 0
    for name, mask in live.items():
        mask = mask.reshape(*mask.shape, *[1] * (before[name].dim() - 2)).expand_as(before[name])
        small = mask & (before[name].abs() < 0.03)
        assert torch.equal(net.model.get_parameter(name), torch.where(small, 0, before[name]))
        count, total = count + int(small.sum()), total + int(mask.sum())
    assert 0 < count < total and pruning.fraction == count / total


def test_moved_units_get_their_synapses_back():
    net, _ = pruned_net()
    weight = net.model.get_parameter("hidden.weight")
    before = weight.detach().clone()
    units = net.analysis.weight_units["hidden.weight"][0]
    pruning = UnstructuredPruning(net, 0.03)
    pruning.round(torch.zeros(net.analysis.num_units, dtype=torch.bool))
    after = weight.detach().clone()
    row = int(((after == 0) & (before != 0)).sum(1).argmax())  # the unit that lost most
    grown = int((after[row] == 0).nonzero()[0])
    with torch.no_grad():
        weight[row, grown] = 0.5  # training has brought one back by itself
    levels, moved = net.levels, torch.zeros(net.analysis.num_units, dtype=torch.bool)
    moved[units[row]] = True
    levels[units[row]] = levels[units[row]] % N + 1 if levels[units[row]] != N else N + 1
    net.set_levels(levels)
    pruning.round(moved)
    expected = before[row].clone()
    expected[grown] = 0.5
    assert torch.equal(weight[row], expected)
    others = torch.arange(len(units)) != row
    assert torch.equal(weight[others], after[others])


def test_no_threshold_prunes_nothing():
    net, _ = pruned_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    UnstructuredPruning(net, 0.0).round(torch.zeros(net.analysis.num_units, dtype=torch.bool))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


# ---------------------------------------------------------------------------------------------- config


def test_all_mistakes_are_told_at_once():
    with pytest.raises(SteppingError) as error:
        ConstructionConfig(flow="papr", iterations=0, batches=1.5, alpha=0, beta=1.5, band=(1.1, 2), lr=float("nan"))  # type: ignore[arg-type]
    text = str(error.value)
    assert "did you mean 'paper'" in text
    assert all(f"- {name}: got" in text for name in ("flow", "iterations", "batches", "alpha", "beta", "band", "lr"))
    assert text.count("\n") == 7


def test_the_recipes_section_is_understood():
    section = Section(flow="paper", iterations=7, band=None, expansion=1.8, clip_grad=5.0, importance="per-batch")
    config = ConstructionConfig.of(section, lr=0.3)
    assert (config.flow, config.iterations, config.band, config.expansion) == ("paper", 7, None, 1.8)
    assert (config.clip_grad, config.importance, config.lr) == (5.0, "per-batch", 0.3)
    assert ConstructionConfig.of(Section()) == ConstructionConfig()
    assert ConstructionConfig.of(SimpleNamespace()) == ConstructionConfig()
