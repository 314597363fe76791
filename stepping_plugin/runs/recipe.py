"""Read recipes: YAML plus `key.sub=value` overrides in, a checked `Recipe` out, all mistakes at once.

    recipe = load_recipe("digits", ["train.epochs=5", "output=runs/short"])

The keys are defined in `recipe_schema.py`. YAML is read by the rules of version 1.2: `1e-4` is a number, `no`
and `12:30` are words (a key that is true or false still takes `no` and `off`).
"""

from __future__ import annotations

import contextlib
import re
import reprlib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from stepping_plugin.errors import RecipeError, nearest
from stepping_plugin.runs.effects import without_effect
from stepping_plugin.runs.recipe_schema import Recipe
from stepping_plugin.runs.recipe_yaml import read_yaml, write_yaml

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # from Python 3.11 on

__all__ = ["Recipe", "dump_recipe", "load_recipe", "parse_recipe", "shipped_recipes"]


LARGEST = 2**20  # bytes of a file that is opened at all


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path_or_name: a YAML file, or the name of a shipped recipe (`shipped_recipes` lists them).
        overrides: "key.sub=value", the value written as in YAML; later ones win.

    Raises:
        RecipeError: with one message per mistake.
    """
    name, text = _read(path_or_name)
    return parse_recipe(text, overrides, name=name, source=str(path_or_name))


def parse_recipe(
    text: str, overrides: Sequence[str] = (), *, name: str = "recipe", source: str | None = None
) -> Recipe:
    """Like `load_recipe`, from YAML text; `output` defaults to runs/`name`."""
    try:
        raw, file = read_yaml(text), read_yaml(text)
    except ValueError as error:
        raise RecipeError(f"not readable as YAML: {error}", source) from None
    if not isinstance(raw, dict):
        raise RecipeError(f"got {_show(raw)}, expected sections such as `model:` and `data:`", source)
    given: dict[str, Any] = {}
    problems = [problem for override in overrides if (problem := _override(raw, override, given))]
    try:
        recipe = Recipe.model_validate(raw)
    except (ValidationError, RecursionError) as error:
        details = error.errors() if isinstance(error, ValidationError) else []
        problems += list(dict.fromkeys(_explain(detail, raw) for detail in _one_per_key(details)))
        problems += [] if details else ["nested too deeply"]
    else:
        problems += _given_in_vain(recipe, file, given)
    if problems:
        raise RecipeError(problems, source)
    return recipe if recipe.output else recipe.model_copy(update={"output": f"runs/{name}"})


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every key spelled out; `parse_recipe` gives it back unchanged."""
    return write_yaml(recipe.model_dump(mode="json"))


def _given_in_vain(recipe: Recipe, file: dict[str, Any], overrides: dict[str, Any]) -> list[str]:
    """Keys without effect: those of the file if the file itself is the reason, those of the overrides in any case.

    A recipe whose training is switched off by an override keeps the keys of that training.
    """
    problems = list(without_effect(recipe, overrides, whole=False))
    if not overrides:
        return problems + list(without_effect(recipe, file, whole=True))
    with contextlib.suppress(ValidationError):  # the overrides complete it
        problems += without_effect(Recipe.model_validate(file), file, whole=True)
    return problems


def shipped_recipes() -> dict[str, Traversable]:
    """Name -> file of every recipe that comes with the package."""
    folder = files("stepping_plugin.recipes")
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {entry.name.removesuffix(".yaml"): entry for entry in sorted(found, key=lambda entry: entry.name)}


def _read(path_or_name: str | Path) -> tuple[str, str]:
    """(name, text) of a recipe file, or of a shipped recipe where no such file exists."""
    path = Path(path_or_name)
    try:
        if path.is_file():
            if path.stat().st_size > LARGEST:
                raise OSError(f"{path.stat().st_size:,} bytes; a recipe has at most {LARGEST:,}")
            return path.stem, path.read_text(encoding="utf-8")
        shipped = shipped_recipes()
        if str(path_or_name) in shipped:
            return str(path_or_name), shipped[str(path_or_name)].read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read: {error}", str(path_or_name)) from None
    raise RecipeError(
        f"no such file, and no shipped recipe has this name; {nearest(path.stem, shipped)}", str(path_or_name)
    )


# --- Overrides ----------------------------------------------------------------------------------------------


def _override(raw: dict[str, Any], override: str, given: dict[str, Any]) -> str | None:
    """Apply one `key.sub=value` to `raw`, and note it in `given`; returns what is wrong with it, or None."""
    path, equals, text = override.partition("=")
    *sections, last = (part.strip() for part in path.split("."))
    if override.startswith("-") or not equals or not all([*sections, last]):
        return f"override {override!r}: expected key=value or key.sub=value, for example train.epochs=5"
    try:
        value = read_yaml(text)
    except ValueError as error:
        return f"override {_show(override)}: the value is not readable as YAML: {error}"
    if len(sections) > 8:
        return f"override {_show(override)}: {len(sections)} sections deep; no key of a recipe lies so deep"
    if sections:
        given.setdefault(sections[0], {})[(sections + [last])[1]] = value
    place = raw
    for depth, section in enumerate(sections):
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            return f"override {override!r}: {'.'.join(sections[: depth + 1])} is a value, not a section"
    place[last] = value
    return None


