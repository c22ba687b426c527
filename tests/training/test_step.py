# SPDX-License-Identifier: Apache-2.0
"""The training step: its bookkeeping, its metrics, and a loss that falls."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning import trees
from prompt_tuning.methods import registry
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import Transformer
from prompt_tuning.training import optimizers
from prompt_tuning.training.step import TrainState, make_train_step


@pytest.fixture(scope="module")
def prompted(tiny_config, tiny_params, tiny_batch):
    """Model, tuned and frozen leaves, and a batch that carries the prompt's ids."""
    model = Model(Transformer(tiny_config, (Prompt("p", 2),)))
    prompt = jax.random.uniform(jax.random.key(3), (2, 32), minval=-0.5, maxval=0.5)
    params = {**tiny_params, "prompts": {"p": prompt}}
    batch = dict(tiny_batch)
    batch["encoder_input_tokens"] = (
        batch["encoder_input_tokens"].at[:, :2].set(jnp.array([256, 257]))
    )
    return model, *registry.split(params, registry.rules_of("prompt_tuning")), batch


@pytest.fixture(scope="module")
def history(prompted):
    """States and metrics of six steps of plain gradient descent."""
    model, tuned, frozen, batch = prompted
    tx = optax.sgd(3e-3)
    step = jax.jit(make_train_step(model, tx))
    states, metrics = [TrainState.create({"p": tuned}, tx, jax.random.key(0))], []
    for _ in range(6):
        state, found = step(states[-1], frozen, batch)
        states.append(state)
        metrics.append(jax.device_get(found))
    return states, metrics


def test_the_step_counts_and_keeps_the_root_key(history):
    states, _ = history
    assert [int(state.step) for state in states] == list(range(7))
    assert states[0].step.dtype == jnp.int32
    roots = {jax.random.key_data(state.key).tobytes() for state in states}
    assert len(roots) == 1


def test_the_loss_falls(history):
    losses = [metrics["loss"] for metrics in history[1]]
    assert all(after < before for before, after in itertools.pairwise(losses))


def test_the_reported_norm_is_that_of_the_gradient_applied(history):
    states, metrics = history
    for before, after, found in zip(states, states[1:], metrics, strict=False):
        moved = after.tuned["p"]["prompts"]["p"] - before.tuned["p"]["prompts"]["p"]
        np.testing.assert_allclose(
            np.linalg.norm(moved), 3e-3 * found["grad_norm"], rtol=1e-4
        )


def test_the_reported_loss_is_that_before_the_update(prompted, history):
    model, tuned, frozen, batch = prompted
    loss, _ = jax.jit(model.loss)(trees.merge(tuned, frozen), batch)
    np.testing.assert_allclose(history[1][0]["loss"], loss, rtol=1e-6)


def test_metrics_count_target_tokens(prompted, history):
    metrics = history[1][0]
    weight = int((prompted[3]["decoder_target_tokens"] > 0).sum())
    assert metrics["weight"] == weight == 15
    assert 0 <= metrics["correct"] <= weight
    assert 0 < metrics["z_loss"] < metrics["loss"]


def test_rows_that_do_not_divide_are_refused(prompted):
    model, tuned, frozen, batch = prompted
    tx = optimizers.adafactor(0.3)
    state = TrainState.create({"p": tuned}, tx, jax.random.key(0))
    with pytest.raises(ValueError, match="3 rows does not divide into 2 microbatches"):
        jax.eval_shape(make_train_step(model, tx, 2), state, frozen, batch)
