# SPDX-License-Identifier: Apache-2.0
"""Cross entropy as T5X computes it: z-loss, label smoothing, normalisation by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning.errors import UserError
from prompt_tuning.types import Array, Batch, PyTree

# What a loss may be divided by, beside a number or None (a plain sum over tokens).
NORMALIZING_FACTORS = (
    "NUM_REAL_TARGET_TOKENS",
    "NUM_TOTAL_TARGET_TOKENS",
    "AVERAGE_PER_SEQUENCE",
)

# What labels may be taught by, where they are compared as wholes.
LABEL_LOSSES = CROSS_ENTROPY, PERCEPTRON = "cross_entropy", "perceptron"
LOWEST = -1e10
# Values of a column beyond these are no groups, but names, dates or texts.
MOST_GROUPS = 50


def cross_entropy(
    logits: Array,  # [B, S, V] float32
    targets: Array,  # [B, S]
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Array, Array]:  # [B, S], [B, S]
    r"""Cross entropy of every target token, with its z-loss, and the z-loss alone.

    With :math:`\log Z` the logsumexp of the logits, the loss is
    :math:`\log Z - \sum_v q_v x_v - H(q) + z \log^2 Z`, where q puts
    ``1 - label_smoothing`` on the target and the rest evenly on the other ids; its
    entropy H(q) is taken off so that a perfect prediction costs nothing.
    """
    vocab_size = logits.shape[-1]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - target
    if label_smoothing:
        confidence = 1.0 - label_smoothing
        low = label_smoothing / (vocab_size - 1)
        others = jnp.sum(logits, axis=-1) - target
        loss = log_z - confidence * target - low * others
        entropy = -(
            confidence * np.log(confidence)
            + (vocab_size - 1) * low * np.log(low + 1e-20)
        )
        loss = loss - entropy
    z_term = z_loss * jnp.square(log_z)
    return loss + z_term, z_term


def over_labels(
    scores: Array,  # [B, C], minus infinity for a label that a row lacks
    right: Array,  # [B, C] bool
    kind: str | None,
    hinge: float,
) -> Array:  # [B]
    """What a row's right label costs among all of its labels.

    Args:
      scores: what labels are compared by.
      right: of each row its one label; a row without any has a cost of no meaning.
      kind: 'cross_entropy' of the softmax over the scores, or 'perceptron': by how much
        the best of the *other* labels comes nearer than ``hinge`` to the right one.
      hinge: the distance that the perceptron asks for.
    """
    # Finite, so that the gradients of rows without labels are.
    scores = jnp.where(jnp.isfinite(scores), scores, LOWEST)
    own = jnp.sum(jnp.where(right, scores, 0.0), axis=-1)
    if kind == CROSS_ENTROPY:
        return jax.nn.logsumexp(scores, axis=-1) - own
    others = jnp.max(jnp.where(right, LOWEST, scores), axis=-1)
    return jax.nn.relu(hinge + others - own)


def by_chunks(
    function: Callable[..., PyTree], size: int, *arrays: Array
) -> PyTree:  # [B, S, ...] each
    """Applies a function to pieces of the target axis, one after the other.

    What the function makes on its way, such as logits, is there for one piece at a
    time, in the backward pass too, which makes it anew. The axis of rows is left whole,
    so that it stays spread over devices.

    Args:
      function: of arrays [B, s, ...] to arrays [B, s, ...], each position for itself.
      size: the most positions of a piece; with S or more there is one, and nothing is
        made anew.
      *arrays: what is cut, [B, S, ...] each.

    Returns:
      What ``function(*arrays)`` returns.
    """
    rows, length = arrays[0].shape[:2]
    if size >= length:
        return function(*arrays)
    count = -(-length // size)
    size = -(-length // count)

    def cut(array: Array) -> Array:  # [B, S, ...] -> [pieces, B, s, ...]
        rest = array.shape[2:]
        padding = [(0, 0), (0, count * size - length), *[(0, 0)] * len(rest)]
        pieces = jnp.pad(array, padding).reshape(rows, count, size, *rest)
        return jnp.moveaxis(pieces, 1, 0)

    def join(pieces: Array) -> Array:
        array = jnp.moveaxis(pieces, 0, 1)
        return array.reshape(rows, count * size, *array.shape[3:])[:, :length]

    # A scan keeps the pieces apart, which `prevent_cse` would do at a cost.
    again = jax.checkpoint(lambda parts: function(*parts), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(again, tuple(map(cut, arrays))))


def total(values: Array, batch: Batch, num_prompts: int = 1) -> Array:  # [] or [E]
    """The sum over a batch or, where its rows say whose they are, over each prompt's.

    Args:
      values: ``[B, ...]``.
      batch: a batch that several prompts share has ``prompt_index`` [B].
      num_prompts: the number E of prompts that rows may name.
    """
    if "prompt_index" not in batch:
        return jnp.sum(values)
    rows = jnp.sum(values, axis=tuple(range(1, values.ndim)))  # [B]
    own = batch["prompt_index"][:, None] == jnp.arange(num_prompts)[None]  # [B, E]
    return jnp.sum(jnp.where(own, rows[:, None], 0), axis=0)


def group_gap(
    values: Array,  # [B]
    counted: Array,  # [B] bool
    batch: Batch,
    num_prompts: int = 1,
) -> Array:  # [] or [E]
    """How far the means of groups of rows lie apart: the variance of these means.

    That of the risks of groups is what V-REx adds to a loss (Krueger et al. 2021,
    https://arxiv.org/abs/2003.00688, section 3.2). A group without rows has no part in it.

    Args:
      values: of each row.
      counted: which rows have a value.
      batch: ``group_index`` [B] is below `MOST_GROUPS`; see `total` for the rest.
      num_prompts: see `total`.
    """
    rows = counted[:, None] & (
        batch["group_index"][:, None] == jnp.arange(MOST_GROUPS)[None]
    )  # [B, G]
    by_group = lambda x: jax.vmap(
        lambda column: total(column, batch, num_prompts), in_axes=1, out_axes=-1
    )(x)
    counts = by_group(rows.astype(jnp.float32))  # [..., G]
    sums = by_group(jnp.where(rows, values[:, None], 0.0))
    means, there = sums / jnp.maximum(counts, 1.0), counts > 0
    seen = jnp.sum(there.astype(jnp.float32), axis=-1, keepdims=True)
    groups = jnp.maximum(seen, 1.0)
    middle = jnp.sum(means, axis=-1, keepdims=True) / groups
    apart = jnp.where(there, jnp.square(means - middle), 0.0)
    return jnp.sum(apart, axis=-1) / groups[..., 0]


def weights_and_divisor(
    batch: Batch, loss_normalizing_factor: str | float | None, num_prompts: int = 1
) -> tuple[Array, Array | float]:  # [B, S], scalar or [E]
    """Weight of every target token, and what the weighted sum is divided by.

    Args:
      batch: uses ``decoder_loss_weights`` if there, else targets above 0 weigh 1. Of a
        batch that several prompts share (see `total`), each prompt's loss is divided by
        what its own rows hold; ``targets_length`` [B] says how long they are without
        what fills them up to their neighbours.
      loss_normalizing_factor: None sums over tokens; a number divides the sum; or one
        of `NORMALIZING_FACTORS`, T5X's special values. ``AVERAGE_PER_SEQUENCE``
        counts every packed segment as a sequence.
      num_prompts: see `total`.

    Raises:
      UserError: an unknown name.
    """
    targets = batch["decoder_target_tokens"]
    weights = batch.get("decoder_loss_weights")
    if weights is None:
        weights = targets > 0
    weights = weights.astype(jnp.float32)
    if loss_normalizing_factor is None:
        return weights, 1.0
    if not isinstance(loss_normalizing_factor, str):
        return weights, float(loss_normalizing_factor)
    match loss_normalizing_factor.upper():
        case "NUM_REAL_TARGET_TOKENS":
            divided = weights
        case "NUM_TOTAL_TARGET_TOKENS":
            if "prompt_index" not in batch:
                return weights, float(np.prod(targets.shape))
            divided = batch["targets_length"].astype(jnp.float32)
        case "AVERAGE_PER_SEQUENCE":
            weights = _sequence_weights(weights, batch.get("decoder_segment_ids"))
            divided = weights
        case _:
            raise UserError(
                f"loss_normalizing_factor={loss_normalizing_factor!r} is neither a "
                f"number nor one of {', '.join(NORMALIZING_FACTORS)}"
            )
    divisor = total(divided, batch, num_prompts)
    if "prompt_index" in batch:
        # A prompt that has no rows here has a loss of 0, not of 0 / 0.
        divisor = jnp.where(divisor == 0, 1, divisor)
    return weights, divisor


def _sequence_weights(weights: Array, segment_ids: Array | None) -> Array:
    """Weights that sum to 1 within each sequence."""
    if segment_ids is None:
        segment_ids = jnp.ones(weights.shape, jnp.int32)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]  # [B, S, S]
    sums = jnp.sum(jnp.where(same, weights[:, None, :], 0.0), axis=-1)
    return jnp.where(weights > 0, weights / jnp.maximum(sums, 1e-9), 0.0)
