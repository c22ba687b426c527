# SPDX-License-Identifier: Apache-2.0
"""Beam search as T5X does it."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from prompt_tuning.decoding.loop import Mask, check_lengths
from prompt_tuning.decoding.masks import NEG_INF, is_possible
from prompt_tuning.errors import UserError
from prompt_tuning.types import (
    Array,
    Decodes,
    NonNegativeFloat,
    NonNegativeInt,
    PyTree,
    TokenLength,
)


class _Beams(NamedTuple):
    """State of a beam search; the best beam of a row is its last."""

    live_tokens: Array  # [B, K, S]
    live_log_probs: Array  # [B, K]
    tokens: Array  # [B, K, S], of decodes that ended
    scores: Array  # [B, K], of decodes that ended
    ended: Array  # [B, K], False where no decode has taken the place yet


@dataclasses.dataclass(frozen=True)
class Beam:
    """Beam search with the length penalty of Wu et al. (2016), equation 14.

    The score of a decode that ended is its log-probability divided by
    ``((5 + length) / 6) ** alpha``, its length including the end token. Of a row none
    of whose decodes ended within S tokens the K live beams are returned instead, and
    their plain log-probabilities. Where fewer than K ended, the first decodes are empty
    and score ``NEG_INF``.

    Attributes:
      max_decode_len: tokens S to decode at most.
      num_decodes: beams K of each row.
      alpha: 0 for no length penalty; more favours longer decodes.
      eos_id: the token that ends a decode.

    References: https://arxiv.org/abs/1609.08144
    """

    max_decode_len: TokenLength
    num_decodes: Decodes = 4
    alpha: NonNegativeFloat = 0.6
    eos_id: NonNegativeInt = 1

    reorders: ClassVar[bool] = True

    def __post_init__(self):
        check_lengths(self)
        if self.alpha < 0:
            # The search stops once no live beam can win, which presumes that a
            # log-probability's penalised score grows with length.
            raise UserError(f"alpha={self.alpha} must be 0 or more")

    def _penalty(self, tokens: Array | int) -> Array:
        return ((5.0 + jnp.asarray(tokens, jnp.float32)) / 6.0) ** self.alpha

    def start(self, batch: int, rng: Array | None) -> _Beams:
        """See `Strategy`."""
        del rng
        beams = self.num_decodes
        nothing = jnp.zeros((batch, beams, self.max_decode_len), jnp.int32)
        # All beams start alike: let one of them live.
        first = jnp.where(jnp.arange(beams) == 0, 0.0, NEG_INF)
        return _Beams(
            live_tokens=nothing,
            live_log_probs=jnp.tile(first, (batch, 1)),
            tokens=nothing,
            scores=jnp.full((batch, beams), NEG_INF),
            ended=jnp.zeros((batch, beams), bool),
        )

    def unfinished(self, state: _Beams) -> Array:
        """See `Strategy`."""
        live = jnp.max(state.live_log_probs, axis=1, keepdims=True)  # [B, 1]
        # One token more than the longest decode, as in T5X, so that both stop at the
        # same step.
        best_live = live / self._penalty(self.max_decode_len + 1)
        worst = jnp.min(state.scores, axis=1, keepdims=True)
        worst = jnp.where(state.ended, worst, NEG_INF)  # [B, K]
        return jnp.any(is_possible(live) & ~(worst > best_live))

    def extend(
        self, state: _Beams, step: Array, logits: Array, mask: Mask, given: Array
    ) -> tuple[_Beams, Array, Array]:
        """See `Strategy`."""
        batch, beams = state.scores.shape
        vocab = logits.shape[-1]
        log_probs = mask(jax.nn.log_softmax(logits)).reshape(batch, beams, vocab)
        log_probs = log_probs + state.live_log_probs[..., None]
        # At most K of the best 2K end here, so K can live on.
        log_probs, flat = jax.lax.top_k(
            log_probs.reshape(batch, beams * vocab), 2 * beams
        )
        parent, token = jnp.divmod(flat, vocab)
        # Beams that are forced alike would be copies: keep the best one only.
        given = given[:, None]
        single = jnp.where(jnp.arange(2 * beams) == 0, 0.0, NEG_INF)
        log_probs = jnp.where(given > 0, single, log_probs)
        token = jnp.where(given > 0, given, token)
        tokens = _take(state.live_tokens, parent)
        tokens = tokens.at[:, :, step].set(token)
        # A constraint may leave fewer than 2K; what it forbids does not end either.
        ended = (token == self.eos_id) & is_possible(log_probs)

        alive = log_probs + jnp.where(ended, NEG_INF, 0.0)
        live = _best_last(alive, beams)
        live_tokens, last, parent, live_log_probs = _take(
            (tokens, token, parent, alive), live
        )

        scores = log_probs / self._penalty(step + 1)
        scores = scores + jnp.where(ended, 0.0, NEG_INF)
        pool = jax.tree.map(
            lambda old, new: jnp.concatenate([old, new], axis=1),
            (state.tokens, state.scores, state.ended),
            (tokens, scores, ended),
        )
        tokens, scores, ended = _take(pool, _best_last(pool[1], beams))
        beams = _Beams(live_tokens, live_log_probs, tokens, scores, ended)
        return beams, last.reshape(-1), parent

    def finish(self, state: _Beams) -> tuple[Array, Array]:
        """See `Strategy`."""
        any_ended = jnp.any(state.ended, axis=1, keepdims=True)  # [B, 1]
        return (
            jnp.where(any_ended[..., None], state.tokens, state.live_tokens),
            jnp.where(any_ended, state.scores, state.live_log_probs),
        )


def _best_last(scores: Array, count: int) -> Array:  # [B, M] -> [B, count]
    """Indices of the greatest scores of each row, in ascending order of score."""
    return jnp.flip(jax.lax.top_k(scores, count)[1], axis=1)


def _take(tree: PyTree, indices: Array) -> PyTree:  # [B, M, ...], [B, C] -> [B, C, ...]
    return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, indices), tree)
