# SPDX-License-Identifier: Apache-2.0
"""An optimizer that ends at the mean of its last iterates, for `recipe.py`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from prompt_tuning.training.optimizers import Optimizer


def ending_at_the_average(
    tx: Optimizer, steps: int, share: float
) -> optax.GradientTransformation:
    """``tx``, whose last step leads to the mean of the last iterates (tail averaging).

    Iterates before it are those of ``tx``, and so are their gradients.

    Args:
      tx: what is averaged.
      steps: of the run.
      share: of the steps whose iterates are averaged, the last one's among them.
    """
    tail = max(1, round(share * steps))

    def init(params: Any) -> tuple[Any, Any, jax.Array]:
        total = jax.tree.map(jnp.zeros_like, params)
        return tx.init(params), total, jnp.zeros((), jnp.int32)

    def update(updates: Any, state: tuple[Any, Any, jax.Array], params: Any):
        inner, total, step = state
        moves, inner = tx.update(updates, inner, params)
        counted = step >= steps - tail
        total = jax.tree.map(
            lambda x, p, move: x + jnp.where(counted, p + move, 0.0),
            total,
            params,
            moves,
        )
        moves = jax.tree.map(
            lambda x, p, move: jnp.where(step == steps - 1, x / tail - p, move),
            total,
            params,
            moves,
        )
        return moves, (inner, total, step + 1)

    averaging = optax.GradientTransformation(init, update)
    return Optimizer.of(averaging, tx.learning_rate, **tx.values, averaged=tail)
