# SPDX-License-Identifier: Apache-2.0
"""The linter says what is wrong with labels and rows, and nothing of what is right."""

import pytest

from prompt_tuning.data import lint
from prompt_tuning.data.lint import FAULT, WARNING, Row

LABELS = ("bad", "good")
LENGTHS = {"inputs": 4, "targets": 2}


class Letters:
    """A vocabulary of lower-case letters; others are unknown (2), EOS is 1."""

    eos_id, unk_id = 1, 2

    def encode(self, s):
        return [ord(x) if x.islower() else self.unk_id for x in s.strip()]

    def decode(self, ids):
        return "".join(chr(i) if i > 2 else "?" for i in ids)


def rows(*pairs):
    """Rows of one token for each character, EOS aside."""
    return [Row(text, target, len(text), 1) for text, target in pairs]


def found(findings):
    return [(each.level, each.text) for each in findings]


def test_right_rows_are_let_alone():
    splits = {
        "train": rows(("a", "bad"), ("b", "good"), ("c", "good")),
        "validation": rows(("d", "bad")),
    }
    assert found(lint.of_rows(splits, LABELS, LENGTHS)) == []
    assert found(lint.of_rows(splits)) == []
    assert found(lint.of_labels(LABELS, Letters(), {"targets": 5})) == []
    assert found(lint.of_labels(None, Letters(), {"targets": 1})) == []


@pytest.mark.parametrize(
    ("labels", "length", "said"),
    [
        (("bad", "B"), 9, "label 'B'"),
        (("bad", "good"), 4, "the longest label has 5 tokens"),
    ],
)
def test_labels_that_cannot_be_written(labels, length, said):
    findings = list(lint.of_labels(labels, Letters(), {"targets": length}))
    assert findings and {each.level for each in findings} == {FAULT}
    assert said in findings[0].text


def test_a_row_of_one_split_in_another():
    """It is a fault where it is trained on, else a warning."""
    splits = {
        "train": rows(("a", "x"), ("b", "y")),
        "validation": rows(("a", "x"), ("c", "x"), ("d", "x")),
        "test": rows(("c", "x")),
    }
    assert found(lint.of_rows(splits)) == [
        (FAULT, "1 of 3 different inputs of validation are in train, too, such as 'a'"),
        (
            WARNING,
            "1 of 1 different inputs of test are in validation, too, such as 'c'",
        ),
    ]


def test_what_one_split_holds():
    train = [
        *rows(("a", "x"), ("a", "x"), ("b", "x"), ("b", "y"), (" ", "x"), ("c", "")),
        Row("abcde", "x", 5, 3),
    ]
    assert found(lint.of_rows({"train": train}, lengths=LENGTHS)) == [
        (
            FAULT,
            (
                "1 targets of train are longer than 2 tokens, the longest has 3: raise "
                "TASK_FEATURE_LENGTHS['targets']"
            ),
        ),
        (
            WARNING,
            (
                "1 inputs of train lose their end: they are longer than 4 tokens (the "
                "longest has 5)"
            ),
        ),
        (FAULT, "1 inputs of train are empty"),
        (FAULT, "1 targets of train are empty"),
        (WARNING, "1 inputs of train have more than one target, such as 'b'"),
        (WARNING, "1 rows of train are there before already"),
    ]


def test_answers():
    """None of the labels; withheld; a label that train lacks, or has seldom."""
    splits = {
        "train": rows(*((f"{i}", "good") for i in range(150)), ("a", "bad")),
        "validation": rows(("c", "meh"), ("d", "good")),
        "test": rows(("e", "<unk>")),
    }
    assert found(lint.of_rows(splits, LABELS)) == [
        (WARNING, "0.7% of train have the label 'bad'"),
        (WARNING, "99.3% of train have the label 'good'"),
        (FAULT, "1 targets of validation are none of the labels, such as 'meh'"),
        (WARNING, "1 targets of test are withheld: no metric"),
    ]
    only = {"train": rows(("a", "bad"))}
    assert (FAULT, "no row of train has the label 'good'") in found(
        lint.of_rows(only, LABELS)
    )


def test_a_split_without_rows():
    splits = {"train": [], "validation": rows(("a", "bad"))}
    assert found(lint.of_rows(splits, LABELS)) == [(FAULT, "train has no rows")]
