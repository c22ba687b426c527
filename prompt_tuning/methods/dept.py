# SPDX-License-Identifier: Apache-2.0
"""DePT (Shi and Lipani 2024, https://arxiv.org/abs/2309.05173): a short prompt and offsets.

A long prompt is parted into a short one and a matrix of low rank that is added to the
embedded text, place by place: ``[S; X + s A B]`` with ``s = alpha / sqrt(r)``. The short
prompt makes the input shorter, and with it training and answers cheaper.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Leaves, Method, Start, positive, torch_uniform
from prompt_tuning.network.adapters import EMBEDDED, Slot
from prompt_tuning.network.text_slots import Offset
from prompt_tuning.types import Array, Params, PositiveFloat


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

    rank: int = 45
    places: int = 256
    alpha: PositiveFloat = 8.0
    offset_rate: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        positive(self, "rank", "places")
        if not self.offset_rate >= 0:
            raise UserError(f"DePT.offset_rate={self.offset_rate} must be 0 or more")

    def init(self, key: Array, start: Start) -> Leaves:
        """The rows; A uniform within ``1 / sqrt(r)`` and B zero."""
        width = start.rows.shape[1]
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
