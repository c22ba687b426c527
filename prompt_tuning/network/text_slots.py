# SPDX-License-Identifier: Apache-2.0
"""Slots that read the text of their row, or its places, where prompts know no text.

Rows may be packed: what a slot makes of a text it makes of each example's own.
"""

from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from prompt_tuning.network.adapters import Where
from prompt_tuning.network.layers import MASKED
from prompt_tuning.network.slots import ByOwner
from prompt_tuning.types import Array


@flax.struct.dataclass
class Offset(ByOwner):
    """Adds to the text a product of low rank that depends on the place in it (DePT).

    Text beyond the places that it knows is left as it is.

    Attributes:
      a: of each place in a text its row: [L, K, A, r].
      b: [L, K, r, width].
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("a", "b")
    a: Array
    b: Array
    place: Array
    start: Array

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Those of the value that passes."""
        return {"": (self.b.shape[0], self.b.shape[3])}

    def __call__(self, y: Array, where: Where, x: Array) -> Array:  # [B, T, width]
        """Adds to each piece of text what belongs to its place."""
        del x
        a, b, _ = self._own(where)
        text = is_text(where)
        count = jnp.cumsum(text, axis=1)
        # What lies before the example that a position belongs to.
        before = jnp.roll(where.segments, 1, axis=1).at[:, 0].set(0)
        begins = where.segments != before
        passed = jax.lax.cummax(jnp.where(begins, count - text, 0), axis=1)
        place = count - 1 - passed
        known = text & (place < a.shape[1])
        place = jnp.clip(place, 0, a.shape[1] - 1)
        low = jnp.take_along_axis(a, place[..., None], axis=1)
        added = jnp.einsum(
            "btr,bro->bto", low, jnp.broadcast_to(b, (len(y), *b.shape[1:]))
        )
        return y + jnp.where(known[..., None], added, 0.0).astype(y.dtype)


@flax.struct.dataclass
class Generator(ByOwner):
    """Makes the states of a prompt's positions of those of the text (IAPT).

    With h the states of the text, n of them: ``z = h down``, ``A = softmax(z pool)`` over
    the text, and position i gets ``rational(A_i z) up``, where ``rational(x)`` is
    ``sum_j c_j x^j / (1 + |sum_j d_j x^j|)`` with c of degree 6 and d of 5 from 1.

    Attributes:
      down: [L, K, H, m].
      pool: one column for each position: [L, K, m, P].
      rational: c and then d: [L, K, 12].
      up: [L, K, m, H].
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("down", "pool", "rational", "up")
    NUMERATOR: ClassVar[int] = 7
    down: Array
    pool: Array
    rational: Array
    up: Array
    place: Array
    start: Array

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Those of the value that passes."""
        return {"": (self.down.shape[0], self.down.shape[2])}

    def __call__(self, y: Array, where: Where, x: Array) -> Array:  # [B, T, H]
        """The states, those of prompts made anew."""
        del x
        down, pool, rational, up, start = self._own(where)
        each = lambda own: jnp.broadcast_to(own, (len(y), *own.shape[1:]))
        index = where.positions - start[:, None]
        own = jax.nn.one_hot(index, pool.shape[2], dtype=jnp.float32)  # [B, T, P]
        own = jnp.where((where.positions >= 0)[..., None], own, 0.0)
        z = jnp.einsum("bth,bhm->btm", y, each(down).astype(y.dtype))
        z = z.astype(jnp.float32)
        score = jnp.einsum(
            "btp,bkp->btk", own, jnp.einsum("bkm,bmp->bkp", z, each(pool))
        )
        seen = where.segments[:, :, None] == where.segments[:, None, :]
        seen &= is_text(where)[:, None, :]
        weights = jax.nn.softmax(jnp.where(seen, score, MASKED), axis=-1)
        pooled = jnp.einsum("btk,bkm->btm", weights, z)
        made = jnp.einsum("btm,bmh->bth", self._activate(pooled, rational), each(up))
        here = own.sum(-1) > 0
        if self.place.size:
            here &= (self.place[where.owner] > 0)[:, None]
        return jnp.where(here[..., None], made.astype(y.dtype), y)

    def _activate(self, x: Array, rational: Array) -> Array:  # [B, T, m], [B or 1, 12]
        coefficient = lambda i: rational[:, i, None, None]
        above = sum(coefficient(j) * x**j for j in range(self.NUMERATOR))
        below = sum(
            coefficient(self.NUMERATOR - 1 + j) * x**j
            for j in range(1, rational.shape[1] - self.NUMERATOR + 1)
        )
        return above / (1.0 + jnp.abs(below))


