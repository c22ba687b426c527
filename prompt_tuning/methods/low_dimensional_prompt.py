# SPDX-License-Identifier: Apache-2.0
"""Ultra-low-dimensional prompt tuning (ULPT, Wu et al. 2025).

The rows are tuned in r dimensions and brought to H by a random projection R that is
never stored, since a seed makes it: ``P = (Z R) * scale + shift``
(https://arxiv.org/abs/2502.04501).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from prompt_tuning.methods.method import Leaves, Method, Start, product, within_width
from prompt_tuning.types import Array, Params, Seed, Size


@dataclasses.dataclass(frozen=True)
class LowDimensionalPrompt(Method, kind="low_dimensional_prompt"):
    """A prompt of ``P r + 2 H`` numbers.

    Attributes:
      dimensions: r.
      projection_seed: makes R.
    """

    dimensions: Size = 64
    projection_seed: Seed = 0
    uses_rows: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 0.6

    def init(self, key: Array, start: Start) -> Leaves:
        """Z normal, the scale one and the shift zero.

        Raises:
          UserError: there are more dimensions than the width.
        """
        length, width = start.rows.shape
        within_width(self, "dimensions", width)
        return {
            "low": jax.random.normal(key, (length, self.dimensions)),
            "scale": jnp.ones(width),
            "shift": jnp.zeros(width),
        }

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """What the projection makes of them: [P, H]."""
        del base
        shape = (self.dimensions, leaves["scale"].shape[0])
        projection = jax.nn.initializers.xavier_uniform()(
            jax.random.key(self.projection_seed), shape, jnp.float32
        )
        scale, shift = leaves["scale"][None], leaves["shift"][None]
        return product(leaves["low"], projection) * scale + shift
