# SPDX-License-Identifier: Apache-2.0
"""The baselines and the interval that says whether a margin is more than luck."""

import numpy as np

from prompt_tuning.checkpoints import base_models
from prompt_tuning.data import vocabularies
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.runs import baselines
from prompt_tuning.runs.baselines import HandWritten


def test_majority_counts_training_labels():
    right = baselines.majority([1, 1, 0], [0, 1, 1, 0])
    assert right.tolist() == [False, True, True, False]


def test_tf_idf_learns_a_word():
    texts = ["a fine film", "fine story", "a dull film", "dull story"]
    right = baselines.tf_idf(texts, [1, 1, 0, 0], ["fine", "dull"], [1, 0])
    assert right.all()


def test_tf_idf_where_there_is_nothing_to_fit():
    known = (["a fine film", "fine story", "a dull film"], ["good", "good", "bad"])
    asked = (["fine", "dull"], ["good", "good"])
    assert baselines.tf_idf_accuracy(known, asked) == 50.0
    assert baselines.tf_idf_accuracy((known[0], ["good"] * 3), asked) is None
    assert baselines.tf_idf_accuracy((["?", "!"], ["good", "bad"]), asked) is None


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


def test_hand_written_prompts_rank_their_verbalizers(tiny_checkpoint):
    """By one program, as each prompt and text would be answered by itself."""
    base = base_models.load(T5Config(8192, 16, 2, 1, 1, 8, 32), tiny_checkpoint)
    vocabulary = vocabularies.load("mini")
    texts = ["a fine film", "a dull film", "what", "{a} long story of " * 6]
    prompts = [
        HandWritten("{text} It was", ("bad", "good")),
        HandWritten("Is it so? {text}", ("it is not so", "yes")),
        HandWritten("{text} It was so", ("good", "bad")),
    ]

    right = baselines.hand_written(base, prompts, texts, [0, 0, 0, 1], vocabulary)
    store = PromptStore(base, 1)
    for at, prompt in enumerate(prompts):
        card = {"template": prompt.pattern, "labels": list(prompt.verbalizers)}
        store.add(str(at), np.zeros((0, 16), np.float32), card, vocabulary)
    rows = [{"prompt": str(at), "text": text} for at in range(3) for text in texts]
    answers = [row["answer"] for row in Engine(base, store).answer(rows)]
    wanted = [p.verbalizers[label] for p in prompts for label in (0, 0, 0, 1)]
    assert (np.array(answers) == wanted).tolist() == right.ravel().tolist()
    assert right.shape == (3, 4)
