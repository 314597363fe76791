"""Command line: `stepping inspect MODEL` and friends."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from .errors import SteppingError, nearest

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a mistake of the user, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except SteppingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stepping", description="SteppingNet for image classifiers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="show the units of a model and what keeps channels at level 1")
    inspect.add_argument("model", help="timm name, e.g. resnet18")
    inspect.add_argument("--img-size", type=int, help="height and width of the images; default: the model's own")
    inspect.add_argument("--num-classes", type=int, help="classes of the model; default: the model's own")
    inspect.add_argument("--time-limit", type=float, default=20.0, help="seconds for torch-pruning's graph (20)")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(command=_inspect)
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from .inspection import describe, inspect_model

    model = build_model(arguments.model, num_classes=arguments.num_classes, img_size=arguments.img_size)
    size = tuple(model.default_cfg["input_size"])
    if arguments.img_size:
        size = (size[0], arguments.img_size, arguments.img_size)
    facts = inspect_model(model, size, time_limit=arguments.time_limit)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        Console(soft_wrap=True).print(describe(facts, arguments.model))
    return 0


def build_model(name: str, num_classes: int | None = None, img_size: int | None = None) -> Any:
    """A timm model by name, without weights.

    Raises:
        SteppingError: no such model; names the nearest one.
    """
    import timm

    from .integrations.timm import models as _  # noqa: F401 - registers the paper's networks

    if not timm.is_model(name):
        raise SteppingError(f"model: timm has no model {name!r}; {nearest(name, timm.list_models())}")
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if img_size is not None:
        try:
            return timm.create_model(name, img_size=img_size, **kwargs)
        except TypeError:  # convolutional models take any size
            pass
    return timm.create_model(name, **kwargs)