# --- Messages -----------------------------------------------------------------------------------------------

_EXPECTED = {  # by pydantic's error type; {} is filled from the error's context
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_too_short": "a word",
    "string_too_long": "at most {max_length} letters",
    "string_type": "a word (write quotes around numbers)",
    "list_type": "a list, for example [1, 2]",
    "tuple_type": "a list of two numbers",
    "dict_type": "a mapping of names to values",
    "too_long": "at most {max_length} values",
    "too_short": "at least {min_length} values",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number from {ge} up",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number up to {le}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
}


def _place(detail: ErrorDetails) -> list[str]:
    """Keys and indices on the way to a value, without the members of unions that pydantic tried."""
    return [str(part) for part in detail["loc"] if not re.match(r"(float|int|str)$|constrained-|literal\[", str(part))]


def _one_per_key(details: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """The first complaint about every value: each member of a union has its own."""
    first: dict[str, ErrorDetails] = {}
    for detail in details:
        first.setdefault(".".join(_place(detail)), detail)
    return list(first.values())


def _explain(detail: ErrorDetails, raw: dict[str, Any]) -> str:
    """One pydantic error in our words: path, what was given, what was expected, the nearest valid key."""
    loc = _place(detail)
    path, kind, given = ".".join(loc), detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"{path}: unknown key; {_nearest_key(loc)}"
    if any(part.isdigit() for part in loc[1:]) and kind == "missing":  # [low] instead of [low, high]
        loc = loc[: next(i for i, part in enumerate(loc) if part.isdigit())]
        return f"{'.'.join(loc)}: got {_show(given)}, expected a list of two numbers"
    if kind == "missing":
        field = Recipe.model_fields.get(loc[0])
        return f"{path}: missing; expected {_describe(loc) or (field.description if field else 'a value')}"
    if kind in ("model_type", "model_attributes_type"):
        keys = ", ".join(list(_keys(loc))[:4])
        return f"{path}: got {_show(given)}, expected a section with keys such as {keys}"
    if kind == "value_error":
        text = str(detail["ctx"]["error"])
        return f"{path}: {text}" if given is None or _show(given) in text else f"{path}: {text} (got {_show(given)})"
    if kind == "string_pattern_mismatch":
        return f"{path}: got {_show(given)}, expected {_describe(loc)}"
    expected = _EXPECTED[kind].format(**detail.get("ctx", {})) if kind in _EXPECTED else detail["msg"]
    hint = _closest_literal(given, detail) if kind == "literal_error" else ""
    return f"{path}: got {_show(given)}, expected {expected}{hint}"


def _model_at(loc: Sequence[str]) -> type[BaseModel] | None:
    """Schema class of the section at `loc`, if it is one."""
    model: type[BaseModel] = Recipe
    for part in loc:
        field = model.model_fields.get(part)
        options = (field.annotation, *get_args(field.annotation)) if field else ()
        inner = [kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return None
        model = inner[0]
    return model


def _keys(loc: Sequence[str]) -> Iterator[str]:
    model = _model_at(loc)
    yield from model.model_fields if model else ()


def _describe(loc: Sequence[str]) -> str | None:
    model = _model_at(loc[:-1])
    return model.model_fields[loc[-1]].description if model and loc[-1] in model.model_fields else None


_OTHER_NAMES = {  # what our keys are called elsewhere
    "dataset": "name",
    "data_dir": "root",
    "initial_checkpoint": "checkpoint_path",
    "label_smoothing": "smoothing",
    "learning_rate": "lr",
    "model_kwargs": "kwargs",
    "n_t": "iterations",
    "optimizer": "opt",
    "scheduler": "sched",
    "wd": "weight_decay",
}


def _nearest_key(loc: Sequence[str]) -> str:
    """The close key of the same section, else the section that has a key of this very name, else all keys."""
    keys = list(_keys(loc[:-1]))
    other = _OTHER_NAMES.get(loc[-1].lower(), "")
    if other in keys:
        return f"did you mean {other!r}?"
    hint = nearest(loc[-1], keys)
    if not hint.startswith("did you mean"):
        homes = [section for section in _keys([]) if loc[-1] in _keys([section])]
        if homes:
            return "did you mean " + " or ".join(f"'{section}.{loc[-1]}'" for section in homes) + "?"
    return hint


def _closest_literal(given: object, detail: ErrorDetails) -> str:
    options = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
    hint = nearest(given, options)
    return f"; {hint}" if hint.startswith("did you mean") else ""


def _show(value: object) -> str:
    """A value as a reader of the recipe knows it, at most 60 characters."""
    if value is None:
        return "nothing"
    text = _SHORT.repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else text[:57] + "..."


_SHORT = reprlib.Repr()  # never writes out a whole value in order to cut it
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 12
