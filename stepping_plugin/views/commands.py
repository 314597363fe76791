"""`stepping inspect`."""

from __future__ import annotations

import argparse
import json
from typing import Any

__all__ = ["add_inspect"]


def add_inspect(commands: Any) -> None:
    """`stepping inspect`."""
    inspect = commands.add_parser("inspect", help="show the units of a model and what keeps channels at level 1")
    inspect.add_argument("model", help="timm name, e.g. resnet18")
    inspect.add_argument("--img-size", type=int, help="height and width of the images; default: the model's own")
    inspect.add_argument("--num-classes", type=int, help="classes of the model; default: the model's own")
    inspect.add_argument("--time-limit", type=float, default=20.0, help="seconds for torch-pruning's graph (20)")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(command=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ..integrations.timm.models import named_model
    from .inspection import describe, inspect_model

    model = named_model(arguments.model, num_classes=arguments.num_classes, img_size=arguments.img_size)
    size = tuple(model.default_cfg["input_size"])
    if arguments.img_size:
        size = (size[0], arguments.img_size, arguments.img_size)
    facts = inspect_model(model, size, time_limit=arguments.time_limit)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        Console(soft_wrap=True).print(describe(facts, arguments.model))
    return 0
