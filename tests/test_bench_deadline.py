"""The deadline bench: what it counts. Whether answers are in time is for the command to say."""

from __future__ import annotations

import pytest
import torch
from nets import make, nested
from rich.console import Console

from stepping_plugin.engine import Prediction, compile_engine
from stepping_plugin.errors import SteppingError
from stepping_plugin.studies.bench.deadline import _judged, bench_deadlines, deadline_table


def answer(deadline: float, subnet: int, seconds: float) -> tuple[float, Prediction]:
    subnets = torch.tensor([subnet])
    return deadline, Prediction(torch.zeros(1, 3), subnets, subnets, seconds, seconds <= deadline)


def test_late_answers_are_told_apart():
    found = _judged([answer(1, 3, 0.5), answer(1, 1, 1.5), answer(2, 2, 2.1), answer(4, 4, 4.0)], 4)
    assert (found["in_time"], found["late_in_subnet_1"], found["late_in_a_step"]) == (2, 1, 1)
    assert found["late_by_ms"] == pytest.approx({"median": 300.0, "largest": 500.0})
    assert found["late_by_share"] == pytest.approx(0.5)
    assert found["subnets"] == [1, 1, 1, 1] and found["unused_share"] == pytest.approx(0.125)


def test_every_request_is_counted_and_shown():
    engine = compile_engine(nested(make("test_resnet"), seed=3).eval())
    row = bench_deadlines(engine, 12, load=1)
    assert row["in_time"] + row["late_in_subnet_1"] + row["late_in_a_step"] == 12 == sum(row["subnets"])
    console = Console(record=True, width=120)
    console.print(deadline_table([{"model": "tiny", **row}]))
    text = console.export_text()
    assert "tiny" in text and str(row["in_time"]) in text


def test_no_requests_is_an_error():
    with pytest.raises(SteppingError, match="requests"):
        bench_deadlines(compile_engine(nested(make("test_resnet"), seed=3).eval()), 0)
