"""`stepping inspect`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .words import HELP

if TYPE_CHECKING:
    from .named import Named

__all__ = ["add_inspect"]


def add_inspect(commands: Any) -> None:
    """`stepping inspect`."""
    inspect = commands.add_parser(
        "inspect", help="units of a model and what keeps channels at level 1; or subnets and levels of a saved net"
    )
    inspect.add_argument("model", metavar="NET", help=HELP)
    inspect.add_argument("--img-size", type=int, help="height and width of the images; default: the model's own")
    inspect.add_argument("--num-classes", type=int, help="classes of the model; default: the model's own")
    inspect.add_argument("--time-limit", type=float, default=20.0, help="seconds for torch-pruning's graph (20)")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(command=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ..integrations.timm.models import named_model
    from .inspection import describe, inspect_model
    from .named import named

    source = named(arguments.model)
    if source.model is None:
        return _inspect_net(source, arguments.json)
    model: Any = named_model(arguments.model, num_classes=arguments.num_classes, img_size=arguments.img_size)
    size = tuple(model.default_cfg["input_size"])
    if arguments.img_size:
        size = (size[0], arguments.img_size, arguments.img_size)
    facts = inspect_model(model, size, time_limit=arguments.time_limit)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        Console(soft_wrap=True).print(describe(facts, arguments.model))
    return 0


def _inspect_net(source: Named, as_json: bool) -> int:
    """What a saved net consists of and, where it was measured, what every level adds."""
    from rich.console import Console

    from .summary import summary, units_per_level

    net = source.stepping_net()
    if not as_json:
        Console(soft_wrap=True).print(summary(net))
        return 0
    facts = {
        "reference_macs": net.reference_macs,
        "budgets": net.budgets,
        "macs": net.macs,
        "groups": [
            {"name": g.name, "units_per_level": units_per_level(net.levels, g, net.num_subnets)}
            for g in net.analysis.groups
        ],
        "contribution": net.contribution and net.contribution.model_dump(),
        "notes": net.notes,
    }
    print(json.dumps(facts, indent=2))
    return 0
