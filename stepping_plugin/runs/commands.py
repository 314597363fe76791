"""Commands about recipes: `stepping run` and `validate`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["add_run"]


def add_run(commands: Any) -> None:
    """`stepping run` and `stepping validate`."""
    run = commands.add_parser("run", help="train, construct, retrain, verify and report, as a recipe says")
    validate = commands.add_parser("validate", help="check a recipe and show what it would do, without training")
    for command in (run, validate):
        command.add_argument("recipe", help="path of a recipe, or name of a shipped one, e.g. digits")
        command.add_argument(
            "overrides", nargs="*", default=[], metavar="key=value", help="e.g. retrain.epochs=20 output=runs/mine"
        )
    run.add_argument("--fresh", action="store_true", help="discard what an earlier run left in the output folder")
    run.set_defaults(command=_run)
    validate.set_defaults(command=_validate)


def _run(arguments: argparse.Namespace) -> int:
    from .pipeline import Run
    from .recipe import load_recipe
    from .report import calibrated_sentence, exit_table, metrics_table, results_table

    say = _speaker()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    folder = Path(recipe.output or Path("runs") / Path(arguments.recipe).stem)
    run = Run(recipe, folder, say)
    try:
        data = run.everything(arguments.fresh, arguments.recipe)
    except KeyboardInterrupt:
        print(_stopped(run.stage, folder, arguments), file=sys.stderr)
        raise
    say(results_table(data))
    say(metrics_table(data))
    for note in data["notes"]:
        say(note)
    if data["early_exit"]:
        say(exit_table(data))
    if "calibrated_exit" in data:
        say(calibrated_sentence(data["calibrated_exit"], data["original"]["macs"]))
    say(f"report: {folder / 'index.html'}   net: {folder / 'net.safetensors'}")
    return 0


def _stopped(stage: str, folder: Path, arguments: argparse.Namespace) -> str:
    """What somebody who pressed Ctrl-C wants to know: that nothing is lost, and how to go on."""
    from .stages import kept_in

    kept = kept_in(folder) or ["nothing yet"]
    again = shlex.join(["stepping", "run", arguments.recipe, *arguments.overrides])
    return f"stopped in: {stage}. Kept in {folder}: {', '.join(kept)}. To go on: {again}"


def _speaker() -> Callable[[Any], None]:
    """Prints a line or a table. A reader that goes away (`| head`) does not end the hours of work that it reads about.

    Other failures of the output, such as a full disk, are raised.
    """
    from rich.console import Console

    console = Console(soft_wrap=True)
    gone = False

    def say(what: Any) -> None:
        nonlocal gone
        if gone:
            return
        with console.capture() as text:
            console.print(what, highlight=False)
        try:
            print(text.get(), end="", flush=True)
        except BrokenPipeError:
            gone = True

    return say


def _validate(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ..views.summary import human_macs
    from .pipeline import plan
    from .recipe import dump_recipe, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(dump_recipe(recipe))
    facts = plan(recipe)
    original, start = human_macs(facts["reference_macs"]), human_macs(facts["start_macs"])
    title = f"plan: {facts['units']:,} units; original {original}, start {start} MACs"
    table = Table("subnet", "budget", "MACs (one shot)", "of the original", title=title)
    for i, (budget, macs) in enumerate(zip(facts["budgets"], facts["macs"]), start=1):
        table.add_row(str(i), human_macs(budget), human_macs(macs), f"{macs / facts['reference_macs']:.2%}")
    Console(soft_wrap=True).print(table, *facts["notes"], sep="\n")
    return 0
