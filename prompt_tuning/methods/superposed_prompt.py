# SPDX-License-Identifier: Apache-2.0
"""Superposed prompts (SuperPos, Ali Sadraei Javaheri et al. 2024).

Every row is a mixture of m rows of the embedding table, of which the weights are tuned
(https://arxiv.org/abs/2406.05279). The paper's abstract is all that is followed here: the
m pieces are the same for all rows, drawn from the most common ones, and the weights of a
row start at one for the piece of its own place and at zero for all others, which makes
the start that of sampled vocabulary.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from prompt_tuning.errors import UserError
from prompt_tuning.methods import initializers
from prompt_tuning.methods.method import Leaves, Method, Start, product
from prompt_tuning.types import Array, Params, Seed, Size


@dataclasses.dataclass(frozen=True)
class SuperposedPrompt(Method, kind="superposed_prompt"):
    """A prompt of ``P m`` weights over pieces of the vocabulary.

    Attributes:
      pieces: m.
      pieces_seed: draws them.
    """

    pieces: Size = 128
    pieces_seed: Seed = 0
    uses_rows: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 0.01

    def init(self, key: Array, start: Start) -> Leaves:
        """One piece a row.

        Raises:
          UserError: there are fewer pieces than rows.
        """
        del key
        length = start.rows.shape[0]
        if length > self.pieces:
            raise UserError(
                f"{self.pieces} pieces do not start a prompt of length {length}; set "
                f"SuperposedPrompt.pieces to {length} or more"
            )
        return {"weights": jnp.eye(length, self.pieces)}

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """The mixtures [P, H]."""
        table = base["token_embedder"]["embedding"]
        draw = initializers.sampled_vocab(table)
        basis = draw(
            jax.random.key(self.pieces_seed),
            (self.pieces, table.shape[1]),
            jnp.float32,
        )
        return product(leaves["weights"], basis)
