# SPDX-License-Identifier: Apache-2.0
"""What a prompt answered, label by label, beside what knowing nothing would give.

A loss that falls and a metric that stands may both be those of a prompt that answers one
label for every row; the counts say so.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any


def summary(
    answers: Sequence[str],
    targets: Sequence[str],
    labels: Sequence[str],
    tf_idf: float | None = None,
) -> dict[str, Any]:
    """Counts of answers and targets, and accuracies in percent.

    >>> found = summary(["a", "a", "a"], ["a", "b", "a"], ["a", "b"])
    >>> found["answers"], found["majority_accuracy"], found["better_than_majority"]
    ({'a': 3, 'b': 0}, 66.66666666666667, False)

    Args:
      answers: one for each row.
      targets: likewise.
      labels: the label set.
      tf_idf: what `baselines.tf_idf_accuracy` gave, if it was asked.
    """
    said, wanted = Counter(answers), Counter(targets)
    right = sum(a == t for a, t in zip(answers, targets, strict=True))
    most = max(wanted.values())
    return {
        "answers": {label: said[label] for label in labels},
        "targets": {label: wanted[label] for label in labels},
        "accuracy": 100 * right / len(targets),
        "majority_accuracy": 100 * most / len(targets),
        # Where all targets are equal there is nothing to be better at.
        "better_than_majority": right > most or most == len(targets) == right,
        "tf_idf_accuracy": tf_idf,
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
    if not found["better_than_majority"]:
        return (
            f"it is right in {found['accuracy']:.1f} % of the rows, the most frequent "
            f"label alone in {majority}: it has learned nothing that counts"
        )
    return None


def cell(found: dict[str, Any]) -> str:
    """The counts, or that they are those of nothing learned, in a table."""
    counts = " / ".join(map(str, found["answers"].values()))
    if found["better_than_majority"]:
        return counts
    return f"{counts}; no better than the majority ({found['majority_accuracy']:.1f} %)"


def line(found: dict[str, Any]) -> str:
    """The counts in a line."""
    said = ", ".join(f"{label} {count}" for label, count in found["answers"].items())
    known = {
        "majority": found["majority_accuracy"],
        "TF-IDF and logistic regression": found["tf_idf_accuracy"],
    }
    others = [f"{name} {x:.1f} %" for name, x in known.items() if x is not None]
    return f"answers: {said}; right {found['accuracy']:.1f} %, {', '.join(others)}"
