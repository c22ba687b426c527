# SPDX-License-Identifier: Apache-2.0
"""What metrics leave out: how sure they are, and which labels they are made of."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.data import text_metrics
from prompt_tuning.data.metrics import Metric

LEVEL = 0.95
# Bins of the calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
BINS = 10


def intervals(
    metric: Metric,
    targets: Sequence[Any],
    predictions: Sequence[Any],
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of 95 % for each figure of a metric.

    Rows are drawn with replacement; the ends are percentiles of what the metric gives
    for them. chrF, which would take minutes, is resampled by sacrebleu itself.

    >>> from prompt_tuning.data.metrics import accuracy
    >>> low, high = intervals(accuracy, ["a", "b"] * 50, ["a"] * 100)["accuracy"]
    >>> round(low), round(high)
    (40, 60)

    Args:
      metric: a function of targets and predictions.
      targets: one for each row.
      predictions: likewise.
      samples: how often rows are drawn.
      seed: of the drawing.
    """
    if metric is text_metrics.chrf:
        return {"chrf": text_metrics.chrf_interval(targets, predictions, samples)}
    random = np.random.default_rng(seed)
    found = collections.defaultdict(list)
    for _ in range(samples):
        rows = random.integers(len(targets), size=len(targets)).tolist()
        drawn = metric(
            targets=[targets[i] for i in rows],
            predictions=[predictions[i] for i in rows],
        )
        for name, value in drawn.items():
            found[name].append(float(getattr(value, "value", value)))
    tail = 100 * (1 - LEVEL) / 2
    ends = {
        name: np.percentile(all_, (tail, 100 - tail)) for name, all_ in found.items()
    }
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def of_labels(
    answers: Sequence[str], targets: Sequence[str], labels: Sequence[str]
) -> dict[str, Any]:
    """Statistics of each label, and which are taken for which.

    Args:
      answers: one for each row; one that is no label is illegal.
      targets: likewise.
      labels: the label set.

    Returns:
      ``labels``, of each its precision, recall and F1 in percent, the rows that have it
      as target and those that have it as answer; ``illegal_answers``, their number;
      ``confusion``, target -> answer -> rows, illegal answers under ``''``.
    """
    from sklearn.metrics import precision_recall_fscore_support

    scores = precision_recall_fscore_support(
        list(targets),
        list(answers),
        labels=list(labels),
        zero_division=0,  # pyright: ignore[reportArgumentType]
    )
    said = collections.Counter(answers)
    each = {
        label: {
            "precision": 100 * float(precision),
            "recall": 100 * float(recall),
            "f1": 100 * float(f1),
            "targets": int(support),
            "answers": said[label],
        }
        for label, precision, recall, f1, support in zip(labels, *scores, strict=True)  # pyright: ignore[reportArgumentType]
    }
    known = set(labels)
    pairs = collections.Counter(
        (target, answer if answer in known else "")
        for target, answer in zip(targets, answers, strict=True)
    )
    illegal = len(answers) - sum(said[label] for label in known)
    columns = [*labels, *([""] if illegal else [])]
    return {
        "labels": each,
        "illegal_answers": illegal,
        "confusion": {
            target: {answer: pairs[target, answer] for answer in columns}
            for target in labels
        },
    }


def calibration_error(
    probabilities: Sequence[Mapping[str, float]], targets: Sequence[str]
) -> float:
    """Expected calibration error, in percent.

    Rows fall into ten bins of equal width by the probability of their answer; the error
    is the mean over rows of how far their bin's mean probability is from the share of
    right answers in it.

    >>> calibration_error([{"a": 0.75, "b": 0.25}] * 4, ["a", "a", "b", "b"])
    25.0

    Args:
      probabilities: of each row, those of the labels.
      targets: the right labels.
    """
    best = [max(row, key=row.__getitem__) for row in probabilities]
    sure = np.array([row[label] for row, label in zip(probabilities, best)])
    right = np.array(
        [label == target for label, target in zip(best, targets, strict=True)]
    )
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [
        abs(sure[bins == i].mean() - right[bins == i].mean()) * np.mean(bins == i)
        for i in np.unique(bins)
    ]
    return 100 * float(sum(gaps))
