"""Metrics against counts by hand, in every shape that labels have."""

from __future__ import annotations

import itertools

import pytest
import torch
from rich.console import Console
from small_nets import loader, small_net
from torch import Tensor

from stepping_plugin import SteppingError
from stepping_plugin.training import predictions
from stepping_plugin.training.evaluation import evaluate
from stepping_plugin.training.metrics import expected_calibration_error, metrics_of, multiclass
from stepping_plugin.training.predictions import Predictions, predict_all, predictions_of
from stepping_plugin.views.metrics import class_rows, metrics_table

S, C = 60, 4


def scores_and_labels(classes: int = C) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, classes, (S,))
    return 2 * torch.randn(S, classes, dtype=torch.float64) + 1.5 * torch.eye(classes)[labels], labels


def area(values: Tensor, positive: Tensor) -> float:
    """AUC as the share of pairs in the right order, ties half."""
    pairs = list(itertools.product(values[positive].tolist(), values[~positive].tolist()))
    return sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)


@pytest.mark.parametrize("classes", [2, C])
def test_one_class_per_picture(classes):
    scores, labels = scores_and_labels(classes)
    answers, shares, found = scores.argmax(-1), scores.softmax(-1), multiclass(scores, labels)
    assert found.accuracy == pytest.approx((answers == labels).double().mean().item())
    recalls, precisions, areas = [], [], []
    for c, entry in enumerate(found.classes):
        own, given = labels == c, answers == c
        hits = int((own & given).sum())
        assert (entry.pictures, entry.found) == (int(own.sum()), hits)
        recalls.append(hits / int(own.sum()))
        precisions.append(hits / max(int(given.sum()), 1))
        areas.append(area(shares[:, c], own))
        f1 = 2 * hits / int(own.sum() + given.sum())
        assert (entry.recall, entry.precision) == pytest.approx((recalls[-1], precisions[-1]))
        assert (entry.f1, entry.auc) == pytest.approx((f1, areas[-1]))
        assert found.confusion[c] == [int((own & (answers == k)).sum()) for k in range(classes)]
    mean = lambda values: sum(values) / classes  # noqa: E731
    assert (found.balanced_accuracy, found.recall) == pytest.approx((mean(recalls), mean(recalls)))
    assert (found.precision, found.auc) == pytest.approx((mean(precisions), mean(areas)))


def test_a_class_without_pictures_is_in_no_mean():
    scores, labels = scores_and_labels()
    few = labels.clamp(max=C - 2)
    found = multiclass(scores, few, ["a", "b", "c", "never"])
    last = found.classes[-1]
    assert (last.name, last.pictures, last.recall, last.f1, last.auc) == ("never", 0, None, None, None)
    assert found.recall == pytest.approx(found.balanced_accuracy)
    assert found.recall == pytest.approx(sum(c.recall for c in found.classes[:3]) / 3)
    alone = multiclass(scores, torch.zeros(S).long())
    assert alone.auc is None and alone.recall == alone.accuracy


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.05, 0.32, 0.34, 0.97, 0.99, 1.0]).double().numpy()
    correct = torch.tensor([0, 1, 0, 1, 1, 0]).bool().numpy()
    # bins of one fifteenth: {0.05}, {0.32}, {0.34}, {0.97, 0.99, 1.0}
    expected = (0.05 + 0.68 + 0.34 + abs(2 - 2.96)) / 6
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected)


def average_precision(values: Tensor, positive: Tensor) -> float:
    """Mean over the positives of the precision down to them (values differ)."""
    ranked = positive[values.argsort(descending=True)]
    hits = ranked.cumsum(0)[ranked]
    return float((hits / (ranked.nonzero().flatten() + 1)).mean())


def test_any_number_of_labels_per_picture():
    labels = (torch.rand(S, C) > 0.6).float()
    scores = 2 * torch.randn(2, S, C, dtype=torch.float64) + labels
    for subnet, found in zip(scores, metrics_of(Predictions(scores, labels), "pqrs")):
        right = (subnet > 0) == (labels > 0)
        assert found.accuracy == pytest.approx(right.all(1).double().mean().item())
        expected = [average_precision(subnet[:, c], labels[:, c] > 0) for c in range(C)]
        assert [c.average_precision for c in found.classes] == pytest.approx(expected)
        assert found.average_precision == pytest.approx(sum(expected) / C)
        assert found.balanced_accuracy is None and found.confusion is None
        assert [c.auc for c in found.classes] == pytest.approx([area(subnet[:, c], labels[:, c] > 0) for c in range(C)])


def test_a_net_evaluates_itself(monkeypatch):
    net, batches = small_net(), loader(5, 32)
    found, plain = net.evaluate(batches, ["a", "b", "c", "d"]), evaluate(net, batches)
    assert [m.accuracy for m in found] == pytest.approx(plain["accuracy"])
    console = Console(width=120, record=True)
    console.print(metrics_table(found))
    assert f"{100 * found[0].accuracy:.2f} %" in console.export_text()
    assert len(class_rows([m.as_dict() for m in found])) == 4
    whole = predictions_of(net, batches)
    monkeypatch.setattr(predictions, "LARGEST", 3 * 5 * 4 * len(batches) // 3)  # a third of the scores fits
    part = predictions_of(net, batches)
    assert part.every == 3
    assert torch.equal(part.labels, whole.labels[::3]) and torch.equal(part.scores, whole.scores[:, ::3])


def test_mistakes_are_named():
    scores, labels = scores_and_labels()
    with pytest.raises(SteppingError, match="no pictures"):
        predict_all(lambda x: x, [])
    with pytest.raises(SteppingError, match="no numbers"):
        predict_all(lambda x: x[None] / 0, [(scores, labels)])
    with pytest.raises(SteppingError, match="0 and 1"):
        predict_all(lambda x: x[None], [(scores, torch.rand(S, C))])
    with pytest.raises(SteppingError, match="2 names, 2 different"):
        multiclass(scores, labels, ["a", "b"])
