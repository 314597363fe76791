"""The comparison: rivals against independent constructions, views that add up, resuming, results as data."""

import itertools
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from nets import images, randomise
from torch import nn

import stepping_plugin.integrations.timm  # noqa: F401 - registers the small networks
from stepping_plugin import BudgetError, CheckpointError, SteppingError
from stepping_plugin.cli import main
from stepping_plugin.integrations.fvcore import count_macs
from stepping_plugin.integrations.torch_pruning.to_budget import PRUNERS, loss_gradients, prune_to_budget
from stepping_plugin.studies.compare import timing
from stepping_plugin.studies.compare.dense import dense_net, dense_units
from stepping_plugin.studies.compare.methods import shared_sizes
from stepping_plugin.studies.compare.page import page_text
from stepping_plugin.studies.compare.results import Result, differing, read, read_all, result_path
from stepping_plugin.studies.compare.runner import Comparison, compare, flat
from stepping_plugin.studies.compare.slimmable import Slimmable
from stepping_plugin.studies.compare.studies import STUDIES, method_variants, study_variants
from stepping_plugin.studies.compare.tables import Group, difference_table
from stepping_plugin.units.analysis import analyse
from stepping_plugin.units.macs import MacModel

NETS = {
    "digits_net": ((1, 8, 8), {}),
    "lenet5": ((1, 28, 28), {"in_chans": 1, "img_size": 28}),
    "resnet_tiny": ((1, 16, 16), {"in_chans": 1}),
    "vgg_tiny": ((1, 16, 16), {"in_chans": 1}),
    "vit_pico": ((1, 16, 16), {"in_chans": 1, "img_size": 16}),
}
SHARES = (0.25, 0.5, 0.85)


def case(name):
    size, kwargs = NETS[name]
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, **kwargs)).double().eval()
    analysis = analyse(model, size)
    return model, analysis, MacModel(analysis), size


def example(size):
    return torch.zeros(1, *size, dtype=torch.float64)


@pytest.mark.parametrize("total", [4_600_975, 2_298_001, 41_556_992])
@pytest.mark.parametrize("shares", [(0.3, 0.6), (0.1, 0.3, 0.5, 0.85), (1 / 3, 2 / 3, 1.0)])
def test_budgets_that_differ_by_rounding_share_a_net(total, shares):
    budgets = [int(share * total) for share in shares]
    increments = [b - a for a, b in itertools.pairwise([0, *budgets])]
    sizes = shared_sizes([*budgets, *increments])
    assert all(0 <= wanted - size <= 2 for wanted, size in sizes.items())
    exact = {round(value, 9) for value in (*shares, *(b - a for a, b in itertools.pairwise([0, *shares])))}
    assert len(set(sizes.values())) == len(exact), "as many nets as there are different shares"
    assert shared_sizes([1_380_292, 2_760_585, 1_380_292, 1_380_293]) == {
        1_380_292: 1_380_292, 1_380_293: 1_380_292, 2_760_585: 2_760_585}  # fmt: skip


# ---------------------------------------------------------------------------------------- dense nets


@pytest.mark.parametrize("name", NETS)
def test_dense_nets_cost_what_fvcore_counts_and_use_the_budget_up(name):
    model, analysis, macs, size = case(name)
    for share in SHARES:
        budget = int(share * macs.total)
        kept = dense_units(analysis, macs, budget)
        counted = count_macs(dense_net(model, analysis, kept), (example(size),)).total
        assert 0.93 * budget <= counted <= budget
        assert counted == int(macs.subnet_macs(torch.where(kept, 1, 2), 1)[0])
        for group in analysis.groups:
            inside = kept[group.units.sort().values]
            assert bool((inside.int().diff() <= 0).all()), f"{group.name} is no prefix"


def test_a_dense_net_of_everything_is_the_model():
    model, analysis, macs, size = case("resnet_tiny")
    x = images(size)
    kept = dense_units(analysis, macs, macs.total)
    assert bool(kept.all())
    with torch.no_grad():
        assert torch.allclose(dense_net(model, analysis, kept).eval()(x), model(x), atol=1e-12)
        assert not torch.allclose(dense_net(model, analysis, kept, seed=1).eval()(x), model(x), atol=1e-3)


def test_no_dense_net_below_one_unit_per_width():
    _, analysis, macs, _ = case("lenet5")
    with pytest.raises(BudgetError, match="one unit per width"):
        dense_units(analysis, macs, 100)


