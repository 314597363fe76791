"""The page of a comparison: every number and picture on it comes from the result files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean

from ...errors import SteppingError
from .pictures import draw_ablation, draw_curves, png
from .results import Result, read_all
from .studies import STUDIES
from .tables import (
    VIEWS,
    Group,
    accuracy_table,
    arrival_table,
    changes_table,
    cost_table,
    difference_table,
    failures,
    markdown,
    spread,
)

__all__ = ["page_text", "summary_table", "write_page"]

_HEAD = """# Comparison

Every number and picture on this page is generated from the JSON files under [{results}]({link}), one
per recipe, variant and seed:

    stepping compare RECIPE --results {results}    # runs what is missing
    stepping compare --results {results} --page {page}    # writes this page

All methods share the trained original that they start from and learn from, the order and augmentation of the data, the
optimizer, the number of updates per network, and the counting of MACs. Nets from scratch get the updates of the
original's training on top; rows that are marked so get 2.5 times the epochs, which makes their training cost about as
much as that of the separate nets of the first view (those of the second view cost less). SteppingNet and any-width are
widened first (`construction.expansion`); slimmable and the pruned nets are not wider than the original.

Two views:

- **Each subnet alone**: a budget is chosen once, and its net runs from scratch.
- **At equal executed MACs**: budgets arrive one after the other, and the MACs executed by then never exceed them. A
  net that reuses results steps up. Without reuse every budget starts a net anew, which is sized to the increment
  P_i - P_(i-1); the answer at hand is that of the largest net so far. (Whoever knows the later budgets may wait instead
  and run one net of P_i - P_(i-2), without a new answer in between.)

Accuracies are in percent on the test set, mean ± standard deviation over seeds; differences are paired by seed. With
few seeds, differences under about half a point are noise.
"""
NOTES = "NOTES.md"  # beside the results: what whoever made them has to say about them, copied to the page


def write_page(results: Path, page: Path) -> list[Path]:
    """Write the page and its pictures, which lie beside it in a folder of the same name; returns their paths.

    Raises:
        SteppingError: there are no results.
    """
    text = page_text(results, page)
    folder = page.with_suffix("")
    pictures = {folder / name: content for name, content in _pictures(read_all(results)).items()}
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in pictures.items():
        path.write_bytes(content)
    page.write_text(text, encoding="utf-8")
    return [page, *pictures]


def page_text(results: Path, page: Path) -> str:
    """The page as Markdown.

    Args:
        results: folder of the JSON files; what a `NOTES.md` in it says comes before the tables.
        page: where the page will lie.

    Raises:
        SteppingError: there are no results.
    """
    found = read_all(results)
    if not found:
        raise SteppingError(f"{results} holds no results. Run `stepping compare RECIPE --results {results}` first.")
    link = Path(os.path.relpath(results, page.parent)).as_posix()
    head = _HEAD.format(results=results.as_posix(), link=link, page=page.as_posix())
    notes = [(results / NOTES).read_text(encoding="utf-8")] if (results / NOTES).is_file() else []
    folder = page.with_suffix("").name
    sections = [_recipe_section(name, list(own), folder) for name, own in groupby(found, lambda r: r.recipe)]
    return "\n".join([head, *notes, *sections])


def summary_table(results: Sequence[Result]) -> str:
    """One row per method, one column per recipe: mean accuracy over the budgets, alone / at equal executed MACs."""
    recipes = {name: _groups(list(own), "methods") for name, own in groupby(results, lambda r: r.recipe)}
    rows = []
    for variant in STUDIES["methods"]:
        found = {name: g for name, groups in recipes.items() for g in groups if g.name == variant.name}
        cells = [_summary(found[name]) if name in found else "" for name in recipes]
        rows += [[variant.label, *cells]] if found else []
    return markdown(["method", *recipes], rows)


def _summary(group: Group) -> str:
    return f"{mean(group.means('alone')):.2f} / {mean(group.means('executed')):.2f} ({len(group.seeds)})"


def _groups(results: Sequence[Result], study: str) -> list[Group]:
    """Groups of a study in its own order, failures left out."""
    found = []
    for variant in STUDIES[study]:
        own = [r for r in results if r.variant == variant.name and r.status == "done"]
        found += [Group(own)] if own else []
    return found


def _expansions(results: Sequence[Result]) -> list[Group]:
    """Groups of the sweep by factor; the reference stands for the recipe's own."""
    groups = _groups(results, "expansion")
    for group in groups:
        group.label = f"expansion {group.first.settings['construction.expansion']:g}"
    return sorted(groups, key=lambda group: group.first.settings["construction.expansion"])


