# SPDX-License-Identifier: Apache-2.0
"""Training that compares a task's labels as wholes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import cli
from prompt_tuning.data import label_sets
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.runs.settings import Objective

CONFIG = T5Config(64, 16, 2, 1, 1, 8, 32)
MODEL = Model(Transformer(CONFIG, (Prompt("a", 2), Prompt("b", 2))))
TWO = np.array([[5, 1, 0], [6, 7, 1]], np.int32)
THREE = np.array([[8, 1], [9, 1], [10, 1]], np.int32)


def rows(owner, labels, right):
    """Rows of one prompt, with the labels of its task."""
    rng = np.random.default_rng(owner)
    text = rng.integers(11, 64, (len(right), 4))
    ids = np.tile(64 + 2 * owner + np.arange(2), (len(right), 1))
    targets = np.pad(labels, ((0, 0), (0, 4 - labels.shape[1])))[right]
    (batch,) = label_sets.with_labels(
        iter([{"decoder_target_tokens": targets}]), labels, "task"
    )
    return batch | {
        "encoder_input_tokens": np.concatenate([ids, text], axis=1),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "prompt_index": np.full(len(right), owner, np.int32),
    }


@pytest.mark.slow
def test_members_of_several_label_sets_have_each_their_own_loss():
    """As ranking says it; labels of more tokens compared by their mean; filled rows."""
    params = jax.jit(MODEL.init)(jax.random.key(0))
    first, second = rows(0, TWO, [0, 1, 1]), rows(1, THREE, [2, 0])
    nobody = {key: np.zeros_like(value[:1]) for key, value in first.items()}
    label_tokens = np.concatenate(
        [
            np.pad(first["label_tokens"], [(0, 0), (0, 1), (0, 0)]),
            np.pad(second["label_tokens"], [(0, 0), (0, 0), (0, 1)]),
            np.pad(nobody["label_tokens"], [(0, 0), (0, 1), (0, 0)]),
        ]
    )
    batch = {
        key: np.concatenate([first[key], second[key], nobody[key]])
        for key in first
        if key != "label_tokens"
    } | {"label_tokens": label_tokens}
    model = dataclasses.replace(MODEL, label_loss="cross_entropy", mean_scores=True)
    loss = lambda prompts: model.loss({**params, "prompts": prompts}, batch)
    (total, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params["prompts"]
    )
    rank = jax.jit(MODEL.rank)
    for owner, own, labels, right in (
        (0, first, TWO, [0, 1, 1]),
        (1, second, THREE, [2, 0]),
    ):
        scores = np.asarray(rank(params, own["encoder_input_tokens"], labels))
        scores = scores / np.count_nonzero(labels, axis=1)
        wanted = -jax.nn.log_softmax(scores)[np.arange(len(right)), right]
        np.testing.assert_allclose(metrics["loss"][owner], wanted.sum(), rtol=1e-4)
        assert metrics["weight"][owner] == len(right)
        assert metrics["correct"][owner] == (scores.argmax(1) == right).sum()
    np.testing.assert_allclose(total, metrics["loss"].sum(), rtol=1e-6)
    for leaf in jax.tree.leaves(gradient):
        assert jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0


def test_a_target_that_is_no_label_is_refused():
    with pytest.raises(UserError, match="task has a target that is none of its labels"):
        next(
            label_sets.with_labels(
                iter([{"decoder_target_tokens": np.array([[5, 6, 1]])}]), TWO, "task"
            )
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label_loss": "hinge"}, "must be None or one of cross_entropy, perceptron"),
        (
            {"label_loss": "perceptron", "label_smoothing": 0.1},
            "label_smoothing is of target tokens: leave one out",
        ),
        (
            {
                "label_loss": "perceptron",
                "loss_normalizing_factor": "AVERAGE_PER_SEQUENCE",
            },
            "'AVERAGE_PER_SEQUENCE' is of target tokens",
        ),
    ],
)
def test_objectives_that_contradict_themselves_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Objective(**values)


def test_the_record_of_a_run_without_it_is_as_it_was():
    assert Objective().identity == {
        "z_loss": 1e-4,
        "label_smoothing": 0.0,
        "loss_normalizing_factor": None,
    }
    assert Objective(label_loss="perceptron").identity["hinge"] == 0.2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"PACK": True}, "PACK=True puts several examples into each"),
        ({"LABEL_NAMES": None}, "has no label set"),
    ],
)
def test_commands_refuse_what_has_no_labels_to_compare(
    values, message, train_words, tmp_path, capsys
):
    words = train_words(
        MIXTURE_OR_TASK_NAME=f"labels_{len(message)}",
        MODEL_DIR=tmp_path / "run",
        LABEL_LOSS="perceptron",
        **values,
    )
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_over_labels_learns_a_task(train_words, tmp_path):
    """Words tell the labels of the sentences apart, which start as even."""
    folder = tmp_path / "run"
    words = train_words(
        MIXTURE_OR_TASK_NAME="labels_learned",
        MODEL_DIR=folder,
        LABEL_LOSS="cross_entropy",
        TRAIN_STEPS=30,
    )
    assert cli.main(words) == 0
    found = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    losses = [record["loss"] for record in found if "loss" in record]
    assert losses[-1] < losses[0]
    assert '"label_loss": "cross_entropy"' in (folder / "run.json").read_text()
