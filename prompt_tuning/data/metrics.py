# SPDX-License-Identifier: Apache-2.0
"""Metrics and the postprocessing that goes with them.

Percentages, as those of T5's own tasks are.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.data import sql_metrics, text_metrics
from prompt_tuning.errors import UserError

Metric = Callable[..., Mapping[str, float]]
# What stands for an answer that is no number, as in T5's STS-B.
NO_NUMBER = -1.0


def accuracy(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Percentage of predictions that equal their target.

    >>> accuracy(["a", "b"], ["a", "a"])
    {'accuracy': 50.0}
    """
    return {
        "accuracy": 100.0
        * float(np.mean([t == p for t, p in _pairs(targets, predictions)]))
    }


def macro_f1(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """F1 of every label that occurs among the targets, averaged, in percent.

    >>> macro_f1(["a", "b"], ["a", "b"])
    {'macro_f1': 100.0}
    """
    occurring = list(dict.fromkeys(targets))
    score = _sklearn().f1_score(
        targets, predictions, labels=occurring, average="macro", zero_division=0
    )
    return {"macro_f1": 100.0 * float(score)}


def f1(
    targets: Sequence, predictions: Sequence, *, positive: str | None = None
) -> dict[str, float]:
    """F1 of the label ``positive``, in percent; 0 where it is never answered.

    >>> f1(["a", "b"], ["b", "b"], positive="b")["f1"].__round__(1)
    66.7
    """
    of_one = [[text == positive for text in texts] for texts in (targets, predictions)]
    score = _sklearn().f1_score(*of_one, zero_division=0)
    return {"f1": 100.0 * float(score)}


def matthews(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Matthews' correlation of targets and predictions, from -100 to 100.

    >>> matthews(["a", "b", "a"], ["a", "b", "a"])
    {'matthews': 100.0}
    """
    score = _sklearn().matthews_corrcoef(list(targets), list(predictions))
    return {"matthews": 100.0 * float(score)}


def balanced_accuracy(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Mean over the labels among the targets of the share that is found, in percent.

    >>> balanced_accuracy(["a", "a", "a", "b"], ["a", "a", "a", "a"])
    {'balanced_accuracy': 50.0}
    """
    occurring = list(dict.fromkeys(targets))
    score = _sklearn().recall_score(
        targets, predictions, labels=occurring, average="macro", zero_division=0
    )
    return {"balanced_accuracy": 100.0 * float(score)}


def pearson(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Correlation of numbers, from -100 to 100; 0 where one side is constant.

    An answer that is no number counts as -1, as in T5's STS-B.

    >>> pearson(["1", "2", "3"], ["10", "20", "30"])["pearson"].__round__(6)
    100.0
    """
    return {"pearson": _correlation("pearsonr", targets, predictions)}


def spearman(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Correlation of ranks, otherwise as `pearson`.

    >>> spearman(["1", "2", "3"], ["1", "2", "30"])["spearman"].__round__(6)
    100.0
    """
    return {"spearman": _correlation("spearmanr", targets, predictions)}


def _correlation(name: str, targets: Sequence, predictions: Sequence) -> float:
    from scipy import stats

    sides = np.array(
        [[number(x, NO_NUMBER) for x in texts] for texts in (targets, predictions)],
        np.float64,
    )
    if any(min(side) == max(side) for side in sides):
        return 0.0
    return 100.0 * float(getattr(stats, name)(*sides).statistic)


def number(text: Any, default: float | None = None) -> float | None:
    """A text as a finite number, or ``default``.

    >>> number("4.2"), number("nan"), number("two", -1.0)
    (4.2, None, -1.0)
    """
    try:
        found = float(text)
    except ValueError:
        return default
    return found if math.isfinite(found) else default


def _sklearn() -> Any:
    # Imported late: it takes a second, which most commands do not want.
    from sklearn import metrics

    return metrics


def _pairs(targets: Sequence, predictions: Sequence) -> list[tuple]:
    return list(zip(targets, predictions, strict=True))


# Metrics of one of a few answers, of numbers, and of free text.
_OF_LABELS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "f1": f1,
    "matthews": matthews,
    "balanced_accuracy": balanced_accuracy,
}
_OF_NUMBERS: Mapping[str, Metric] = {"pearson": pearson, "spearman": spearman}
_OF_TEXT = {**text_metrics.METRICS, **sql_metrics.METRICS}
METRICS: Mapping[str, Metric] = {**_OF_LABELS, **_OF_NUMBERS, **_OF_TEXT}
# Figures that are all or nothing for a single answer.
_SAYS_RIGHT = (
    "accuracy",
    "em",
    "math_accuracy",
    "sql_exact_match",
    sql_metrics.EXECUTION,
)


def by_name(names: Sequence[Any], labels: Sequence[str] | None = None) -> list[Metric]:
    """Metric functions by their names in `METRICS`.

    Args:
      names: of the metrics; ``sql_execution`` is followed by a colon and the path of
        its database, and a function stands for itself.
      labels: the task's; ``f1`` is that of the second of two, as GLUE has it.

    Raises:
      UserError: no metric has the name, it is not for these labels, or what it needs is
        missing.
    """
    if isinstance(names, str):
        raise UserError(f"METRICS={names!r} is one text: give a list, ('{names}',)")
    return [_named(name, labels) for name in dict.fromkeys(names)]


def _named(name: Any, labels: Sequence[str] | None) -> Metric:
    if callable(name):
        given: Any = name
        return given
    kind, _, of = str(name).partition(":")
    if kind not in METRICS or (of and kind != sql_metrics.EXECUTION):
        raise UserError(
            f"no metric is called {name!r}: choose from {', '.join(METRICS)}"
        )
    if kind == "f1":
        if labels is None or len(labels) != 2:
            raise UserError(
                "the metric f1 is that of the second of two labels (LABEL_NAMES): take "
                "macro_f1, or squad for the F1 of words"
            )
        return functools.partial(f1, positive=labels[1])
    if kind in _OF_TEXT and labels is not None:
        raise UserError(
            f"the metric {kind} compares free texts, and the answers here are one of "
            f"{len(labels)} labels: take accuracy, macro_f1 or another of labels"
        )
    if kind in _OF_NUMBERS:
        check_targets([kind], labels or (), "LABEL_NAMES")
    text_metrics.check_installed(kind)
    if kind == sql_metrics.EXECUTION:
        return functools.partial(sql_metrics.sql_execution, database=of)
    return METRICS[kind]


def check_targets(names: Sequence[Any], targets: Iterable[str], where: str) -> None:
    """Refuses targets that a metric cannot compare.

    Raises:
      UserError: a metric of numbers has a target that is none.
    """
    found = [x for x in names if isinstance(x, str) and x in _OF_NUMBERS]
    wrong = next((x for x in targets if number(x) is None), None) if found else None
    if wrong is not None:
        raise UserError(
            f"{where}: the metric {found[0]} is of numbers, and {str(wrong)[:80]!r} is "
            "none: take another metric"
        )


def right(
    metrics: Sequence[Metric], targets: Sequence[Any], predictions: Sequence[Any]
) -> list[bool] | None:
    """Whether each answer is right, by the first metric that says it of a single one.

    >>> right([accuracy], ["a", "b"], ["a", "a"])
    [True, False]

    Args:
      metrics: of the task.
      targets: one for each row.
      predictions: likewise.

    Returns:
      None where the metrics grade answers, or see them together alone.
    """
    for metric in metrics:
        said = [
            metric(targets=[target], predictions=[prediction])
            for target, prediction in _pairs(targets[:1], predictions[:1])
        ]
        name = next((n for row in said for n in row if n in _SAYS_RIGHT), None)
        if name is not None:
            for target, prediction in _pairs(targets[1:], predictions[1:]):
                said.append(metric(targets=[target], predictions=[prediction]))
            values = (getattr(row[name], "value", row[name]) for row in said)
            return [float(value) > 0 for value in values]
    return None


def strip(text: str, **unused_kwargs) -> str:
    """A decoded answer without the spaces around it (a postprocess function)."""
    return text.strip()


def raw_target(
    text: str,
    example: Mapping[str, Any] | None = None,
    is_target: bool = False,
    **unused_kwargs,
) -> str:
    """An answer as it was decoded, a target as its file has it, without outer spaces.

    What a vocabulary cannot write is not in what a target's tokens decode to.
    """
    if is_target and example is not None:
        text = np.asarray(example["targets_pretokenized"]).item().decode()
    return text.strip()
