# SPDX-License-Identifier: Apache-2.0
"""Instruction-aware prompt tuning (IAPT, Zhu et al. 2024, https://arxiv.org/abs/2405.18203).

Every layer makes the states of a prompt's positions of those of the text: down to a few
dimensions, pooled over the text by one learned query for each position, through a rational
activation that is learned too, and up (see `network.slots.Generator`).

The authors published no code. Chosen here where the paper is silent: the text is the whole
input of the encoder; each layer overwrites what the layer below left at these positions;
they stand in front, so that T5's relative positions see them there; all is trained on the
same batches, the activation's coefficients at a hundredth of the rate; the projections of neighbouring layers are
one in groups of ``shared_layers``, while the queries and the activation are each layer's
own.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import (
    Leaves,
    Method,
    Start,
    depth_of,
    torch_uniform,
    within_width,
)
from prompt_tuning.network.adapters import HIDDEN, Slot
from prompt_tuning.network.text_slots import Generator
from prompt_tuning.types import Array, Params, Size

# The start of the rational activation, degrees 6 over 5: GELU to 0.003 within [-3, 3].
ABOVE = (-0.002661, 0.499106, 0.459154, 0.135032, 0.008223, -0.002202, -0.000262)
BELOW = (0.092988, 0.190443, 0.024147, -0.007451, 0.000132)


@dataclasses.dataclass(frozen=True)
class InstructionAwarePrompt(Method, kind="instruction_aware_prompt"):
    """``2 m H`` numbers for each group of layers and ``m P + 12`` for each layer.

    Attributes:
      bottleneck: m.
      shared_layers: layers that share their projections; it must divide their number.
    """

    bottleneck: Size = 16
    shared_layers: Size = 1
    uses_rows: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 0.0001

    def init(self, key: Array, start: Start) -> Leaves:
        """Projections as PyTorch starts them, queries too, the activation GELU's.

        Raises:
          UserError: the layers do not part into such groups, or the bottleneck is
            wider than the model.
        """
        depth, (length, width) = depth_of(start.base), start.rows.shape
        if depth % self.shared_layers:
            raise UserError(
                f"InstructionAwarePrompt.shared_layers={self.shared_layers} does not "
                f"divide the {depth} layers of the encoder; choose one that does"
            )
        within_width(self, "bottleneck", width)
        groups, narrow = depth // self.shared_layers, self.bottleneck
        down, pool, up = jax.random.split(key, 3)
        return {
            "down": torch_uniform(down, (groups, width, narrow), width),
            "pool": torch_uniform(pool, (depth, narrow, length), narrow),
            "rational": jnp.tile(jnp.array(ABOVE + BELOW), (depth, 1)),
            "up": torch_uniform(up, (groups, narrow, width), narrow),
        }

    def rate_factors(self) -> Mapping[str, float]:
        """Coefficients of powers up to the sixth take small steps."""
        return {"rational": 0.01}

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """Zeros: the first layer makes its own."""
        del base
        return jnp.zeros((leaves["pool"].shape[2], leaves["up"].shape[2]))

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """A generator before each layer of the encoder."""
        del base
        each = lambda name: jnp.repeat(leaves[name], self.shared_layers, axis=0)
        made = Generator.of(
            each("down"), leaves["pool"], leaves["rational"], each("up")
        )
        return {f"encoder/layers/{HIDDEN}": made}
