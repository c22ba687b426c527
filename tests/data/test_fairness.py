# SPDX-License-Identifier: Apache-2.0
"""Figures of groups are scikit-learn's; words are exchanged whole and at once."""

import random

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from prompt_tuning.data import fairness
from prompt_tuning.data.word_swaps import Swaps
from prompt_tuning.errors import UserError

LABELS = ["bad", "good"]


def drawn(seed, count=300, choices=LABELS):
    return random.Random(seed).choices(choices, k=count)


def test_figures_are_those_of_sklearn():
    answers, targets, groups = drawn(0), drawn(1), drawn(2, choices=["x", "y", "z"])
    found = fairness.of_groups(answers, targets, groups, "good", samples=0)
    values = {name: [] for name in fairness.FIGURES}
    for group in "xyz":
        own = [i for i, each in enumerate(groups) if each == group]
        said, meant = ([side[i] for i in own] for side in (answers, targets))
        told = found["groups"][group]
        assert told["rows"] == len(own)
        assert told["accuracy"] == pytest.approx(
            100 * sklearn_metrics.accuracy_score(meant, said)
        )
        assert told["true_positive_rate"] == pytest.approx(
            100 * sklearn_metrics.recall_score(meant, said, pos_label="good")
        )
        assert told["positive_rate"] == pytest.approx(
            100 * said.count("good") / len(said)
        )
        for name, each in values.items():
            each.append((told[name], group))
    for name, each in values.items():
        gap = found["gaps"][name]
        assert gap["gap"] == pytest.approx(max(each)[0] - min(each)[0])
        assert (gap["highest"], gap["lowest"]) == (max(each)[1], min(each)[1])
        assert "interval" not in gap


def test_an_interval_tells_a_gap_from_chance():
    """It holds the true difference in 95 % of samples, give or take chance's own."""
    random_ = np.random.default_rng(0)
    held = 0
    for seed in range(50):
        groups = ["x"] * 150 + ["y"] * 150
        right = random_.random(300) < np.repeat([0.8, 0.6], 150)
        answers = np.where(right, "good", "bad").tolist()
        found = fairness.of_groups(answers, ["good"] * 300, groups, "good", 100, seed)
        gap = found["gaps"]["accuracy"]
        low, high = gap["interval"]
        sign = 1 if gap["highest"] == "x" else -1
        held += low <= sign * 20 <= high
        own = found["groups"]["x"]
        ends = own["intervals"]["accuracy"]
        assert ends[0] <= own["accuracy"] <= ends[1]
    # A binomial count of 50 with 0.95 is below in 1 of 1,000 cases.
    assert 42 <= held


def test_equal_groups_are_not_told_apart():
    rows = 100 * ["good", "bad"]
    found = fairness.of_groups(rows, rows, ["x"] * 100 + ["y"] * 100, "good", 200)
    assert found["gaps"]["accuracy"] == {
        "gap": 0,
        "interval": (0, 0),
        "highest": "x",
        "lowest": "y",
    }
    gap = found["gaps"]["positive_rate"]
    low, high = gap["interval"]
    assert gap["gap"] == 0 and low < 0 < high


def test_a_group_without_positive_targets_has_no_true_positive_rate():
    found = fairness.of_groups(
        ["good", "bad"], ["good", "bad"], ["x", "y"], "good", samples=20
    )
    assert found["groups"]["y"]["true_positive_rate"] is None
    assert "true_positive_rate" not in found["groups"]["y"]["intervals"]
    assert found["gaps"]["true_positive_rate"] is None
    assert found["gaps"]["accuracy"]["gap"] == 0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([{"age": 3}], "row 1: GROUP_COLUMN='sex' is no column of it; it has age"),
        ([{"sex": "x"}, {"sex": " "}], "row 2: the group column 'sex' is empty"),
        ([{"sex": "x"}, {"sex": "x"}], "has only the value 'x'.*nothing to compare"),
        ([{"sex": i} for i in range(60)], "has 60 values, more than 50"),
    ],
)
def test_columns_that_are_no_groups(values, says):
    with pytest.raises(UserError, match=f"people.tsv.*{says}"):
        fairness.groups_of(values, "sex", "people.tsv")


def test_groups_are_texts():
    assert fairness.groups_of([{"x": 1}, {"x": " 2"}], "x", "") == ["1", "2"]


@pytest.mark.parametrize(
    ("labels", "positive", "says"),
    [
        (None, None, "answers here are free text"),
        (["a", "b", "c"], None, "POSITIVE_LABEL is not set: choose one of a, b, c"),
        (["a", "b"], "c", "POSITIVE_LABEL is 'c', which is no label"),
    ],
)
def test_what_is_no_positive_label(labels, positive, says):
    with pytest.raises(UserError, match=says):
        fairness.positive_of(labels, positive)


def test_the_positive_label():
    assert fairness.positive_of(["a", "b"], None) == "b"
    assert fairness.positive_of(["a", "b", "c"], "a") == "a"


@pytest.fixture
def swaps(tmp_path):
    path = tmp_path / "pronouns.tsv"
    path.write_text("he\tshe\nhis\ther\nhim\ther\nNew York\tÉvry\nhis own\ther own\n")
    return Swaps.read(path)


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("He saw her; SHE left", "She saw his; HE left"),
        ("the hen said: 'he'", "the hen said: 'she'"),
        ("his own, him", "her own, her"),
        ("from new york to évry, New York", "from évry to new york, Évry"),
        ("nothing here, he_llo", "nothing here, he_llo"),
        ("ﬁne, İ, K and ſhe", "ﬁne, İ, K and he"),
        ("", ""),
    ],
)
def test_words_are_exchanged(swaps, text, swapped):
    assert swaps.apply(text) == swapped


def test_a_word_of_one_letter_is_no_shout():
    assert (
        Swaps({"a": "the", "the": "a"}).apply("A film, THE film") == "The film, A film"
    )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("words.txt", "he she\n", "is no table"),
        ("words.tsv", "he\tHe\n", "line 1: 'he' and 'He' are no two words"),
        ("words.tsv", "he\tshe\nhis\t\n", "line 2: 'his' and '' are no two words"),
        ("words.csv", "he,she,they\n", "line 1: 3 fields instead of the 2"),
        ("words.csv", "", "is empty: write two words a line"),
    ],
)
def test_lists_that_are_none(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        Swaps.read(tmp_path / name)
