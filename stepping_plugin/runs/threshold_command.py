"""`stepping thresholds`: temperatures and thresholds for another target, chosen and judged on the data of a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import SteppingError
from ..net import load
from ..training.targets import FORMS, Target, parse_target
from .figures import calibrated_exit, collected
from .folder import opened_folder
from .pipeline import Run
from .provenance import described
from .recipe import load_recipe
from .report import calibrated_sentence, calibrated_table, write_report
from .weights import load_weights

__all__ = ["add_thresholds", "thresholds"]


def add_thresholds(commands: Any) -> None:
    """`stepping thresholds`."""
    command = commands.add_parser(
        "thresholds",
        help="choose when a net stops stepping, for a target",
        description="Fit temperatures and choose thresholds on the validation pictures of a run, judge them on its "
        'test pictures, and keep them in RUN/net.safetensors: predict(until="calibrated").',
        epilog="Targets: " + "; ".join(FORMS) + ". 'the largest subnet' and 'the original' can stand for a subnet.",
    )
    command.add_argument("run", metavar="RUN", help="folder of `stepping run`")
    command.add_argument("--target", required=True, metavar="TEXT", help="what to reach, in quotes; forms: see below")
    command.add_argument("--per-class", action="store_true", help="thresholds for every class, where they pay")
    command.add_argument(
        "--combine", choices=("last", "product"), default="last", help="product: of the answers so far (last)"
    )
    command.set_defaults(command=_thresholds)


def _thresholds(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    data = thresholds(
        Path(arguments.run), arguments.target, per_class=arguments.per_class, combine=arguments.combine, say=print
    )
    console = Console(soft_wrap=True)
    console.print(calibrated_table(data))
    console.print(calibrated_sentence(data["calibrated_exit"], data["original"]["macs"]), highlight=False)
    return 0


def thresholds(
    folder: Path, target: str, *, per_class: bool = False, combine: str = "last", say: Callable[[str], None]
) -> dict[str, Any]:
    """Choose thresholds for the net of a run, keep them in its file and in its report.

    Args:
        folder: of a finished `stepping run`.
        target, per_class, combine: see `training.exits.choose_exit`.
        say: told what is going on.

    Returns:
        The report's data.

    Raises:
        SteppingError: no finished run, or a target that means nothing for its net.
    """
    wanted, report = parse_target(target), folder / "report.json"
    if not (folder / "net.safetensors").is_file() or not report.is_file():
        raise SteppingError(
            f"thresholds: {folder} is no folder of a finished run: they are chosen on its validation pictures and "
            "judged on its test pictures. For a net alone call net.choose_exit(loader, target)."
        )
    recipe = load_recipe(str(folder / "recipe.yaml"))
    run = Run(recipe, folder, say)
    with opened_folder(folder, recipe, say=say):
        net = load(folder / "net.safetensors")
        engine = net.deploy()
        figures = collected(run, engine, _original(run, wanted))
        choice, judged = calibrated_exit(
            figures, engine, wanted, net.reference_macs, per_class=per_class, combine=combine
        )
        known = net.metadata if net.metadata.classes else described(recipe, run.data, figures.classes, say)
        net.metadata = known.updated(exit=choice.rule)
        net.save(folder / "net.safetensors")
        data = {**json.loads(report.read_text(encoding="utf-8")), "calibrated_exit": judged}
        write_report(folder, data)
    return data


def _original(run: Run, target: Target) -> nn.Module | None:
    """The run's original, where the target refers to it."""
    weights = run.folder / "original.safetensors"
    if 0 not in (target.reference, target.other) or not weights.is_file():
        return None
    model = run.build_model(run.recipe.model, pretrained=False)
    load_weights(model, weights)
    return model.eval()
