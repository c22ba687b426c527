# SPDX-License-Identifier: Apache-2.0
"""Decomposed prompt tuning (DPT, Xiao et al. 2023, https://arxiv.org/abs/2310.10094).

The prompt is a product of low rank, ``P = A B``.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from prompt_tuning.methods.method import Leaves, Method, Start, product, within_width
from prompt_tuning.types import Array, Params, Size


@dataclasses.dataclass(frozen=True)
class DecomposedPrompt(Method, kind="decomposed_prompt"):
    """A prompt of low rank: ``(P + H) r`` numbers in place of ``P H``.

    Attributes:
      rank: r.
    """

    rank: Size = 10
    uses_rows: ClassVar[bool] = False

    def init(self, key: Array, start: Start) -> Leaves:
        """Both factors uniform in [-0.5, 0.5], as the authors have them.

        Raises:
          UserError: the rank is more than the width.
        """
        length, width = start.rows.shape
        within_width(self, "rank", width)
        keys = jax.random.split(key)
        draw = lambda key, *shape: jax.random.uniform(
            key, shape, jnp.float32, -0.5, 0.5
        )
        return {
            "left": draw(keys[0], length, self.rank),
            "right": draw(keys[1], self.rank, width),
        }

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """The product [P, H]."""
        del base
        return product(leaves["left"], leaves["right"])
