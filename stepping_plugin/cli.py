"""Command line: `stepping COMMAND`. Every room registers its own commands; this is the edge that catches errors.

argparse, because options take several values as people write them (`--seeds 0 1 2`), which click and typer do not have.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Sequence

from .arguments import CLASSES, IMAGE, number, whole
from .console.progress import manner
from .errors import SteppingError
from .runs.commands import add_run
from .runs.conversion import add_convert_weights
from .runs.net_commands import add_export, add_predict, add_report
from .runs.threshold_command import add_thresholds
from .runs.zoo import add_zoo
from .studies.commands import add_bench, add_compare, add_coverage
from .views.commands import add_inspect

__all__ = ["main"]

_OVERRIDE = re.compile(r"[A-Za-z][\w.]*=.*", re.DOTALL)  # key.sub=value
FAILED, INTERRUPTED, PIPE_CLOSED = 1, 130, 141  # the last as if SIGPIPE had ended the process
DELAY = 2.0  # seconds of a stage before it is shown


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0; 1 for what fails, told in one line; 2 for arguments that cannot be (argparse exits); 130 after Ctrl-C; 141 when
    the reader of the output has gone, without a word. Anything else that is raised is a mistake in the package.
    """
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # an old terminal is no reason to fail
    arguments = _parsed(sys.argv[1:] if argv is None else argv)
    try:
        with manner(not arguments.quiet, lines=not getattr(arguments, "json", False), delay=DELAY):
            status = arguments.command(arguments)
        sys.stdout.flush()
        return status
    except SteppingError as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (BrokenPipeError, SystemExit):  # rich leaves by SystemExit when the pipe is closed
        _silence_output()
        return PIPE_CLOSED
    except OSError as error:
        if error.filename is None:
            _silence_output()
        return _failed(_reason(error))
    except MemoryError:
        return _failed("the memory of this machine is full. Take smaller batches, pictures or models.")
    except RuntimeError as error:
        if not _is_about_memory(error):
            raise
        return _failed(f"no memory is left ({str(error).splitlines()[0][:200]}). Take smaller batches or models.")


def _failed(text: str) -> int:
    with contextlib.suppress(OSError):
        print(f"error: {text}", file=sys.stderr)
    return FAILED


def _reason(error: OSError) -> str:
    """One line: the path, what the system says."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename or 'standard output, or a temporary file'}: {reason}"


def _silence_output() -> None:
    """Nobody reads: what is left in the buffer must not raise when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _is_about_memory(error: RuntimeError) -> bool:
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text or "out of memory" in text


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """Arguments, with the overrides of a recipe wherever they stand: argparse takes them only before any option."""
    parser = _parser()
    takes = bool(words) and words[0] in ("run", "validate", "compare")
    values = _values_of_options(parser, words) if takes else set()
    places = [i for i, word in enumerate(words) if takes and i not in values and _OVERRIDE.fullmatch(word)]
    arguments = parser.parse_args([word for i, word in enumerate(words) if i not in places])
    if places:
        arguments.overrides = [*arguments.overrides, *(words[i] for i in places)]
    return arguments


def _values_of_options(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[int]:
    """Places of words that are the one value of the option before them, whatever they look like."""
    options = _command(parser, words[0])._option_string_actions
    one = {name for name, action in options.items() if action.nargs is None}
    return {i + 1 for i, word in enumerate(words) if word in one}


def _command(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    return _commands(parser)[name]


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Commands of a parser by name, those of a group (`bench`) among them; none of a single command."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return groups[0].choices if groups else {}


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    """To every command: an option of all of them stands where people write it, behind the command's name."""
    for command in _commands(parser).values():
        _add_quiet(command)
        if not _commands(command):
            command.add_argument("--quiet", action="store_true", help="show no progress on standard error")


_COMMANDS = (add_inspect, add_run, add_thresholds, add_predict, add_report, add_export, add_bench, add_compare,
             add_coverage, add_zoo, add_convert_weights)  # fmt: skip

# Options of commands that register plain numbers.
_RANGES = {
    "inspect": {"img_size": whole(1, IMAGE), "num_classes": whole(1, CLASSES), "time_limit": number(0, 1e6)},
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stepping", description="SteppingNet for image classifiers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    parser.set_defaults(quiet=False)
    _add_quiet(parser)
    for name, ranges in _RANGES.items():
        for action in _command(parser, name)._actions:
            action.type = ranges.get(action.dest, action.type)
    return parser
