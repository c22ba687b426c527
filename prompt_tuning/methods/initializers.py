# SPDX-License-Identifier: Apache-2.0
"""How a soft prompt starts (Lester et al. 2021, section 3.2).

Every initialiser has Flax's signature ``(key, shape, dtype) -> array`` with shape
``(P, H)``. They take arrays and token ids, never files: reading a vocabulary or a
checkpoint is the caller's business.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning.errors import UserError
from prompt_tuning.types import Array, Initializer

# The paper draws from the 5,000 most common pieces; SentencePiece orders them so.
PAPER_POPULATION = 5000


def random_uniform(scale: float = 0.5) -> Initializer:
    """Uniform in ``[-scale, scale]`` (the paper's 0.5)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -scale, scale)

    return init


def sampled_vocab(
    table: Array, *, population: int = PAPER_POPULATION, first: int = 3
) -> Initializer:
    """Rows drawn from the most common pieces of the vocabulary.

    Args:
      table: embedding table ``[V, H]``.
      population: how many pieces to draw from, the most common first.
      first: the first id to draw: ids below it (padding, end of sentence, unknown)
        stand for no piece of text.

    Rows are drawn without replacement unless the prompt is longer than the population.
    """

    def init(key, shape, dtype=jnp.float32):
        _check_width(shape, table)
        size = min(population, table.shape[0] - first)
        rows = jax.random.choice(key, size, (shape[0],), replace=shape[0] > size)
        return jnp.asarray(table)[rows + first].astype(dtype)

    return init


def class_labels(
    table: Array, labels: Sequence[Sequence[int]], fallback: Initializer
) -> Initializer:
    """One row for each class label; ``fallback`` gives the remaining rows.

    Args:
      table: embedding table ``[V, H]``.
      labels: the token ids of each label; a label of several tokens starts as their
        mean.
      fallback: initialiser of the rows that no label is left for.

    Raises:
      UserError: a label without tokens, or more labels than prompt positions.
    """
    empty = [i for i, ids in enumerate(labels) if len(ids) == 0]
    if empty or not labels:
        raise UserError(
            "class label initialisation needs labels of one token or more, e.g. "
            f"('positive', 'negative'); empty: {empty or 'all'}"
        )

    def init(key, shape, dtype=jnp.float32):
        _check_width(shape, table)
        if len(labels) > shape[0]:
            raise UserError(
                f"{len(labels)} class labels do not fit a prompt of length {shape[0]}"
            )
        rows = [jnp.mean(jnp.asarray(table)[np.asarray(ids)], axis=0) for ids in labels]
        labelled = jnp.stack(rows).astype(dtype)
        rest = (shape[0] - len(labels), shape[1])
        if rest[0] == 0:
            return labelled
        return jnp.concatenate([labelled, fallback(key, rest, dtype)])

    return init


def from_text(table: Array, ids: Sequence[int], fallback: Initializer) -> Initializer:
    """The rows of a text's tokens; ``fallback`` gives the remaining rows.

    Raises:
      UserError: an empty text, or one of more tokens than the prompt has positions.
    """
    if len(ids) == 0:
        raise UserError("text initialisation needs a text of one token or more")

    def init(key, shape, dtype=jnp.float32):
        if len(ids) > shape[0]:
            raise UserError(
                f"the initial text has {len(ids)} tokens, the prompt only {shape[0]} "
                f"positions; set PROMPT_LENGTH={len(ids)} or shorten the text"
            )
        return class_labels(table, [[i] for i in ids], fallback)(key, shape, dtype)

    return init


def from_saved(prompt: Array) -> Initializer:
    """A prompt that was tuned before (soft prompt transfer, Vu et al. 2022).

    Raises:
      UserError: the saved prompt has another length or width.
    """

    def init(key, shape, dtype=jnp.float32):
        del key
        if tuple(prompt.shape) != tuple(shape):
            raise UserError(
                f"the saved prompt is {list(prompt.shape)}, the model wants "
                f"{list(shape)}; set PROMPT_LENGTH={prompt.shape[0]} or use the model "
                "it was tuned on"
            )
        return jnp.asarray(prompt, dtype)

    return init


def _check_width(shape: Sequence[int], table: Array) -> None:
    if shape[1] != table.shape[1]:
        raise UserError(
            f"prompt width {shape[1]} is not the embedding width {table.shape[1]}"
        )
