# SPDX-License-Identifier: Apache-2.0
"""Soft prompts as virtual tokens (Lester et al. 2021, section 2).

A prompt position is an id that lies after the last row of the embedding table: with V
rows and prompts laid end to end, position i of the first prompt is V + i. The data
pipeline writes these ids where the prompt belongs; the network looks frozen rows up in
its table and virtual rows in the `PromptBank`. Masks, relative positions, packing and
batches of mixed tasks need nothing more.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning import prompt_names
from prompt_tuning.errors import UserError
from prompt_tuning.types import Array

# Names of the leaves that a `PromptBank` holds, wherever the network stands.
PROMPT_LEAVES = r"(.*/)?prompts/.*"


def _small(key, shape, dtype):
    """A start for those that are given no other: the paper's random one."""
    return jax.random.uniform(key, shape, dtype, -0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A named run of ``length`` virtual tokens."""

    name: str
    length: int

    def __post_init__(self):
        if self.length < 1:
            raise UserError(
                f"prompt {self.name!r} has length {self.length}; it must be 1 or more"
            )
        prompt_names.check(self.name)


class PromptBank(nn.Module):
    """Holds every prompt as its own float32 leaf ``[P_n, H]``.

    Calling it lays the prompts end to end. The second logical axis is not ``embed``, so
    that prompts stay whole on every device under any partitioning of the model.
    """

    prompts: tuple[Prompt, ...]
    emb_dim: int

    @nn.compact
    def __call__(self) -> Array:  # [sum of P_n, H]
        rows = [
            self.param(
                prompt.name,
                nn.with_logical_partitioning(_small, ("prompt", "prompt_embed")),
                (prompt.length, self.emb_dim),
                jnp.float32,
            )
            for prompt in self.prompts
        ]
        return jnp.concatenate(rows, axis=0)  # pyright: ignore[reportArgumentType]


def virtual_ids(
    prompts: Sequence[Prompt], vocab_size: int
) -> dict[str, np.ndarray]:  # name -> [P_n] int32
    """The ids of every prompt's positions, in the order of the bank.

    >>> virtual_ids([Prompt("a", 2), Prompt("b", 1)], vocab_size=100)["b"]
    array([102], dtype=int32)
    """
    prompt_names.check_different(
        (prompt.name for prompt in prompts), "the prompts", "give each its own name"
    )
    ids, start = {}, vocab_size
    for prompt in prompts:
        ids[prompt.name] = np.arange(start, start + prompt.length, dtype=np.int32)
        start += prompt.length
    return ids
