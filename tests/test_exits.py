"""Calibrated exit: what is chosen against brute force, and `predict` against what was promised."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from nets import images, make, nested
from torch import Tensor

from stepping_plugin import SteppingError
from stepping_plugin.engine import compile_engine
from stepping_plugin.files.calibrated import combined, threshold_table
from stepping_plugin.files.metadata import Metadata
from stepping_plugin.training.exits import choose_exit, fit_temperature, judge_exit, step_changes
from stepping_plugin.training.predictions import Predictions, predict_all
from stepping_plugin.training.targets import FORMS, parse_target
from stepping_plugin.training.thresholds import Bound, Problem, _fitted, exits

MACS = [10, 30, 50, 85]


def answers(pictures: int = 400, classes: int = 5, seed: int = 0, sharpness: float = 2.5) -> Predictions:
    """Subnets that become better, of pictures that are easy or hard."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (pictures,), generator=g)
    hard = torch.rand(pictures, 1, generator=g)
    noise = torch.randn(len(MACS), pictures, classes, generator=g, dtype=torch.float64)
    signal = torch.arange(1.5, 1.5 + len(MACS))[:, None, None] * (1.2 - hard) * F.one_hot(labels, classes)
    return Predictions(sharpness * (noise + 1.5 * signal), labels)


def test_a_temperature_has_the_least_cross_entropy():
    found = answers()
    for scores in found.scores:
        best = fit_temperature(scores, found.labels)
        losses = {t: F.cross_entropy(scores / t, found.labels).item() for t in (0.98 * best, best, 1.02 * best)}
        assert min(losses, key=losses.__getitem__) == best
    assert fit_temperature(100 * torch.eye(5), torch.arange(5)) == pytest.approx(0.05)


def problem(pictures: int = 9, classes: int = 1, seed: int = 0) -> Problem:
    found = answers(pictures, 3, seed)
    confidence, given = found.scores.softmax(-1).max(-1)
    weight = torch.full((pictures,), 1 / pictures, dtype=torch.float64)
    value = weight * (given == found.labels)
    return Problem(confidence, given, weight, value, torch.tensor(MACS).double(), classes)


@pytest.mark.parametrize("seed", range(6))
def test_thresholds_for_few_pictures_against_all_there_are(seed):
    """Not always the best of all (sweeps move one threshold at a time), never beyond the bound, seldom far from it."""
    case = problem(seed=seed)
    rows = [[0.0, *sorted(row.tolist()), 2.0] for row in case.confidence[:-1]]
    outcomes = [case.outcome(torch.tensor(t).view(3, 1).double()) for t in itertools.product(*rows)]
    reachable = max(quality for quality, _ in outcomes)
    for goal in (0.5 * reachable, 0.9 * reachable, reachable):
        quality, cost = case.outcome(_fitted(case, Bound(least_quality=goal)))
        assert quality >= goal - 1e-9
        assert cost <= min(c for q, c in outcomes if q >= goal - 1e-9) * 1.1 + 1e-9
    for most in (20.0, 40.0):
        quality, cost = case.outcome(_fitted(case, Bound(most_cost=most)))
        assert cost <= most + 1e-9
        assert quality >= max(q for q, c in outcomes if c <= most + 1e-9) - 0.12


def by_hand(rule, scores: Tensor) -> tuple[list[int], list[int]]:
    """Exits and answers of a rule, picture by picture."""
    places, given = [], []
    for s in range(scores.shape[1]):
        for i in range(len(MACS)):
            if rule.combine == "product":
                logs = [(j + 1) * scores[j, s].log_softmax(-1) for j in range(i + 1)]
                answer = sum(logs) / sum(range(1, i + 2))
            else:
                answer = scores[i, s]
            share, best = (answer / rule.temperatures[i]).softmax(-1).max(-1)
            if i < len(MACS) - 1:
                row = rule.thresholds[i]
                threshold = row[0] if len(row) == 1 else row[int(best)]
            if i == len(MACS) - 1 or (threshold is not None and float(share) >= threshold):
                places.append(i)
                given.append(int(best))
                break
    return places, given


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("combine", ["last", "product"])
def test_a_target_is_met_and_judged_as_the_rule_says(combine, per_class):
    held_out, test = answers(400, seed=1), answers(200, seed=2)
    choice = choose_exit(held_out, MACS, "accuracy >= 85 %", combine=combine, per_class=per_class)
    assert choice.rule.met and choice.reached >= 0.85 - 1e-9 and "met on held-out" in choice.sentence()
    found = judge_exit(choice, test, MACS, MACS)
    places, given = by_hand(choice.rule, test.scores)
    right = [g == y for g, y in zip(given, test.labels.tolist())]
    assert (found["test"], found["metrics"]["accuracy"]) == pytest.approx((sum(right) / 200,) * 2)
    assert found["macs"] == pytest.approx(sum(MACS[i] for i in places) / 200)
    assert found["subnets"] == pytest.approx([places.count(i) / 200 for i in range(4)])
    assert found["macs"] < 0.9 * MACS[-1] and found["metrics"]["ece"] < 0.08


