"""Read recipes: YAML plus `key.sub=value` overrides in, a checked `Recipe` out, all mistakes at once.

    recipe = load_recipe("digits", ["train.epochs=5", "output=runs/short"])

The keys are defined in `recipe_schema.py`. YAML is read by the rules of version 1.2: `1e-4` is a number, `no`
and `12:30` are words (a key that is true or false still takes `no` and `off`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from stepping_plugin.errors import RecipeError, nearest
from stepping_plugin.runs.recipe_schema import Recipe

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # from Python 3.11 on

__all__ = ["Recipe", "dump_recipe", "load_recipe", "parse_recipe", "shipped_recipes"]


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
        raw = yaml.load(text, Loader=_Loader)
    except _UNREADABLE as error:
        raise RecipeError(f"not readable as YAML: {_one_line(error)}", source) from None
    if not isinstance(raw, dict):
        raise RecipeError(f"got {_show(raw)}, expected sections such as `model:` and `data:`", source)
    problems = [problem for override in overrides if (problem := _override(raw, override))]
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems += [_explain(detail, raw) for detail in error.errors()]
    if problems:
        raise RecipeError(problems, source)
    return recipe if recipe.output else recipe.model_copy(update={"output": f"runs/{name}"})


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every key spelled out; `parse_recipe` gives it back unchanged."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=100)


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
            return path.stem, path.read_text(encoding="utf-8")
        shipped = shipped_recipes()
        if str(path_or_name) in shipped:
            return str(path_or_name), shipped[str(path_or_name)].read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read: {error}", str(path_or_name)) from None
    raise RecipeError(
        f"no such file, and no shipped recipe has this name; {nearest(path.stem, shipped)}", str(path_or_name)
    )


# --- YAML ---------------------------------------------------------------------------------------------------

_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)  # bad syntax, endless numbers, endless nesting


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (the library follows 1.1), and a key that is given twice is an error."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (drops the inherited ones)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key_node, yaml.ScalarNode) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(str(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Sections as blocks, lists on one line, quotes around words that YAML 1.1 or 1.2 reads otherwise."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: Any = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)

    def represent_mapping(self, tag: str, mapping: Any, flow_style: Any = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, flow_style=False)


_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {  # kind: pattern of YAML 1.2's core schema, reader
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.([a-z])", r"\1", text.lower())),  # .inf -> inf
    ),
}


def _teach(kind: str, pattern: str, read: Callable[[str], Any]) -> None:
    tag = f"tag:yaml.org,2002:{kind}"
    for yaml_class in (_Loader, _Dumper):
        yaml_class.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), None)
    _Loader.add_constructor(tag, lambda _loader, node: read(node.value))


for _kind, (_pattern, _read_scalar) in _SCALARS.items():
    _teach(_kind, _pattern, _read_scalar)


def _override(raw: dict[str, Any], override: str) -> str | None:
    """Apply one `key.sub=value` to `raw`; returns what is wrong with it, or None."""
    path, equals, text = override.partition("=")
    if override.startswith("-") or not equals or not path.strip():
        return f"override {override!r}: expected key=value or key.sub=value, for example train.epochs=5"
    try:
        value = yaml.load(text, Loader=_Loader)
    except _UNREADABLE as error:
        return f"override {override!r}: the value is not readable as YAML: {_one_line(error)}"
    *sections, last = path.strip().split(".")
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


def _explain(detail: ErrorDetails, raw: dict[str, Any]) -> str:
    """One pydantic error in our words: path, what was given, what was expected, the nearest valid key."""
    loc = [str(part) for part in detail["loc"] if part not in ("float", "int", "str")]  # members of a union
    path, kind, given = ".".join(loc), detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"{path}: unknown key; {_nearest_key(loc)}"
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
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()
