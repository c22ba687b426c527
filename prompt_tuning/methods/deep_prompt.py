# SPDX-License-Identifier: Apache-2.0
"""Deep prompts: states of their own before every layer of the encoder.

P-tuning v2 (Liu et al. 2022, https://arxiv.org/abs/2110.07602) puts prompts into every
layer. Here the positions of a prompt get new states before each layer, as the prompts of
per-layer prompt tuning do, instead of running on with what the layer below made of them.
All layers start from the rows of the initialisation, which the paper leaves open.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp

from prompt_tuning.methods.method import Leaves, Method, Start, depth_of
from prompt_tuning.network.adapters import HIDDEN, Slot
from prompt_tuning.network.slots import Rows
from prompt_tuning.types import Array, Params


@dataclasses.dataclass(frozen=True)
class DeepPrompt(Method, kind="deep_prompt"):
    """``L P`` rows of H numbers, L being the layers of the encoder."""

    learning_rate: ClassVar[float] = 0.005

    def init(self, key: Array, start: Start) -> Leaves:
        """The rows, once for each layer."""
        del key
        return {"layers": jnp.tile(start.rows, (depth_of(start.base), 1, 1))}

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """Those of the lowest layer."""
        del base
        return leaves["layers"][0]

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """The states before each layer."""
        del base
        return {f"encoder/layers/{HIDDEN}": Rows.of(leaves["layers"])}
