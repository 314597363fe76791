"""Figures in README, docs and recipes are those of the committed JSON files."""

import json
import re

import measured
import pytest

from stepping_plugin.runs.recipe import load_recipe
from stepping_plugin.studies.compare.results import read_all


@pytest.mark.parametrize("path, text, wanted", [pytest.param(*u, id=u[0].name) for u in measured.updates()])
def test_texts_say_what_the_data_say(path, text, wanted):
    assert text == wanted, "run `python tests/measured.py`"


def test_a_wrong_figure_is_noticed():
    text = (measured.ROOT / "docs" / "results" / "measurements.md").read_text(encoding="utf-8")
    accuracy = measured._percent(measured.runs()["digits"][0]["subnets"][0]["accuracy"])
    assert accuracy in text
    assert measured.filled(text.replace(accuracy, "99.99 %")) == text


def gains(variant, view, chosen=slice(None), reference="steppingnet"):
    """Recipe -> mean accuracy minus the reference's in points, over the seeds that both have and the chosen budgets."""
    found = {(r.recipe, r.variant, r.seed): r for r in read_all(measured.RESULTS) if r.status == "done"}
    differences = {}
    for recipe, name, seed in found:
        if name == variant and (recipe, reference, seed) in found:
            ours, theirs = (getattr(found[recipe, n, seed], view)[chosen] for n in (reference, variant))
            pairs = [100 * (b.accuracy - a.accuracy) for a, b in zip(ours, theirs, strict=True)]
            differences.setdefault(recipe, []).append(sum(pairs) / len(pairs))
    return {recipe: sum(values) / len(values) for recipe, values in differences.items()}


def beyond(gained, points):
    """Recipes in which a variant gains more than so many points, or, if negative, loses more."""
    return {
        r.removeprefix("compare_") for r, gain in gained.items() if (gain > points if points >= 0 else gain < points)
    }


def test_the_short_list_says_what_the_data_say():
    page = " ".join((measured.ROOT / "docs" / "results" / "measurements.md").read_text(encoding="utf-8").split())
    networks = {"lenet5", "lenet5_full", "resnet", "vgg", "vit"}
    slim, pruned = gains("slimmable", "executed"), gains("tp-magnitude", "executed")
    assert "above that of slimmable networks on every network, by more than half a point on LeNet-5" in page
    assert max(slim.values()) < 0 and beyond(slim, -0.5) == networks - {"vgg", "vit"}
    assert "level with it or a little behind on LeNet-5, and ahead by a quarter to two thirds of a point else" in page
    assert all(-0.4 < gain < 0 if "lenet5" in name else 0.25 < gain < 0.67 for name, gain in pruned.items()), pruned
    assert "separately pruned nets have the better mean on every network" in page
    assert min(gains("tp-magnitude", "alone").values()) > 0
    costly = [gains("tp-magnitude", view, reference="steppingnet-long") for view in ("alone", "executed")]
    assert "level with theirs if a budget is chosen once, on the residual net above it" in page
    assert beyond(costly[0], -0.25) == {"resnet"} and not beyond(costly[0], 0.25)
    assert "ahead by about half a point or more, except on the transformer, where it is level" in page
    assert beyond(costly[1], -0.45) == networks - {"vit"} and abs(costly[1]["compare_vit"]) < 0.25
    assert "(from three quarters on LeNet-5 to five quarters elsewhere)" in page
    dearer = {r: training_cost(r, "steppingnet-long") / training_cost(r, "tp-magnitude") for r in costly[0]}
    assert all(0.65 < q < 0.9 if "lenet5" in recipe else 1.05 < q < 1.3 for recipe, q in dearer.items()), dearer
    regular = [gains("any-width", "alone", chosen) for chosen in (slice(1), slice(None), slice(2, None))]
    assert "has the worse subnet 1 on every network" in page and max(regular[0].values()) < 0
    assert "a mean more than half a point lower on LeNet-5 and the VGG" in page
    assert beyond(regular[1], -0.5) == {"lenet5", "lenet5_full", "vgg"}
    assert "On the residual net and the transformer the means are level" in page
    assert max(abs(regular[1][f"compare_{name}"]) for name in ("resnet", "vit")) < 0.25
    assert "its two largest subnets are the better ones" in page
    assert beyond(regular[2], 0.1) == {"resnet", "vit", "vgg_long"}
    assert "a third of a point behind on LeNet-5, as much ahead on the transformer, and level on the other" in page
    late = gains("any-width-long", "alone", reference="steppingnet-long")
    assert beyond(late, -0.25) == {"lenet5"} and beyond(late, 0.25) == {"vit"} and len(late) == 4
    assert abs(late["compare_lenet5"] + 1 / 3) < 0.05 and abs(late["compare_vit"] - 1 / 3) < 0.05
    paper = gains("steppingnet-paper", "alone")
    assert "does worse than this package's on all but the transformer" in page
    assert beyond(paper, -0.25) == {"lenet5", "resnet", "vgg"} and abs(paper["compare_vit"]) < 0.25
    assert "they lose a third of a point on LeNet-5 and three quarters on the VGG" in page
    untaught = gains("no-distillation", "alone")
    assert abs(untaught["compare_lenet5"] + 1 / 3) < 0.05 and abs(untaught["compare_vgg"] + 3 / 4) < 0.05
    assert "More epochs pay" in page and min(gains("steppingnet-long", "alone").values()) > 0.5


