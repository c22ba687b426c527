# SPDX-License-Identifier: Apache-2.0
"""What shows of a row, and of a folder of prompts, before anything is computed."""

import numpy as np
import pytest

from prompt_tuning.checkpoints import base_models, prompt_file
from prompt_tuning.errors import UserError
from prompt_tuning.inference import prepared_rows
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.network.transformer import T5Config

ARRAY = np.ones((2, 16), np.float32)


@pytest.fixture(scope="module")
def source(tiny_checkpoint):
    return base_models.load(T5Config(8192, 16, 2, 1, 1, 8, 32), tiny_checkpoint)


@pytest.fixture(scope="module")
def store(source):
    found = PromptStore(source, 64)
    usual = {"base_model": source.identity, "vocabulary": "mini"}
    for name, task, labels in (
        ("mood_0", "mood", ["good", "bad"]),
        ("mood_1", "mood", ["good", "bad"]),
        ("turned", "mood", ["bad", "good"]),
        ("entails", "rte", ["yes", "no"]),
        ("nameless", None, ["yes", "no"]),
        ("free", None, None),
    ):
        found.add(name, ARRAY, {**usual, "task": task, "labels": labels})
    return found


def prepare(store, prompts, **row):
    return prepared_rows.prepare(store, {"prompt": prompts, "text": "x", **row}, 99)


@pytest.mark.parametrize(
    "prompts, says",
    [
        (["mood_0", "entails"], r"different tasks \(mood_0 of mood, entails of rte\)"),
        (["mood_0", "nameless"], "do not have the same labels"),
        (["mood_0", "free"], "do not have the same labels"),
    ],
)
@pytest.mark.parametrize("rule", ["vote", "mean", "best"])
def test_prompts_of_different_questions_are_not_combined(store, prompts, says, rule):
    with pytest.raises(UserError, match=says) as caught:
        prepare(store, prompts, combine=rule)
    assert "vote" not in str(caught.value)


def test_prompts_of_one_question_are_combined(store):
    assert len(prepare(store, ["mood_0", "mood_1", "turned"]).items) == 3
    labelled = prepare(store, ["nameless", "free"], labels=["yes", "no"])
    assert len(labelled.items) == 2


@pytest.mark.parametrize(
    "text, share", [("a fine film", 0), ("\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5", 0.5)]
)
def test_a_text_that_is_mostly_unknown_is_said(store, text, share):
    request = prepare(store, "mood_0", text=text)
    assert request.items[0].unknown >= share
    answer = prepared_rows.Answer("good")
    warning = request.result([answer]).get("warning", "")
    assert ("pieces are unknown" in warning) == bool(share)


def test_long_labels_are_compared_by_their_mean_where_the_card_says_so(source, store):
    """Numbers are those of the sum, over the tokens of a label and its end."""
    labels = ["good", "a long story of a fine film"]
    usual = dict(store.get("mood_0").card)
    for scores in ("sum", "mean"):
        store.add(scores, ARRAY, {**usual, "labels": labels, "label_scores": scores})
    engine = Engine(source, store, lengths=(16,), batch_sizes=(2,))
    rows = [prepare(store, name, text="a fine film") for name in ("sum", "mean")]
    by_sum, by_mean = engine.outputs([row.items[0] for row in rows])
    vocabulary = store.get("sum").encoding.vocabulary
    sizes = [len(vocabulary.encode(label)) + 1 for label in labels]
    np.testing.assert_allclose(by_mean, by_sum / sizes, rtol=1e-5)
    answers = [answer["answer"] for answer in engine.run(rows)]
    assert answers == [labels[int(np.argmax(x))] for x in (by_sum, by_mean)]
    # Labels of a row's own are compared in the same way.
    own = prepare(store, "mean", text="a fine film", labels=labels[::-1])
    assert engine.outputs(own.items)[0] == pytest.approx(by_mean[::-1], rel=1e-5)


def test_prompts_of_sweeps_are_found_below_their_runs(source, tmp_path):
    card = {"base_model": source.identity, "vocabulary": "mini"}
    for run in ("rte", "cb"):
        for name in ("lr_1", "lr_2"):
            path = tmp_path / run / "prompts" / f"{name}.safetensors"
            prompt_file.save_prompt(path, ARRAY, {**card, "task": run})
        (tmp_path / run / "results.json").write_text("{}")
    prompt_file.save_prompt(tmp_path / "one" / "prompt.safetensors", ARRAY, card)
    (tmp_path / "one" / "results.json").write_text("{}")

    def names(folder):
        store = PromptStore(source, 64)
        assert not store.load_folder(folder)
        return store.names()

    assert names(tmp_path) == ["cb.lr_1", "cb.lr_2", "one", "rte.lr_1", "rte.lr_2"]
    assert names(tmp_path / "rte") == ["lr_1", "lr_2"]
    assert names(tmp_path / "one") == ["one"]
