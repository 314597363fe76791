"""Figures in README.md, docs/ and the recipes' headers, from the JSON files in docs/measured and recipes/results.

    python tests/measured.py                    # bring the texts up to date
    python tests/measured.py --add RUN_FOLDER   # keep what a text may quote of a run's report.json, then the same

A block begins with `<!-- measured: NAME -->` and ends with `<!-- /measured -->`; a recipe's begins with
`# Expected result:` and goes on while lines are indented. test_measured.py fails if a text says anything else.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from measured_paper import BLOCKS as PAPER
from measured_rounding import BLOCKS as ROUNDING

from stepping_plugin.studies.compare.page import summary_table
from stepping_plugin.studies.compare.results import read_all
from stepping_plugin.studies.compare.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
MEASURED, RESULTS = ROOT / "docs" / "measured", ROOT / "recipes" / "results"
TEXTS = [
    ROOT / "README.md",
    *(ROOT / "docs" / "results" / f"{name}.md" for name in ("measurements", "levels", "rounding")),
]
_KEPT = ("title", "seed", "machine", "original", "subnets", "early_exit", "verify", "seconds", "recipe")
_BLOCK = re.compile(r"(<!-- measured: ([\w-]+) -->\n).*?(<!-- /measured -->)", re.DOTALL)
_EXPECTED = re.compile(r"^# Expected result:.*\n(?:#   .*\n)*", re.MULTILINE)

Json = dict[str, Any]


def keep_run(folder: Path) -> Path:
    """Copy what may be quoted of a run into docs/measured/runs/RECIPE/seedS.json; its folder is named RECIPE-S."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    recipe = yaml.safe_load(report["recipe"])
    recipe.pop("output")
    kept = {**{key: report[key] for key in _KEPT}, "recipe": recipe}
    path = MEASURED / "runs" / folder.name.rsplit("-", 1)[0] / f"seed{report['seed']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return path


def runs() -> dict[str, list[Json]]:
    """Recipe -> its runs in order of seeds."""
    found: dict[str, list[Json]] = {}
    for path in sorted(MEASURED.glob("runs/*/seed*.json")):
        found.setdefault(path.parent.name, []).append(json.loads(path.read_text(encoding="utf-8")))
    return found


def bench(name: str) -> Json:
    return json.loads((MEASURED / f"{name}.json").read_text(encoding="utf-8"))


# --- Blocks -------------------------------------------------------------------------------------------------


def digits() -> str:
    return _run_table(runs()["digits"][0])


def _run_table(run: Json) -> str:
    total = run["original"]["macs"]
    rows = [["original", f"{total:,}", "100 %", "", "", _percent(run["original"]["accuracy"])]]
    for s in run["subnets"]:
        rows.append([f"subnet {s['subnet']}", f"{s['macs']:,}", _percent(s["macs"] / total),
                     f"{100 * s['budget'] / total:.0f} %", _percent(s["accuracy_before_retraining"]),
                     _percent(s["accuracy"])])  # fmt: skip
    return markdown(["network", "MACs", "share of M_t", "budget", "accuracy before retraining", "accuracy"], rows)


def fashion_mnist() -> str:
    rows = []
    for recipe, own in runs().items():
        if not recipe.startswith("fashion_mnist"):
            continue
        for run in own:
            rows.append([f"`{recipe}`", str(run["seed"]), _budgets(run), _percent(run["original"]["accuracy"]),
                         _accuracies(run), _used(run)])  # fmt: skip
    return markdown(["recipe", "seed", "budgets", "original", "subnets 1 to 4", "MACs, of the budgets"], rows)


def every_run() -> str:
    parts = []
    for recipe, own in runs().items():
        for run in own:
            parts += [f"`{recipe}`, seed {run['seed']} ({_machine(run['machine'])}):\n", _run_table(run), ""]
    return "\n".join(parts).rstrip()


def early_exit() -> str:
    parts = []
    for recipe, own in runs().items():
        run, total = own[0], own[0]["original"]["macs"]
        rows = [
            [f"{p['threshold']:.5f}", f"{p['macs'] / total:.1%}", _percent(p["accuracy"]),
             ", ".join(f"{100 * share:.0f} %" for share in p["subnets"])]
            for p in run["early_exit"]["points"]
        ]  # fmt: skip
        heading = ["threshold of the largest probability", "average MACs, of M_t", "accuracy",
                   "pictures that stop at subnet 1, 2, ..."]  # fmt: skip
        parts += [f"`{recipe}`, seed {run['seed']}:\n", markdown(heading, rows), ""]
    return "\n".join(parts).rstrip()


