"""Command line: `stepping COMMAND`. Every room registers its own commands; this is the edge that catches errors.

argparse, because options take several values as people write them (`--seeds 0 1 2`), which click and typer do not have.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from .errors import SteppingError
from .runs.commands import add_export, add_run
from .studies.commands import add_bench, add_compare, add_coverage
from .views.commands import add_inspect

__all__ = ["main"]

_OVERRIDE = re.compile(r"[A-Za-z][\w.]*=.*", re.DOTALL)  # key.sub=value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a mistake of the user, 130 after Ctrl-C."""
    arguments = _parsed(sys.argv[1:] if argv is None else argv)
    try:
        return arguments.command(arguments)
    except SteppingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """Arguments, with the overrides of a recipe wherever they stand: argparse takes them only before any option."""
    takes = bool(words) and words[0] in ("run", "validate", "compare")
    overrides = [word for word in words if takes and _OVERRIDE.fullmatch(word)]
    arguments = _parser().parse_args([word for word in words if word not in overrides])
    if overrides:
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stepping", description="SteppingNet for image classifiers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_inspect, add_run, add_bench, add_export, add_compare, add_coverage):
        add(commands)
    return parser
