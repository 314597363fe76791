"""Parts of the reference that come from the code: recipe keys from the schema, the command line from its parser.

A hook of mkdocs: `<!-- generated: NAME -->` on a page is replaced when the site is built.
"""

from __future__ import annotations

import argparse
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stepping_plugin import errors
from stepping_plugin.cli import _parser
from stepping_plugin.runs.recipe_schema import Recipe

_PLACE = re.compile(r"<!-- generated: (\w+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return _PLACE.sub(lambda match: PARTS[match[1]](), markdown)


def recipe_keys() -> str:
    return "\n".join(_section("", Recipe))


def _section(name: str, model: type[BaseModel]) -> Iterator[str]:
    inner = {key: kind for key, field in model.model_fields.items() if (kind := _model_in(field.annotation))}
    if name:
        yield f"\n## {name}\n"
    if model.__doc__:
        yield f"{model.__doc__.strip().splitlines()[0]}\n"
    yield "| key | type | default | |\n|---|---|---|---|"
    for key, field in model.model_fields.items():
        if key not in inner:
            default = "required" if field.is_required() else f"`{_shown(field)}`"
            yield f"| `{f'{name}.' if name else ''}{key}` | `{_type(field.annotation)}` | {default} | {_text(field)} |"
    for key, kind in inner.items():
        yield from _section(f"{name}.{key}".lstrip("."), kind)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    parts = [annotation, *typing.get_args(annotation)]
    return next((p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)), None)


def _shown(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(a) for a in arguments)
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin is not None:
        return f"{origin.__name__} of {', '.join(_type(a) for a in arguments if a is not ...)}"
    return "null" if annotation in (None, type(None)) else getattr(annotation, "__name__", "any")


def _text(field: FieldInfo) -> str:
    return (field.description or "").replace("|", r"\|").replace("\n", " ")


def command_line() -> str:
    parser = _parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    about = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    parts = []
    for name, command in commands.choices.items():
        parts += [f"\n## stepping {name}\n", f"{about.get(name, '')[:1].upper()}{about.get(name, '')[1:]}.\n"]
        parts.append(f"```text\n{_help(command)}\n```")
        inner = [a for a in command._actions if isinstance(a, argparse._SubParsersAction)]
        for action in inner:
            for sub, own in action.choices.items():
                parts.append(f"\n### stepping {name} {sub}\n\n```text\n{_help(own)}\n```")
    return "\n".join(parts)


def _help(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100, max_help_position=30)  # type: ignore[assignment]
    return parser.format_help().strip()


def error_classes() -> str:
    found = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.SteppingError)]
    rows = [f"| `{kind.__name__}` | {(kind.__doc__ or '').strip().splitlines()[0]} |" for kind in found]
    return "\n".join(["| class | raised for |\n|---|---|", *rows])


PARTS = {"recipe_keys": recipe_keys, "command_line": command_line, "error_classes": error_classes}
