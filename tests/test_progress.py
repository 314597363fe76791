"""Progress: what is shown where, when, how far, and never in the way of what is measured or printed."""

from __future__ import annotations

import io
import os
import re
import sys

import pytest
import torch
from torch import nn

from stepping_plugin import ConstructionConfig, apply_steppingnet
from stepping_plugin.console import progress
from stepping_plugin.console.progress import Stage, as_time, manner, stage, track

LINE = r"{what}: .* so far, {done} of {total} \((\d+)%\)"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when it is told to, and views that are looked at whenever it passes."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress._clock, "add", progress._clock.views.append)
    monkeypatch.setattr(progress._clock, "remove", progress._clock.views.remove)

    def passes(seconds):
        for _ in range(seconds):
            now[0] += 1
            for view in progress._clock.views:
                if view.due <= now[0]:
                    view.show()

    return passes


def test_lines_come_at_growing_pauses_with_the_time_that_is_left(clock, capsys):
    with manner(delay=5), stage("work", total=400) as task:
        for _ in range(200):
            clock(1)
            task.advance(text="epoch 1/2")
    lines = capsys.readouterr().err.splitlines()
    shown = [int(re.match(r"work: .*?(\d+) of 400", line)[1]) for line in lines[:-1]]
    assert shown == [4, 14, 34, 74, 134, 194], "after 5, 15, 35, 75, 135 and 195 seconds"
    left = [re.search(r"about (.*) left", line)[1] for line in lines[:-1]]
    assert left[-1] == as_time(195 / 194 * (400 - 194)) and lines[0].endswith("epoch 1/2")
    assert lines[-1] == "work: done, 3 min 20 s"


def test_what_is_quick_says_nothing(clock, capsys):
    for _ in track(range(4), "work"):
        clock(1)
    assert capsys.readouterr().err == ""


def test_stages_in_each_other_and_broken_ones(clock, capsys):
    with manner(delay=2), pytest.raises(KeyboardInterrupt), stage("outer"):
        for _ in track(range(9), "inner"):
            clock(1)
            if _ == 3:
                raise KeyboardInterrupt
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["outer", "inner"], "no end is told of what has not ended"
    assert not progress._clock.views


@pytest.mark.parametrize("switch", [{"shown": False}, {"lines": False}])
def test_quiet_is_quiet_whatever_is_asked_inside(switch, clock, capsys):
    with manner(**switch), manner(True, delay=0), stage("work"):
        clock(99)
    assert capsys.readouterr().err == ""


def test_the_first_process_speaks(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with stage("work"):
        clock(99)
    assert capsys.readouterr().err == ""


def test_pace_counts_what_this_process_did(clock):
    resumed = Stage("work", 100, 90)
    clock(10)
    assert resumed.seconds_left is None
    resumed.advance(5)
    assert resumed.seconds_left == 10.0


def test_bars_on_a_terminal_go_away_and_leave_what_is_printed(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with stage("outer", 2) as outer:
        for _ in track(range(3), "inner"):
            clock(1)
            outer.text = "half"
        assert progress._Bar.display is not None and progress._Bar.shown == 1
        clock(1)
    assert progress._Bar.display is None and progress._Bar.shown == 0
    assert "outer" in sys.stderr.getvalue() and "inner" in sys.stderr.getvalue()


def test_measurements_get_no_bars(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with manner(bars=False, delay=5), stage("turns", 3):
        clock(6)
        assert progress._Bar.display is None
    assert sys.stderr.getvalue().startswith("turns: 5 s so far, 0 of 3")


def test_the_thread_ends_and_begins_anew():
    for _ in range(2):
        with manner(delay=0), stage("work"):
            thread = progress._clock.thread
            assert thread is not None and thread.daemon
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_begins_anew(capsys):
    with manner(delay=60), stage("work"):
        child = os.fork()
        if child == 0:
            with stage("of the child"):
                os._exit(len(progress._clock.views))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (9e3, "2 h 30 min")]
)
def test_times_for_people(seconds, text):
    assert as_time(seconds) == text


def test_construction_shows_every_part(capsys):
    """In Python too: capture, iterations with the time left, landing, cool-down; nothing where it is switched off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    batches = [(torch.randn(8, 1, 8, 8), torch.arange(8) % 4)] * 2
    config = ConstructionConfig(iterations=3, batches=2, cooldown_iterations=1, lr=0.01)
    example = batches[0][0]

    class Noted(Stage):
        def __init__(self, what, total, done):
            super().__init__(what, total, done)
            seen.append(self)

    seen: list[Stage] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "Stage", Noted)
        apply_steppingnet(
            model, [0.4, 0.8], example_inputs=example, train_loader=batches, config=config, progress=False
        )
    told = [(s.what, s.total, s.done) for s in seen]
    assert capsys.readouterr().err == ""
    assert told[0] == ("capture of Sequential's operators", 2, 2), "in eval and in train mode"
    assert [t for t in told if t[0] in ("construction", "landing on the budgets", "cool-down of the construction")] == [
        ("construction", 6, 6), ("landing on the budgets", 2, 2), ("cool-down of the construction", 2, 2)]  # fmt: skip
    assert seen[[t[0] for t in told].index("construction")].text == "iteration 3/3"