def test_what_cannot_be_met_says_what_can():
    found = answers()
    perfect = choose_exit(found, MACS, "accuracy >= 100 %")
    best = max(float((s.argmax(-1) == found.labels).double().mean()) for s in found.scores)
    assert not perfect.rule.met and perfect.reached >= best - 1e-9
    assert "cannot be met" in perfect.sentence() and "asked for 100.00 %" in perfect.sentence()
    cheap = choose_exit(found, MACS, "macs <= 5")
    assert not cheap.rule.met and cheap.cost == 10


@pytest.mark.parametrize(
    ("target", "quality"),
    [
        ("balanced accuracy >= 80 %", lambda g, f, o: balanced(g, f.labels)),
        ("recall of d at least 90%", lambda g, f, o: (g == 3)[f.labels == 3].double().mean()),
        ("agreement with subnet 2 >= 70 %", lambda g, f, o: (g == f.scores[1].argmax(-1)).double().mean()),
        ("agreement with the original >= 70 %", lambda g, f, o: (g == o.scores[0].argmax(-1)).double().mean()),
        ("accuracy ≥ 95 % of the original", lambda g, f, o: (g == f.labels).double().mean()),
        ("Accuracy >= 98 % of the largest subnet", lambda g, f, o: (g == f.labels).double().mean()),
    ],
)  # fmt: skip
def test_every_quality_is_what_it_is_called(target, quality):
    held_out, test = answers(300, seed=3), answers(300, seed=4)
    guides = [Predictions(f.scores[-1:] + 1, f.labels) for f in (held_out, test)]
    choice = choose_exit(held_out, MACS, target, original=guides[0], classes="abcde")
    found = judge_exit(choice, test, MACS, MACS, original=guides[1], classes="abcde")
    given = torch.tensor(by_hand(choice.rule, test.scores)[1])
    assert found["test"] == pytest.approx(float(quality(given, test, guides[1])))
    if "of the" in target:
        share = parse_target(target).amount
        assert choice.goal == pytest.approx(
            share * float((held_out.scores[-1].argmax(-1) == held_out.labels).double().mean())
        )


def balanced(given: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([(given == k)[labels == k].double().mean() for k in range(5)]).mean()


def test_forms_can_be_read_and_others_are_refused():
    for form in FORMS:
        assert parse_target(form).text == form
    macs = [parse_target(text) for text in ("macs <= 30 %", "average MACs at most 12.5M", "MACs <= 900")]
    assert [(t.amount, t.is_share) for t in macs] == [(0.3, True), (12.5e6, False), (900, False)]
    for text in ("accuracy", "accuracy >= 120 %", "accuracy >= 0.9", "ms <= 5 %", "f1 >= 3 %", "", "macs >= 3"):
        with pytest.raises(SteppingError):
            parse_target(text)
    found = answers(20)
    for text, words in {
        "accuracy >= 90 % of the original": "not at hand",
        "agreement with subnet 9 >= 90 %": "1 to 4",
        "recall of cat >= 90 %": "no such class",
        "macs <= 30 %": "original's MACs",
    }.items():
        with pytest.raises(SteppingError, match=words):
            choose_exit(found, MACS, text)
    several = Predictions(found.scores, torch.ones(20, 5))
    with pytest.raises(SteppingError, match="one class per picture"):
        choose_exit(several, MACS, "accuracy >= 90 %")


def test_steps_that_make_answers_better_and_worse():
    labels = torch.zeros(4).long()
    scores = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]], [[1, 0], [0, 1], [1, 0], [1, 0]]])
    assert step_changes(scores, labels) == [{"subnet": 2, "better": 0.5, "worse": 0.25}]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_predict_does_what_was_chosen(name):
    net = nested(make(name), seed=3).eval()
    engine = compile_engine(net)
    x = images(engine.image_size, 48)
    found = predict_all(lambda batch: torch.stack(list(engine.steps(batch))), [(x, torch.arange(48) % 3)])
    for combine in ("last", "product"):
        choice = choose_exit(found, engine.macs, f"macs <= {sum(engine.macs) // 4}", combine=combine)
        names = [f"class {k}" for k in range(found.scores.shape[-1])]
        calibrated = dataclasses.replace(engine, metadata=Metadata(exit=choice.rule, classes=names))
        prediction = calibrated.predict(x, until="calibrated")
        places, given = by_hand(choice.rule, found.scores)
        assert prediction.subnet.tolist() == [i + 1 for i in places]
        assert prediction.labels == [f"class {k}" for k in given]
        heat = torch.tensor(choice.rule.temperatures)[places, None]
        share = (combined(found.scores, combine)[places, range(48)] / heat).softmax(-1).amax(-1)
        torch.testing.assert_close(prediction.confidence, share, rtol=1e-4, atol=1e-6)
    with pytest.raises(SteppingError, match="holds no temperatures"):
        engine.predict(x, until="calibrated")
    with pytest.raises(SteppingError, match="'calibrated'"):
        engine.predict(x, until="calibrate")


def test_a_table_of_thresholds():
    table = threshold_table([[0.5], [None, 0.25, 0.75]], 3)
    assert table.tolist() == [[0.5] * 3, [float("inf"), 0.25, 0.75]]
    confidence = torch.tensor([[0.6, 0.4, 0.6], [0.3, 0.3, 0.3], [0.1, 0.1, 0.1]])
    assert exits(confidence, torch.tensor([[0, 1, 2], [1, 1, 0], [0, 0, 0]]), table).tolist() == [0, 1, 0]