@flax.struct.dataclass
class Mixture(ByOwner):
    """Adds to a prompt a mixture of M others that the text chooses (ATTEMPT).

    With x the largest values of the text's embeddings and k_j those of prompt j's rows,
    the weights are ``softmax_j(k_j . LN(silu(x down) up))``, LN being the norm of
    layers with ``scale`` and ``bias``, and position i gets ``sum_j weight_j P_j[i]``.

    Attributes:
      prompts: those that are mixed: [L, K, M, P, H].
      down: [L, K, H, r].
      up: [L, K, r, H].
      scale: [L, K, H].
      bias: [L, K, H].
      keys: the largest values of each prompt's rows: [L, K, M, H].
      is_there: 1 for those of an owner that mixes fewer than M too: [L, K, M].
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("prompts", "down", "up", "scale", "bias")
    DERIVED = ("keys", "is_there")
    EPSILON: ClassVar[float] = 1e-5
    prompts: Array
    down: Array
    up: Array
    scale: Array
    bias: Array
    keys: Array
    is_there: Array
    place: Array
    start: Array

    @classmethod
    def of(cls, *arrays: Array) -> "Mixture":
        """That of one owner: `FIELDS` without the axis K."""
        prompts = arrays[0]
        return super().of(*arrays, prompts.max(axis=2), jnp.ones(prompts.shape[:2]))

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Those of the value that passes."""
        return {"": (self.down.shape[0], self.down.shape[2])}

    def __call__(self, y: Array, where: Where, x: Array) -> Array:  # [B, T, H]
        """The embedded input, prompts with what is mixed for them."""
        del x
        prompts, down, up, scale, bias, keys, is_there, start = self._own(where)
        each = lambda own: jnp.broadcast_to(own, (len(y), *own.shape[1:]))
        text = largest_of_text(y.astype(jnp.float32), where)
        low = jax.nn.silu(jnp.einsum("bth,bhr->btr", text, each(down)))
        query = jnp.einsum("btr,brh->bth", low, each(up))
        query = jax.nn.standardize(query, epsilon=self.EPSILON)
        query = query * scale[:, None] + bias[:, None]
        score = jnp.einsum("bth,bmh->btm", query, each(keys))
        score = jnp.where(is_there[:, None] > 0, score, MASKED)
        weights = jax.nn.softmax(score, axis=-1)
        index = where.positions - start[:, None]
        here = (where.positions >= 0) & (index >= 0) & (index < prompts.shape[2])
        index = jnp.clip(index, 0, prompts.shape[2] - 1)[..., None]
        # One after the other: rows of all of them at once would be M times the input.
        added = jnp.zeros(y.shape, jnp.float32)
        for number in range(prompts.shape[1]):
            own = jnp.take_along_axis(each(prompts[:, number]), index, axis=1)
            added += weights[..., number : number + 1] * own
        return y + jnp.where(here[..., None], added, 0.0).astype(y.dtype)


@flax.struct.dataclass
class Visibility(ByOwner):
    """Says which kinds of the encoder's positions attend to which.

    Attributes:
      sees: 1 where positions of the first kind attend to those of the second, text being
        kind 0 and prompts kind 1: [L, K, 2, 2].
      ahead: 1 where positions of a prompt attend to later ones of it, too: [L, K, 1].
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("sees", "ahead")
    NEUTRAL = 1.0
    sees: Array
    ahead: Array
    place: Array
    start: Array

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """The kinds of positions."""
        return {"": (self.sees.shape[0], self.sees.shape[2])}

    def __call__(self, y: Array, where: Where, x: Array) -> Array:  # [B, 1, T, T] bool
        """The mask, narrowed."""
        del x
        sees, ahead, _ = self._own(where)
        prompt = where.positions >= 0
        kinds = jnp.stack([~prompt, prompt], axis=-1).astype(jnp.float32)  # [B, T, 2]
        allowed = jnp.einsum(
            "btq,bqk,bsk->bts",
            kinds,
            jnp.broadcast_to(sees, (len(y), *sees.shape[1:])),
            kinds,
        )
        later = where.positions[:, None, :] > where.positions[:, :, None]
        hidden = later & prompt[:, :, None] & (ahead[..., None] == 0)
        return y & ((allowed > 0) & ~hidden)[:, None]


def largest_of_text(y: Array, where: Where) -> Array:  # [B, T, H] -> [B, T, H]
    """Of each position the largest values of its own example's text; 0 without text.

    Nothing is differentiated through them: text is embedded by what nobody moves.
    """
    values = jnp.where(is_text(where)[..., None], jax.lax.stop_gradient(y), MASKED)

    def of_row(values: Array, segments: Array) -> Array:  # [T, H], [T]
        count = len(segments) + 1  # Examples of a row have numbers up to T.
        return jax.ops.segment_max(values, segments, count)[segments]

    found = jax.vmap(of_row)(values, where.segments)
    return jnp.where(found > MASKED / 2, found, 0.0)


def is_text(where: Where) -> Array:  # [B, T] bool
    """Which positions hold text."""
    return (where.segments > 0) & (where.positions < 0)
