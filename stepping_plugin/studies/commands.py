"""Commands about the product: `stepping bench`, `compare`, `coverage`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..arguments import SEED, SUBNETS, device, number, output_file, output_folder, whole
from ..errors import SteppingError
from ..views.words import HELP

__all__ = ["add_bench", "add_compare", "add_coverage"]


def add_bench(commands: Any) -> None:
    """`stepping bench training|engine|deadline`."""
    bench = commands.add_parser("bench", help="measure speed, as ratios in one run").add_subparsers(
        required=True, metavar="WHAT"
    )
    training = bench.add_parser("training", help="a step of all subnets against plain training")
    training.add_argument("--rounds", type=whole(1, 10_000), default=7, help="repetitions (7)")
    training.add_argument("--device", type=device, default="cpu", help="where to train (cpu)")
    training.set_defaults(command=_bench_training)
    engine = bench.add_parser("engine", help="the steps against the dense model and subnets from scratch")
    engine.add_argument("models", nargs="*", metavar="NET", help=f"{HELP}; default: five common timm models")
    engine.add_argument("--batch", type=whole(1, 65_536), nargs="+", default=[1, 8], help="batch sizes (1 8)")
    engine.add_argument("--subnets", type=whole(1, SUBNETS), default=4, help="of timm models, equally wide (4)")
    engine.add_argument("--turns", type=whole(1, 10_000), default=15, help="runs of everything; medians count (15)")
    engine.add_argument("--compile", action="store_true", help="through torch.compile")
    engine.set_defaults(command=_bench_engine)
    deadline = bench.add_parser("deadline", help="answers to random deadlines, with other work on the machine")
    deadline.add_argument("models", nargs="*", metavar="NET", help=f"{HELP}; default: resnet18")
    deadline.add_argument("--requests", type=whole(1, 1_000_000), default=200, help="random deadlines (200)")
    deadline.add_argument("--load", type=whole(0, 256), default=2, help="busy processes beside (2)")
    deadline.add_argument("--batch", type=whole(1, 65_536), default=1, help="images per request (1)")
    deadline.add_argument("--subnets", type=whole(1, SUBNETS), default=4, help="of timm models, equally wide (4)")
    deadline.set_defaults(command=_bench_deadline)
    for command in (training, engine, deadline):
        command.add_argument("--threads", type=whole(1, 1024), help="CPU threads; default: torch's own")
        command.add_argument("--json", action="store_true", help="print JSON")


def _bench_training(arguments: argparse.Namespace) -> int:
    from .bench.training import bench_training, training_table

    _use_threads(arguments)
    return _show(arguments, bench_training(rounds=arguments.rounds, device=arguments.device), training_table)


def _bench_engine(arguments: argparse.Namespace) -> int:
    from ..views.named import named
    from .bench.engine import MODELS, bench_engine, bench_table
    from .bench.own import contender

    _use_threads(arguments)
    report = bench_engine(
        {word: contender(named(word)) for word in arguments.models or MODELS},
        arguments.batch,
        num_subnets=arguments.subnets,
        turns=arguments.turns,
        compile=arguments.compile,
        progress=lambda text: None if arguments.quiet else print(text, file=sys.stderr),
    )
    return _show(arguments, report, bench_table)


def _bench_deadline(arguments: argparse.Namespace) -> int:
    from ..views.named import named
    from .bench.deadline import bench_deadlines, deadline_table

    _use_threads(arguments)
    rows = []
    for name in arguments.models or ["resnet18"]:
        engine = named(name).deployed(arguments.subnets)
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

    from ..runs.machine import describe_machine

    if arguments.json:
        results = measured if isinstance(measured, dict) else {"results": measured}
        print(json.dumps({"machine": describe_machine(), **results}, indent=2))
    else:
        Console(soft_wrap=True).print(table(measured))
    return 0


def add_compare(commands: Any) -> None:
    """`stepping compare`."""
    compare = commands.add_parser("compare", help="SteppingNet against its rivals; runs what is missing")
    compare.add_argument("recipe", nargs="?", help="path or name of a recipe; without one, only --page is made")
    compare.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="e.g. data.limit=2000")
    compare.add_argument(
        "--study", default="methods", help="methods (default), expansion (Fig. 7), ablation (Fig. 8), rounding"
    )
    compare.add_argument("--methods", nargs="+", metavar="NAME", help="only these variants, e.g. steppingnet slimmable")
    compare.add_argument("--seeds", nargs="+", type=whole(0, SEED), default=[0, 1, 2], metavar="SEED", help="(0 1 2)")
    compare.add_argument(
        "--results", type=output_folder, default="runs/compare", metavar="DIR", help="of the JSON files (runs/compare)"
    )
    compare.add_argument(
        "--work", type=output_folder, default="runs/compare-work", metavar="DIR", help="of unfinished jobs"
    )
    compare.add_argument("--resume", action="store_true", help="run only what is missing (the default)")
    compare.add_argument("--again", action="store_true", help="run also what is there already")
    compare.add_argument(
        "--page", type=output_file, metavar="FILE", help="write tables and pictures of all results as a Markdown page"
    )
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


def add_coverage(commands: Any) -> None:
    """`stepping coverage`."""
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
    which.add_argument(
        "--all-variants-under", type=number(1, 1e12), metavar="PARAMS", help="every timm model below, e.g. 5e6"
    )
    coverage.add_argument("--jobs", type=whole(1, 256), default=1, help="models at a time (1)")
    coverage.add_argument("--time-limit", type=number(0.1, 1e6), default=600.0, help="seconds per model (600)")
    coverage.add_argument("--memory-limit", type=number(0.1, 1e5), default=12.0, help="GiB per model (12)")
    coverage.add_argument("--again", action="store_true", help="repeat models of the output that are not ok")
    coverage.add_argument(
        "--output", type=output_file, default="coverage_results.json", help="made or continued (coverage_results.json)"
    )
    coverage.add_argument(
        "--table", type=output_file, metavar="FILE", help="also write the results as a Markdown table"
    )
    coverage.add_argument(
        "--fuzz", type=whole(1, 1_000_000), metavar="COUNT", help="check COUNT random small networks instead of models"
    )
    coverage.add_argument("--structure", nargs="+", metavar="NAME", help="units and MACs of models, without weights")
    coverage.add_argument("--json", action="store_true", help="print what --structure finds as JSON")
    coverage.add_argument("--seed", type=whole(0, SEED), default=0, help="first seed of --fuzz (0)")
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
