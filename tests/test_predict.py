"""Early exit and deadlines."""

import pytest
import torch
from engine_nets import TOLERANCE
from engine_nets import small as small  # a fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import relative

from stepping_plugin.engine import engine as engine_module
from stepping_plugin.engine import entropy, margin, max_probability
from stepping_plugin.errors import SteppingError
from stepping_plugin.runtimes.clock import PATIENCE, StepClock


def test_predict_without_a_rule_runs_all_subnets(small):
    _, engine, x, expected = small
    result = engine.predict(x)
    assert relative(result.logits, expected[3]) < TOLERANCE
    assert result.subnet.tolist() == [4] * 8 and result.macs.tolist() == [engine.macs[3]] * 8
    assert torch.equal(result.classes, expected[3].argmax(-1)) and result.in_time


@pytest.mark.parametrize("kind", ["max_prob", "margin", "entropy", "own"])
def test_every_sample_stops_by_the_rule(small, kind):
    """Against the rule applied to the scores of all subnets at once."""
    _, engine, x, expected = small
    probabilities = expected.softmax(-1)
    best = probabilities.topk(2, -1).values
    measure = {
        "max_prob": best[..., 0],
        "margin": best[..., 0] - best[..., 1],
        "entropy": (probabilities * probabilities.log()).sum(-1),
        "own": expected[..., 0],
    }[kind]
    threshold = float(measure[0].quantile(0.5))
    until = {
        "max_prob": max_probability(threshold) if kind == "max_prob" else None,
        "margin": {"margin": threshold},
        "entropy": entropy(-threshold) if kind == "entropy" else None,
        "own": lambda scores: scores[:, 0] >= threshold,
    }[kind]
    result = engine.predict(x, until=until)
    stops = measure >= threshold
    stops[3] = True
    wanted = stops.long().argmax(0)
    assert result.subnet.tolist() == (wanted + 1).tolist()
    assert len(set(result.subnet.tolist())) > 1
    for k in range(8):
        assert relative(result.logits[k], expected[wanted[k], k]) < TOLERANCE
        assert int(result.macs[k]) == engine.macs[int(wanted[k])]


@pytest.mark.parametrize(
    "until",
    [
        {},
        {"max_prop": 0.5},
        {"max_prob": 1.5},
        {"entropy": -1},
        {"margin": "high"},
        0.5,
        lambda s: s,
        lambda s: s[0, 0] > 0,
        lambda s: True,
    ],
)
def test_wrong_rules(small, until):
    with pytest.raises(SteppingError):
        small[1].predict(small[2], until=until)


def test_rules_check_their_thresholds():
    for rule in (max_probability, margin):
        with pytest.raises(SteppingError, match="from 0 to 1"):
            rule(2)


def test_deadline_decides_by_measured_times(small, monkeypatch):
    """Times are made up, so the answer is known: steps of 10 s do not fit into 5 s, steps of 1 ms do."""
    _, engine, x, expected = small
    for seconds, subnet in ((10.0, 1), (1e-3, 4)):
        monkeypatch.setattr(engine.clock, "estimate", lambda level, size, last, t=seconds: t)
        result = engine.predict(x, deadline=5.0)
        assert result.subnet.tolist() == [subnet] * 8
        assert relative(result.logits, expected[subnet - 1]) < TOLERANCE
    monkeypatch.undo()
    late = engine.predict(x, deadline=0.0)
    assert late.subnet.tolist() == [1] * 8 and not late.in_time
    for wrong in ("soon", float("nan"), True):
        with pytest.raises(SteppingError, match="deadline"):
            engine.predict(x, deadline=wrong)


def test_clock_estimates():
    clock = StepClock([100, 200])
    clock.record(1, 2, 1.0)
    assert clock.estimate(2, 2, last=1) >= 2.0  # never measured: by its MACs
    for seconds in (1.0, 1.1, 5.0, 1.0):
        clock.record(2, 2, seconds)
    assert clock.estimate(2, 2) == 5.0  # nearly the slowest
    assert clock.estimate(2, 4) == 10.0  # a larger batch: in proportion
    assert clock.estimate(2, 1) == 5.0  # a smaller one is no slower
    clock.record(1, 2, 3.0)  # three times as slow as usual: so will the next step be
    assert clock.estimate(2, 2, last=1) == pytest.approx(15.0)


FIELDS = ("programs", "macs", "image_size", "dtype", "device", "cache_axes")


def served(clock, times, left):
    """Subnet that a request reaches whose steps take `times` and which has `left` seconds after subnet 1."""
    clock.record(1, 1, times[0])
    for level, seconds in enumerate(times[1:], start=2):
        if not clock.allows(level, 1, left, last=level - 1):
            return level - 1
        clock.record(level, 1, seconds)
        left -= seconds
    return len(times)


PHASES = st.lists(
    st.tuples(st.integers(1, 400), st.lists(st.floats(0.01, 10.0), min_size=3, max_size=3)), min_size=1, max_size=4
)


@settings(max_examples=60)
@given(PHASES, st.floats(0.05, 30.0))
def test_deadlines_cannot_lock_in(phases, left):
    """Whatever happened before, a step that fits runs within 256 requests; one that does not hardly ever does."""
    clock = StepClock([100, 100, 100])
    for requests, times in phases:
        reached = [served(clock, times, left) for _ in range(requests)]
        if times[1] > left:
            assert sum(subnet > 1 for subnet in reached) <= 7 + requests / PATIENCE[1]
    reached = [served(clock, [0.01, left / 3, left / 3], left) for _ in range(2 * PATIENCE[1])]
    assert 3 in reached[: PATIENCE[1] + 1]
    assert reached[reached.index(3) + 24 :] == [3] * (len(reached) - reached.index(3) - 24)


def test_after_slow_passes_a_deadline_recovers(small, monkeypatch):
    """24 slow passes without a deadline, then a fast machine: subnet 4 after 16 requests and not never."""
    _, engine, x, _ = small
    engine, now, slow = engine_module.Engine(**{k: getattr(engine, k) for k in FIELDS}), [0.0], [0.4]
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: now[0])

    def timed(runner):
        def run(*caches):
            now[0] += slow[0]
            return runner(*caches)

        return run

    engine._runners = [timed(runner) for runner in engine._runners]
    for _ in range(24):
        engine.predict(x[:1])
    slow[0] = 0.005
    reached = [int(engine.predict(x[:1], deadline=0.3).subnet) for _ in range(40)]
    assert reached[:16] == [1] * 16 and reached[16:] == [4] * 24
    slow[0] = 0.4
    engine.predict(x[:1])
    slow[0] = 0.005
    engine.calibrate(1)
    assert int(engine.predict(x[:1], deadline=0.03).subnet) == 4
