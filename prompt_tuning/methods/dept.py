# SPDX-License-Identifier: Apache-2.0
"""DePT (Shi and Lipani 2024, https://arxiv.org/abs/2309.05173): a short prompt and offsets.

A long prompt is parted into a short one and a matrix of low rank that is added to the
embedded text, place by place: ``[S; X + s A B]`` with ``s = alpha / sqrt(r)``. The short
prompt makes the input shorter, and with it training and answers cheaper.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from prompt_tuning.methods.method import (
    Leaves,
    Method,
    Start,
    torch_uniform,
    within_width,
)
from prompt_tuning.network.adapters import EMBEDDED, Slot
from prompt_tuning.network.text_slots import Offset
from prompt_tuning.types import Array, NonNegativeFloat, Params, PositiveFloat, Size


@dataclasses.dataclass(frozen=True)
class DePT(Method, kind="dept"):
    """``P H + (A + H) r`` numbers, A being the places that have an offset.

    Attributes:
      rank: r.
      places: A; text beyond them has no offset.
      alpha: scales the offsets.
      offset_rate: their learning rate as a multiple of the prompt's. The authors search
        it: from 5e-4 to the prompt's own 0.3.
    """

    rank: Size = 45
    places: Size = 256
    alpha: PositiveFloat = 8.0
    offset_rate: NonNegativeFloat = 1.0

    def init(self, key: Array, start: Start) -> Leaves:
        """The rows; A uniform within ``1 / sqrt(r)`` and B zero.

        Raises:
          UserError: the rank is more than the width.
        """
        width = start.rows.shape[1]
        within_width(self, "rank", width)
        return {
            "prompt": start.rows,
            "places": torch_uniform(key, (self.places, self.rank), self.rank),
            "up": jnp.zeros((self.rank, width)),
        }

    def rate_factors(self) -> Mapping[str, float]:
        """The offsets' own."""
        return {"places": self.offset_rate, "up": self.offset_rate}

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """The short prompt."""
        del base
        return leaves["prompt"]

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """The offsets of the embedded text."""
        del base
        up = leaves["up"] * (self.alpha / jnp.sqrt(self.rank))
        return {f"encoder/{EMBEDDED}": Offset.of(leaves["places"][None], up[None])}
