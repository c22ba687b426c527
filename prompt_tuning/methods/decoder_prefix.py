# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning of the decoder's self-attention alone, as PEFT has it for T5.

PEFT's ``PREFIX_TUNING`` of an encoder-decoder (0.21) hands its keys and values to the
decoder's cache, from which self-attention takes them and cross-attention does not; the way
it lays them out, layers i and i + L/2 read the same half of what it tunes. Here each layer
has its own. Nothing stands in the encoder's input, so that texts keep its whole length.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax

from prompt_tuning.methods.method import Leaves, Method, Start
from prompt_tuning.methods.prefix_tuning import (
    OWN,
    keys_and_values,
    made_by,
    network,
    shape_of,
)
from prompt_tuning.network.adapters import KEYS, PREFIX, VALUES, Slot
from prompt_tuning.network.slots import Prefix
from prompt_tuning.types import Array, Params, Size


@dataclasses.dataclass(frozen=True)
class DecoderPrefix(Method, kind="decoder_prefix"):
    """Keys and values before the decoder's first position: ``2 L P N D`` numbers.

    Attributes:
      length: P.
      hidden: width of the network that makes keys and values (PEFT's
        ``prefix_projection``), which is not saved; None tunes these themselves.
    """

    length: Size = 20
    hidden: Size | None = None
    has_prompt: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 0.01

    def init(self, key: Array, start: Start) -> Leaves:
        """What the layers' own projections make of rows of the table; or the network."""
        if self.hidden is not None:
            return network(key, start.base, OWN, self.length, self.hidden)
        drawn = jax.random.choice(key, start.table, (self.length,))
        return keys_and_values(start.base, OWN, drawn)

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """The prefix in its place."""
        if self.hidden is not None:
            leaves = made_by(leaves, shape_of(base, OWN)[0])
        return {f"{OWN}/{PREFIX}": Prefix.of(leaves[KEYS], leaves[VALUES])}