# ---------------------------------------------------------------------------------------- slimmable


def test_slimmable_prefix_nets_equal_nets_sliced_by_hand():
    """Independent of the channel graph: weights cut with ordinary slices into a plain nn.Sequential."""
    model, analysis, macs, size = case("digits_net")
    widths = [dense_units(analysis, macs, int(s * macs.total)) for s in SHARES]
    net = Slimmable(model, analysis, widths).eval()
    with torch.no_grad():
        for i, own in enumerate(net.nets):  # norms of their own, unlike those of the other widths
            for parameter in own.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * (i + 1) * torch.randn_like(parameter))
    x = images(size)
    for i, width in enumerate(widths):
        counts = [int(width[g.units].sum()) for g in analysis.groups]
        expected = _sliced_by_hand(net.model, net.nets[i].model, counts)(x)
        assert torch.allclose(net.run(i + 1, x), expected, atol=1e-10)
        assert torch.allclose(net.extract(i + 1).eval()(x), expected, atol=1e-10)
    assert torch.equal(net(x), net.forward_all(x)[-1])


def _sliced_by_hand(shared, own, counts):
    layers, before = [], 1
    for k, count in enumerate(counts, start=1):
        conv, norm = getattr(shared, f"conv{k}")[0], getattr(own, f"conv{k}")[1]
        cut = nn.Conv2d(before, count, 3, padding=1).double()
        cut.weight.data = conv.weight.data[:count, :before].clone()
        cut.bias.data = conv.bias.data[:count].clone()
        fresh = nn.BatchNorm2d(count).double()
        fresh.load_state_dict(norm.state_dict())
        layers += [cut, fresh, nn.ReLU()] + [nn.MaxPool2d(2)] * (k == 2)
        before = count
    last = nn.Linear(before, 10).double()
    last.weight.data, last.bias.data = shared.fc.weight.data[:, :before].clone(), shared.fc.bias.data.clone()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last).eval()


@pytest.mark.parametrize("name", ["lenet5", "resnet_tiny", "vit_pico"])
def test_slimmable_trains_shared_weights_and_own_norms_only(name):
    model, analysis, macs, size = case(name)
    widths = [dense_units(analysis, macs, int(s * macs.total)) for s in SHARES]
    net = Slimmable(model, analysis, widths).train()
    net.forward_all(images(size, batch=3)).square().sum().backward()
    trained = {id(p) for p in net.parameters() if p.requires_grad}
    assert all((p.grad is not None) == (id(p) in trained) for p in net.parameters())
    assert net.stored() == sum(p.numel() for p in net.parameters() if p.requires_grad) + sum(
        b.numel() for own in net.nets for b in own.model.buffers() if b.is_floating_point()
    )


def test_slimmable_gradient_of_shared_weights_is_the_sum_over_widths():
    model, analysis, macs, size = case("resnet_tiny")
    widths = [dense_units(analysis, macs, int(s * macs.total)) for s in SHARES]
    net, x = Slimmable(model, analysis, widths).eval(), images(size)
    weight = net.model.layer2.conv1.weight
    parts = [torch.autograd.grad(net.run(i, x).square().sum(), weight)[0] for i in (1, 2, 3)]
    whole = torch.autograd.grad(net.forward_all(x).square().sum(), weight)[0]
    torch.testing.assert_close(whole, sum(parts))
    used = torch.stack([p.flatten(1).abs().sum(1) > 0 for p in parts]).sum(1)
    assert used.tolist() == sorted(used.tolist()) and used[0] < used[-1]


# ---------------------------------------------------------------------------------------- pruned nets


