# SPDX-License-Identifier: Apache-2.0
"""Decoder prompts: states of their own before the decoder's first position.

Prompt tuning puts its rows before the encoder's input. Here P positions stand before the
decoder's, with states of their own in every layer, as deep prompts have in the encoder
(P-tuning v2, Liu et al. 2022, https://arxiv.org/abs/2110.07602, puts prompts into both).
Of such a position nothing is read but the keys and values of its state, which the layer's
own norm and projections make of it, so that these are what is saved. All layers start from
the same rows of the embedding table.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from prompt_tuning.methods.method import Leaves, Method, Start
from prompt_tuning.methods.prefix_tuning import OWN, keys_and_values, shape_of
from prompt_tuning.network.adapters import KEYS, PREFIX, VALUES, Slot
from prompt_tuning.network.slots import Prefix
from prompt_tuning.types import Array, Params, Size


@dataclasses.dataclass(frozen=True)
class DecoderPrompt(Method, kind="decoder_prompt"):
    """``L P`` rows of H numbers, L being the layers of the decoder.

    Attributes:
      length: P.
    """

    length: Size = 20
    has_prompt: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 0.005

    def init(self, key: Array, start: Start) -> Leaves:
        """Rows of the table, once for each layer."""
        depth, _, _ = shape_of(start.base, OWN)
        drawn = jax.random.choice(key, start.table, (self.length,))
        return {"layers": jnp.tile(drawn.astype(jnp.float32), (depth, 1, 1))}

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """The keys and values of the states."""
        made = keys_and_values(base, OWN, leaves["layers"])
        return {f"{OWN}/{PREFIX}": Prefix.of(made[KEYS], made[VALUES])}
