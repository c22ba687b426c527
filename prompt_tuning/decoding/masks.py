# SPDX-License-Identifier: Apache-2.0
"""What may not be chosen, as logits."""

import jax
import jax.numpy as jnp

from prompt_tuning.types import Array

# The log-probability of what must not be chosen: finite, because differences of it are
# taken.
NEG_INF = -1.0e7


def is_possible(log_probs: Array) -> Array:
    """Where sums of log-probabilities hold no `NEG_INF`; no real decode gets near it."""
    return log_probs > NEG_INF / 2


def keep_topk(logits: Array, k: int) -> Array:  # [R, V] -> same
    """Masks all but the k greatest logits of a row; ties with the k-th stay."""
    k = min(k, logits.shape[-1])
    least = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits >= least, logits, NEG_INF)


def keep_topp(logits: Array, p: float) -> Array:  # [R, V] -> same
    """Masks all but the fewest likeliest tokens of total probability p or more."""
    probs = jax.nn.softmax(logits)
    descending = -jnp.sort(-probs, axis=-1)
    before = jnp.cumsum(descending, axis=-1) - descending
    least = jnp.min(
        jnp.where(before < p, descending, 1.0), axis=-1, keepdims=True
    )  # [R, 1]
    return jnp.where(probs >= least, logits, NEG_INF)
