# SPDX-License-Identifier: Apache-2.0
"""IA3 (Liu et al. 2022, https://arxiv.org/abs/2205.05638): activations that are scaled.

A vector of ones for the keys and values of every attention and for the hidden units of
every MLP; what it multiplies is learned. The start is the base model.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp

from prompt_tuning import trees
from prompt_tuning.methods import kernels
from prompt_tuning.methods.method import Leaves, Method, Start
from prompt_tuning.network.adapters import INPUT, OUTPUT, Slot
from prompt_tuning.network.slots import Scale
from prompt_tuning.types import Array, Params


@dataclasses.dataclass(frozen=True)
class IA3(Method, kind="ia3"):
    """Scales at the outputs of keys and values and at the input of ``wo``."""

    has_prompt: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 0.003

    def init(self, key: Array, start: Start) -> Leaves:
        """Ones."""
        del key
        leaves = {}
        for path, shape in kernels.find(start.base, ("key", "value", "wo")).items():
            layers, inputs, outputs = shape
            is_mlp = path.endswith("/wo")
            site, width = (INPUT, inputs) if is_mlp else (OUTPUT, outputs)
            leaves[f"{path}/{site}"] = jnp.ones((layers, width))
        return trees.unflatten(leaves)

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """A scale at each site."""
        del base
        return {site: Scale.of(by) for site, by in trees.flatten(leaves).items()}
