"""Commands about nets that are there: `stepping predict`, `export`, `report`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import SUBNETS, number, output_folder, whole
from ..views.words import HELP

if TYPE_CHECKING:
    from torch import Tensor

    from ..views.named import Named

__all__ = ["add_export", "add_predict", "add_report"]

CALIBRATED = "calibrated"  # by the thresholds in the file


def add_predict(commands: Any) -> None:
    """`stepping predict`."""
    predict = commands.add_parser("predict", help="class, confidence, subnet and MACs of pictures")
    predict.add_argument("net", metavar="NET", help=HELP.rpartition(", or")[0])
    predict.add_argument("files", nargs="+", metavar="FILE", help="pictures, or folders of pictures")
    predict.add_argument(
        "--until",
        type=_rule,
        nargs="+",
        metavar="RULE",
        help="stop a picture early: max_prob=0.9, margin=0.5, or calibrated",
    )
    predict.add_argument("--deadline", type=number(0, 1e6), metavar="SECONDS", help="for every batch")
    predict.add_argument("--batch-size", type=whole(1, 65_536), default=1, help="pictures at a time (1)")
    predict.add_argument("--json", action="store_true", help="print JSON")
    predict.set_defaults(command=_predict)


def _rule(text: str) -> tuple[str, float] | str:
    """RULE=NUMBER of `Engine.predict(until=...)`; a number alone is a probability; or the word "calibrated"."""
    if text == CALIBRATED:
        return text
    name, equals, value = text.rpartition("=")
    try:
        threshold = float(value)
    except ValueError:
        threshold = math.nan
    if math.isnan(threshold) or (equals and not name):
        raise ArgumentTypeError(f"got {text!r}, expected RULE=NUMBER, for example max_prob=0.9")
    return name or "max_prob", threshold


def _rules(given: list[Any] | None) -> Any:
    """What `Engine.predict(until=...)` takes: a word, or rules by name."""
    from ..errors import SteppingError

    if not given:
        return None
    if CALIBRATED in given and len(given) > 1:
        raise SteppingError("--until calibrated: the thresholds in the file stand alone; leave the other rules out.")
    return CALIBRATED if given == [CALIBRATED] else dict(given)


def _predict(arguments: argparse.Namespace) -> int:
    from ..engine.exit import as_rule
    from ..errors import SteppingError
    from ..views.named import named
    from .predict import predictions
    from .prepare import files_of, preparation_of

    files = files_of(arguments.files)
    until = _rules(arguments.until)
    if until != CALIBRATED:
        as_rule(until)  # before a net is loaded
    source = named(arguments.net)
    if source.model is not None:
        raise SteppingError(
            f"{source.word}: predict needs a net that was trained: the folder of a run, or the file of a net or engine."
        )
    net = source.stepping_net() if source.engine is None else None
    engine = source.deployed() if net is None else net.deploy()
    origin = net.origin.get("timm") if net is not None else None
    preparation = preparation_of(source, engine.image_size, origin, engine.metadata)
    if arguments.deadline is not None:
        engine.calibrate(arguments.batch_size)
    options = {"until": until, "deadline": arguments.deadline, "batch_size": arguments.batch_size}
    rows = []
    if not arguments.json:
        print("file\tclass\tconfidence\tsubnet\tMACs", flush=True)
    for row in predictions(engine, preparation, files, **options):
        rows.append(row)
        if "error" in row:
            print(f"{row['file']}: this picture cannot be read ({row['error']})", file=sys.stderr)
        elif not arguments.json:
            print(f"{row['file']}\t{row['class']}\t{row['confidence']:.4f}\t{row['subnet']}\t{row['macs']}", flush=True)
    if arguments.json:
        facts = {"subnets": engine.num_subnets, "macs": list(engine.macs), "prepared": preparation.source}
        print(json.dumps({**facts, "pictures": rows}, indent=2))
    return 1 if any("error" in row for row in rows) else 0


def add_report(commands: Any) -> None:
    """`stepping report`."""
    report = commands.add_parser("report", help="accuracies, warnings and early exit of a run that is done")
    report.add_argument("net", metavar="NET", help=HELP)
    report.add_argument("--json", action="store_true", help="print report.json")
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ..errors import SteppingError
    from ..views.named import named
    from .report import exit_table, results_table

    source = named(arguments.net)
    if source.run is None:
        what = "a timm model, which nobody has run" if source.model else "a file without the run that it comes from"
        raise SteppingError(
            f"{source.word} is {what}; reports are written by `stepping run`. `stepping inspect {source.word}` tells "
            "what is known without."
        )
    path = source.run / "report.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        tables = [results_table(data), *data.get("warnings", []), *[exit_table(data)] * bool(data.get("early_exit"))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SteppingError(f"{path} cannot be read ({error}). Run the recipe again: it is written anew.") from None
    if arguments.json:
        print(json.dumps(data, indent=2))
        return 0
    Console(soft_wrap=True).print(*tables, f"report: {source.run / 'index.html'}", sep="\n")
    return 0


def add_export(commands: Any) -> None:
    """`stepping export`."""
    export = commands.add_parser("export", help="write the step programs of a net for another runtime")
    export.add_argument("run", metavar="NET", help=HELP)
    export.add_argument(
        "--format", choices=("torch", "onnx", "aoti", "executorch"), default="torch", help="kind of files (torch)"
    )
    export.add_argument(
        "--external-data", action="store_true", help="of ONNX: one weight file shared by the steps, weights.bin"
    )
    export.add_argument(
        "--int8",
        type=whole(1, 100_000),
        metavar="PICTURES",
        help="of ONNX: quantise, calibrated on so many validation pictures of the run",
    )
    export.add_argument(
        "--output", type=output_folder, metavar="DIR", help="where to; default: export-FORMAT beside the net"
    )
    export.add_argument("--batch-size", type=whole(1, 65_536), help="fix the batch size; default: any")
    export.add_argument("--subnets", type=whole(1, SUBNETS), default=4, help="of a timm model, equally wide (4)")
    export.set_defaults(command=_export)


def _pictures(source: Named, count: int) -> Tensor:
    """Validation pictures of a run, Tensor (count, C, H, W) or fewer if there are fewer."""
    from ..errors import SteppingError, explain
    from .data.build import build_data
    from .recipe import load_recipe

    if source.run is None or not (source.run / "recipe.yaml").is_file():
        action = "Export a run, or call engine.export(folder, 'onnx', calibration=pictures) in Python."
        raise SteppingError(explain("no pictures to calibrate int8 on", where=source.word, action=action))
    recipe = load_recipe(source.run / "recipe.yaml")
    pretrained = recipe.model.pretrained or recipe.model.checkpoint_path is not None
    loader = build_data(recipe.data, recipe.model.name, pretrained=pretrained).loader("val", count)
    return next(iter(loader))[0]


def _export(arguments: argparse.Namespace) -> int:
    from ..views.named import named

    source = named(arguments.run)
    kind = f"{arguments.format}-int8" if arguments.int8 else arguments.format
    folder = Path(arguments.output or source.place / f"export-{kind}")
    options: dict[str, Any] = {"external_data": arguments.external_data}
    if arguments.int8:
        options["calibration"] = _pictures(source, arguments.int8)
    engine = source.deployed(arguments.subnets)
    manifest = engine.export(folder, arguments.format, arguments.batch_size, **options)
    if source.model is not None:
        print(f"{source.word} is untrained here, its subnets are equally wide: for measuring only.")
    for note in manifest["notes"]:
        print(note)
    files = ", ".join(dict.fromkeys(step["file"] for step in manifest["steps"]))
    print(f"{folder}: {files}, manifest.json (batch size: {manifest['batch']})")
    return 0
