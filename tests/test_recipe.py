"""Recipes: the shipped ones are valid, YAML's traps are no traps, every mistake gets its own message."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from stepping_plugin.errors import RecipeError
from stepping_plugin.runs.recipe import dump_recipe, load_recipe, parse_recipe, shipped_recipes
from stepping_plugin.runs.recipe_schema import Recipe, Section

MINIMAL = "model: {name: lenet5}\ndata: {name: digits}\nbudgets: [0.1, 0.5]\n"
PAPER = {  # section IV: expansion, m, budgets
    "cifar10_lenet3c1l": ("lenet3c1l", 1.8, 250, [0.10, 0.30, 0.50, 0.85]),
    "cifar10_lenet5": ("lenet5", 2.0, 250, [0.15, 0.30, 0.60, 0.85]),
    "cifar100_vgg16": ("vgg16_cifar", 1.8, 100, [0.20, 0.40, 0.50, 0.70]),
}


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, overrides)
    return caught.value.problems


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_tell_how_to_run_them(name):
    recipe = load_recipe(name)
    assert recipe.output == f"runs/{name}"
    assert parse_recipe(dump_recipe(recipe)) == recipe
    header = shipped_recipes()[name].read_text().split("\n\n")[0]
    assert any(f"{command} {name}" in header for command in ("stepping run", "stepping_plugin run", "stepping compare"))
    assert "# Data: " in header and "# Expected result: " in header
    assert all(line.startswith("#") for line in header.splitlines())


def test_the_promised_recipes_are_there():
    expected = {
        "digits",
        "fashion_mnist_lenet5",
        "fashion_mnist_resnet",
        "imagenet_resnet50",
        "imagenet_deit_small",
    }
    assert expected | set(PAPER) | {"distill"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_hold_its_hyperparameters(name):
    recipe = load_recipe(name)
    found = (recipe.model.name, recipe.construction.expansion, recipe.construction.batches, recipe.budgets)
    assert found == PAPER[name]
    construction, retrain = recipe.construction, recipe.retrain
    assert (construction.flow, construction.iterations, construction.threshold) == ("paper", 300, 1e-5)
    assert (construction.alpha, construction.beta, retrain.gamma, retrain.beta) == (1.5, 0.9, 0.4, 0.9)


def test_files_are_read_relative_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine.yaml").output == "runs/mine"
    assert load_recipe("mine.yaml", ["output=elsewhere"]).output == "elsewhere"
    with pytest.raises(RecipeError, match=r"digts: no such file.*did you mean 'digits'"):
        load_recipe("digts")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"bad\.yaml: cannot be read"):
        load_recipe("bad.yaml")


def test_yaml_traps_are_taken_kindly():
    recipe = parse_recipe(
        MINIMAL + "train: {lr: 1e-4, min_lr: 1E-6, weight_decay: .5e-4, amp: no, model_ema: on, epochs: 010}"
    )
    train = recipe.train
    assert (train.lr, train.min_lr, train.weight_decay, train.epochs) == (1e-4, 1e-6, 5e-5, 10)
    assert (train.amp, train.model_ema) == (False, True)
    assert problems(MINIMAL + "train: {sched: no}") == [
        "train.sched: got 'no', expected 'cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', "
        "'constant' or 'none'; did you mean 'none'?"
    ]
    assert "true" in problems(MINIMAL + "train: {epochs: true}")[0]
    assert "given twice" in problems(MINIMAL + "budgets: [0.2]")[0]
    assert "finite" in problems(MINIMAL + "train: {lr: .inf}")[0]


def test_overrides_are_yaml_and_the_last_one_wins():
    recipe = parse_recipe(
        MINIMAL,
        [
            "train.lr=1e-3",
            "train.lr=2e-3",
            "budgets=0.2,40%",
            "model.kwargs.width_mult=1.8",
            "data.root=null",
        ],
    )
    assert recipe.train.lr == 2e-3 and recipe.budgets == [0.2, "40%"]
    assert recipe.model.kwargs == {"width_mult": 1.8} and recipe.data.root is None
    assert parse_recipe(MINIMAL, ["budgets=[1.2M, 5000000]"]).budgets == ["1.2M", 5_000_000]
    assert parse_recipe(MINIMAL, ["construction.band=[0.5,2]"]).construction.band == (0.5, 2.0)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("--lr", "expected key=value"),
        ("lr", "expected key=value"),
        ("=3", "expected key=value"),
        ("train.lr=[1", "not readable as YAML"),
        ("model.name.x=1", "model.name is a value, not a section"),
        ("train=3", "expected a section with keys such as"),
        ("train.lrr=3", "did you mean 'lr'?"),
        ("gamma=0.3", "did you mean 'retrain.gamma'?"),
        ("momentum=0.3", "'train.momentum'"),
    ],
)
def test_bad_overrides_say_what_is_expected(override, text):
    (problem,) = problems(MINIMAL, override)
    assert text in problem


def test_five_mistakes_give_five_messages_each_with_path_and_remedy():
    text = """
