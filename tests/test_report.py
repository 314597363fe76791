"""The report: complete, self-contained, valid JSON, and never half written."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console

from stepping_plugin.errors import SteppingError
from stepping_plugin.runs import report
from stepping_plugin.training.exits import choose_exit, judge_exit
from stepping_plugin.training.metrics import metrics_of
from stepping_plugin.training.predictions import Predictions

FILES = {"report.json", "accuracy_vs_macs.png", "units_per_layer.png", "index.html"}


def example(levels: int = 3, layers: int = 4) -> dict:
    return {
        "title": "net & data <1>",
        "original": {"macs": 1_000_000, "accuracy": 0.9},
        "subnets": [
            {
                "subnet": i,
                "macs": 200_000 * i,
                "budget": 210_000 * i,
                "accuracy": 0.5 + 0.1 * i,
                "accuracy_before_retraining": 0.4 + 0.1 * i,
            }
            for i in range(1, levels + 1)
        ],
        "layers": [{"name": f"layer{k}", "units_per_level": [k + 1] * (levels + 1)} for k in range(layers)],
        "recipe": "model:\n  name: <b>&amp;</b>\n",
        "history": [{"epoch": 0, "accuracy": [0.1, 0.2]}],
    }


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open += [tag] if tag not in ("meta", "img") else []
        self.links += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data
            if self.open[-1] == "td":
                self.cells.append(data)


def test_all_files_are_there_and_nothing_else(tmp_path):
    page = report.write_report(tmp_path / "new" / "folder", example())
    assert {path.name for path in page.parent.iterdir()} == FILES and page.name == "index.html"
    assert json.loads((page.parent / "report.json").read_text()) == example()


def test_the_page_needs_nothing_but_itself(tmp_path):
    path = report.write_report(tmp_path, example())
    page = Page(path.read_text())
    assert page.open == [] and len(page.links) == 2
    for link, name in zip(page.links, ("accuracy_vs_macs.png", "units_per_layer.png")):
        kind, _, content = link.partition(";base64,")
        assert kind == "data:image/png" and base64.b64decode(content) == (tmp_path / name).read_bytes()
    assert not re.search(r"https?://|@import|url\(", path.read_text())
    assert page.text["pre"] == example()["recipe"] and page.text["h1"] == example()["title"]
    assert {"subnet 3", "600 k", "60.0 %", "63.0 %", "80.00 %", "70.00 %"} <= set(page.cells)


@pytest.mark.parametrize(("levels", "layers"), [(1, 1), (4, 3), (2, 45)])
def test_pictures_are_pictures(tmp_path, levels, layers):
    report.write_report(tmp_path, example(levels, layers))
    for name in ("accuracy_vs_macs.png", "units_per_layer.png"):
        pixels = matplotlib.image.imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 150 and pixels[..., :3].std() > 0.02


def test_bars_hold_every_units_share():
    data = example(levels=3, layers=2)
    data["layers"] = [
        {"name": "a", "units_per_level": [2, 3, 5, 10]},
        {"name": "b", "units_per_level": [7, 0, 0]},  # without the entry for spare units
    ]
    axes = report.draw_units(data).axes[0]
    shares = [[bar.get_width() for bar in level] for level in axes.containers]
    np.testing.assert_allclose(np.array(shares).T, [[10, 15, 25, 50], [100, 0, 0, 0]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_the_curve_holds_every_subnet():
    lines = {line.get_label(): line.get_xydata() for line in report.draw_accuracy(example()).axes[0].lines}
    np.testing.assert_allclose(lines["subnets"], [[20, 60], [40, 70], [60, 80]])
    np.testing.assert_allclose(lines["subnets before retraining"], [[20, 50], [40, 60], [60, 70]])
    np.testing.assert_allclose(lines["original"], [[100, 90]])


def test_early_exit_is_in_the_picture_on_the_page_and_in_the_terminal(tmp_path):
    points = [
        {"threshold": 0.0, "macs": 200_000.0, "accuracy": 0.6, "subnets": [1.0, 0.0, 0.0]},
        {"threshold": 0.83, "macs": 310_000.0, "accuracy": 0.78, "subnets": [0.6, 0.25, 0.15]},
    ]
    data = example() | {"early_exit": {"rule": "max_prob", "thresholds_from": "the <val> split", "points": points}}
    lines = {str(line.get_label()): line.get_xydata() for line in report.draw_accuracy(data).axes[0].lines}
    [curve] = [xy for label, xy in lines.items() if label.startswith("early exit")]
    np.testing.assert_allclose(curve, [[20, 60], [31, 78]])
    console = Console(file=io.StringIO(), width=120)
    console.print(report.exit_table(data))
    page = report.write_report(tmp_path, data).read_text()
    for text in ("0.8300", "310 k", "31.0 %", "78.00 %", "60 / 25 / 15"):
        assert text in console.file.getvalue() and text in page
    assert "the &lt;val&gt; split" in page


def test_metrics_and_calibrated_exit_are_on_the_page_and_in_the_terminal(tmp_path):
    labels = torch.arange(60) % 3
    scores = torch.randn(3, 60, 3) + 2 * torch.eye(3)[labels]
    found, names = Predictions(scores, labels), ["cat", "<dog>", "owl"]
    macs = [200_000, 400_000, 600_000]
    choice = choose_exit(found, macs, "recall of <dog> >= 70 %", classes=names, per_class=True)
    judged = judge_exit(choice, found, macs, macs, classes=names)
    original, *subnets = [m.as_dict() for m in metrics_of(Predictions(torch.cat([scores[-1:], scores]), labels), names)]
    metrics = {"pictures": 60, "original": original, "subnets": subnets}
    data = example() | {"metrics": metrics, "calibrated_exit": judged}
    page = report.write_report(tmp_path, data).read_text()
    assert Page(page).open == [] and "<dog>" not in page
    dogs, exits = subnets[0]["classes"][1], judged["metrics"]["classes"][1]
    for entry in (dogs, exits):
        assert f"{entry['found']} ({100 * entry['recall']:.1f} %)" in page
    console = Console(file=io.StringIO(), width=120)
    console.print(report.metrics_table(data), report.calibrated_table(data), report.calibrated_sentence(judged, 1e6))
    for text in (f"{100 * original['balanced_accuracy']:.2f} %", f"{100 * judged['steps'][0]['worse']:.2f} %"):
        assert text in console.file.getvalue() and text in page
    assert "recall of <dog> >= 70 %: met on" in console.file.getvalue().replace("\n", " ")
    lines = {str(line.get_label()): line.get_xydata() for line in report.draw_accuracy(data).axes[0].lines}
    expected = [[judged["macs"] / 1e4, 100 * judged["metrics"]["accuracy"]]]
    np.testing.assert_allclose(lines["early exit, as calibrated"], expected)


def test_tensors_numpy_and_nan_become_json(tmp_path):
    data = example()
    data |= {"levels": torch.tensor([1, 2]), "loss": float("nan"), "time": np.float64(1.5), "path": tmp_path}
    data["original"]["accuracy"] = None
    for row in data["subnets"]:
        row["accuracy_before_retraining"] = None
    report.write_report(tmp_path, data)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert (found["levels"], found["loss"], found["time"], found["path"]) == (
        [1, 2],
        None,
        1.5,
        str(tmp_path),
    )


def test_table_shows_original_and_subnets():
    console = Console(file=io.StringIO(), width=120)
    console.print(report.results_table(example()))
    lines = [line for line in console.file.getvalue().splitlines() if "original" in line or "subnet" in line]
    assert len(lines) == 4
    for expected, line in zip(("1 M", "200 k", "400 k", "600 k"), lines):
        assert expected in line


@pytest.mark.parametrize("key", ["original", "subnets", "layers"])
def test_incomplete_data_are_a_clear_error(tmp_path, key):
    data = example()
    del data[key]
    with pytest.raises(SteppingError, match=key):
        report.write_report(tmp_path, data)
    assert not list(tmp_path.iterdir())


def test_percent_in_place_of_share_is_a_clear_error(tmp_path):
    data = example()
    data["subnets"][0]["accuracy"] = 60.0
    with pytest.raises(SteppingError, match=r"60\.0.*share in \[0, 1\]"):
        report.write_report(tmp_path, data)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_report_whole(tmp_path, monkeypatch, call):
    report.write_report(tmp_path, example(levels=2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(SteppingError, match="No space left on device"):
        report.write_report(tmp_path, example(levels=3))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
