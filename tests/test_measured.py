"""Figures in README, docs and recipes are those of the committed JSON files."""

import json
import re

import measured
import pytest

from stepping_plugin.compare.results import read_all
from stepping_plugin.recipe import load_recipe


@pytest.mark.parametrize("path, text, wanted", [pytest.param(*u, id=u[0].name) for u in measured.updates()])
def test_texts_say_what_the_data_say(path, text, wanted):
    assert text == wanted, "run `python tests/measured.py`"


def test_a_wrong_figure_is_noticed():
    text = (measured.ROOT / "README.md").read_text(encoding="utf-8")
    accuracy = measured._percent(measured.runs()["digits"][0]["subnets"][0]["accuracy"])
    assert accuracy in text
    assert measured.filled(text.replace(accuracy, "99.99 %")) == text


def test_the_short_list_in_the_readme_says_what_the_data_say():
    """Of each recipe, over the seeds that both methods have: mean accuracy minus SteppingNet's, in every view."""
    found = {(r.recipe, r.variant, r.seed): r for r in read_all(measured.RESULTS) if r.status == "done"}

    def ahead(variant, view, chosen=slice(None)):
        differences = {}
        for recipe, name, seed in found:
            if name == variant and (recipe, "steppingnet", seed) in found:
                ours, theirs = (getattr(found[recipe, n, seed], view)[chosen] for n in ("steppingnet", variant))
                gain = sum(b.accuracy - a.accuracy for a, b in zip(ours, theirs, strict=True))
                differences[recipe] = differences.get(recipe, 0) + gain
        return {recipe for recipe, difference in differences.items() if difference > 0}, set(differences)

    readme = (measured.ROOT / "README.md").read_text(encoding="utf-8")
    assert "SteppingNet beats slimmable networks" in readme and ahead("slimmable", "executed")[0] == set()
    assert "on the VGG and the transformer these stay ahead" in readme
    better, where = ahead("tp-magnitude", "executed")
    assert where - better == {"compare_lenet5", "compare_resnet"}
    assert "separately pruned nets are the better choice" in readme
    better, where = ahead("tp-magnitude", "alone")
    assert better == where
    assert "has the worse subnet 1 on every network and the better large" in readme
    better, where = ahead("any-width", "alone", slice(1))
    assert better == set() and len(where) >= 4
    better, where = ahead("any-width", "alone", slice(2, None))
    assert where - better == {"compare_lenet5"}
    assert "That of `compare_vgg` is not, and there training without it" in readme
    assert all("compare_vgg" in ahead(name, "alone")[0] for name in ("no-distillation", "in-place-distillation"))


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
