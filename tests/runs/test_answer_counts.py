# SPDX-License-Identifier: Apache-2.0
"""A prompt that has learned nothing is told from one that has."""

import pytest

from prompt_tuning.runs import answer_counts

LABELS = ["a", "b", "c"]


@pytest.mark.parametrize(
    "answers, targets, says",
    [
        ("aaaa", "aabb", "answers 'a' for every row"),
        ("bbbb", "aaab", "answers 'b' for every row"),
        ("abab", "aaab", "the most frequent label alone in 75.0 %"),
        ("aaab", "aaab", None),
        # Where there is nothing to tell apart, one answer is right.
        ("aaaa", "aaaa", None),
    ],
)
def test_warnings(answers, targets, says):
    found = answer_counts.summary(list(answers), list(targets), LABELS)
    warning = answer_counts.warning(found)
    assert warning is None if says is None else says in warning


def test_counts():
    found = answer_counts.summary(list("abba"), list("abcc"), LABELS, 75.0)
    assert found == {
        "answers": {"a": 2, "b": 2, "c": 0},
        "targets": {"a": 1, "b": 1, "c": 2},
        "accuracy": 50.0,
        "majority_accuracy": 50.0,
        "better_than_majority": False,
        "tf_idf_accuracy": 75.0,
    }
    assert answer_counts.line(found) == (
        "answers: a 2, b 2, c 0; right 50.0 %, majority 50.0 %, "
        "TF-IDF and logistic regression 75.0 %"
    )
    assert "2 / 2 / 0; no better than the majority (50.0 %)" in answer_counts.cell(
        found
    )
    better = answer_counts.summary(list("abcc"), list("abcc"), LABELS)
    assert better["better_than_majority"] and answer_counts.cell(better) == "1 / 1 / 2"
    assert "TF-IDF" not in answer_counts.line(better)
