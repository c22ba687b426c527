# SPDX-License-Identifier: Apache-2.0
"""Texts reach the network as their prompt's task would have given them."""

import jax
import numpy as np
import pytest

from prompt_tuning import base, infer, task_data, trees
from prompt_tuning.errors import UserError
from prompt_tuning.feature_converter import PromptFeatureConverter
from prompt_tuning.model import Model
from prompt_tuning.network import T5Config, Transformer
from prompt_tuning.prompts import Prompt
from prompt_tuning.tasks import features

PROMPT = Prompt("task", 3)
VIRTUAL = [8192, 8193, 8194]


@pytest.fixture(scope="module")
def vocabulary():
    return features.vocabulary("mini")


def rows(texts, vocabulary, template=None, batch_size=2):
    converter = PromptFeatureConverter((PROMPT,), 8192)
    return list(
        task_data.text_batches(texts, vocabulary, converter, batch_size, template)
    )


def test_rows_hold_prompt_text_and_end(vocabulary):
    (batch,) = rows(["a fine film"], vocabulary)
    ids = [*VIRTUAL, *vocabulary.encode("a fine film"), 1]
    assert batch.shape == (2, 32 + 3)
    assert batch[0, : len(ids)].tolist() == ids
    assert not batch[0, len(ids) :].any() and not batch[1].any()


def test_a_template_is_filled_in(vocabulary):
    template = "{prompt:0:1} review: {sentence} {prompt:1:3} it was"
    (batch,) = rows(["a fine film"], vocabulary, template)
    ids = [8192, *vocabulary.encode("review: a fine film"), 8193, 8194]
    ids += [*vocabulary.encode("it was"), 1]
    assert batch[0, : len(ids)].tolist() == ids


def test_a_template_of_two_columns_is_refused(vocabulary):
    with pytest.raises(UserError, match="columns premise, hypothesis"):
        rows(["x"], vocabulary, "{premise} {hypothesis}")


def test_no_text_is_cut(vocabulary):
    long = "film " * 200
    batch = rows(["short", long], vocabulary)[0]
    assert batch[1, 3:].tolist().count(vocabulary.encode("film")[0]) == 200


@pytest.fixture(scope="module")
def prompted(tiny_checkpoint):
    source = base.load(T5Config(8192, 16, 2, 1, 1, 8, 32), tiny_checkpoint)
    prompt = jax.random.normal(jax.random.key(0), (3, 16))
    params = trees.merge(source.params, {"prompts": {"task": prompt}})
    return Model(Transformer(source.config, (PROMPT,))), params


def test_answers_do_not_depend_on_their_neighbours(prompted):
    model, params = prompted
    card = {"labels": ["good", "bad"], "vocabulary": "mini"}
    texts = ["a fine film", "dull", "what a story this is"]
    together = infer.answer_texts(model, params, texts, card, batch_size=2)
    assert [row["input"] for row in together] == texts
    for text, row in zip(texts, together, strict=True):
        (alone,) = infer.answer_texts(model, params, [text], card, batch_size=1)
        assert alone["answer"] == row["answer"]
        values = [list(r["scores"].values()) for r in (alone, row)]
        np.testing.assert_allclose(*values, atol=2e-4)
        assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-3)


def test_without_labels_answers_are_decoded(prompted):
    model, params = prompted
    card = {"vocabulary": "mini"}
    (row,) = infer.answer_texts(model, params, ["hi"], card, max_decode_len=4)
    assert set(row) == {"input", "answer"} and isinstance(row["answer"], str)
