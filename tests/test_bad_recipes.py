"""Recipes that would explode, run for ever, be ignored in part, or fail after hours: one clear message each."""

import resource

import pytest

from stepping_plugin.errors import RecipeError
from stepping_plugin.runs.recipe import dump_recipe, load_recipe, parse_recipe
from stepping_plugin.runs.recipe_schema import Recipe

MINIMAL = "model: {name: lenet5}\ndata: {name: digits}\nbudgets: [0.1, 0.5]\n"
DISK = "model: {name: lenet5}\ndata: {name: imagefolder}\nbudgets: [0.1, 0.5]\n"

MEMORY = DISK.replace("imagefolder", "imagefolder, in_memory: true")


def refused(text, *overrides):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, overrides)
    assert all("\n" not in problem and len(problem) < 400 for problem in caught.value.problems)
    return caught.value.problems


# --- Aliases


def bomb(wide: int, deep: int, section: str) -> str:
    """A section whose aliases stand for wide ** deep values."""
    lists = ["&x0 [" + ",".join("1" * wide) + "]"]
    lists += [f"&x{i} [{','.join([f'*x{i - 1}'] * wide)}]" for i in range(1, deep)]
    return MINIMAL + f"{section}: {{k: [{', '.join(lists)}]}}\n"


@pytest.mark.parametrize("section", ["construction", "retrain", "surprise", "output"])
@pytest.mark.parametrize(("wide", "deep"), [(10, 9), (2, 60), (100, 5), (10, 200)])
def test_alias_bombs_are_counted_not_written_out(wide, deep, section):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (problem,) = refused(bomb(wide, deep, section))
    assert "aliases written out" in problem
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; written out, it has no end


@pytest.mark.parametrize(
    "text",
    [
        "model: {name: lenet5, kwargs: &a {b: *a}}\ndata: {name: digits}\nbudgets: [0.1]\n",
        "a: &a [*a]",
        "&a {model: *a}",
        "a: &a\n  b: {c: [1, {d: *a}]}",
        "a: &a [1, &b [*a, *b]]",
    ],
)
def test_circular_references_are_named(text):
    assert "circular reference" in refused(text)[0]


@pytest.mark.parametrize(
    "text", ["[" * 60 + "]" * 60, "x: " + "{a: " * 50 + "1" + "}" * 50, "- " * 3000, "a: b\n" * 70_000]
)
def test_size_and_depth_have_bounds(text):
    assert "not readable as YAML" in refused(text)[0]


def test_an_alias_is_a_copy():
    """An override of one section leaves the other as it is; so do overrides inside of what an override brought."""
    text = MINIMAL + "train: &t {epochs: 3, lr: 0.1}\nretrain: *t\n"
    recipe = parse_recipe(text, ["train.epochs=50", "retrain.lr=0.2"])
    assert (recipe.train.epochs, recipe.retrain.epochs) == (50, 3)
    assert (recipe.train.lr, recipe.retrain.lr) == (0.1, 0.2)
    text = MINIMAL + "retrain: {distill_from: teacher, teacher: {name: lenet5, kwargs: {width_mult: 2}}}\n"
    recipe = parse_recipe(text, ["retrain.teacher.kwargs.width_mult=3", "model.kwargs={width_mult: 1.5}"])
    assert recipe.model.kwargs == {"width_mult": 1.5} and recipe.retrain.teacher.kwargs == {"width_mult": 3}
    assert parse_recipe(dump_recipe(recipe)) == recipe and "&" not in dump_recipe(recipe)


# --- Numbers


def limits():
    """Every key that takes a number, by path."""
    for name, field in Recipe.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {name: field})
        for key, value in inner.items():
            text = str(value.annotation)
            if ("int" in text or "float" in text) and "dict" not in text and key not in ("budgets", "interpolation"):
                yield (f"{name}.{key}" if inner is not field and key != name else name), "tuple" in text, "list" in text


NUMBERS = sorted(limits())


@pytest.mark.parametrize(("path", "pair", "many"), NUMBERS, ids=[path for path, *_ in NUMBERS])
def test_every_number_has_limits_and_is_no_switch(path, pair, many):
    text = MINIMAL if path.endswith("shift") else DISK
    for bad in ("1e300", "1e20", "-1e20", "-1", "true", "'?'", ".nan", ".inf"):
        value = f"[{bad}, {bad}]" if pair or many else bad
        if bad == "-1" and path == "data.mean":
            continue
        problems = refused(text, f"{path}={value}")
        assert any(problem.startswith((path, path.split(".")[0])) for problem in problems), (bad, problems)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("budgets=[true]", "true and false"),
        ("budgets=[0.1, false]", "true and false"),
        ("retrain.subnet_weights=[true, 1]", "true and false"),
        ("data.std=[0]", "from 1e-06 up"),
        ("data.mean=[]", "at least 1"),
        ("data.std=[]", "at least 1"),
        ("data.scale=[0.1]", "a list of two numbers"),
        ("data.scale=[0.9, 0.1]", "low <= high"),
        ("data.ratio=[0, 1]", "0 < low"),
        ("construction.band=[0.1]", "a list of two numbers"),
        ("construction.expansion=17", "up to 16"),
        ("seed=9223372036854775808", "up to 9223372036854775807"),
        ("train.warmup_epochs=11", "longer than the training"),
        ("model.name=''", "timm has no model ''"),
        ("output=''", "a word"),
        ('output="a\\0b"', "control characters"),
        ("model..name=x", "expected key=value"),
        ("=.=", "expected key=value"),
        ("a.b.c.d.e.f.g.h.i.j=1", "9 sections deep"),
        ("data.interpolation=banana", "'bilinear'"),
    ],
)
def test_values_that_cannot_be(override, text):
    problems = refused(DISK, override)
    assert len(problems) == 1 and text in problems[0], problems