def _pictures(results: Sequence[Result]) -> dict[str, bytes]:
    pictures = {}
    for name, rows in groupby(results, lambda r: r.recipe):
        own = list(rows)
        methods, expansion, ablation = _groups(own, "methods"), _expansions(own), _groups(own, "ablation")
        pictures[f"{name}-methods.png"] = png(draw_curves(methods))
        if len(expansion) > 1:
            pictures[f"{name}-expansion.png"] = png(draw_curves(expansion, ["alone"]))
        if len(ablation) > 1:
            pictures[f"{name}-ablation.png"] = png(draw_ablation(ablation))
    return pictures


def _recipe_section(name: str, results: list[Result], folder: str) -> str:
    methods = _groups(results, "methods")
    parts = [f"## {_title(results[0])}\n", _facts(results)]
    for view, title in VIEWS.items():
        parts += [f"### {title[0].upper() + title[1:]}\n", accuracy_table(methods, view), ""]
        if differences := difference_table(methods, view):
            parts += [differences, ""]
    parts += [f"![accuracy against MACs]({folder}/{name}-methods.png)\n"]
    parts += ["### What it takes\n", _COST, cost_table(methods), ""]
    parts += ["### When budgets arrive one after the other\n", _ARRIVAL, arrival_table(methods), ""]
    parts += [_CHANGES, changes_table(methods), ""]
    expansion, ablation = _expansions(results), _groups(results, "ablation")
    for study, title, groups in (("expansion", "Expansion (Fig. 7 of the paper)", expansion),
                                 ("ablation", "Ablation (Fig. 8)", ablation)):  # fmt: skip
        if len(groups) > 1:
            parts += [f"### {title}\n", accuracy_table(groups, "alone"), ""]
            parts += [f"![{study}]({folder}/{name}-{study}.png)\n"]
    if missing := failures(results):
        parts += ["### Not possible\n", missing, ""]
    return "\n".join(parts)


_COST = """Stored numbers (weights, norm statistics) as multiples of the original's. Training as multiples of the
original's training: updates times the measured time of an update over a plain one, all networks together.
"""
_ARRIVAL = """MACs, and in brackets CPU time on this package's engine (batches of 1 and of 32), spent until the mean
accuracy is reached, in % of one run of the original. Nets without reuse are those of the first view, started anew at
every budget.
"""
_CHANGES = """What a change of the budget in the middle of an inference costs, in MACs, % of the original:
"""


def _title(result: Result) -> str:
    return f"{result.settings['model.name']} on {result.settings['data.name']} (`{result.recipe}`)"


def _facts(results: Sequence[Result]) -> str:
    first = results[0]
    per_seed = {r.seed: 100 * r.reference.accuracy for r in results}
    machines = {f"{m.processor}, {m.threads} thread(s), torch {m.torch}" for m in (r.machine for r in results)}
    size = first.settings.get("data.img_size")
    pictures = f"{first.train_samples:,} training and {first.test_samples:,} test pictures"
    hours = sum(r.seconds for r in results) / 3600
    return (
        f"{pictures}{f', shrunk to {size}x{size}' if size else ''}. Original: {first.reference.macs:,} MACs, "
        f"{first.reference.numbers:,} numbers, accuracy {spread(list(per_seed.values()))} % "
        f"(seeds {', '.join(map(str, per_seed))}), trained with {first.reference.updates:,} updates. "
        f"Run on {'; '.join(sorted(machines))}; {hours:.1f} hours of CPU time, "
        f"mean {mean(r.seconds for r in results) / 60:.1f} minutes per variant and seed.\n"
    )
