"""`stepping zoo`: the trained nets that `load("zoo:NAME")` knows, and how a run becomes one of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..arguments import output_folder
from ..errors import CheckpointError, explain
from ..files.zoo import PREFIX, VARIABLE, ZooEntry, add_net, list_nets

__all__ = ["add_zoo", "publish"]


def add_zoo(commands: Any) -> None:
    """`stepping zoo` and `stepping zoo add`."""
    zoo = commands.add_parser("zoo", help='trained nets by name, for load("zoo:NAME"); and how to publish a run')
    zoo.add_argument("--json", action="store_true", help="print JSON")
    zoo.set_defaults(command=_list)
    actions = zoo.add_subparsers(metavar="add")
    add = actions.add_parser("add", help="copy the net of a finished run into a zoo")
    add.add_argument("run", metavar="RUN", type=Path, help="folder of `stepping run`")
    add.add_argument("name", metavar="NAME", help="letters, digits, - and _")
    add.add_argument("--zoo", metavar="DIR", type=output_folder, required=True, help=f"folder; later {VARIABLE}=DIR")
    add.add_argument("--made-by", metavar="COMMAND", required=True, help="what made the run, for those who repeat it")
    add.add_argument("--data-licence", metavar="TEXT", required=True, help="terms of the pictures it was trained on")
    add.set_defaults(command=_add)


def _list(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    nets = list(list_nets())
    if arguments.json:
        print(json.dumps({name: {**entry.model_dump(), "zoo": place} for name, entry, place in nets}, indent=2))
        return 0
    table = Table("net", "what", "original", "subnets, share of its MACs: accuracy")
    for name, entry, _ in nets:
        total = entry.original.macs
        answers = ", ".join(f"{s.macs / total:.0%}: {s.accuracy:.2%}" for s in entry.subnets)
        table.add_row(PREFIX + name, entry.about, f"{entry.original.accuracy:.2%}", answers)
    Console(soft_wrap=True).print(table)
    return 0


def _add(arguments: argparse.Namespace) -> int:
    entry = publish(arguments.run, arguments.name, Path(arguments.zoo), arguments.made_by, arguments.data_licence)
    print(f"{Path(arguments.zoo) / entry.file}; {VARIABLE}={arguments.zoo} makes it load({PREFIX + arguments.name!r})")
    return 0


def publish(run: Path, name: str, zoo: Path, command: str, data_licence: str) -> ZooEntry:
    """List the net of a finished run in a zoo.

    Args:
        run: folder of `stepping run`.
        name, zoo: see `files.zoo.add_net`.
        command: what made the run, as somebody would type it.
        data_licence: terms of the pictures that the net was trained on.

    Raises:
        CheckpointError: the folder holds no finished run, or the zoo cannot take the net.
    """
    report = run / "report.json"
    try:
        data = json.loads(report.read_text(encoding="utf-8"))
        facts = {
            "about": data["title"],
            "command": command,
            "data_licence": data_licence,
            "original": {key: data["original"][key] for key in ("macs", "accuracy")},
            "subnets": [{key: subnet[key] for key in ("macs", "accuracy")} for subnet in data["subnets"]],
            "versions": {k: str(data["machine"][k]) for k in ("stepping_plugin", "torch", "timm")},
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        action = "Give the folder of a `stepping run` that has ended."
        reason = f"no finished run ({type(error).__name__})"
        raise CheckpointError(explain(reason, where=str(report), action=action)) from None
    return add_net(zoo, name, run / "net.safetensors", facts)
