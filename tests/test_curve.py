"""Early-exit curve: what it says about a threshold is what `engine.predict` does with it."""

from __future__ import annotations

import pytest
import torch
from nets import images, make, nested

from stepping_plugin.engine import compile_engine
from stepping_plugin.runs.early_exit import Answers, early_exit_curve
from stepping_plugin.training.predictions import predict_all


def answers(confidence: list[list[float]], correct: list[list[int]]) -> Answers:
    return Answers(torch.tensor(confidence), torch.tensor(correct, dtype=torch.bool))


def random_answers(seed: int, samples: int = 200) -> Answers:
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(3, samples, generator=generator)
    return Answers(confidence, torch.rand(3, samples, generator=generator) < confidence)


def test_a_point_is_what_predict_does_with_its_threshold():
    engine = compile_engine(nested(make("test_resnet"), seed=3).eval())
    x, labels = images(engine.image_size, 24), torch.arange(24) % 3
    batches = [(x[:10], labels[:10]), (x[10:], labels[10:])]
    found = Answers.of(predict_all(lambda images: torch.stack(list(engine.steps(images))), batches))
    for row in early_exit_curve(found, found, engine.macs, points=4):
        threshold = min(1.0, row["threshold"] * (1 - 1e-9))  # batches of another size round otherwise
        prediction = engine.predict(x, until={"max_prob": threshold})
        assert prediction.macs.double().mean().item() == pytest.approx(row["macs"])
        assert (prediction.logits.argmax(-1) == labels).double().mean().item() == pytest.approx(row["accuracy"])
        assert (torch.bincount(prediction.subnet, minlength=5)[1:] / 24).tolist() == pytest.approx(row["subnets"])


def brute_force(held_out: Answers, aim: float, macs: list[int]) -> float:
    """The largest confidence seen, or 0, whose average MACs are within the aim."""
    best = 0.0
    for threshold in held_out.confidence[:-1].flatten().tolist():
        total = 0
        for sample in held_out.confidence.t().tolist():
            stop = next((i for i, value in enumerate(sample[:-1]) if value >= threshold), len(macs) - 1)
            total += macs[stop]
        if total / held_out.confidence.shape[1] <= aim:
            best = max(best, threshold)
    return best


def test_thresholds_are_the_largest_that_the_average_allows():
    held_out, test, macs = random_answers(0, 40), random_answers(1), [10, 30, 70]
    rows = early_exit_curve(held_out, test, macs, points=5)
    assert [row["threshold"] for row in rows] == [brute_force(held_out, aim, macs) for aim in (10, 25, 40, 55, 70)]


def test_the_ends_are_the_first_and_the_last_subnet():
    held_out, macs = random_answers(2), [10, 30, 70]
    first, *_, last = early_exit_curve(held_out, held_out, macs)
    assert first["macs"] == 10 and first["subnets"] == [1, 0, 0]
    assert first["accuracy"] == pytest.approx(held_out.correct[0].double().mean().item())
    assert last["macs"] == pytest.approx(70, rel=0.02)
    assert sum(last["subnets"]) == pytest.approx(1)


def test_sure_samples_stop_early_and_the_others_win():
    """Subnet 1 is right where it is sure: the middle of the curve beats the mean of its ends."""
    found = answers([[0.9, 0.9, 0.2, 0.3], [1.0, 1.0, 1.0, 1.0]], [[1, 1, 0, 0], [1, 1, 1, 1]])
    first, middle, last = early_exit_curve(found, found, [10, 30], points=3)
    assert (first["accuracy"], middle["accuracy"], last["accuracy"]) == (0.5, 1.0, 1.0)
    assert middle["macs"] == 20