def training() -> str:
    report = bench("training")
    rows = [
        [r["model"], str(r["img_size"]), str(r["batch_size"]), *[f"{r['ratio'][k]:.2f}" for k in ("joint", "separate")]]
        for r in report["results"]
    ]
    table = markdown(["network", "pixels", "batch", "all 4 subnets at once / plain", "4 separate nets / plain"], rows)
    return f"{table}\n\n{_machine(report['machine'])}"


def engine_summary() -> str:
    reports = _engine_reports()
    header = ["network", "MACs"]
    columns: list[dict[str, Json]] = []
    for report in reports:
        for size in sorted({r["batch_size"] for r in report["results"]}):
            threads = report["machine"]["threads"]
            header.append(f"batch {size}, {threads} thread{'s' if threads > 1 else ''}")
            columns.append({r["model"]: r for r in report["results"] if r["batch_size"] == size})
    rows = [
        [
            name,
            f"{columns[0][name]['macs_ratio']:.2f}",
            *[f"{c[name]['ratio']:.2f}" if name in c else "" for c in columns],
        ]
        for name in columns[0]
    ]
    return f"{markdown(header, rows)}\n\n{_machine(reports[0]['machine'], threads=False)}"


def engine_steps() -> str:
    parts = []
    for report in _engine_reports():
        rows = []
        for r in report["results"]:
            rows.append([r["model"], str(r["batch_size"]), f"{r['dense']:.1f}", _listed(r["steps"]),
                         _listed(r["subnets"]), f"{r['ratio']:.2f}", f"{r['scratch_ratio']:.2f}",
                         f"{max(a / b for a, b in zip(r['steps'], r['subnets'], strict=True)):.2f}",
                         f"{max(r['cache_bytes']) / 2**20:.1f}"])  # fmt: skip
        header = ["network", "batch", "dense, ms", "steps, ms", "subnets from scratch, ms", "sum of steps / dense",
                  "sum of subnets / dense", "dearest step / its subnet", "cache, MiB"]  # fmt: skip
        parts += [f"{_machine(report['machine'])}:\n", markdown(header, rows), ""]
    return "\n".join(parts).rstrip()


def _engine_reports() -> list[Json]:
    return [bench(path.stem) for path in sorted(MEASURED.glob("engine-*.json"))]


def deadlines() -> str:
    reports = [bench(path.stem) for path in sorted(MEASURED.glob("deadline-*.json"))]
    rows = []
    for report in reports:
        for r in report["results"]:
            late = r["late_by_ms"]
            rows.append([r["model"], str(r["load"]), str(r["requests"]), str(r["in_time"]), str(r["late_in_subnet_1"]),
                         str(r["late_in_a_step"]), f"{late['median']:.1f} / {late['largest']:.1f} ms",
                         " / ".join(map(str, r["subnets"]))])  # fmt: skip
    header = ["network", "busy processes beside", "requests", "in time", "late in subnet 1", "late in a step",
              "late by, median / largest", "ended at subnet 1 / 2 / ..."]  # fmt: skip
    return f"{markdown(header, rows)}\n\n{_machine(reports[0]['machine'])}"


def structure() -> str:
    report = bench("structure")
    rows = []
    for r in sorted(report["results"], key=lambda r: r["parameters"]):
        rows.append([r["model"], f"{r['parameters'] / 1e6:,.0f}", f"{r['channels']:,}", f"{r['units']:,}",
                     f"{r['pinned_channels']:,}", f"{r['macs'] / 1e9:,.0f}", f"{r['floor_share']:.2%}",
                     f"{r['cpu_seconds']:.1f}", f"{r['cpu_seconds'] / r['channels'] * 1e6:.0f}",
                     f"{r['gib']:.2f}"])  # fmt: skip
    header = ["model", "parameters, M", "channels", "units", "pinned channels", "G MACs", "floor", "CPU s",
              "µs per channel", "GiB"]  # fmt: skip
    return f"{markdown(header, rows)}\n\n{_machine(report['machine'])}"


def coverage() -> str:
    first, second = (
        json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("coverage_results", "coverage_second")
    )
    smallest = [r for r in first if not r["model"].startswith("torchvision:")]
    kinds = {
        "timm, smallest": smallest,
        "timm, another size": second,
        "torchvision": [r for r in first if r not in smallest],
    }
    table = []
    for kind, own in kinds.items():
        few = len({r["module"] for r in own if r.get("pinned_share", 1.0) < 0.01})
        passed = sum(r["status"] == "ok" for r in own)
        table.append([kind, str(len({r["module"] for r in own})), str(len(own)), str(passed), str(few)])
    header = ["models of", "modules", "models", "pass every check", "modules with less than 1 % of the channels pinned"]
    return markdown(header, table)


