# SPDX-License-Identifier: Apache-2.0
"""Tokens by gradients, and those nearest to a soft prompt: the loss, the file, the cost."""

import jax
import numpy as np
import pytest

import prompt_tuning as pt
from prompt_tuning import trees
from prompt_tuning.library import rows, token_swaps
from prompt_tuning.library.tuned_prompt import TunedPrompt
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import Transformer

TRAIN = [
    (f"a {word} film", label)
    for word, label in [
        ("fine", "good"),
        ("dull", "bad"),
        ("grand", "good"),
        ("flat", "bad"),
        ("fair", "good"),
        ("sad", "bad"),
        ("kind", "good"),
        ("cruel", "bad"),
    ]
]
VALIDATION = [("so fine", "good"), ("so dull", "bad"), ("it is slow", "bad")]
VALUES = {"labels": ["good", "bad"], "length": 3, "candidates": 6, "batch_size": 4}


@pytest.fixture(scope="module")
def search(base):
    return lambda **values: token_swaps.search(
        base, TRAIN, VALIDATION, **{**VALUES, "steps": 20, **values}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("swaps")


@pytest.fixture(scope="module")
def found(search, folder):
    return search(folder=folder)


def loss_of(base, prompt):
    """The mean loss of a target token on the validation rows, row by row."""
    vocabulary = base.vocabulary
    model = Model(Transformer(base.config, (Prompt("p", len(prompt.array)),)))
    params = trees.merge(base.params, {"prompts": {"p": prompt.array}})
    loss = jax.jit(model.loss)
    total = weight = 0.0
    for text, answer in VALIDATION:
        ids = 8192 + np.arange(len(prompt.array))
        inputs = [*ids, *vocabulary.encode(text), vocabulary.eos_id]
        targets = np.array([[*vocabulary.encode(answer), vocabulary.eos_id]])
        batch = {
            "encoder_input_tokens": np.array([inputs], np.int32),
            "decoder_input_tokens": np.insert(targets, 0, 0, axis=1)[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": np.ones(targets.shape, np.float32),
        }
        _, metrics = loss(params, batch)
        total += float(metrics["token_loss"])
        weight += float(metrics["weight"])
    return total / weight


def test_swaps_lower_the_loss_of_the_validation_rows(found, base):
    assert found.kept > 0 and found.after < found.before
    assert found.after == pytest.approx(loss_of(base, found.prompt), rel=1e-4)
    table = np.asarray(base.table, np.float32)
    np.testing.assert_array_equal(found.prompt.array, table[list(found.ids)])
    assert found.text == base.vocabulary.decode(list(found.ids))
    assert not set(found.ids) & {0, base.vocabulary.eos_id, base.vocabulary.unk_id}
    # A gradient on 4 rows each; then 4 for it, 4 for each candidate, 3 to validate.
    assert found.backward_passes == 20 * 4
    validated, rest = divmod(found.forward_passes - 3 - 20 * 4 * 7, 3)
    assert rest == 0 and found.kept <= validated <= 20


def test_the_tokens_are_a_prompt_like_any_other(found, base, tmp_path):
    path = found.prompt.save(tmp_path / "tokens.safetensors")
    (answer,) = pt.Predictor(base, path)(["so fine"])
    assert answer["answer"] in ("good", "bad")
    asked = rows.read(VALIDATION, "rows", labels=VALUES["labels"])
    said = pt.Predictor(base, path)([text for text, _ in VALIDATION])
    right = [a["answer"] == t for a, (_, t) in zip(said, VALIDATION, strict=True)]
    assert token_swaps.accuracy(found.prompt, base, asked) == 100 * np.mean(right)


def test_an_interrupted_search_ends_as_a_whole_one(search, found, tmp_path, folder):
    search(folder=tmp_path, steps=7)
    again = search(folder=tmp_path)
    for name in ("ids", "before", "after", "kept", "forward_passes", "backward_passes"):
        assert getattr(again, name) == getattr(found, name), name
    # All is done there: nothing is asked for again.
    assert search(folder=folder).forward_passes == found.forward_passes
    with pytest.raises(pt.UserError, match="of a search with other rows or values"):
        search(folder=folder, seed=1)


def test_the_estimate_is_the_loss_to_first_order(base):
    """For pieces so near that the first order is all there is."""
    card = {"vocabulary": base.vocabulary.name, "base_model": base.identity}
    task = token_swaps._Task(base, "p", card, 2, 8)
    batch = task.arrays(rows.read(TRAIN, "rows", labels=VALUES["labels"]))
    start = np.asarray(base.table, np.float32)[[40, 41]]
    value, gradient = task.gradient(start, batch)
    step = 1e-2 * jax.random.normal(jax.random.key(0), (16,))
    moved = start.copy()
    moved[1] += step
    change = task.loss(moved, batch) - value
    assert change == pytest.approx(float(step @ gradient[1]), rel=0.05)


def test_a_soft_prompt_becomes_its_nearest_tokens(base):
    table = np.asarray(base.table, np.float32)
    near = 3.0 * table[[50, 60]] + 1e-3
    soft = TunedPrompt("soft", near, {"method": "prompt_tuning", "labels": ["a", "b"]})
    hard = token_swaps.nearest(soft, base)
    assert hard.name == "soft_tokens" and hard.card["tokens"] == [50, 60]
    np.testing.assert_array_equal(hard.array, table[[50, 60]])
    assert hard.card["projected_from"] == "prompt_tuning" and soft.card["labels"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"length": 0}, "length=0 must be a whole number"),
        ({"candidates": 0}, "candidates=0 must be"),
        ({"steps": 1.5}, "steps=1.5 must be"),
        ({"labels": ["yes", "no"]}, "none of the labels yes, no"),
    ],
)
def test_refused(search, values, says):
    with pytest.raises(pt.UserError, match=says):
        search(**values)


def test_what_has_no_rows_has_no_nearest_tokens(base, found):
    words = TunedPrompt("w", np.zeros((0, 16), np.float32), {})
    with pytest.raises(pt.UserError, match="w is not a prompt of rows alone"):
        token_swaps.nearest(words, base)
    wide = TunedPrompt("wide", np.zeros((1, 8), np.float32), {})
    with pytest.raises(pt.UserError, match="wide has width 8, the model 16"):
        token_swaps.nearest(wide, base)
