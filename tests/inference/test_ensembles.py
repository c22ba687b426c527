# SPDX-License-Identifier: Apache-2.0
"""Rules that make one answer of several."""

import numpy as np
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.inference import ensembles
from prompt_tuning.inference.ensembles import Answer

NO_METRICS = [None] * 5


def texts(*words):
    return [Answer(word) for word in words]


def test_the_most_frequent_answer_wins():
    answer = ensembles.vote(texts("no", "yes", "no", "yes", "yes"), NO_METRICS)
    assert answer.text == "yes" and answer.scores == {"no": 0.4, "yes": 0.6}


def test_a_tie_goes_to_the_earliest_prompt():
    assert ensembles.vote(texts("b", "a"), NO_METRICS).text == "b"
    assert ensembles.vote(texts("c", "a", "b", "b", "a"), NO_METRICS).text == "a"


def test_labels_that_no_one_voted_for_have_no_share():
    answers = [ensembles.ranked(["x", "y", "z"], np.array([0.0, 1.0, 0.5]))] * 2
    assert ensembles.vote(answers, NO_METRICS).scores == {"x": 0.0, "y": 1.0, "z": 0.0}


def test_the_mean_is_of_log_probabilities_by_label():
    sure = ensembles.ranked(["a", "b"], np.log([0.9, 0.1]))
    unsure = ensembles.ranked(["b", "a"], np.log([0.6, 0.4]))
    answer = ensembles.mean([unsure, sure, unsure], NO_METRICS)
    weights = np.array([0.9 * 0.4**2, 0.1 * 0.6**2]) ** (1 / 3)
    want = weights / weights.sum()
    assert answer.text == "a" and list(answer.scores) == ["b", "a"]
    assert answer.scores["a"] == pytest.approx(want[0])
    # Two of the three would have voted otherwise.
    assert ensembles.vote([unsure, sure, unsure], NO_METRICS).text == "b"


def test_a_mean_of_the_impossible_stays_finite():
    never = ensembles.ranked(["a", "b"], np.array([0.0, -5000.0], np.float32))
    rather = ensembles.ranked(["a", "b"], np.array([-1.0, 0.0], np.float32))
    answer = ensembles.mean([never, rather], NO_METRICS)
    assert answer.text == "a" and answer.scores["a"] == pytest.approx(1)


def test_free_text_has_no_mean():
    with pytest.raises(UserError, match="do not rank the same labels"):
        ensembles.mean(texts("a", "a"), NO_METRICS)


def test_the_best_prompt_is_that_of_the_best_metric():
    assert ensembles.best(texts("a", "b", "c"), [1.0, 3.0, 3.0]).text == "b"
    with pytest.raises(UserError, match="no validation metric"):
        ensembles.best(texts("a", "b"), [1.0, None])


def test_several_metrics_count_by_their_mean():
    card = {"metric": {"accuracy": 80.0, "f1": 70.0}}
    assert ensembles.validation_metric(card) == 75.0
    assert ensembles.validation_metric({"metric": {}}) is None
    assert ensembles.validation_metric({}) is None
