# SPDX-License-Identifier: Apache-2.0
"""Strategies whose decodes do not meet: greedy and sampling."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from prompt_tuning.decoding.loop import Mask, check_lengths
from prompt_tuning.decoding.masks import keep_topk, keep_topp
from prompt_tuning.errors import UserError
from prompt_tuning.types import (
    Array,
    Decodes,
    NonNegativeFloat,
    NonNegativeInt,
    Share,
    TokenLength,
)

# Below this temperature sampling is greedy: dividing by it would overflow.
MIN_TEMPERATURE = 1e-4


class _Decodes(NamedTuple):
    tokens: Array  # [R, S]
    scores: Array  # [R]
    ended: Array  # [R] bool
    rng: Array | None


class _TokenByToken:
    """Extends every decode by the token that ``_choose`` takes."""

    max_decode_len: int
    num_decodes: int
    eos_id: int
    reorders: ClassVar[bool] = False

    def _choose(
        self, logits: Array, mask: Mask, rng: Array | None
    ) -> tuple[Array, Array, Array | None]:
        """Tokens [R], the log-probabilities [R, V] that score them, the next key."""
        raise NotImplementedError

    def start(self, batch: int, rng: Array | None) -> _Decodes:
        """See `Strategy`."""
        rows = batch * self.num_decodes
        return _Decodes(
            tokens=jnp.zeros((rows, self.max_decode_len), jnp.int32),
            scores=jnp.zeros(rows, jnp.float32),
            ended=jnp.zeros(rows, bool),
            rng=rng,
        )

    def unfinished(self, state: _Decodes) -> Array:
        """See `Strategy`."""
        return ~jnp.all(state.ended)

    def extend(
        self, state: _Decodes, step: Array, logits: Array, mask: Mask, given: Array
    ) -> tuple[_Decodes, Array, None]:
        """See `Strategy`."""
        token, log_probs, rng = self._choose(logits, mask, state.rng)
        log_prob = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
        given = jnp.repeat(given, self.num_decodes)
        token = jnp.where(given > 0, given, token)
        token = jnp.where(state.ended, 0, token).astype(jnp.int32)
        counted = (given == 0) & ~state.ended
        places = (jnp.arange(len(token)) if step.ndim else slice(None), step)
        state = _Decodes(
            tokens=state.tokens.at[places].set(token),
            scores=state.scores + jnp.where(counted, log_prob, 0.0),
            ended=state.ended | (token == self.eos_id),
            rng=rng,
        )
        return state, token, None

    def finish(self, state: _Decodes) -> tuple[Array, Array]:
        """See `Strategy`."""
        scores = state.scores.reshape(-1, self.num_decodes)
        tokens = state.tokens.reshape(*scores.shape, -1)
        order = jnp.argsort(scores, axis=1)
        return (
            jnp.take_along_axis(tokens, order[..., None], axis=1),
            jnp.take_along_axis(scores, order, axis=1),
        )


@dataclasses.dataclass(frozen=True)
class Greedy(_TokenByToken):
    """Takes the likeliest token at every step; scores are log-probabilities.

    Attributes:
      max_decode_len: tokens S to decode at most.
      eos_id: the token after which a row holds padding only.
    """

    max_decode_len: TokenLength
    eos_id: NonNegativeInt = 1

    num_decodes = 1

    def __post_init__(self):
        check_lengths(self)

    def _choose(
        self, logits: Array, mask: Mask, rng: Array | None
    ) -> tuple[Array, Array, Array | None]:
        return *_likeliest(logits, mask), rng


@dataclasses.dataclass(frozen=True)
class Sampling(_TokenByToken):
    """Draws tokens from the distribution that temperature, topk or topp leave.

    Scores are log-probabilities under that distribution, not under the network's.

    Attributes:
      max_decode_len: tokens S to decode at most.
      temperature: divides the logits; 0 is `Greedy`.
      topk: draw from the k likeliest tokens (more if they tie); 0 from all.
      topp: draw from the fewest tokens whose probability adds up to p; 0 from all.
      num_decodes: independent samples K of each row.
      eos_id: the token after which a row holds padding only.
    """

    max_decode_len: TokenLength
    temperature: NonNegativeFloat = 1.0
    topk: NonNegativeInt = 0
    topp: Share = 0.0
    num_decodes: Decodes = 1
    eos_id: NonNegativeInt = 1

    def __post_init__(self):
        check_lengths(self)
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} must be 0 or more")
        if self._is_greedy and self.num_decodes > 1:
            raise UserError(
                f"temperature={self.temperature} gives num_decodes={self.num_decodes} "
                "equal decodes: raise it or set num_decodes=1"
            )
        if self.topk < 0 or not 0 <= self.topp <= 1:
            raise UserError(
                f"topk={self.topk} must be 0 or more and topp={self.topp} in [0, 1]"
            )
        if self.topk and self.topp:
            raise UserError(
                f"topk={self.topk} and topp={self.topp} exclude each other: set one to 0"
            )

    @property
    def _is_greedy(self) -> bool:
        return self.temperature <= MIN_TEMPERATURE

    def start(self, batch: int, rng: Array | None) -> _Decodes:
        """See `Strategy`.

        Raises:
          ValueError: there is no key.
        """
        if rng is None and not self._is_greedy:
            raise ValueError("sampling needs a key: pass rng=jax.random.key(seed)")
        return super().start(batch, rng)

    def _choose(
        self, logits: Array, mask: Mask, rng: Array | None
    ) -> tuple[Array, Array, Array | None]:
        if self._is_greedy or rng is None:
            return *_likeliest(logits, mask), rng
        now, later = jax.random.split(rng)
        logits = mask(logits / self.temperature)
        if self.topk:
            logits = keep_topk(logits, self.topk)
        if self.topp:
            logits = keep_topp(logits, self.topp)
        token = jax.random.categorical(now, logits)
        return token, jax.nn.log_softmax(logits), later


def _likeliest(logits: Array, mask: Mask) -> tuple[Array, Array]:
    return jnp.argmax(mask(logits), axis=-1), jax.nn.log_softmax(logits)