model: {name: lenet55}
data: {name: digts}
budgets: [0.5, 0.3]
train: {learning_rate: 0.1, epochs: many}
"""
    found = problems(text)
    assert len(found) == 5
    for path, remedy in {
        "model.name": "did you mean 'lenet5'?",
        "data.name": "did you mean 'digits'?",
        "budgets": "must ascend",
        "train.epochs": "got 'many', expected a whole number",
        "train.learning_rate": "unknown key; did you mean 'lr'?",
    }.items():
        assert [line for line in found if line.startswith(f"{path}: ") and remedy in line], path
    with pytest.raises(RecipeError, match=r"5 problems in here\.yaml"):
        parse_recipe(text, source="here.yaml")


@pytest.mark.parametrize(
    ("budgets", "text"),
    [
        ("[]", "expected ascending budgets"),
        ("[0.3, 0.3]", "must ascend"),
        ("[40%, 0.3]", "must ascend"),
        ("[3M, 1.2M]", "must ascend"),
        ("[0.0, 0.3]", "out of range"),
        ("[0.3, 1.1]", "out of range"),
        ("[120%]", "out of range"),
        ("[-0.1]", "out of range"),
        ("[1]", "write 1.0"),
        ("[0.3, much]", "is no budget"),
        ("[4 apples]", "is no budget"),
    ],
)
def test_bad_budgets(budgets, text):
    (problem,) = problems(MINIMAL.replace("[0.1, 0.5]", budgets))
    assert problem.startswith("budgets: ") and text in problem


@pytest.mark.parametrize(
    ("lines", "path", "text"),
    [
        ("train: {sched: multistep}", "train.decay_milestones", "needs decay_milestones"),
        ("train: {sched: multistep, decay_milestones: [5, 2]}", "train.decay_milestones", "ascend"),
        ("train: {epochs: 0}", "train", "model.pretrained: true"),
        ("train: {opt: adamww}", "train.opt", "did you mean 'adamw'?"),
        ("retrain: {distill_from: teacher}", "retrain.teacher", "needs teacher.name"),
        ("retrain: {teacher: {name: lenet5}}", "retrain.teacher", "no effect"),
        ("retrain: {subnet_weights: [1, 2, 3]}", "retrain", "3 numbers for 2 budgets"),
        ("retrain: {subnet_weights: [1, -1]}", "retrain.subnet_weights", "from 0 up"),
        ("construction: {band: [1.2, 1.5]}", "construction.band", "low <= 1 <= high"),
        ("construction: {beta: 0}", "construction.beta", "a number above 0"),
        ("device: gpu", "device", "cuda:NUMBER"),
        ("output: 3", "output", "quotes"),
    ],
)
def test_mistakes_between_and_within_keys(lines, path, text):
    (problem,) = problems(MINIMAL + lines)
    assert problem.startswith(f"{path}: ") and text in problem


def test_keys_without_effect_on_the_data_set_are_mistakes():
    assert "has no effect on data.name=digits" in problems(MINIMAL, "data.aa=rand-m9")[0]
    assert "has no effect on data.name=imagefolder" in problems(MINIMAL, "data.name=imagefolder", "data.shift=2")[0]


def test_a_saved_net_replaces_model_name_and_budgets():
    text = "model: {net: runs/a/net}\ndata: {name: digits}\n"
    assert parse_recipe(text).budgets == []
    assert "has its budgets already" in problems(text + "budgets: [0.5]")[0]
    assert "either model.name" in problems(text, "model.name=lenet5")[0]
    assert "either model.name" in problems(MINIMAL, "model.name=null")[0]


def test_missing_sections_are_named():
    found = problems("seed: 1")
    assert [line.split(":")[0] for line in found] == ["model", "data"]
    assert "expected sections" in problems("just a word")[0]
    for text in ("model: {name", "{[1]: 2}", "seed: " + "9" * 5000, "[" * 5000):
        assert "not readable as YAML" in problems(text)[0]


def sections(model: type[BaseModel] = Recipe) -> list[type[BaseModel]]:
    return [Recipe, *(kind for kind in Section.__subclasses__() if kind is not Recipe)]


@pytest.mark.parametrize("section", sections(), ids=lambda kind: kind.__name__)
def test_every_key_is_described(section):
    assert all(field.description for field in section.model_fields.values())


scalars = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(),
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.sampled_from(
        ["1e5", "no", "0x1F", "010", "~", "12:30", ".5", "<<", "=", "true", "2001-01-01", ".inf", "1_0", ""]
    ),
)


@given(st.dictionaries(st.text(min_size=1, max_size=6), scalars | st.lists(scalars, max_size=3), max_size=4))
def test_dump_gives_the_recipe_back_whatever_the_model_arguments_hold(kwargs):
    recipe = Recipe.model_validate({**yaml.safe_load(MINIMAL), "output": "o"})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"kwargs": kwargs})})
    assert parse_recipe(dump_recipe(recipe)) == recipe


@given(st.text(alphabet="ab:{}[]\"'\n -#&*!|>%@`,0123456789.e", max_size=40))
def test_any_text_is_a_recipe_or_a_recipe_error(text):
    with pytest.raises(RecipeError):
        parse_recipe(text)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5, unique=True).map(sorted))
def test_budgets_keep_their_values(shares):
    recipe = parse_recipe(MINIMAL, [f"budgets={shares}"])
    assert recipe.budgets == shares
    percent = parse_recipe(MINIMAL, ["budgets=[" + ",".join(f"{100 * s:.6f}%" for s in shares) + "]"]).budgets
    assert all(re.fullmatch(r"[\d.]+%", str(budget)) for budget in percent)
