# SPDX-License-Identifier: Apache-2.0
"""Losses: against numpy on numbers, and every way of dividing on a known batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.network import losses

LOGITS = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32) * 3
TARGETS = np.array([[1, 0, 6], [3, 3, 2]])


def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_cross_entropy_is_the_negative_log_probability_of_the_target():
    loss, z_term = losses.cross_entropy(LOGITS, TARGETS)
    want = -np.take_along_axis(log_softmax(LOGITS), TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_array_equal(z_term, np.zeros((2, 3)))


def test_z_loss_is_the_square_of_the_log_normaliser():
    plain, _ = losses.cross_entropy(LOGITS, TARGETS)
    loss, z_term = losses.cross_entropy(LOGITS, TARGETS, z_loss=0.01)
    log_z = np.log(np.exp(LOGITS.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(z_term, 0.01 * log_z**2, rtol=1e-5)
    np.testing.assert_allclose(loss, plain + z_term, rtol=1e-6)


def test_smoothing_is_the_divergence_from_the_smoothed_distribution():
    smoothing = 0.2
    soft = np.full(LOGITS.shape, smoothing / 6)
    np.put_along_axis(soft, TARGETS[..., None], 1 - smoothing, -1)
    want = (soft * (np.log(soft) - log_softmax(LOGITS))).sum(-1)
    loss, _ = losses.cross_entropy(LOGITS, TARGETS, label_smoothing=smoothing)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    perfect, _ = losses.cross_entropy(
        np.log(soft).astype(np.float32), TARGETS, label_smoothing=smoothing
    )
    np.testing.assert_allclose(perfect, 0, atol=1e-6)


def test_huge_logits_give_finite_losses_and_gradients():
    grad = jax.grad(lambda x: losses.cross_entropy(x, TARGETS)[0].sum())(LOGITS * 1e4)
    assert np.isfinite(grad).all()


BATCH = {
    "decoder_target_tokens": jnp.array([[5, 6, 1, 0], [7, 1, 0, 0]]),
    "decoder_loss_weights": jnp.array([[1.0, 1, 1, 0], [0.5, 1.5, 0, 0]]),
}


@pytest.mark.parametrize(
    ("factor", "divisor"),
    [
        (None, 1.0),
        (233472, 233472.0),
        (0.5, 0.5),
        ("NUM_REAL_TARGET_TOKENS", 5.0),
        ("num_real_target_tokens", 5.0),
        ("NUM_TOTAL_TARGET_TOKENS", 8.0),
    ],
)
def test_the_divisor_by_its_name(factor, divisor):
    weights, got = losses.weights_and_divisor(BATCH, factor)
    np.testing.assert_array_equal(weights, BATCH["decoder_loss_weights"])
    assert float(got) == divisor


def test_without_weights_every_target_above_padding_weighs_one():
    targets = {"decoder_target_tokens": BATCH["decoder_target_tokens"]}
    weights, divisor = losses.weights_and_divisor(targets, "NUM_REAL_TARGET_TOKENS")
    np.testing.assert_array_equal(weights, [[1, 1, 1, 0], [1, 1, 0, 0]])
    assert weights.dtype == jnp.float32 and float(divisor) == 5


def test_the_average_per_sequence_gives_each_row_one():
    weights, divisor = losses.weights_and_divisor(BATCH, "AVERAGE_PER_SEQUENCE")
    third = 1 / 3
    np.testing.assert_allclose(
        weights, [[third, third, third, 0], [0.25, 0.75, 0, 0]], rtol=1e-6
    )
    assert float(divisor) == pytest.approx(2)


def test_the_average_per_sequence_counts_packed_segments():
    batch = {
        "decoder_target_tokens": jnp.array([[5, 6, 1, 8, 0]]),
        "decoder_segment_ids": jnp.array([[1, 1, 2, 2, 0]]),
        "decoder_loss_weights": jnp.array([[1.0, 1, 1, 3, 0]]),
    }
    weights, divisor = losses.weights_and_divisor(batch, "AVERAGE_PER_SEQUENCE")
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0.25, 0.75, 0]], rtol=1e-6)
    assert float(divisor) == pytest.approx(2)


def test_an_unknown_factor_lists_those_that_exist():
    with pytest.raises(
        ValueError, match="'TOKENS' is neither a number nor one of NUM_"
    ):
        losses.weights_and_divisor(BATCH, "TOKENS")


def positions(hidden, targets):
    """Two results for each position, one of them of more axes."""
    logits = jnp.tanh(hidden @ jnp.arange(28.0).reshape(4, 7) / 20)
    loss, _ = losses.cross_entropy(logits, targets)
    return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 100])
def test_pieces_of_the_target_axis_give_what_the_whole_gives(size):
    hidden = np.random.default_rng(1).normal(size=(2, 7, 4)).astype(np.float32)
    targets = np.arange(14).reshape(2, 7) % 7
    weights = np.arange(14.0).reshape(2, 7)
    seen = []

    def watched(hidden, targets):
        seen.append(hidden.shape)
        return positions(hidden, targets)

    def total(hidden, function):
        return jnp.sum(function(hidden)["loss"] * weights)

    chunked = lambda hidden: losses.by_chunks(watched, size, hidden, targets)
    whole = lambda hidden: positions(hidden, targets)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        chunked(hidden),
        whole(hidden),
    )
    # Three pieces of 3, 2 and 2 would be uneven: they are 3, 3 and 3, the last padded.
    assert set(seen) == {(2, min(7, -(-7 // -(-7 // size))), 4)}
    np.testing.assert_allclose(
        jax.grad(total)(hidden, chunked),
        jax.grad(total)(hidden, whole),
        rtol=1e-5,
        atol=1e-6,
    )


# The right label leads by 0.05 and by 0.3, is behind by 1, or is all that a row has.
SCORES = np.array(
    [[-1.0, -1.05, -9], [-2, -1.7, -9], [-2, -1, -np.inf], [-3, -np.inf, -np.inf]],
    np.float32,
)
RIGHT = np.eye(3, dtype=bool)[[0, 1, 0, 0]]


def test_cross_entropy_over_labels_is_that_of_their_softmax():
    found = losses.over_labels(SCORES, RIGHT, "cross_entropy", 0.2)
    want = -np.log(np.exp(SCORES)[RIGHT] / np.exp(SCORES).sum(-1))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_a_perceptron_wants_the_right_label_to_lead_the_others():
    """A label that leads by less than the hinge is still pushed."""
    total = lambda scores: losses.over_labels(scores, RIGHT, "perceptron", 0.2).sum()
    found = losses.over_labels(SCORES, RIGHT, "perceptron", 0.2)
    np.testing.assert_allclose(found, [0.15, 0, 1.2, 0], atol=1e-6)
    gradient = jax.grad(total)(SCORES)
    np.testing.assert_array_equal(gradient[:3], [[-1, 1, 0], [0, 0, 0], [-1, 1, 0]])


@pytest.mark.parametrize("kind", losses.LABEL_LOSSES)
def test_rows_without_labels_have_finite_gradients(kind):
    scores = np.full((1, 2), -np.inf, np.float32)
    right = np.zeros((1, 2), bool)
    grad = jax.grad(lambda s: losses.over_labels(s, right, kind, 0.2).sum())(scores)
    assert np.isfinite(grad).all()


# Groups of rows.


def test_the_gap_is_the_variance_of_the_groups_means():
    """Rows without targets have no part in it, nor have groups without rows."""
    values = jnp.array([1.0, 3.0, 7.0, 9.0, 100.0])
    counted = jnp.array([True, True, True, True, False])
    batch = {"group_index": jnp.array([0, 0, 7, 49, 3])}
    gap = losses.group_gap(values, counted, batch)
    assert gap == pytest.approx(np.var([2.0, 7.0, 9.0]))
    same = {"group_index": jnp.array([2, 2, 2, 2, 3])}
    assert losses.group_gap(values, counted, same) == 0


def test_the_gap_of_each_prompt_is_that_of_its_own_rows():
    values = jnp.array([1.0, 3.0, 7.0, 2.0, 2.0, 6.0])
    groups = jnp.array([0, 1, 1, 0, 4, 4])
    index = jnp.array([0, 1, 0, 1, 1, 0])
    counted = jnp.ones(6, bool)
    batch = {"group_index": groups, "prompt_index": index}
    found = losses.group_gap(values, counted, batch, 2)
    for prompt in (0, 1):
        own = np.flatnonzero(index == prompt)
        alone = losses.group_gap(
            values[own], counted[own], {"group_index": groups[own]}
        )
        assert found[prompt] == pytest.approx(float(alone))


@pytest.mark.parametrize("factor", [None, "AVERAGE_PER_SEQUENCE"])
def test_the_gap_is_added_to_the_loss_and_to_no_metric(
    factor, tiny_model, tiny_params, tiny_batch
):
    batch = {**tiny_batch, "group_index": jnp.array([0, 1, 1])}
    plain = dataclasses.replace(tiny_model, loss_normalizing_factor=factor)
    loss, metrics = plain.loss(tiny_params, batch)
    rows = [
        plain.loss(
            tiny_params, {key: array[i : i + 1] for key, array in batch.items()}
        )[1]
        for i in range(3)
    ]
    # Per target token, with its z-loss, as the loss itself has it.
    z_loss, smoothing = plain.z_loss, plain.label_smoothing
    assert not smoothing and z_loss
    means = [float(row["token_loss"]) / float(row["weight"]) for row in rows]
    gap = np.var([means[0], (means[1] + means[2]) / 2])
    # AVERAGE_PER_SEQUENCE divides by the rows, which then weigh as much.
    scale = 1.0 if factor else float(metrics["weight"])
    with_gap, same = dataclasses.replace(plain, gap_weight=0.5).loss(tiny_params, batch)
    assert with_gap - loss == pytest.approx(0.5 * scale * gap, rel=1e-3)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, same, metrics))