@pytest.mark.parametrize(
    "name",
    ["lenet5", pytest.param("resnet_tiny", marks=pytest.mark.slow), pytest.param("vit_pico", marks=pytest.mark.slow)],
)
def test_pruned_nets_land_below_their_budget(name):
    model, _, macs, size = case(name)
    x = images(size)
    gradients = loss_gradients(model, [(x, torch.tensor([0, 1]))])
    before = [p.detach().clone() for p in model.parameters()]
    for share in (0.3, 0.85):
        budget = int(share * macs.total)
        pruned = prune_to_budget(model, x[:1], budget, "taylor", gradients=gradients)
        assert 0.93 * budget <= count_macs(pruned, (x[:1],)).total <= budget
        assert pruned(x).shape == (2, 10) and all(p.grad is None for p in pruned.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("method", PRUNERS)
def test_every_pruner_reaches_small_budgets(method):
    """One channel per layer stays: at larger ratios the toolkit would leave a small layer whole."""
    model, _, macs, size = case("digits_net")
    gradients = [torch.randn_like(p) for p in model.parameters()]
    budget = int(0.05 * macs.total)
    pruned = prune_to_budget(model, example(size), budget, method, gradients=gradients)
    assert 0.8 * budget <= count_macs(pruned, (example(size),)).total <= budget


def test_magnitude_keeps_the_large_filters_and_random_obeys_its_seed():
    model, _, macs, size = case("digits_net")
    with torch.no_grad():
        model.conv1[0].weight[5] *= 50
        model.conv1[1].weight.fill_(1.0)
    kept = prune_to_budget(model, example(size), int(0.2 * macs.total)).conv1[0].weight
    assert any(torch.equal(filter, model.conv1[0].weight[5]) for filter in kept)
    half = macs.total // 2
    drawn = [prune_to_budget(model, example(size), half, "random", seed=s).conv1[0].weight for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_refusals_of_the_toolkit_are_explained():
    model, _, macs, size = case("lenet5")
    with pytest.raises(BudgetError, match="cannot get down to"):  # it has no batch norm to rank by
        prune_to_budget(model, example(size), macs.total // 2, "bn-scale")
    with pytest.raises(SteppingError, match="loss_gradients"):
        prune_to_budget(model, example(size), macs.total // 2, "taylor")
    with pytest.raises(SteppingError, match="did you mean 'magnitude'"):
        prune_to_budget(model, example(size), macs.total // 2, "magnitud")


# ---------------------------------------------------------------------------------------- runner

TINY = [
    "data.limit=200", "train.epochs=1", "retrain.epochs=1", "construction.iterations=3", "construction.batches=1",
    "construction.cooldown_iterations=0",
    "budgets=0.2,0.5,0.8", "device=cpu", "train.batch_size=50", "retrain.batch_size=50", "construction.batch_size=50",
]  # fmt: skip
RUN = ["steppingnet", "any-width", "slimmable", "tp-growing-reg", "scratch"]


def comparison(folder, names, seeds=(0,), overrides=TINY, **options):
    said = []
    made = Comparison("digits", method_variants(names), seeds, overrides, folder / "results", folder / "work",
                      say=said.append, **options)  # fmt: skip
    return made, said


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:  # what is timed here is not looked at
        patch.setattr(timing, "PICTURE_TURNS", 1)
        patch.setattr(timing, "STEP_TURNS", 1)
        compare(comparison(folder, RUN)[0])
    return folder


def test_results_are_complete_and_within_budgets(done):
    results = read_all(done / "results")
    assert [r.variant for r in results] == sorted(RUN)
    for result in results:
        assert result.status == "done" and result.settings["seed"] == 0 and result.train_samples == 200
        for answer in result.alone:
            assert 0.85 * answer.budget <= answer.macs == answer.executed <= answer.budget
        assert all(a.executed <= a.budget for a in result.executed)
        assert all(len(t.alone) == len(t.steps) == 3 for t in result.latency.values())
        assert result.reuse == (result.method == "stepping")
        assert len({r.reference.accuracy for r in results}) == 1, "one original for all"


def test_executed_macs_add_up(done):
    for result in read_all(done / "results"):
        answers = result.executed
        steps = [b.executed - a.executed for a, b in itertools.pairwise(answers)]
        increments = [b.budget - a.budget for a, b in itertools.pairwise(answers)]
        assert answers[0].executed == answers[0].macs
        if result.reuse:
            assert [a.executed for a in answers] == [a.macs for a in answers]
            continue
        assert all(0 < step <= room for step, room in zip(steps, increments, strict=True))
        sizes = [answers[0].executed, *steps]
        assert [a.macs for a in answers] == list(itertools.accumulate(sizes, max))
        assert result.stored["executed"] < result.stored["alone"]


def test_updates_per_network_are_equal(done):
    results = {r.variant: r for r in read_all(done / "results")}
    updates = {name: [(p.name, p.networks, p.updates) for p in r.training["alone"]] for name, r in results.items()}
    assert updates["steppingnet"] == [("construction", 1, 3), ("retraining", 1, 4)]
    assert updates["any-width"] == [("retraining", 1, 8)] and updates["slimmable"] == [("training", 1, 8)]
    assert updates["tp-growing-reg"] == [("sparse training", 1, 3), ("training", 3, 4)]
    assert updates["scratch"] == [("training", 3, 12)]  # those of the original on top


def test_only_what_is_missing_is_run(done, monkeypatch):
    path = result_path(done / "results", "digits", "slimmable", 0)
    before = {p: p.read_bytes() for p in (done / "results").rglob("*.json")}
    path.unlink()
    again, said = comparison(done, RUN)
    assert [(v.name, seed) for v, seed in again.missing()] == [("slimmable", 0)]
    assert compare(again) == [path]
    assert not any("original:" in text and "epochs" in text for text in said), "the original was trained again"
    numbers = [json.loads(text)["alone"] for text in (path.read_text(), before[path])]
    assert numbers[0] == numbers[1], "a repeated job gives the same numbers"
    assert all(p.read_bytes() == content for p, content in before.items() if p != path)
    assert compare(again) == []


def test_a_variant_that_is_the_reference_by_another_name_is_not_run_twice(tmp_path):
    names = [v.name for v in study_variants("expansion")]
    made, _ = comparison(tmp_path, names, overrides=[*TINY, "construction.expansion=1.5"])
    assert [v.name for v, _ in made.missing()] == [name for name in names if name != "expansion-1.5"]
    alone, _ = comparison(tmp_path, ["expansion-1.5"], overrides=[*TINY, "construction.expansion=1.5"])
    assert [v.name for v, _ in alone.missing()] == ["expansion-1.5"], "nothing else would have its numbers"


def test_other_settings_are_refused_but_unknown_keys_are_not(done):
    with pytest.raises(SteppingError, match=r"retrain\.epochs: 1 then, 2 now"):
        compare(comparison(done, ["any-width"], overrides=[*TINY, "retrain.epochs=2"])[0])
    other = [*TINY, "construction.noise=0.25"]
    assert comparison(done, ["slimmable", "scratch"], overrides=other)[0].missing() == []
    with pytest.raises(SteppingError, match=r"construction\.noise"):
        comparison(done, ["steppingnet"], overrides=other)[0].missing()
    result = read(result_path(done / "results", "digits", "any-width", 0))
    older = {k: v for k, v in result.settings.items() if k != "construction.noise"}
    assert differing(result.model_copy(update={"settings": older}), result.settings, lambda key: False) == []


def test_seeds_are_not_overridden(tmp_path):
    with pytest.raises(SteppingError, match="give --seeds"):
        comparison(tmp_path, ["scratch"], overrides=[*TINY, "seed=5"])


def test_two_comparisons_that_make_the_same_are_refused_and_others_are_not(tmp_path):
    """The second one at once, whether it shares the results or the unfinished jobs; nothing was made for it."""
    seen = []

    def second(text):
        if seen:
            return
        seen.append(text)
        for shared in ("results", "work"):
            other, _ = comparison(tmp_path / "other", ["any-width"])
            setattr(other, shared, tmp_path / shared)
            with pytest.raises(CheckpointError, match="is being made by another comparison"):
                compare(other)
        assert not list(tmp_path.rglob("*.json"))
        compare(comparison(tmp_path, ["any-width"], seeds=(1,))[0])

    first, _ = comparison(tmp_path, ["any-width"])
    first.say = second
    compare(first)
    assert seen and len(read_all(tmp_path / "results")) == 2


def test_a_method_that_cannot_is_a_result(tmp_path):
    made, _ = comparison(tmp_path, ["scratch"], overrides=[*TINY, "budgets=0.001,0.5"])
    (path,) = compare(made)
    result = read(path)
    assert result.status == "failed" and "one unit per width" in result.reason and not result.alone
    assert made.missing() == []


def test_damaged_results_are_named(tmp_path):
    path = tmp_path / "digits" / "scratch" / "seed0.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"format": 1}')
    with pytest.raises(SteppingError, match=r"seed0\.json is no comparison result"):
        read_all(tmp_path)


def test_the_schema_forbids_what_it_does_not_know(done):
    data = json.loads(result_path(done / "results", "digits", "scratch", 0).read_text())
    Result.model_validate(data)
    for change in ({"typo": 1}, {"format": 2}, {"reference": {**data["reference"], "accuracy": 1.5}}):
        with pytest.raises(ValueError):
            Result.model_validate({**data, **change})


def test_studies_name_each_variant_once_and_share_the_reference():
    names = [v.name for variants in STUDIES.values() for v in variants]
    assert names.count("steppingnet") == len(STUDIES) and len(set(names)) == len(names) - (len(STUDIES) - 1)
    assert all(study_variants(study)[0] is study_variants("methods")[0] for study in STUDIES)
    with pytest.raises(SteppingError, match="did you mean 'ablation'"):
        study_variants("ablations")
    with pytest.raises(SteppingError, match="did you mean 'tp-taylor'"):
        method_variants(["tp-tailor"])


# ---------------------------------------------------------------------------------------- page


def test_the_page_shows_the_data(done, tmp_path, capsys):
    page = tmp_path / "comparison.md"
    assert main(["compare", "--results", str(done / "results"), "--page", str(page)]) == 0
    text = page.read_text()
    assert (tmp_path / "comparison" / "digits-methods.png").read_bytes().startswith(b"\x89PNG")
    for result in read_all(done / "results"):
        for answer in result.alone:
            assert f" {100 * answer.accuracy:.2f} " in text
    assert "was tuned" not in text, "what the notes of other results say"
    place = re.search(r"JSON files under \[[^]]*\]\(([^)]*)\)", text).group(1)
    assert (tmp_path / place).resolve() == (done / "results").resolve()
    assert main(["compare"]) == 1 and "give a recipe" in capsys.readouterr().err
    assert main(["compare", "--results", str(tmp_path / "none"), "--page", str(page)]) == 1


@pytest.mark.parametrize("view", ["alone", "executed"])
def test_differences_at_every_budget_are_paired_by_seed(done, view):
    """Of seeds that both methods have; the accuracies are made up."""
    by_name = {r.variant: r for r in read_all(done / "results")}
    ours, theirs = by_name["steppingnet"], by_name["slimmable"]
    made = {
        "steppingnet": {0: [0.50, 0.60, 0.70], 1: [0.52, 0.60, 0.75], 2: [0.9, 0.9, 0.9]},
        "slimmable": {0: [0.51, 0.58, 0.70], 1: [0.55, 0.58, 0.71]},
    }

    def group(result, accuracies):
        copies = []
        for seed, values in accuracies.items():
            answers = [a.model_copy(update={"accuracy": v}) for a, v in zip(getattr(result, view), values)]
            copies.append(result.model_copy(update={"seed": seed, view: answers}))
        return Group(copies)

    groups = [group(ours, made["steppingnet"]), group(theirs, made["slimmable"])]
    row = difference_table(groups, view).splitlines()[-1]
    # (1 + 3) / 2, (-2 - 2) / 2, (0 - 4) / 2 points; their spread with n - 1
    assert row == "| slimmable | +2.00 ± 1.41 | -2.00 ± 0.00 | -2.00 ± 2.83 |"
    assert difference_table(groups[:1], view) == difference_table(groups[1:], view) == ""


ROOT = Path(__file__).resolve().parents[1]


def committed():
    return read_all(ROOT / "recipes" / "results")


def test_the_committed_page_comes_from_the_committed_results(monkeypatch):
    """Every number on it: the whole text is made anew and compared."""
    monkeypatch.chdir(ROOT)
    page = Path("docs/results/comparison.md")
    text = page_text(Path("recipes/results"), page)
    assert text == page.read_text(encoding="utf-8"), "run stepping compare --page docs/results/comparison.md"
    shown = re.findall(r"\]\((comparison/[^)]*\.png)\)", page.read_text(encoding="utf-8"))
    assert shown and all((ROOT / "docs" / "results" / name).is_file() for name in shown)
    assert Path("recipes/results/NOTES.md").read_text(encoding="utf-8") in text


def test_committed_results_were_made_by_shipped_recipes():
    """Settings that the recipe has by now other values of would make the table a lie."""
    for result in committed():
        variant = {v.name: v for variants in STUDIES.values() for v in variants}[result.variant]
        recipe = variant.recipe(result.recipe, seed=result.seed)
        assert differing(result, flat(recipe), variant.ignores) == [], (result.recipe, result.variant, result.seed)