def left_out() -> str:
    rows = []
    for r in bench("left_out")["results"]:
        *smaller, largest = r["differences"]
        rows.append([r["variant"], r["network"], f"{r['steps']:,}", str(r["seeds"]),
                     *[f"{d:+.2f}" for d in smaller], f"{largest:+.2f} ± {r['largest_deviation']:.1f}"])  # fmt: skip
    header = ["variant", "network", "updates", "seeds", "subnet 1", "subnet 2", "subnet 3", "subnet 4"]
    return markdown(header, rows)


def comparison() -> str:
    return summary_table(read_all(RESULTS))


SHORT = {"steppingnet-long": "SteppingNet", "slimmable": "slimmable", "tp-magnitude": "separately pruned"}


def comparison_short() -> str:
    """Mean over the budgets at equal executed MACs, of the three that matter most."""
    found: dict[tuple[str, str], list[float]] = {}
    for r in read_all(RESULTS):
        if r.status == "done" and r.variant in SHORT:
            found.setdefault((r.variant, r.recipe), []).append(100 * _mean([a.accuracy for a in r.executed]))
    recipes = sorted({recipe for variant, recipe in found if variant == "steppingnet-long"})
    rows = [
        [label, *[f"{_mean(found[variant, recipe]):.2f}" for recipe in recipes]] for variant, label in SHORT.items()
    ]
    return markdown(["at equal executed MACs, mean over four budgets, %", *[f"`{r}`" for r in recipes]], rows)


def headlines() -> str:
    """Three figures for people who read nothing else, each with where it comes from."""
    engine = next(r for r in bench("engine-1-thread")["results"] if (r["model"], r["batch_size"]) == ("resnet18", 8))
    shares = {recipe: _exit_share(own[0]) for recipe, own in runs().items()}
    early = ", ".join(f"{share:.0%} (`{recipe}`)" for recipe, share in shares.items() if share is not None)
    done = [r["status"] for name in ("coverage_results", "coverage_second") for r in
            json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))]  # fmt: skip
    rows = [
        ["time of four answers, of one dense run", f"{engine['ratio']:.2f}; as four separate nets "
         f"{engine['scratch_ratio']:.2f} (resnet18, batch 8, one thread)", _link("Engine", "engine")],
        ["average MACs at which early exit is as accurate as the original", early, _link("Early exit", "early-exit")],
        ["models that pass every check", f"{done.count('ok')} of {len(done)}", "[coverage](docs/results/coverage.md)"],
    ]  # fmt: skip
    return markdown(["", "", "measured in"], rows)


def _exit_share(run: Json) -> float | None:
    """Least average MACs, of the original's, at which pictures that stop early are as accurate as the original."""
    enough = [p["macs"] for p in run["early_exit"]["points"] if p["accuracy"] >= run["original"]["accuracy"]]
    return min(enough) / run["original"]["macs"] if enough else None


def _link(title: str, anchor: str) -> str:
    return f"[{title.lower()}](docs/results/measurements.md#{anchor})"


