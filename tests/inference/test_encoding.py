# SPDX-License-Identifier: Apache-2.0
"""Rows reach the network as the prompt's task would have given them."""

import numpy as np
import pytest
import tensorflow as tf

from prompt_tuning.data import vocabularies
from prompt_tuning.data.feature_converter import PromptFeatureConverter
from prompt_tuning.data.template import Placement, Template
from prompt_tuning.errors import UserError
from prompt_tuning.inference.encoding import Encoding
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.tasks import features

V = 8192
ROWS = [
    {"premise": "a fine film", "hypothesis": "it is { good }"},
    {"premise": "", "hypothesis": "dull"},
    {"premise": "  spaces  around ", "hypothesis": "☃ unknown ☃"},
    {"premise": "long " * 60, "hypothesis": "story"},
]
TEMPLATES = [
    None,
    "{premise} {hypothesis}",
    "premise: {premise} hypothesis: {hypothesis}",
    "{prompt:0:2} {premise} {prompt:2:5} {hypothesis}",
    "{premise} {hypothesis} {prompt}",
    "{prompt:3:5} {{ {hypothesis} }} {prompt:0:1}",
]


@pytest.fixture(scope="module")
def vocabulary():
    return features.vocabulary("mini")


def converted(ids, placement, length):
    """What training makes of a task's inputs: [T] without padding."""
    converter = PromptFeatureConverter((Prompt("task", length),), V, placement)
    example = {"inputs": np.array(ids, np.int32), "targets": np.array([1], np.int32)}
    dataset = tf.data.Dataset.from_tensors(example)
    (row,) = converter(dataset, {"inputs": 256, "targets": 1}).as_numpy_iterator()
    return np.trim_zeros(row["encoder_input_tokens"], "b").tolist()


def with_virtual_ids(ids):
    return np.where(ids < 0, V - 1 - ids, ids).tolist()


@pytest.mark.parametrize("length", [1, 5, 12])
@pytest.mark.parametrize("placement", list(Placement))
@pytest.mark.parametrize("template", TEMPLATES)
def test_rows_are_those_of_the_feature_converter(
    template, placement, length, vocabulary
):
    card = {"template": template, "placement": str(placement), "vocabulary": "mini"}
    if "5" in (template or "") and length < 5:
        with pytest.raises(UserError, match="names position"):
            Encoding(card, length, V)
        return
    encoding = Encoding(card, length, V)
    for row in ROWS:
        row = row if template else {"text": row["hypothesis"]}
        parsed = Template.parse(template or "{text}")
        ids = [*parsed.encode(row, vocabulary.encode), 1]
        expected = converted(ids, placement, length)
        assert with_virtual_ids(encoding.encode(row)) == expected


def test_prompts_in_words_have_no_virtual_tokens(vocabulary):
    card = {"template": "Review: {text} Sentiment:", "vocabulary": "mini"}
    ids = Encoding(card, 0, V).encode({"text": "fine"})
    assert ids.tolist() == [*vocabulary.encode("Review: fine Sentiment:"), 1]


def test_text_stands_for_the_only_column(vocabulary):
    encoding = Encoding({"template": "it: {sentence}", "vocabulary": "mini"}, 2, V)
    ids = encoding.encode({"text": "fine"}).tolist()
    assert ids == encoding.encode({"sentence": "fine"}).tolist()
    assert ids == [-1, -2, *vocabulary.encode("it: fine"), 1]


def test_values_that_are_no_texts_are_written_in_json():
    card = {"template": "{stars} of {text}", "vocabulary": "mini"}
    encoding = Encoding(card, 1, V)
    one, other = {"stars": 4.5, "text": True}, {"stars": "4.5", "text": "true"}
    assert encoding.encode(one).tolist() == encoding.encode(other).tolist()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"premise": "x"}, "no column 'hypothesis'"),
        ({"premise": "x", "text": "y"}, "no column 'hypothesis'"),
        ({"premise": "x", "hypothesis": None}, "no column 'hypothesis'"),
        ({"premise": " ", "hypothesis": "\n"}, "the text is empty"),
        ({"premise": "x", "hypothesis": "\ud800"}, "half a character"),
        ({"premise": "word " * 100, "hypothesis": "x"}, "together more than 64"),
        ({"premise": "a" * 10**8, "hypothesis": "x"}, "characters long"),
    ],
)
def test_refused_rows(row, says):
    card = {"template": "{premise} and {hypothesis}", "vocabulary": "mini"}
    with pytest.raises(UserError, match=says):
        Encoding(card, 3, V).encode(row, 64)


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ({"vocabulary": "nowhere"}, "no vocabulary is called"),
        ({"vocabulary_fingerprint": "0" * 64}, "another one"),
        ({"placement": "infix"}, "infix"),
        ({"template": "no column"}, "names no column"),
        ({"template": "{prompt:0:4} {text}"}, "names position 3, the prompt has 3"),
        ({"labels": ["one"]}, "two or more"),
        ({"labels": "yes, no"}, "two or more"),
        ({"labels": ["yes", "☃"]}, "does not know"),
    ],
)
def test_refused_cards(card, says):
    with pytest.raises(UserError, match=says):
        Encoding({"vocabulary": "mini", **card}, 3, V)


def test_a_vocabulary_larger_than_the_model_is_refused_even_by_force():
    # Its last ids would be read as positions of prompts.
    with pytest.raises(UserError, match="8192 ids, the model has 8000"):
        Encoding({}, 3, 8000, vocabularies.load("mini"))
