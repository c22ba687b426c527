# SPDX-License-Identifier: Apache-2.0
"""Wayward prompts (Khashabi et al. 2022, https://arxiv.org/abs/2112.08348).

A prompt that solves its task and stays near to the words that it starts from, whatever
these say: the loss has ``gamma`` times the squared distance of the prompt's rows to those
of the text, summed over the width and averaged over the rows. It is added once to the
loss of a step, which is a sum over target tokens unless it is normalised.
"""

import dataclasses

import jax.numpy as jnp

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import HELD, Leaves, Method, Start
from prompt_tuning.types import Array, Params


@dataclasses.dataclass(frozen=True)
class WaywardPrompt(Method, kind="wayward_prompt"):
    """P rows of H numbers, near to where they start.

    Attributes:
      gamma: weight of the distance.
    """

    gamma: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if not self.gamma >= 0:
            raise UserError(f"WaywardPrompt.gamma={self.gamma} must be 0 or more")

    def held(self, start: Start) -> Params:
        """The rows of the text."""
        return {"text": start.rows}

    def penalty(self, leaves: Leaves, base: Params) -> Array | float:
        """The weighted distance to the text."""
        distance = jnp.sum(jnp.square(leaves - base[HELD]["text"]), axis=1)
        return self.gamma * jnp.mean(distance)