def test_means_and_deviations_are_as_many():
    assert "data.mean has 2" in refused(MINIMAL, "data.mean=[1,2]", "data.std=[1]")[0]


def test_a_hundred_budgets_are_the_most():
    assert "at most 100" in refused(MINIMAL, "budgets=[" + ",".join(f"{i}e-3" for i in range(1, 102)) + "]")[0]


@pytest.mark.parametrize("budgets", [["0.4", "500000", "1T"], [".5 ", "3 M", "1.5G"], ["10%", 0.2, "1k"]])
def test_budgets_are_written_as_in_python(budgets):
    assert parse_recipe(MINIMAL.replace("[0.1, 0.5]", str(budgets))).budgets == budgets


# --- In vain


@pytest.mark.parametrize(
    ("base", "override"),
    [
        (MINIMAL, "data.num_classes=3"),
        (MINIMAL, "data.root=somewhere"),
        (MINIMAL, "data.download=true"),
        (MINIMAL, "data.workers=2"),
        (MINIMAL, "data.train_split=half"),
        (MINIMAL, "data.aa=rand-m9"),
        (MINIMAL, "data.in_memory=true"),
        (DISK, "data.labels=labels.csv"),
        (DISK, "data.target_key=kind"),
        (DISK.replace("imagefolder", "csv"), "data.val_split=test"),
        (MINIMAL, "data.in_chans=3"),
        (DISK.replace("folder", "folder, in_chans: 4"), "data.aa=rand-m9"),
        (MINIMAL, "data.test_fraction=0.3"),
        (MEMORY, "data.scale=[0.5, 1.0]"),
        (MEMORY, "data.rotation=10"),
        (MEMORY, "data.crop_mode=squash"),
        (MINIMAL, "data.train_crop_mode=rkrc"),
        (DISK, "data.shift=1"),
        (DISK, "data.val_split=test"),
        (MINIMAL, "train.decay_rate=0.5"),
        (MINIMAL, "train.decay_epochs=5"),
        (MINIMAL, "train.decay_milestones=[2]"),
        (MINIMAL, "train.warmup_lr=0.1"),
        (MINIMAL, "train.model_ema_decay=0.9"),
        (MINIMAL, "retrain.amp_dtype=float16"),
        (MINIMAL, "construction.amp_dtype=float16"),
        (MINIMAL + "train: {sched: step}\n", "train.min_lr=0.1"),
        (MINIMAL + "train: {sched: constant}\n", "train.cooldown_epochs=1"),
        (MINIMAL + "train: {sched: none}\n", "train.warmup_epochs=1"),
        (MINIMAL + "retrain: {distill_from: none}\n", "retrain.gamma=0.2"),
        (MINIMAL + "retrain: {epochs: 0}\n", "retrain.lr=0.2"),
        (MINIMAL.replace("lenet5}", "lenet5, pretrained: true}") + "train: {epochs: 0}\n", "train.batch_size=3"),
        ("model: {net: a.safetensors}\ndata: {name: digits}\n", "train.epochs=3"),
        ("model: {net: a.safetensors}\ndata: {name: digits}\n", "construction.iterations=3"),
        ("model: {net: a.safetensors}\ndata: {name: digits}\n", "model.pretrained=true"),
        (MINIMAL, "model.kwargs.checkpoint_path=x.pt"),
        (MINIMAL, "model.kwargs.num_classes=3"),
        (MINIMAL, "model.kwargs.img_size=3"),
        (MINIMAL, "model.kwargs.pretrained_cfg_overlay={file: x}"),
    ],
)
def test_a_value_that_would_be_ignored_is_refused(base, override):
    parse_recipe(base)
    (problem,) = refused(base, override)
    assert any(why in problem for why in ("has no effect", "is set by", "are named by", "longer than")), problem


def test_a_file_that_contradicts_itself_and_one_that_an_override_changes():
    """What an override switches off may stay in the file; a resolved recipe names all keys, whatever they do."""
    for section, key in (("retrain", "lr"), ("construction", "alpha")):
        switch = "epochs: 0" if section == "retrain" else "policy: random"
        assert "has no effect" in refused(MINIMAL + f"{section}: {{{switch}, {key}: 0.3}}\n")[0]
        recipe = parse_recipe(MINIMAL + f"{section}: {{{key}: 0.3}}\n", [f"{section}.{switch.replace(': ', '=')}"])
        assert parse_recipe(dump_recipe(recipe)) == recipe
    recipe = load_recipe("cifar10_lenet5", ["retrain.epochs=0", "train.sched=cosine"])
    assert parse_recipe(dump_recipe(recipe)) == recipe