def draw_executed() -> bytes:
    """Accuracy against executed MACs where budgets arrive one after the other; two networks, mean over seeds."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "executed"
    figure = Figure(figsize=(9.2, 3.5), layout="constrained")
    panels = figure.subplots(1, 2)
    styles = {"steppingnet-long": ("#0b7285", "o-"), "slimmable": ("#e8590c", "s--"), "tp-magnitude": ("#868e96", "^:")}
    for panel, (recipe, title) in zip(panels, {"compare_lenet5": "LeNet-5", "compare_resnet": "residual net"}.items()):
        own = [r for r in read_all(RESULTS) if r.status == "done" and r.recipe == recipe]
        for variant, (colour, style) in styles.items():
            answers = [r.executed for r in own if r.variant == variant]
            macs = [100 * a.executed / own[0].reference.macs for a in answers[0]]
            means = [100 * _mean([run[i].accuracy for run in answers]) for i in range(len(macs))]
            panel.plot(macs, means, style, color=colour, label=SHORT[variant])
        panel.set(title=f"{title}, Fashion-MNIST", xlabel="executed MACs, % of the original")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e4e7eb")
    panels[0].set_ylabel("accuracy, %")
    panels[0].legend(frameon=False, loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def levels_study() -> str:
    """SteppingNet of today and of the comparison page, and what they are measured by."""
    found = {(r.recipe, r.variant, r.seed): r for r in read_all(RESULTS) if r.status == "done"}
    rows = []
    for entry in _levels("study.json"):
        recipe, seed = entry["recipe"], entry["seed"]
        for name, variant in (("before", "steppingnet"), ("slimmable", "slimmable"), ("pruned", "tp-magnitude")):
            entry[name] = [a.accuracy for a in found[recipe, variant, seed].alone]
        shown = [_points(entry[key]) for key in ("before", "accuracy", "slimmable", "pruned")]
        rows.append([recipe, str(seed), *shown, f"{100 * (_mean(entry['accuracy']) - _mean(entry['before'])):+.2f}"])
    heading = ["recipe", "seed", "before", "now", "slimmable", "separately pruned", "now minus before, mean"]
    return markdown(heading, rows)


def levels_trials() -> str:
    """Per trial: mean difference to the net without it, over networks and seeds."""
    trials: dict[str, list[Json]] = {}
    for entry in _levels("trials.json"):
        trials.setdefault(entry["trial"], []).append(entry)
    rows = []
    for trial, own in trials.items():
        gains = [[a - b for a, b in zip(e["accuracy"], e["without"])] for e in own]
        each = [_mean(column) for column in zip(*gains)]
        nets = ", ".join(f"{e['network']} {e['seed']}" + (f" ({e['epochs']} epochs)" * (e["epochs"] > 15)) for e in own)
        rows.append([trial, nets, f"{_mean(each):+.2f}", " ".join(f"{gain:+.2f}" for gain in each)])
    return markdown(["trial", "networks and seeds", "mean", "subnets 1 to 4"], rows)


def one_shot_cifar() -> str:
    text = (MEASURED / "levels" / "one_shot_cifar.jsonl").read_text(encoding="utf-8")
    rows = []
    for entry in map(json.loads, text.splitlines()):
        macs = ", ".join(f"{100 * share:.1f}" for share in entry["macs"])
        rows.append([entry["net"], entry["method"], f"{macs} %", f"{_points(entry['accuracy'])} %"])
    return markdown(["network", "method", "MACs, of the original", "accuracy"], rows)


def _levels(name: str) -> list[Json]:
    return json.loads((MEASURED / "levels" / name).read_text(encoding="utf-8"))


def _points(shares: Sequence[float]) -> str:
    return ", ".join(f"{100 * share:.2f}" for share in shares)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


BLOCKS: dict[str, Callable[[], str]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "runs": every_run,
    "early-exit": early_exit,
    "training": training,
    "engine": engine_summary,
    "engine-steps": engine_steps,
    "deadlines": deadlines,
    "structure": structure,
    "coverage": coverage,
    "left-out": left_out,
    "comparison": comparison,
    "comparison-short": comparison_short,
    "headlines": headlines,
    "levels-study": levels_study,
    "levels-trials": levels_trials,
    "one-shot-cifar": one_shot_cifar,
    **PAPER,
    **ROUNDING,
}


def expected_result(recipe: str) -> str:
    """The lines of a recipe's header that say what to expect."""
    own = runs()[recipe]
    lines = ["# Expected result: test accuracy of the original, and of the subnets"]
    for run in own:
        lines.append(f"#   {_percent(run['original']['accuracy'])}; {_accuracies(run)} (seed {run['seed']})")
    machine = own[0]["machine"]
    lines.append(f"#   with {machine['threads']} CPU thread(s) and torch {machine['torch'].split('+')[0]}.")
    return "\n".join(lines) + "\n"


# --- Cells --------------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _accuracies(run: Json) -> str:
    return ", ".join(f"{100 * s['accuracy']:.2f}" for s in run["subnets"]) + " %"


def _budgets(run: Json) -> str:
    return ", ".join(f"{100 * s['budget'] / run['original']['macs']:.0f}" for s in run["subnets"]) + " %"


def _used(run: Json) -> str:
    used = [100 * s["macs"] / s["budget"] for s in run["subnets"]]
    return f"{min(used):.1f} to {max(used):.1f} %"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.1f}" for v in values)


def _machine(machine: Json, threads: bool = True) -> str:
    number = f", {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}" if threads else ""
    return f"{machine['processor']}{number}, torch {machine['torch']}, timm {machine['timm']}"


# --- Texts --------------------------------------------------------------------------------------------------


def filled(text: str) -> str:
    """A text with all its blocks as they should be."""
    return _BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m[2]]()}\n{m[3]}", text)


def without_blocks(text: str) -> str:
    return _BLOCK.sub("", text)


def updates() -> Iterator[tuple[Path, str, str]]:
    """(file, its text, what it should be) of all texts that quote figures."""
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        yield path, text, filled(text)
    for recipe in runs():
        path = ROOT / "recipes" / f"{recipe}.yaml"
        text = path.read_text(encoding="utf-8")
        yield path, text, _EXPECTED.sub(lambda _, r=recipe: expected_result(r), text)  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs="+", type=Path, default=[], metavar="RUN_FOLDER", help="named RECIPE-SEED")
    for folder in parser.parse_args().add:
        print(keep_run(folder))
    for path, text, wanted in updates():
        if text != wanted:
            path.write_text(wanted, encoding="utf-8")
            print(f"updated {path}")
    (ROOT / "docs" / "pictures" / "executed.svg").write_bytes(draw_executed())


if __name__ == "__main__":
    main()
