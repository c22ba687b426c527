# SPDX-License-Identifier: Apache-2.0
"""Multitask prompt tuning (MPT, Wang et al. 2023, https://arxiv.org/abs/2303.02861).

A prompt of a task is a shared one times a matrix of rank one, element by element:
``P_k = P * (u_k v_k^T)``. Both vectors start as ones, so that the start is the shared
prompt itself: the start of PEFT, small random numbers, wipes it out.

To carry what several tasks share to another, start from a prompt of all of them (a run
over their mixture), and tune this from there.
"""

import dataclasses

import jax.numpy as jnp

from prompt_tuning.methods.method import Leaves, Method, Start
from prompt_tuning.types import Array, Params


@dataclasses.dataclass(frozen=True)
class MultitaskPrompt(Method, kind="multitask_prompt"):
    """``P + H`` numbers of the task's own and the shared ``P H``."""

    def init(self, key: Array, start: Start) -> Leaves:
        """The rows are the shared prompt; the task's vectors are ones."""
        del key
        length, width = start.rows.shape
        own = {"left": jnp.ones(length), "right": jnp.ones(width)}
        return {"shared": start.rows, **own}

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """The product [P, H]."""
        del base
        return leaves["shared"] * leaves["left"][:, None] * leaves["right"][None]
