"""Random damage in recipes: a RecipeError, or a recipe that is what its own text says; never anything else."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from stepping_plugin import RecipeError
from stepping_plugin.runs.recipe import dump_recipe, load_recipe, parse_recipe

RECIPES = ("digits", "fashion_mnist_resnet", "distill", "compare_vgg", "imagenet_deit_small", "photos")
NASTY = [
    "null", "true", "-1", "0", "1e308", "-1e-308", ".nan", ".inf", "99999999999999999999", "''", "[]", "{}", "yes", "~",
    "[1, [2, [3]]]", "{a: {b: c}}",
    "*x", "&x [*x]", "!!python/object/apply:os.system [id]", "!!binary aGk=", "2026-01-01",
    "0x10", "1_000", "'\\u0000'", "\"\\ud800\"", "a" * 5000, "- 1", "? x", "| \n  text", "1:30:00", "cuda:7",
    "../../etc",
]  # fmt: skip
LIMIT = 10  # seconds of the processor for one recipe


def _value(rng: random.Random, lines: list[str]) -> None:
    """Another value for a key."""
    keyed = [k for k, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
    k = rng.choice(keyed)
    lines[k] = f"{lines[k].split(':')[0]}: {rng.choice(NASTY)}"


def _line(rng: random.Random, lines: list[str]) -> None:
    """A line twice, or missing, or elsewhere."""
    k = rng.randrange(len(lines))
    line = lines.pop(k)
    for _ in range(rng.choice([0, 1, 2])):
        lines.insert(rng.randrange(len(lines) + 1), line)


def _indentation(rng: random.Random, lines: list[str]) -> None:
    k = rng.randrange(len(lines))
    lines[k] = " " * rng.randrange(6) + lines[k].lstrip() if rng.random() < 0.8 else "\t" + lines[k]


def _characters(rng: random.Random, lines: list[str]) -> None:
    text = list("\n".join(lines))
    for _ in range(rng.randrange(1, 4)):
        text[rng.randrange(len(text))] = rng.choice(":{}[]&*!|>'\"%@`#,-?\x00\x85\ufeff5a \n")
    lines[:] = "".join(text).split("\n")


def _alias(rng: random.Random, lines: list[str]) -> None:
    """Sections that are shared, or grow without end."""
    depth = rng.choice([2, 5, 12])
    lines.append("anchors: &x0 [1, 1, 1, 1, 1, 1, 1, 1]")
    for k in range(1, depth):
        lines.append(f"more{k}: &x{k} [{', '.join([f'*x{k - 1}'] * 8)}]")
    lines.append(f"model: {{name: digits_net, kwargs: {{a: *x{depth - 1}}}}}")


MUTATIONS: list[Callable[[random.Random, list[str]], None]] = [_value, _value, _line, _indentation, _characters, _alias]


def mutated(seed: int) -> str:
    rng = random.Random(seed)
    lines = dump_recipe(load_recipe(rng.choice(RECIPES))).splitlines()
    for _ in range(rng.choice([1, 1, 2, 3])):
        rng.choice(MUTATIONS)(rng, lines)
    return "\n".join(lines)


def check(seed: int) -> bool:
    """Whether the recipe of a seed is accepted; everything else but a RecipeError is raised."""
    text, began = mutated(seed), time.process_time()
    try:
        recipe = parse_recipe(text)
    except RecipeError as error:
        assert error.problems and len(str(error)) < 20_000, "a message that a person can read"
        return False
    finally:
        assert time.process_time() - began < LIMIT
    assert parse_recipe(dump_recipe(recipe)) == recipe
    return True


def test_damaged_recipes():
    accepted = [check(seed) for seed in range(150)]
    assert 0 < sum(accepted) < len(accepted), "the mutations are neither harmless nor all fatal"


@pytest.mark.slow
def test_many_damaged_recipes():
    assert any([check(seed) for seed in range(1000, 3000)])
