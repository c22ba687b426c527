# SPDX-License-Identifier: Apache-2.0
"""The baselines and the interval that says whether a margin is more than luck."""

import numpy as np
import pytest

from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.runs import baselines
from prompt_tuning.runs.baselines import HandWritten


def test_majority_counts_training_labels():
    right = baselines.majority([1, 1, 0], [0, 1, 1, 0])
    assert right.tolist() == [False, True, True, False]


def test_tf_idf_learns_a_word():
    texts = ["a fine film", "fine story", "a dull film", "dull story"]
    right = baselines.tf_idf(texts, [1, 1, 0, 0], ["fine", "dull"], [1, 0])
    assert right.all()


def test_interval_of_equal_answers_is_zero():
    answers = np.array([True, False, True])
    assert baselines.margin_interval(answers, answers) == (0.0, 0.0)


def test_interval_covers_the_margin_and_shrinks_with_examples():
    rng = np.random.default_rng(0)

    def interval(size):
        better = rng.random(size) < 0.8
        worse = rng.random(size) < 0.6
        return baselines.margin_interval(better, worse)

    low, high = interval(2000)
    assert 0 < low < 0.2 < high
    wide = interval(50)
    assert wide[1] - wide[0] > high - low


@pytest.mark.parametrize("verbalizers", [("bad", "good"), ("good", "bad")])
def test_hand_written_prompts_rank_their_verbalizers(verbalizers, tiny_checkpoint):
    from prompt_tuning.checkpoints import base_models

    sizes = T5Config(8192, 16, 2, 1, 1, 8, 32)
    source = base_models.load(sizes, tiny_checkpoint)
    model = Model(Transformer(source.config))
    texts = ["a fine film", "a dull film", "what"]
    prompt = HandWritten("{text} It was", verbalizers)
    right = baselines.hand_written(
        model, source.params, prompt, texts, [0, 0, 0], "mini"
    )
    wrong = baselines.hand_written(
        model, source.params, prompt, texts, [1, 1, 1], "mini"
    )
    assert (right != wrong).all()
