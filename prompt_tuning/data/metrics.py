# SPDX-License-Identifier: Apache-2.0
"""Metrics and the postprocessing that goes with them.

Percentages, as those of T5's own tasks are.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.errors import UserError

Metric = Callable[..., Mapping[str, float]]


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


def _sklearn() -> Any:
    # Imported late: it takes a second, which most commands do not want.
    from sklearn import metrics

    return metrics


def _pairs(targets: Sequence, predictions: Sequence) -> list[tuple]:
    return list(zip(targets, predictions, strict=True))


METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "f1": f1,
    "matthews": matthews,
    "balanced_accuracy": balanced_accuracy,
}


def by_name(names: Sequence[str], labels: Sequence[str] | None = None) -> list[Metric]:
    """Metric functions by their names in `METRICS`.

    Args:
      names: of the metrics.
      labels: the task's; ``f1`` is that of the second of two, as GLUE has it.

    Raises:
      UserError: no metric has the name, or it is not for these labels.
    """
    if isinstance(names, str):
        raise UserError(f"METRICS={names!r} is one text: give a list, ('{names}',)")
    for name in names:
        if name not in METRICS:
            raise UserError(
                f"no metric is called {name!r}: choose from {', '.join(METRICS)}"
            )
    found = dict(zip(names, [METRICS[name] for name in names], strict=True))
    if "f1" in found:
        if labels is None or len(labels) != 2:
            raise UserError(
                "the metric f1 is that of the second of two labels (LABEL_NAMES): take "
                "macro_f1"
            )
        found["f1"] = functools.partial(f1, positive=labels[1])
    return list(found.values())


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
