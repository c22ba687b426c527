# SPDX-License-Identifier: Apache-2.0
"""Decoding strategies: greedy, sampling and beam search.

A strategy is a frozen dataclass, so that `jax.jit` can take it as a static argument. It
is called with ``tokens_to_logits(ids [R, 1], cache) -> (logits [R, V], cache)`` and
runs a single `jax.lax.while_loop`. A row of the batch occupies K neighbouring rows of
the R = B * K that the network sees. Leaves of the cache are stacked over layers:
``[L, R, ...]``; those without a row axis, ``[L]``, are the same for all rows.

Arithmetic, use of the random key and order of the results (the best decode of a row is
its last) are those of T5X's `decoding` module, with one difference: the score of a
greedy decode is its log-probability, where T5X gives 0.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from prompt_tuning.errors import UserError
from prompt_tuning.types import Array, PyTree

# The log-probability of what must not be chosen: finite, because differences of it are
# taken.
NEG_INF = -1.0e7
# Below this temperature sampling is greedy: dividing by it would overflow.
MIN_TEMPERATURE = 1e-4

TokensToLogits = Callable[[Array, PyTree], tuple[Array, PyTree]]


class Strategy(Protocol):
    """How to turn logits into tokens; see the module's docstring."""

    @property
    def max_decode_len(self) -> int: ...

    @property
    def num_decodes(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    def __call__(
        self,
        tokens_to_logits: TokensToLogits,
        cache: PyTree,  # leaves [L, B * K, ...] or [L]
        forced: Array,  # [B, S], see `forced_tokens`
        rng: Array | None = None,
    ) -> tuple[Array, Array]:  # [B, K, S] int32, [B, K]
        """Decodes S tokens after the start token 0."""
        ...


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Takes the likeliest token at every step; scores are log-probabilities.

    Attributes:
      max_decode_len: tokens S to decode at most.
      eos_id: the token after which a row holds padding only.
    """

    max_decode_len: int
    eos_id: int = 1

    num_decodes = 1

    def __post_init__(self):
        _check_lengths(self)

    def __call__(
        self,
        tokens_to_logits: TokensToLogits,
        cache: PyTree,
        forced: Array,
        rng: Array | None = None,
    ) -> tuple[Array, Array]:
        del rng

        def choose(logits: Array, rng: None) -> tuple[Array, Array, None]:
            return jnp.argmax(logits, axis=-1), jax.nn.log_softmax(logits), rng

        return _token_by_token(self, choose, tokens_to_logits, cache, forced, None)


@dataclasses.dataclass(frozen=True)
class Sampling:
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

    max_decode_len: int
    temperature: float = 1.0
    topk: int = 0
    topp: float = 0.0
    num_decodes: int = 1
    eos_id: int = 1

    def __post_init__(self):
        _check_lengths(self)
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} must be 0 or more")
        if self.temperature <= MIN_TEMPERATURE and self.num_decodes > 1:
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

    def __call__(
        self,
        tokens_to_logits: TokensToLogits,
        cache: PyTree,
        forced: Array,
        rng: Array | None = None,
    ) -> tuple[Array, Array]:
        def choose(logits: Array, rng: Array) -> tuple[Array, Array, Array]:
            now, later = jax.random.split(rng)
            logits = logits / self.temperature
            if self.topk:
                logits = keep_topk(logits, self.topk)
            if self.topp:
                logits = keep_topp(logits, self.topp)
            token = jax.random.categorical(now, logits)
            return token, jax.nn.log_softmax(logits), later

        if self.temperature <= MIN_TEMPERATURE:
            greedy = Greedy(self.max_decode_len, self.eos_id)
            return greedy(tokens_to_logits, cache, forced)
        if rng is None:
            raise ValueError("sampling needs a key: pass rng=jax.random.key(seed)")
        return _token_by_token(self, choose, tokens_to_logits, cache, forced, rng)


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

    max_decode_len: int
    num_decodes: int = 4
    alpha: float = 0.6
    eos_id: int = 1

    def __post_init__(self):
        _check_lengths(self)
        if self.alpha < 0:
            # The search stops once no live beam can win, which presumes that a
            # log-probability's penalised score grows with length.
            raise UserError(f"alpha={self.alpha} must be 0 or more")

    def __call__(
        self,
        tokens_to_logits: TokensToLogits,
        cache: PyTree,
        forced: Array,
        rng: Array | None = None,
    ) -> tuple[Array, Array]:
        del rng
        batch, length = forced.shape
        beams = self.num_decodes

        def penalty(tokens: Array | int) -> Array:
            return ((5.0 + jnp.asarray(tokens, jnp.float32)) / 6.0) ** self.alpha

        def may_improve(state: _Beams) -> Array:  # scalar bool
            # One token more than the longest decode, as in T5X, so that both stop at
            # the same step.
            best_live = state.live_log_probs[:, -1:] / penalty(length + 1)
            worst = jnp.min(state.scores, axis=1, keepdims=True)
            worst = jnp.where(state.ended, worst, NEG_INF)  # [B, K]
            return (state.step < length) & ~jnp.all(worst > best_live)

        def advance(state: _Beams) -> _Beams:
            logits, cache = tokens_to_logits(state.last, state.cache)
            vocab = logits.shape[-1]
            log_probs = jax.nn.log_softmax(logits).reshape(batch, beams, vocab)
            log_probs = log_probs + state.live_log_probs[..., None]
            # At most K of the best 2K end here, so K can live on.
            log_probs, flat = jax.lax.top_k(
                log_probs.reshape(batch, beams * vocab), 2 * beams
            )
            parent, token = jnp.divmod(flat, vocab)
            # Beams that are forced alike would be copies: keep the best one only.
            given = _column(forced, state.step)[:, None]
            single = jnp.where(jnp.arange(2 * beams) == 0, 0.0, NEG_INF)
            log_probs = jnp.where(given > 0, single, log_probs)
            token = jnp.where(given > 0, given, token)
            tokens = _take(state.live_tokens, parent)
            tokens = tokens.at[:, :, state.step].set(token)
            ended = token == self.eos_id

            alive = log_probs + jnp.where(ended, NEG_INF, 0.0)
            live = _best_last(alive, beams)
            live_tokens, last, parent, live_log_probs = _take(
                (tokens, token, parent, alive), live
            )

            scores = log_probs / penalty(state.step + 1)
            scores = scores + jnp.where(ended, 0.0, NEG_INF)
            pool = jax.tree.map(
                lambda old, new: jnp.concatenate([old, new], axis=1),
                (state.tokens, state.scores, state.ended),
                (tokens, scores, ended),
            )
            tokens, scores, ended = _take(pool, _best_last(pool[1], beams))
            return _Beams(
                step=state.step + 1,
                last=last.reshape(-1, 1),
                live_tokens=live_tokens,
                live_log_probs=live_log_probs,
                tokens=tokens,
                scores=scores,
                ended=ended,
                cache=_reorder_rows(cache, parent),
            )

        nothing = jnp.zeros((batch, beams, length), jnp.int32)
        # All beams start alike: let one of them live.
        first = jnp.where(jnp.arange(beams) == 0, 0.0, NEG_INF)
        final = jax.lax.while_loop(
            may_improve,
            advance,
            _Beams(
                step=jnp.zeros((), jnp.int32),
                last=jnp.zeros((batch * beams, 1), jnp.int32),
                live_tokens=nothing,
                live_log_probs=jnp.tile(first, (batch, 1)),
                tokens=nothing,
                scores=jnp.full((batch, beams), NEG_INF),
                ended=jnp.zeros((batch, beams), bool),
                cache=cache,
            ),
        )
        any_ended = jnp.any(final.ended, axis=1, keepdims=True)  # [B, 1]
        return (
            jnp.where(any_ended[..., None], final.tokens, final.live_tokens),
            jnp.where(any_ended, final.scores, final.live_log_probs),
        )


class _Beams(NamedTuple):
    """State of a beam search; the best beam of a row is its last."""

    step: Array  # scalar, tokens decoded so far
    last: Array  # [B * K, 1], the newest token of the live beams
    live_tokens: Array  # [B, K, S]
    live_log_probs: Array  # [B, K]
    tokens: Array  # [B, K, S], of decodes that ended
    scores: Array  # [B, K], of decodes that ended
    ended: Array  # [B, K], False where no decode has taken the place yet
    cache: PyTree


class _Walk(NamedTuple):
    """State of a decoding whose rows do not meet."""

    step: Array  # scalar, tokens decoded so far
    last: Array  # [R, 1], the newest tokens
    tokens: Array  # [R, S]
    scores: Array  # [R]
    ended: Array  # [R] bool
    cache: PyTree
    rng: Array | None


def _token_by_token(
    strategy: Strategy,
    choose: Callable[..., tuple[Array, Array, Array | None]],
    tokens_to_logits: TokensToLogits,
    cache: PyTree,
    forced: Array,  # [B, S]
    rng: Array | None,
) -> tuple[Array, Array]:  # [B, K, S], [B, K]
    """Extends every row by ``choose(logits, rng) -> (token, log_probs, rng)``."""
    batch, length = forced.shape
    forced = jnp.repeat(forced, strategy.num_decodes, axis=0)

    def unfinished(state: _Walk) -> Array:  # scalar bool
        return (state.step < length) & ~jnp.all(state.ended)

    def advance(state: _Walk) -> _Walk:
        logits, cache = tokens_to_logits(state.last, state.cache)
        token, log_probs, rng = choose(logits, state.rng)
        log_prob = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
        given = _column(forced, state.step)
        token = jnp.where(given > 0, given, token)
        token = jnp.where(state.ended, 0, token).astype(jnp.int32)
        counted = (given == 0) & ~state.ended
        return _Walk(
            step=state.step + 1,
            last=token[:, None],
            tokens=state.tokens.at[:, state.step].set(token),
            scores=state.scores + jnp.where(counted, log_prob, 0.0),
            ended=state.ended | (token == strategy.eos_id),
            cache=cache,
            rng=rng,
        )

    rows = forced.shape[0]
    final = jax.lax.while_loop(
        unfinished,
        advance,
        _Walk(
            step=jnp.zeros((), jnp.int32),
            last=jnp.zeros((rows, 1), jnp.int32),
            tokens=jnp.zeros((rows, length), jnp.int32),
            scores=jnp.zeros(rows, jnp.float32),
            ended=jnp.zeros(rows, bool),
            cache=cache,
            rng=rng,
        ),
    )
    tokens = final.tokens.reshape(batch, strategy.num_decodes, length)
    scores = final.scores.reshape(batch, strategy.num_decodes)
    return _take((tokens, scores), jnp.argsort(scores, axis=1))


def forced_tokens(
    prefix: Array | None, batch: int, strategy: Strategy
) -> Array:  # [B, S] int32
    """What decodes must begin with: 0 where the strategy is free to choose.

    Args:
      prefix: ``[B, Q]`` with Q <= S, laid out as targets are: padded with 0. Its end
        tokens are not forced, for a decode would stop at them.
      batch: rows B.
      strategy: has the length S and the end token.

    Raises:
      ValueError: the prefix has another number of rows or is too long.
    """
    length = strategy.max_decode_len
    if prefix is None:
        return jnp.zeros((batch, length), jnp.int32)
    if prefix.ndim != 2 or prefix.shape[0] != batch or prefix.shape[1] > length:
        raise ValueError(
            f"a decoder prefix of shape {prefix.shape} does not fit: pass [{batch}, Q] "
            f"with Q up to max_decode_len={length}"
        )
    prefix = jnp.where(prefix == strategy.eos_id, 0, prefix).astype(jnp.int32)
    return jnp.pad(prefix, ((0, 0), (0, length - prefix.shape[1])))


def repeat_rows(cache: PyTree, times: int) -> PyTree:
    """Repeats every row in place: leaves ``[L, B, ...]`` become ``[L, B * K, ...]``."""
    return jax.tree.map(
        lambda x: x if x.ndim < 2 else jnp.repeat(x, times, axis=1), cache
    )


def keep_topk(logits: Array, k: int) -> Array:  # [R, V] -> same
    """Masks all but the k greatest logits of a row; ties with the k-th stay."""
    k = min(k, logits.shape[-1])
    least = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits >= least, logits, NEG_INF)


def keep_topp(logits: Array, p: float) -> Array:  # [R, V] -> same
    """Masks all but the fewest likeliest tokens of total probability p or more."""
    probs = jax.nn.softmax(logits)
    descending = -jnp.sort(-probs, axis=-1)
    before = jnp.cumsum(descending, axis=-1) - descending
    least = jnp.min(
        jnp.where(before < p, descending, 1.0), axis=-1, keepdims=True
    )  # [R, 1]
    return jnp.where(probs >= least, logits, NEG_INF)


def _check_lengths(strategy: Strategy):
    for name in ("max_decode_len", "num_decodes"):
        if getattr(strategy, name) < 1:
            raise UserError(f"{name}={getattr(strategy, name)} must be 1 or more")


def _column(x: Array, index: Array) -> Array:  # [B, S], scalar -> [B]
    return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)


def _best_last(scores: Array, count: int) -> Array:  # [B, M] -> [B, count]
    """Indices of the greatest scores of each row, in ascending order of score."""
    return jnp.flip(jax.lax.top_k(scores, count)[1], axis=1)


def _take(tree: PyTree, indices: Array) -> PyTree:  # [B, M, ...], [B, C] -> [B, C, ...]
    return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, indices), tree)


def _reorder_rows(cache: PyTree, parents: Array) -> PyTree:
    """Gives every live beam the cache of the beam it continues: ``parents`` [B, K]."""

    def reorder(x: Array) -> Array:
        if x.ndim < 2:
            return x
        beams = x.reshape(x.shape[0], *parents.shape, *x.shape[2:])
        select = jax.vmap(lambda row, i: row[:, i], in_axes=(1, 0), out_axes=1)
        return select(beams, parents).reshape(x.shape)

    return jax.tree.map(reorder, cache)
