# SPDX-License-Identifier: Apache-2.0
"""The decoder's attentions where one token is decoded at a time.

The K decodes of a row are the queries of one row: they share the keys of its encoder
positions, and a projection sees them side by side. What they wrote before lies behind one
another, step by step and decode by decode, so that a step writes one block in place; which
of it a decode has said, a mask tells.

Parameters and sites are those of `layers.Attention`.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import spmd

from prompt_tuning.network import adapters, layers, saved_activations
from prompt_tuning.network.adapters import Where
from prompt_tuning.types import Array, DType

# Written positions are read in blocks: of so many steps at first, then twice as many.
FIRST_STEPS = 32


class KeysValues(NamedTuple):
    """Keys and values with the heads in front, as the products want them.

    Attributes:
      keys: [..., B, N, M, D].
      values: [..., B, N, M, D].
    """

    keys: Array
    values: Array


class Past(NamedTuple):
    """What a step attends to beside its own token, the same for all layers.

    Attributes:
      step: tokens decoded so far: [].
      summand: of the attention logits of every position, those not written yet masked:
        [B or 1, N, K, M].
      prefix: positions that lie before the first step's, P.
    """

    step: Array
    summand: Array
    prefix: int


class _Attention(nn.Module):
    """The projections of an attention; `layers.Attention` says what they are.

    Attributes:
      num_heads: heads N.
      head_dim: width D of a head.
      width: H.
      dtype: dtype of the computation; the softmax is float32.
      int8_products: of the projections; see `layers.Dense`.
    """

    num_heads: int
    head_dim: int
    width: int
    dtype: DType
    int8_products: bool = False

    def setup(self):
        joined = self.num_heads * self.head_dim
        dense = lambda features, *axes: layers.Dense(
            features, axes, self.dtype, int8_products=self.int8_products
        )
        self.query, self.key, self.value = (
            dense(joined, "embed", "joined_kv") for _ in range(3)
        )
        self.out = dense(self.width, "joined_kv", "embed")

    def _heads_in_front(self, y: Array) -> Array:  # [B, M, N D] -> [B, N, M, D]
        y = y.reshape(*y.shape[:-1], self.num_heads, self.head_dim)
        y = jnp.swapaxes(y, 1, 2)
        return spmd.with_logical_constraint(y, ("batch", "heads", "length", "kv"))

    def _finish(self, y: Array, where: Where | None) -> Array:  # [B, N, K, D]
        y = jnp.swapaxes(y, 1, 2)
        return self.out(y.reshape(*y.shape[:2], -1), where)


class MemoryAttention(_Attention):
    """Attention to the encoder's output, which is projected once."""

    def memorize(self, encoded: Array, where: Where | None) -> KeysValues:
        """Keys and values of encoder positions [B, M, H]."""
        sites = ((self.key, adapters.KEYS), (self.value, adapters.VALUES))
        return KeysValues(
            *(
                self._heads_in_front(
                    adapters.at(self, site, project(encoded, where), where)
                )
                for project, site in sites
            )
        )

    def __call__(
        self,
        x: Array,  # [B, K, H]
        memory: KeysValues,
        summand: Array,  # [B, 1, 1, M]
        where: Where | None,
    ) -> Array:  # [B, K, H]
        query = self._heads_in_front(self.query(x, where))
        logits = jnp.einsum("bnkd,bnmd->bnkm", query, memory.keys) + summand
        weights = saved_activations.softmax(logits)
        y = jnp.einsum("bnkm,bnmd->bnkd", weights, memory.values)
        return self._finish(y, where)


class SelfAttention(_Attention):
    """Attention to the tokens that a decode has written, and to its newest one."""

    def prefix(
        self, batch: int, where: Where | None
    ) -> tuple[KeysValues, Array]:  # [B, N, P, D] each, [B or 1, 1, 1, P] bool
        """Keys and values before those of the first token, and which rows have them."""
        nothing = jnp.zeros((batch, 0, self.num_heads, self.head_dim), self.dtype)
        key, value, mask = adapters.at(
            self,
            adapters.PREFIX,
            (nothing, nothing, jnp.ones((1, 1, 1, 0), bool)),
            where,
        )
        in_front = lambda y: jnp.swapaxes(y, 1, 2)
        return KeysValues(in_front(key), in_front(value)), mask

    def __call__(
        self,
        x: Array,  # [B, K, H]
        cache: KeysValues,  # [B, N, P + S K, D] each
        past: Past,
        where: Where | None,
    ) -> tuple[Array, KeysValues]:  # [B, K, H], and the cache
        """Writes the tokens' keys and values, and attends.

        Writing first leaves one array that all later operations read, so that compilers
        need no copy of what it was.
        """
        query, key, value = (
            self._heads_in_front(project(x, where))
            for project in (self.query, self.key, self.value)
        )
        decodes, size = x.shape[1], cache.keys.shape[2]
        place = past.prefix + past.step * decodes
        cache = KeysValues(
            *(
                jax.lax.dynamic_update_slice_in_dim(old, new, place, axis=2)
                for old, new in zip(cache, (key, value), strict=True)
            )
        )

        def attend(positions: int) -> Array:  # [B, N, K, D]
            keys, values = (array[:, :, :positions] for array in cache)
            logits = jnp.einsum("bnkd,bnmd->bnkm", query, keys)
            weights = saved_activations.softmax(logits + past.summand[..., :positions])
            return jnp.einsum("bnkm,bnmd->bnkd", weights, values)

        blocks = blocks_of((size - past.prefix) // decodes)
        branches = [
            lambda steps=steps: attend(past.prefix + steps * decodes)
            for steps in blocks
        ]
        reached = sum((past.step >= steps).astype(jnp.int32) for steps in blocks[:-1])
        y = jax.lax.switch(reached, branches) if blocks[1:] else branches[0]()
        return self._finish(y, where), cache


def blocks_of(steps: int) -> list[int]:
    """How many steps' positions are read at a time, up to all of them.

    >>> blocks_of(20), blocks_of(100)
    ([20], [32, 64, 100])
    """
    found, size = [], FIRST_STEPS
    while size < steps:
        found.append(size)
        size *= 2
    return [*found, steps]