def test_the_short_list_ranks_the_rivals_as_the_data_do():
    page = " ".join((measured.ROOT / "docs" / "results" / "measurements.md").read_text(encoding="utf-8").split())
    others = ("taylor", "bn-scale", "group-norm", "growing-reg", "random")
    rival = {
        view: {name: gains(f"tp-{name}", view, reference="tp-magnitude") for name in others}
        for view in ("alone", "executed")
    }
    assert "none is above group magnitude by more than a sixth of a point" in page
    assert all(gain < 1 / 6 for view in rival.values() for found in view.values() for gain in found.values())
    assert "Taylor, BN scale and random are behind it by two fifths of a point or more, except on the trans" in page
    assert all(beyond(rival["executed"][n], -0.4) == {"lenet5", "resnet", "vgg"} for n in ("taylor", "random"))
    assert beyond(rival["executed"]["bn-scale"], -0.4) == {"resnet", "vgg"}, "it cannot do the others"
    ab_initio = {view: gains("scratch", view, reference="tp-magnitude") for view in ("alone", "executed")}
    assert "have a better mean than the pruned nets on every network, by up to nine tenths of a point" in page
    assert all(0 < gain < 0.9 for found in ab_initio.values() for gain in found.values())
    assert "for more than three times their training" in page
    assert all(training_cost(r, "scratch") > 3 * training_cost(r, "tp-magnitude") for r in ab_initio["alone"])
    assert "more than half a point ahead of them on LeNet-5, level on the residual net and the VGG, and half" in page
    new = gains("scratch", "executed", reference="steppingnet-long")
    assert beyond(new, -0.5) == {"lenet5"} and abs(new["compare_vit"] - 1 / 2) < 0.1
    assert max(abs(new[f"compare_{name}"]) for name in ("resnet", "vgg")) < 0.25


def training_cost(recipe, variant):
    """Plain updates that all nets of the first view take, mean over seeds."""
    rows = [r for r in read_all(measured.RESULTS) if (r.recipe, r.variant, r.status) == (recipe, variant, "done")]
    return sum(phase.cost for row in rows for phase in row.training["alone"]) / len(rows)


@pytest.mark.parametrize("path", measured.TEXTS, ids=lambda path: path.name)
def test_no_figure_stands_outside_the_blocks(path):
    """Percentages and ratios with decimals, times: whatever looks measured."""
    prose = measured.without_blocks(path.read_text(encoding="utf-8"))
    prose = re.sub(r"```.*?```", "", prose, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+ ?%|±|\d+(?:\.\d+)? (?:ms|seconds|minutes|times)\b", prose) == []


def test_every_block_is_used_and_exists():
    texts = "".join(path.read_text(encoding="utf-8") for path in measured.TEXTS)
    assert set(re.findall(r"<!-- measured: ([\w-]+) -->", texts)) == set(measured.BLOCKS)


def test_measured_runs_are_those_of_the_shipped_recipes():
    """A recipe that has changed since would make its figures a lie; keys that came later have their defaults."""
    for name, runs in measured.runs().items():
        for run in runs:
            then = run["recipe"]
            now = load_recipe(name, [f"seed={then['seed']}", f"device={then['device']}"])
            plain = json.loads(json.dumps(now.model_dump(mode="json")))
            known = _leaves(plain)
            assert {k: v for k, v in _leaves(then).items() if known[k] != v} == {}, (name, run["seed"])


def _leaves(value, prefix=""):
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _leaves(inner, f"{prefix}.{key}").items()}
