# SPDX-License-Identifier: Apache-2.0
"""Prompts between tasks and models: the formulas on cases whose answers are known."""

import dataclasses

import numpy as np
import pytest

import prompt_tuning as pt
from prompt_tuning.library import transfer
from prompt_tuning.library.tuned_prompt import TunedPrompt
from prompt_tuning.network.slots import LowRank


@pytest.fixture(scope="module")
def source():
    return pt.load("embedded:t5_1_1_mini")


@pytest.fixture(scope="module")
def wider(source):
    """Another model of the vocabulary, whose table is a linear map of the one's."""
    width = source.config.emb_dim
    turn = np.random.default_rng(3).normal(size=(width, width + 8)) / width**0.5
    params = dict(source.params)
    table = np.asarray(source.table, np.float32) @ turn
    params["token_embedder"] = {"embedding": table.astype(np.float32)}
    other = dataclasses.replace(
        source, params=params, name="wider", fingerprint="another"
    )
    return other, turn


def prompt(array, model=None, **card):
    identity = {} if model is None else {"base_model": model.identity}
    return TunedPrompt("p", np.asarray(array, np.float32), {**identity, **card})


def test_tasks_are_as_alike_as_their_rows():
    east, north = prompt([[2, 0], [1, 0]]), prompt([[0, 3], [0, 1]])
    both = prompt([[1, 0], [0, 1]])
    assert transfer.similarity(east, east) == pytest.approx(1)
    assert transfer.similarity(east, north) == pytest.approx(0)
    assert transfer.similarity(east, both) == pytest.approx(0.5**0.5)
    assert transfer.similarity(east, both, by="pairs") == pytest.approx(0.5)
    found = transfer.nearest(east, [north, both, east])
    assert [each for each, _ in found] == [east, both, north]


def test_what_tasks_added_is_added():
    start, other = prompt([[1, 1]], metric={"accuracy": 0.9}), prompt([[5, 5]])
    found = transfer.add_tasks(
        start, [(prompt([[2, 1]]), start), (prompt([[5, 8]]), other)], scale=2
    )
    np.testing.assert_array_equal(found.array, [[3, 7]])
    assert "metric" not in found.card and found.card["length"] == 1


def test_a_linear_map_carries_a_prompt_to_a_model_that_is_one(source, wider):
    other, turn = wider
    rows = np.random.default_rng(0).normal(size=(5, source.config.emb_dim))
    own = prompt(rows, source, metric={"accuracy": 0.9})
    for how in ("linear", "mixture"):
        found = transfer.recycle(own, source, other, how)
        np.testing.assert_allclose(found.array, rows @ turn, rtol=1e-2, atol=1e-2)
        assert found.card["base_model"] == other.identity
        assert found.card["width"] == other.table.shape[1]
        assert "metric" not in found.card


def test_the_nearest_piece_is_that_of_a_row_of_the_table(source, wider):
    other, _ = wider
    ids = [5, 700, 3000]
    own = prompt(np.asarray(source.table, np.float32)[ids] * 1.5, source)
    found = transfer.recycle(own, source, other, "nearest")
    np.testing.assert_array_equal(found.array, np.asarray(other.table)[ids])


def test_what_does_not_belong_together_is_refused(source, wider):
    other, _ = wider
    one = prompt(np.ones((2, source.config.emb_dim)), source)
    rows = np.ones((1, 2, 3), np.float32)
    lora = TunedPrompt("q", one.array, one.card, {"a/output": LowRank.of(rows, rows)})
    for make, message in (
        (lambda: transfer.recycle(one, other, source), "on another model than wider"),
        (lambda: transfer.recycle(one, source, other, "best"), "how='best' is not"),
        (lambda: transfer.similarity(one, one, by="sum"), "by='sum' is not"),
        (lambda: transfer.similarity(one, prompt([[1]])), "on several models"),
        (lambda: transfer.similarity(one, one.array), "ndarray is no prompt"),
        (lambda: transfer.recycle(lora, source, other), "q holds an adapter, which"),
        (lambda: transfer.add_tasks(one, []), "tasks is empty"),
        (
            lambda: transfer.add_tasks(prompt([[1]]), [(prompt([[1], [2]]),) * 2]),
            "prompts of 1, 2 rows cannot be added",
        ),
    ):
        with pytest.raises(pt.UserError, match=message):
            make()
