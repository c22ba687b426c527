# SPDX-License-Identifier: Apache-2.0
"""What a prompt answered, label by label, beside what knowing nothing would give.

A loss that falls and a metric that stands may both be those of a prompt that answers one
label for every row; the counts say so.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any


def summary(
    answers: Sequence[str], targets: Sequence[str], labels: Sequence[str]
) -> dict[str, Any]:
    """Counts of answers and targets, and accuracies in percent.

    >>> found = summary(["a", "a", "a"], ["a", "b", "a"], ["a", "b"])
    >>> found["answers"], found["majority_accuracy"]
    ({'a': 3, 'b': 0}, 66.66666666666667)

    Args:
      answers: one for each row.
      targets: likewise.
      labels: the label set.
    """
    said, wanted = Counter(answers), Counter(targets)
    pairs = zip(answers, targets, strict=True)
    return {
        "answers": {label: said[label] for label in labels},
        "targets": {label: wanted[label] for label in labels},
        "accuracy": 100 * sum(a == t for a, t in pairs) / len(targets),
        "majority_accuracy": 100 * max(wanted.values()) / len(targets),
    }


def warning(found: dict[str, Any]) -> str | None:
    """One line where a `summary` is no better than knowing nothing, else None."""
    given = [label for label, count in found["answers"].items() if count]
    majority = f"{found['majority_accuracy']:.1f} %"
    if len(given) == 1 and sum(1 for n in found["targets"].values() if n) > 1:
        return (
            f"it answers {given[0]!r} for every row, and so has learned nothing: the "
            f"most frequent label alone is right in {majority}; raise LEARNING_RATE or "
            "TRAIN_STEPS"
        )
    if found["accuracy"] <= found["majority_accuracy"] < 100:
        return (
            f"it is right in {found['accuracy']:.1f} % of the rows, the most frequent "
            f"label alone in {majority}: it has learned nothing that counts"
        )
    return None


def line(found: dict[str, Any]) -> str:
    """The counts in a line."""
    said = ", ".join(f"{label} {count}" for label, count in found["answers"].items())
    return f"answers: {said}; majority {found['majority_accuracy']:.1f} %"
