# SPDX-License-Identifier: Apache-2.0
"""Examples in every form that people have, and what is refused of them."""

import math

import numpy as np
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.library import rows

LABELS = ["bad", "good"]
PAIRS = [("a fine film", "good"), ("a dull film", "bad")]


class Split(list):
    """What a split of Hugging Face's datasets is taken for: rows and features."""

    class ClassLabel:
        names = LABELS

    @property
    def features(self):
        return {"text": object(), "label": self.ClassLabel()}


@pytest.mark.parametrize(
    "form", ["pairs", "lists", "dicts", "frame", "split", "values"]
)
def test_forms(form):
    dicts = [{"text": text, "label": label, "id": 3} for text, label in PAIRS]
    coded = [{**row, "label": LABELS.index(row["label"])} for row in dicts]
    given = {
        "pairs": lambda: PAIRS,
        "lists": lambda: [list(pair) for pair in PAIRS],
        "dicts": lambda: dicts,
        "frame": lambda: pytest.importorskip("pandas").DataFrame(coded),
        "split": lambda: Split(coded),
        "values": lambda: [(text, np.int64(label == "good")) for text, label in PAIRS],
    }[form]()
    labels = rows.found_labels(given, "label", None if form == "split" else LABELS)
    assert rows.label_names(labels) == LABELS
    found = rows.read(given, "train", labels=labels)
    assert found.answers == ["good", "bad"]
    assert found.columns == [{"text": "a fine film"}, {"text": "a dull film"}]


def test_a_template_of_columns_and_a_mapping_of_values():
    given = [{"p": "it rains", "h": 7, "y": True, "rest": None}]
    found = rows.read(
        given,
        "train",
        template="{p} so {h}",
        target_column="y",
        labels={True: "yes", False: "no"},
    )
    assert found.columns == [{"p": "it rains", "h": "7"}] and found.answers == ["yes"]


@pytest.mark.parametrize(
    "given, message",
    [
        (None, "train is None: give a list of"),
        ("a text", "train is 'a text' .* give a list of"),
        ({"train": PAIRS}, "give a list .* or one split"),
        (3, "train is 3 .* has no length"),
        (iter(PAIRS), "read only once"),
        ([], "train is empty: give one example or more"),
        ([("a", "good"), None], "train, row 2 is None: give a pair"),
        ([("a", "good", 1)], "train, row 1 is .*tuple.*: give a pair"),
        ([(None, "good")], "train, row 1: 'text' is None"),
        ([(math.nan, "good")], "train, row 1: 'text' is nan"),
        ([(b"a", "good")], "train, row 1: 'text' is .*bytes.* not a text"),
        ([(" ", "good")], "train, row 1: the text is empty"),
        ([("a", None)], "train, row 1: the answer is None"),
        ([("a\ud800", "good")], "row 1: 'text' holds half a character"),
        ([("a", "fine")], "the answer 'fine' is none of the labels bad, good"),
        ([("a", 2)], "the answer 2 .* stands for none of the labels bad, good"),
        ([{"sentence": "a", "label": 1}], "row 1 has no 'text', only sentence, label"),
        ([{"text": "a"}], "row 1 has no 'label'"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(UserError, match=message) as said:
        rows.read(given, "train", labels=LABELS)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    "labels, message",
    [
        ("good", "must be a list of texts"),
        (["good"], "leaves nothing to choose from"),
        (["good", "good"], "has 'good' twice"),
        (["good", None], "None is no text"),
        (["good", " "], "' ' is no text"),
    ],
)
def test_labels_that_are_none(labels, message):
    with pytest.raises(UserError, match=message):
        rows.label_names(labels)


def test_an_index_that_is_another_name_is_refused_with_both_readings():
    stars = ["1", "2", "3", "4", "5"]
    with pytest.raises(UserError) as said:
        rows.read([("a", 0), ("b", 1)], "train", labels=stars)
    assert "the label '1' by its name or '2' by its index" in str(said.value)
    assert str(said.value).startswith("labels=[")
    by_index = dict(enumerate(stars))
    found = rows.read([("a", 0), ("b", 1)], "train", labels=by_index)
    assert found.answers == ["1", "2"]


def test_inputs_that_hold_the_answer_are_refused():
    given = [{"text": "a", "label": "good"}]
    with pytest.raises(UserError, match="which holds the answer"):
        rows.read(given, "train", labels=LABELS, template="{text} {label}")


def test_a_label_that_no_row_has():
    found = rows.read(PAIRS, "train", labels=[*LABELS, "fair"])
    with pytest.raises(UserError, match="no row of train has the label 'fair'"):
        rows.check_labels(found, [*LABELS, "fair"], "train")


def test_free_text_must_be_text():
    assert rows.read(PAIRS, "train").answers == ["good", "bad"]
    with pytest.raises(UserError, match="the answer holds half a character"):
        rows.read([("a", "\ud800")], "train")
    with pytest.raises(UserError, match="the answer is 1 .*: give labels"):
        rows.read([("a", 1)], "train")


def test_shared_rows_are_warned_of():
    train, dev = rows.read(PAIRS, "train"), rows.read(PAIRS[:1] * 2, "validation")
    with pytest.warns(UserWarning, match="validation: 2 of 2 rows have the text of"):
        rows.warn_of_shared(train, dev)
