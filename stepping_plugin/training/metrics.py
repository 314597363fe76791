"""Metrics of every subnet, by scikit-learn: a dependency anyway (`digits`), with the definitions that people know.

The expected calibration error, which scikit-learn lacks, is that of Guo et al., https://arxiv.org/abs/1706.04599, with
15 bins of equal width.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn import metrics as sk
from torch import Tensor

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.training.predictions import Predictions

__all__ = ["ClassMetrics", "Metrics", "expected_calibration_error", "metrics_of", "multiclass", "named_classes"]

BINS = 15
MOST_CLASSES = 100  # of a confusion matrix that is kept


@dataclass(frozen=True)
class ClassMetrics:
    """One class against all others. What cannot be said (no such picture) is None.

    Attributes:
        name: of the class.
        pictures: how many show it, and how many of those are `found`.
        precision, recall, f1, auc: shares in [0, 1].
        average_precision: of pictures with any number of labels only.
    """

    name: str
    pictures: int
    found: int
    precision: float
    recall: float | None
    f1: float | None
    auc: float | None
    average_precision: float | None = None


@dataclass(frozen=True)
class Metrics:
    """Of one subnet. Shares in [0, 1]; means over classes are over those that some picture shows.

    Attributes:
        pictures: that were judged.
        accuracy: of the class of largest score; with any number of labels: share of the pictures whose labels are all
            right at a probability of one half.
        balanced_accuracy: mean recall; None with any number of labels.
        precision, recall, f1: mean over classes (macro).
        auc: mean area under the ROC curves of the classes, each against all others; None where there is no other.
        average_precision: mean over classes (mAP), with any number of labels only.
        ece: expected calibration error of the largest probability, or of every label's probability.
        classes: one entry per class.
        confusion: pictures [true class][answer]; None with any number of labels or more than 100 classes.
    """

    pictures: int
    accuracy: float
    balanced_accuracy: float | None
    precision: float
    recall: float
    f1: float
    auc: float | None
    average_precision: float | None
    ece: float
    classes: list[ClassMetrics]
    confusion: list[list[int]] | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return dataclasses.asdict(self)


def metrics_of(found: Predictions, classes: Sequence[str] | None = None) -> list[Metrics]:
    """Metrics of subnets 1..N.

    Args:
        found: what they say.
        classes: names; by default the numbers from 0.
    """
    judge = multilabel if found.multi_label else multiclass
    return [judge(scores, found.labels, classes) for scores in found.scores]


def multiclass(scores: Tensor, labels: Tensor, classes: Sequence[str] | None = None) -> Metrics:
    """Metrics of class scores (S, C), of one class per picture, labels int64 (S,)."""
    names, truth = named_classes(classes, scores.shape[-1]), labels.numpy()
    probabilities = scores.double().softmax(-1).numpy()
    answers, confidence = scores.argmax(-1).numpy(), probabilities.max(-1)
    hot = truth[:, None] == np.arange(len(names))
    per_class = _per_class(hot, answers[:, None] == np.arange(len(names)), probabilities, names)
    shown = [c for c in per_class if c.pictures]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an answer that no picture of the set shows
        balanced = float(sk.balanced_accuracy_score(truth, answers))
    table = sk.confusion_matrix(truth, answers, labels=range(len(names))) if len(names) <= MOST_CLASSES else None
    return Metrics(
        pictures=len(truth),
        accuracy=float(sk.accuracy_score(truth, answers)),
        balanced_accuracy=balanced,
        **_means(shown),
        average_precision=None,
        ece=expected_calibration_error(confidence, answers == truth),
        classes=per_class,
        confusion=None if table is None else table.tolist(),
    )


def multilabel(scores: Tensor, labels: Tensor, classes: Sequence[str] | None = None) -> Metrics:
    """Metrics of class scores (S, C), of any number of classes per picture, labels (S, C) of zeros and ones."""
    names, hot = named_classes(classes, scores.shape[-1]), labels.numpy() > 0
    probabilities = scores.double().sigmoid().numpy()
    answers = scores.numpy() > 0
    per_class = _per_class(hot, answers, probabilities, names, ranked=True)
    shown = [c for c in per_class if c.pictures]
    return Metrics(
        pictures=len(hot),
        accuracy=float((hot == answers).all(-1).mean()),
        balanced_accuracy=None,
        **_means(shown),
        average_precision=_mean([c.average_precision for c in shown]),
        ece=expected_calibration_error(probabilities.ravel(), hot.ravel()),
        classes=per_class,
        confusion=None,
    )


def _per_class(hot: Any, answers: Any, probabilities: Any, names: Sequence[str], ranked: bool = False) -> list[Any]:
    """Every class against all others; arrays (S, C)."""
    precision, recall, f1, pictures = sk.precision_recall_fscore_support(hot, answers, average=None, zero_division=0)
    found, entries = (hot & answers).sum(0), []
    for c, name in enumerate(names):
        shown, both = bool(pictures[c]), 0 < pictures[c] < len(hot)
        entries.append(
            ClassMetrics(
                name=name,
                pictures=int(pictures[c]),
                found=int(found[c]),
                precision=float(precision[c]),
                recall=float(recall[c]) if shown else None,
                f1=float(f1[c]) if shown else None,
                auc=float(sk.roc_auc_score(hot[:, c], probabilities[:, c])) if both else None,
                average_precision=float(sk.average_precision_score(hot[:, c], probabilities[:, c]))
                if ranked and shown
                else None,
            )
        )
    return entries


def _means(shown: Sequence[ClassMetrics]) -> dict[str, Any]:
    return {
        "precision": _mean([c.precision for c in shown]) or 0.0,
        "recall": _mean([c.recall for c in shown]) or 0.0,
        "f1": _mean([c.f1 for c in shown]) or 0.0,
        "auc": _mean([c.auc for c in shown]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def expected_calibration_error(confidence: Any, correct: Any) -> float:
    """Mean over pictures of |accuracy - confidence| of the bin of their confidence; arrays (S,)."""
    edges = np.linspace(0, 1, BINS + 1)[1:-1]
    bins = np.digitize(confidence, edges, right=True)
    gaps = np.bincount(bins, weights=np.asarray(correct, float) - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def named_classes(classes: Sequence[str] | None, count: int) -> list[str]:
    """The names of the classes, as many as there are scores.

    Raises:
        SteppingError: another number of names, or one twice.
    """
    names = [str(k) for k in range(count)] if classes is None else [str(name) for name in classes]
    if len(names) != count or len(set(names)) != count:
        got = f"{len(names)} names, {len(set(names))} different ones"
        raise SteppingError(explain("names of classes do not fit", where="classes", got=got, expected=f"{count}"))
    return names
