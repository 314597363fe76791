"""Command line: `stepping inspect MODEL` and friends."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import SteppingError

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
    inspect = commands.add_parser("inspect", help="show the units of a model and what keeps channels at level 1")
    inspect.add_argument("model", help="timm name, e.g. resnet18")
    inspect.add_argument("--img-size", type=int, help="height and width of the images; default: the model's own")
    inspect.add_argument("--num-classes", type=int, help="classes of the model; default: the model's own")
    inspect.add_argument("--time-limit", type=float, default=20.0, help="seconds for torch-pruning's graph (20)")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(command=_inspect)
    run = commands.add_parser("run", help="train, construct, retrain, verify and report, as a recipe says")
    validate = commands.add_parser("validate", help="check a recipe and show what it would do, without training")
    for command in (run, validate):
        command.add_argument("recipe", help="path of a recipe, or name of a shipped one, e.g. digits")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="e.g. retrain.epochs=20 output=runs/mine"
        )
    run.add_argument("--fresh", action="store_true", help="discard what an earlier run left in the output folder")
    run.set_defaults(command=_run)
    bench = commands.add_parser("bench", help="measure speed, as ratios in one run").add_subparsers(
        required=True, metavar="WHAT"
    )
    training = bench.add_parser("training", help="a step of all subnets against plain training")
    training.add_argument("--rounds", type=int, default=7, help="repetitions (7)")
    training.add_argument("--device", default="cpu")
    training.set_defaults(command=_bench_training)
    engine = bench.add_parser("engine", help="the steps against the dense model and subnets from scratch")
    engine.add_argument("models", nargs="*", metavar="MODEL", help="timm names; default: five common ones")
    engine.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (1 8)")
    engine.add_argument("--subnets", type=int, default=4, help="subnets of equal width shares (4)")
    engine.add_argument("--turns", type=int, default=15, help="runs of everything; medians count (15)")
    engine.add_argument("--compile", action="store_true", help="through torch.compile")
    engine.set_defaults(command=_bench_engine)
    deadline = bench.add_parser("deadline", help="answers to random deadlines, with other work on the machine")
    deadline.add_argument("models", nargs="*", metavar="MODEL", help="timm names; default: resnet18")
    deadline.add_argument("--requests", type=int, default=200, help="random deadlines (200)")
    deadline.add_argument("--load", type=int, default=2, help="busy processes beside (2)")
    deadline.add_argument("--batch", type=int, default=1, help="images per request (1)")
    deadline.add_argument("--subnets", type=int, default=4, help="subnets of equal width shares (4)")
    deadline.set_defaults(command=_bench_deadline)
    for command in (training, engine, deadline):
        command.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
        command.add_argument("--json", action="store_true", help="print JSON")
    export = commands.add_parser("export", help="write the step programs of a net as torch.export or ONNX files")
    export.add_argument("run", metavar="RUN", help="folder of `stepping run`, or a net.safetensors file")
    export.add_argument("--format", choices=("torch", "onnx"), default="torch", help="kind of files (torch)")
    export.add_argument("--output", metavar="DIR", help="where to; default: export-FORMAT beside the net")
    export.add_argument("--batch-size", type=int, help="fix the batch size; default: any")
    export.set_defaults(command=_export)
    validate.set_defaults(command=_validate)
    _add_compare(commands)
    _add_coverage(commands)
    return parser


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser("compare", help="SteppingNet against its rivals; runs what is missing")
    compare.add_argument("recipe", nargs="?", help="path or name of a recipe; without one, only --page is made")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.limit=2000")
    compare.add_argument("--study", default="methods", help="methods (default), expansion (Fig. 7), ablation (Fig. 8)")
    compare.add_argument("--methods", nargs="+", metavar="NAME", help="only these variants, e.g. steppingnet slimmable")
    compare.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="(0 1 2)")
    compare.add_argument("--results", default="runs/compare", metavar="DIR", help="of the JSON files (runs/compare)")
    compare.add_argument("--work", default="runs/compare-work", metavar="DIR", help="of unfinished jobs")
    compare.add_argument("--resume", action="store_true", help="run only what is missing (the default)")
    compare.add_argument("--again", action="store_true", help="run also what is there already")
    compare.add_argument("--page", metavar="FILE", help="write tables and pictures of all results as a Markdown page")
    compare.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from .compare.page import write_page
    from .compare.runner import Comparison, compare
    from .compare.studies import method_variants, study_variants

    results = Path(arguments.results)
    if not (arguments.recipe or arguments.page):
        raise SteppingError("compare: give a recipe to run, or --page FILE to make a page of the results at hand.")
    if arguments.resume and arguments.again:
        raise SteppingError("compare: --resume runs what is missing, --again runs everything anew: give one of them.")
    if arguments.recipe is not None:
        chosen = method_variants(arguments.methods) if arguments.methods else study_variants(arguments.study)
        compare(
            Comparison(
                arguments.recipe, chosen, arguments.seeds, arguments.overrides, results, Path(arguments.work),
                arguments.again, say=lambda text: print(text, flush=True),
            )
        )  # fmt: skip
    if arguments.page is not None:
        for path in write_page(results, Path(arguments.page)):
            print(path)
    return 0


def _add_coverage(commands: Any) -> None:
    coverage = commands.add_parser("coverage", help="convert many models and check every promise on each of them")
    coverage.add_argument(
        "--models", nargs="+", default=[], metavar="PATTERN", help="timm names, modules, torchvision:*"
    )
    which = coverage.add_mutually_exclusive_group()
    which.add_argument("--family-smallest", action="store_true", help="one model per timm module (default)")
    which.add_argument(
        "--family-second",
        action="store_true",
        help="another size of every timm module, mostly the smallest with at least 1.3 times the parameters",
    )
    which.add_argument("--all-variants-under", type=float, metavar="PARAMS", help="every timm model below, e.g. 5e6")
    coverage.add_argument("--jobs", type=int, default=1, help="models at a time (1)")
    coverage.add_argument("--time-limit", type=float, default=600.0, help="seconds per model (600)")
    coverage.add_argument("--memory-limit", type=float, default=12.0, help="GiB per model (12)")
    coverage.add_argument("--again", action="store_true", help="repeat models of the output that are not ok")
    coverage.add_argument("--output", default="coverage_results.json", help="made or continued (coverage_results.json)")
    coverage.add_argument("--table", metavar="FILE", help="also write the results as a Markdown table")
    coverage.add_argument(
        "--fuzz", type=int, metavar="COUNT", help="check COUNT random small networks instead of models"
    )
    coverage.add_argument("--structure", nargs="+", metavar="NAME", help="units and MACs of models, without weights")
    coverage.add_argument("--json", action="store_true", help="print what --structure finds as JSON")
    coverage.add_argument("--seed", type=int, default=0, help="first seed of --fuzz (0)")
    coverage.set_defaults(command=_coverage)


def _coverage(arguments: argparse.Namespace) -> int:
    from .coverage.families import select
    from .coverage.runner import run_coverage
    from .coverage.table import summary_lines, write_table

    if arguments.json and not arguments.structure:
        raise SteppingError("--json goes with --structure. Results of models are JSON anyway, in the file --output.")
    if arguments.fuzz:
        from .coverage.fuzz import run_fuzz

        return 1 if run_fuzz(arguments.seed, arguments.fuzz, lambda text: print(text, flush=True)) else 0
    if arguments.structure:
        from .coverage.structure import structure_table, structures

        return _show(arguments, list(structures(arguments.structure)), structure_table)
    limit = arguments.all_variants_under
    output, say = Path(arguments.output), lambda text: print(text, flush=True)
    specs = select(
        arguments.models,
        arguments.family_smallest,
        None if limit is None else int(limit),
        family_second=arguments.family_second,
        cache=output.with_suffix(".parameters.json"),
        say=say,
    )
    rows = run_coverage(
        specs,
        output,
        jobs=arguments.jobs,
        seconds=arguments.time_limit,
        gib=arguments.memory_limit,
        again=arguments.again,
        say=say,
    )
    if arguments.table:
        write_table(arguments.table, rows)
    print("\n".join(summary_lines(rows)))
    return 0 if all(row["status"] == "ok" for row in rows) else 1


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from .pipeline import run_recipe
    from .recipe import load_recipe
    from .report import exit_table, results_table

    console = Console(soft_wrap=True)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    folder = Path(recipe.output or Path("runs") / Path(arguments.recipe).stem)
    data = run_recipe(recipe, folder, fresh=arguments.fresh, say=lambda text: console.print(text, highlight=False))
    console.print(results_table(data), *data["notes"])
    console.print(exit_table(data))
    console.print(f"report: {folder / 'index.html'}   net: {folder / 'net.safetensors'}")
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from .pipeline import plan
    from .recipe import dump_recipe, load_recipe
    from .summary import human_macs

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(dump_recipe(recipe))
    facts = plan(recipe)
    original, start = human_macs(facts["reference_macs"]), human_macs(facts["start_macs"])
    title = f"plan: {facts['units']:,} units; original {original}, start {start} MACs"
    table = Table("subnet", "budget", "MACs (one shot)", "of the original", title=title)
    for i, (budget, macs) in enumerate(zip(facts["budgets"], facts["macs"]), start=1):
        table.add_row(str(i), human_macs(budget), human_macs(macs), f"{macs / facts['reference_macs']:.2%}")
    Console(soft_wrap=True).print(table, *facts["notes"])
    return 0


def _bench_training(arguments: argparse.Namespace) -> int:
    from .training.bench import bench_training, training_table

    _use_threads(arguments)
    return _show(arguments, bench_training(rounds=arguments.rounds, device=arguments.device), training_table)


def _bench_engine(arguments: argparse.Namespace) -> int:
    from .engine.bench import MODELS, bench_engine, bench_table

    _use_threads(arguments)
    report = bench_engine(
        {name: build_model(name) for name in arguments.models or MODELS},
        arguments.batch,
        num_subnets=arguments.subnets,
        turns=arguments.turns,
        compile=arguments.compile,
        progress=lambda text: print(text, file=sys.stderr),
    )
    return _show(arguments, report, bench_table)


def _bench_deadline(arguments: argparse.Namespace) -> int:
    from .engine.bench import equal_net
    from .engine.bench_deadline import bench_deadlines, deadline_table

    _use_threads(arguments)
    rows = []
    for name in arguments.models or ["resnet18"]:
        engine = equal_net(build_model(name), arguments.subnets).deploy()
        row = bench_deadlines(engine, arguments.requests, batch_size=arguments.batch, load=arguments.load)
        rows.append({"model": name, **row})
    return _show(arguments, rows, deadline_table)


def _use_threads(arguments: argparse.Namespace) -> None:
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def _show(arguments: argparse.Namespace, measured: Any, table: Callable[[Any], Any]) -> int:
    """Print what a benchmark measured: a table, or JSON with the machine beside."""
    from rich.console import Console

    from .machine import describe_machine

    if arguments.json:
        results = measured if isinstance(measured, dict) else {"results": measured}
        print(json.dumps({"machine": describe_machine(), **results}, indent=2))
    else:
        Console(soft_wrap=True).print(table(measured))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from .serialization import load

    source = Path(arguments.run)
    if source.is_dir():
        source = source / "net.safetensors"
    folder = Path(arguments.output or source.parent / f"export-{arguments.format}")
    manifest = load(source).deploy().export(folder, arguments.format, arguments.batch_size)
    for note in manifest["notes"]:
        print(note)
    files = ", ".join(step["file"] for step in manifest["steps"])
    print(f"{folder}: {files}, manifest.json (batch size: {manifest['batch']})")
    return 0


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

    from .integrations.timm.models import require_model

    require_model(name)
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if img_size is not None:
        try:
            return timm.create_model(name, img_size=img_size, **kwargs)
        except TypeError:  # convolutional models take any size
            pass
    return timm.create_model(name, **kwargs)
