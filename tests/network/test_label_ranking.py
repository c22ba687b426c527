# SPDX-License-Identifier: Apache-2.0
"""Ranking: labels that share a decoder row score as if each had one of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from prompt_tuning.network import model as model_module

COUNT, LENGTH = (
    70,
    5,
)  # 25 labels fit a row: three rows of 24, of which two are filled up


@pytest.fixture(scope="module")
def labels():
    """70 labels of 1 to 5 tokens; the last is of padding only."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(2, 256, (COUNT, LENGTH)).astype(np.int32)
    tokens[np.arange(LENGTH) >= rng.integers(1, LENGTH + 1, COUNT)[:, None]] = 0
    tokens[-1] = 0
    return tokens


@pytest.fixture
def alone(tiny_model, tiny_params, tiny_batch):
    """A function from labels [B, C, S] to scores of one label a decoder row."""
    tokens = jnp.asarray(tiny_batch["encoder_input_tokens"])

    def scores(labels):
        score = lambda targets: tiny_model.score(
            tiny_params,
            {
                "encoder_input_tokens": tokens,
                "decoder_input_tokens": jnp.pad(targets[:, :-1], ((0, 0), (1, 0))),
                "decoder_target_tokens": targets,
            },
        )
        return np.asarray(jax.jit(lambda x: jax.lax.map(score, x))(labels)).T

    return scores


@pytest.mark.parametrize("max_logit_bytes", [2**27, 1])
@pytest.mark.parametrize("own", [False, True])
def test_labels_score_as_if_alone(
    tiny_model, tiny_params, tiny_batch, labels, alone, own, max_logit_bytes
):
    """The same labels for all rows or each row's own, with logits whole or in chunks."""
    tokens = tiny_batch["encoder_input_tokens"]
    each = np.stack([np.roll(labels, row if own else 0, axis=0) for row in range(3)])
    model = dataclasses.replace(tiny_model, max_logit_bytes=max_logit_bytes)
    found = jax.jit(model.rank)(tiny_params, tokens, each if own else labels)
    none = ~(each > 0).any(-1)
    assert none.sum() == 3
    assert (np.asarray(found)[none] == -np.inf).all()
    want = alone(np.moveaxis(each, 1, 0))
    np.testing.assert_allclose(np.asarray(found)[~none], want[~none], rtol=1e-4)


def encoder_products(jaxpr, positions, times=1):
    """How often keys or values of encoder positions are made of the encoder's output."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            inner = times * equation.params["length"]
        else:
            inner = times
        if equation.primitive.name == "dot_general":
            left, right = (v.aval.shape for v in equation.invars[:2])
            count += times * (left == (positions, 32) and right == (32, 32))
        for other in jaxprs_in_params(equation.params):
            count += encoder_products(other, positions, inner)
    return count


def test_labels_of_a_row_share_the_encoders_keys_and_values(
    tiny_model, tiny_params, tiny_batch, labels
):
    tokens = tiny_batch["encoder_input_tokens"]

    def products(labels):
        jaxpr = jax.make_jaxpr(tiny_model.rank)(tiny_params, tokens, labels)
        return encoder_products(jaxpr.jaxpr, tokens.size)

    one, few, many = (products(labels[:count]) for count in (1, 25, COUNT))
    assert few == one
    # Keys and values of two layers for each of two more decoder rows.
    assert many - one == 2 * 2 * 2


def test_labels_are_spread_evenly():
    assert model_module.packs_of(COUNT, LENGTH) == (3, 24)
    assert model_module.packs_of(1, 1000) == (1, 1)
