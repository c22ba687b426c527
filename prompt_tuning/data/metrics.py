# SPDX-License-Identifier: Apache-2.0
"""Metrics and the postprocessing that goes with them.

Percentages, as those of T5's own tasks are.
"""

from collections.abc import Callable, Mapping, Sequence

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
    pairs = _pairs(targets, predictions)
    scores = []
    for label in dict.fromkeys(targets):
        hits = sum(t == label == p for t, p in pairs)
        named = sum(t == label for t, _ in pairs) + sum(p == label for _, p in pairs)
        scores.append(2 * hits / named)
    return {"macro_f1": 100.0 * float(np.mean(scores))}


def _pairs(targets: Sequence, predictions: Sequence) -> list[tuple]:
    return list(zip(targets, predictions, strict=True))


METRICS: Mapping[str, Metric] = {"accuracy": accuracy, "macro_f1": macro_f1}


def by_name(names: Sequence[str]) -> list[Metric]:
    """Metric functions by their names in `METRICS`.

    Raises:
      UserError: no metric has the name.
    """
    for name in names:
        if name not in METRICS:
            raise UserError(
                f"no metric is called {name!r}: choose from {', '.join(METRICS)}"
            )
    return [METRICS[name] for name in names]


def strip(text: str, **unused_kwargs) -> str:
    """A decoded answer without the spaces around it (a postprocess function)."""
    return text.strip()
