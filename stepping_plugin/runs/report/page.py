"""The report's page: HTML that needs nothing but itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from stepping_plugin.files.headers import Contribution
from stepping_plugin.views.contribution import contribution_rows, idle_levels
from stepping_plugin.views.metrics import MOST_ROWS, class_header, class_rows, metrics_titles, metrics_values

from .tables import COLUMNS, EXIT_COLUMNS, calibrated_rows, calibrated_sentence, exit_rows, judged, result_rows

__all__ = ["html_page"]

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 56rem;
       margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
h3, h4 {{ font-size: 1rem; margin: 1.2rem 0 .3rem; }} h4 {{ font-size: .9rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e7eb; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
img {{ max-width: 100%; height: auto; }}
pre {{ background: #f5f7fa; padding: 1rem; overflow-x: auto; font-size: .85rem; }}
.wide {{ overflow-x: auto; }} .note {{ color: #616e7c; font-size: .9rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="wide">{results}</div>
<p class="note">MACs: multiply-accumulates per image, of subnet 1 up to and including this one. M_t: MACs of
the original network.</p>
{metrics}
<h2>Accuracy against MACs</h2>
<img alt="Accuracy of each subnet against its MACs" src="{accuracy_vs_macs}">
{early_exit}
{calibrated}
<h2>Units per layer and level</h2>
<img alt="Share of each layer's units in each level" src="{units_per_layer}">
<details><summary>As a table</summary><div class="wide">{units}</div></details>
{contribution}
{recipe}
</body>
</html>
"""


def html_page(data: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The HTML page; needs nothing but itself."""
    sources = {
        name.removesuffix(".png"): "data:image/png;base64," + base64.b64encode(png).decode()
        for name, png in pictures.items()
    }
    most = max(len(layer["units_per_level"]) for layer in data["layers"])
    levels = len(data["subnets"])
    header = ["layer", *(f"level {level + 1}" if level < levels else "spare" for level in range(most))]
    units = [[layer["name"], *map(str, layer["units_per_level"])] for layer in data["layers"]]
    recipe = data.get("recipe")
    return _PAGE.format(
        title=html.escape(str(data.get("title") or "SteppingNet report")),
        results=_html_table(COLUMNS, result_rows(data)) + _warnings(data),
        units=_html_table(header, units),
        metrics=_metrics(data),
        early_exit=_early_exit(data),
        calibrated=_calibrated(data),
        contribution=_contribution(data),
        recipe=f"<h2>Recipe</h2>\n<pre>{html.escape(str(recipe))}</pre>" if recipe else "",
        **sources,
    )


def _warnings(data: Mapping[str, Any]) -> str:
    return "".join(f"<p><strong>{html.escape(text)}</strong></p>" for text in data.get("warnings", []))


def _early_exit(data: Mapping[str, Any]) -> str:
    """The early-exit curve as a table, folded; empty without one."""
    if not data.get("early_exit"):
        return ""
    where = html.escape(data["early_exit"]["thresholds_from"])
    table = _html_table(EXIT_COLUMNS, exit_rows(data))
    note = f'<p class="note">Thresholds were chosen on {where}.</p>'
    return f'<details><summary>Early exit, as a table</summary>{note}<div class="wide">{table}</div></details>'


def _metrics(data: Mapping[str, Any]) -> str:
    """Metrics of original, subnets and calibrated exit, and what each of them finds of every class."""
    names, found = judged(data)
    if not found:
        return ""
    titles = metrics_titles(found)
    rows = [[name, *metrics_values(m, titles)] for name, m in zip(names, found)]
    pictures = data["metrics"]["pictures"]
    note = (
        f'<p class="note">On {pictures:,} test pictures. Balanced: balanced accuracy, the mean recall. Precision '
        "and F1 are means over classes (macro), AUC is that of each class against all others, mAP the mean average "
        "precision, ECE the expected calibration error (15 bins)."
        f"{_exit_note(data, found)}</p>"
    )
    table = _html_table(["network", *titles.values()], rows)
    further = _classes(names, found) + _confusion(names, found)
    return f'<h2>Metrics</h2>\n<div class="wide">{table}</div>{note}\n{further}'


def _exit_note(data: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    judged_on = found[-1]["pictures"]
    if not data.get("calibrated_exit") or judged_on == data["metrics"]["pictures"]:
        return ""
    return f" Early exit is judged on {judged_on:,} of them; the others chose its thresholds."


def _classes(names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> str:
    rows = class_rows(found)
    shown = sum(1 for entry in found[-1]["classes"] if entry["pictures"])
    which = "every class" if len(rows) == shown else f"the {len(rows)} worst of {shown} classes"
    title = f"Pictures of {which} that are recognised (recall)"
    return f'<h3>{title}</h3>\n<div class="wide">{_html_table(class_header(names), rows)}</div>'


def _confusion(names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> str:
    """Folded, one table per network; none of many classes."""
    tables = []
    for name, metrics in zip(names, found):
        counts = metrics.get("confusion")
        if not counts or len(counts) > MOST_ROWS:
            continue
        classes = [entry["name"] for entry in metrics["classes"]]
        rows = [[label, *(f"{n:,}" for n in row)] for label, row in zip(classes, counts)]
        table = _html_table(["true class / answer", *classes], rows)
        tables.append(f'<h4>{html.escape(name)}</h4>\n<div class="wide">{table}</div>')
    return f"<details><summary>Confusion matrices</summary>{''.join(tables)}</details>" if tables else ""


def _calibrated(data: Mapping[str, Any]) -> str:
    """What was asked of early exit, what was chosen, and what it gives."""
    found = data.get("calibrated_exit")
    if not found:
        return ""
    table = _html_table(["", *(f"subnet {i + 1}" for i in range(len(found["temperatures"])))], calibrated_rows(found))
    of_class = " of the class it answers" if any(len(row) > 1 for row in found["thresholds"]) else ""
    answers = "the product of those so far" if found["combine"] == "product" else "those of the last subnet"
    sentence, chosen_on = (
        html.escape(text) for text in (calibrated_sentence(found, data["original"]["macs"]), found["chosen_on"])
    )
    return (
        f'<h2>Early exit for a target</h2>\n<p>{sentence}</p>\n<div class="wide">{table}</div>'
        f'<p class="note">Temperatures and thresholds were chosen on {chosen_on} and are kept in the net: '
        '<code>engine.predict(images, until="calibrated")</code>. A picture stops at the first subnet whose calibrated '
        f"probability reaches the threshold{of_class}; answers are {answers}.</p>"
    )


def _contribution(data: Mapping[str, Any]) -> str:
    """What every level adds, as a table with a sentence per level that adds nothing; empty where not measured."""
    if not data.get("contribution"):
        return ""
    found = Contribution(**data["contribution"])
    header = ["", *(f"level {level + 1}" for level in range(len(found.scores)))]
    warnings = "".join(f"<p><strong>{html.escape(text)}</strong></p>" for text in idle_levels(found))
    note = (
        f'<p class="note">Measured on {found.pictures:,} pictures: the share of each level in what the class scores of '
        "the subnets differ by, the answers that it changes, and per layer its units that say anything at all.</p>"
    )
    table = _html_table(header, contribution_rows(found))
    return f'<h2>What every level adds</h2>\n{warnings}<div class="wide">{table}</div>{note}'


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
