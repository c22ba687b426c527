# SPDX-License-Identifier: Apache-2.0
"""The loop of every decoding, and what strategies are to it.

The network is ``tokens_to_logits(ids [B, K], step, ancestry, cache) -> (logits [R, V],
cache)``, R being B * K. What it keeps of a token stays where it was written: a strategy
whose decodes continue one another moves ``ancestry`` [B, K, S] alone, which says of each
decode which of its row's K wrote its token of a step.

Arithmetic, use of the random key and order of the results (the best decode of a row is
its last) are those of T5X's `decoding` module, with one difference: the score of a
greedy decode is its log-probability, where T5X gives 0.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from prompt_tuning.decoding.label_trie import Constraint
from prompt_tuning.errors import UserError
from prompt_tuning.types import Array, PyTree

TokensToLogits = Callable[[Array, Array, Array | None, PyTree], tuple[Array, PyTree]]
# [R, V] -> same, `NEG_INF` in place of what the constraint forbids.
Mask = Callable[[Array], Array]


class Strategy(Protocol):
    """How to turn logits into tokens; its state is a pytree of its own making."""

    @property
    def max_decode_len(self) -> int: ...

    @property
    def num_decodes(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    # Whether a decode may continue another one of its row.
    reorders: ClassVar[bool]

    def start(self, batch: int, rng: Array | None) -> Any:
        """The state of B rows before their first token."""
        ...

    def unfinished(self, state: Any) -> Array:  # scalar bool
        """Whether another token of any row could still change the result."""
        ...

    def extend(
        self,
        state: Any,
        step: Array,  # scalar, or [R] of `Greedy`: tokens decoded so far
        logits: Array,  # [R, V]
        mask: Mask,
        given: Array,  # [B], the token to take, or 0
    ) -> tuple[Any, Array, Array | None]:
        """Takes a token.

        Returns:
          The new state, the tokens ``[R]``, and the decodes ``[B, K]`` among the K of
          their row that they continue, None of a strategy that never `reorders`.
        """
        ...

    def finish(self, state: Any) -> tuple[Array, Array]:
        """Tokens ``[B, K, S]``, 0 after the end token, and scores ``[B, K]``."""
        ...


class _Loop(NamedTuple):
    step: Array  # scalar, tokens decoded so far
    last: Array  # [B, K], the newest tokens
    nodes: PyTree  # [R], where the constraint stands; None if there is none
    ancestry: Array | None  # [B, K, S]
    cache: PyTree
    state: Any  # the strategy's


def decode(
    strategy: Strategy,
    tokens_to_logits: TokensToLogits,
    cache: PyTree,
    forced: Array,
    rng: Array | None = None,
    constraint: Constraint | None = None,
) -> tuple[Array, Array]:
    """Decodes S tokens after the start token 0, fewer where all rows have ended.

    Args:
      strategy: takes the tokens.
      tokens_to_logits: the network.
      cache: what the network keeps, before the first token.
      forced: ``[B, S]``, see `forced_tokens`. Forced tokens come before a label and are
        no part of it.
      rng: key for sampling.
      constraint: the labels that each row may write.

    Returns:
      Tokens ``[B, K, S]`` int32 and scores ``[B, K]``, the best of a row last.
    """
    batch, length = forced.shape
    copies = strategy.num_decodes
    nodes = None if constraint is None else jnp.repeat(constraint.nodes, copies)

    def unfinished(loop: _Loop) -> Array:
        return (loop.step < length) & strategy.unfinished(loop.state)

    def advance(loop: _Loop) -> _Loop:
        logits, cache = tokens_to_logits(
            loop.last, loop.step, loop.ancestry, loop.cache
        )
        given = jax.lax.dynamic_index_in_dim(forced, loop.step, axis=1, keepdims=False)
        mask, nodes = _unbound, loop.nodes
        if constraint is not None:
            mask = functools.partial(constraint.trie.mask, nodes)
        state, token, parents = strategy.extend(
            loop.state, loop.step, logits, mask, given
        )
        ancestry = loop.ancestry
        if parents is not None and ancestry is not None:
            own = ancestry.at[:, :, loop.step].set(jnp.arange(copies)[None])
            ancestry = jnp.take_along_axis(own, parents[..., None], axis=1)
        if constraint is not None:
            if parents is not None:
                of_rows = nodes.reshape(batch, copies)
                nodes = jnp.take_along_axis(of_rows, parents, axis=1).reshape(-1)
            free = jnp.repeat(given == 0, copies)
            nodes = jnp.where(free, constraint.trie.follow(nodes, token), nodes)
        last = token.reshape(batch, copies)
        return _Loop(loop.step + 1, last, nodes, ancestry, cache, state)

    final = jax.lax.while_loop(
        unfinished,
        advance,
        _Loop(
            step=jnp.zeros((), jnp.int32),
            last=jnp.zeros((batch, copies), jnp.int32),
            nodes=nodes,
            ancestry=jnp.zeros((batch, copies, length), jnp.int32)
            if strategy.reorders
            else None,
            cache=cache,
            state=strategy.start(batch, rng),
        ),
    )
    return strategy.finish(final.state)


def forced_tokens(
    prefix: Array | None,
    batch: int,
    strategy: Strategy,
    constraint: Constraint | None = None,
) -> Array:  # [B, S] int32
    """What decodes must begin with: 0 where the strategy is free to choose.

    Args:
      prefix: ``[B, Q]`` with Q <= S, laid out as targets are: padded with 0. Its end
        tokens are not forced, for a decode would stop at them.
      batch: rows B.
      strategy: has the length S and the end token.
      constraint: its labels must have room after the prefix.

    Raises:
      ValueError: the prefix or the constraint has another number of rows, or together
        they are too long.
    """
    length = strategy.max_decode_len
    room = length
    if constraint is not None:
        room -= constraint.trie.max_decode_len
        if constraint.nodes.shape != (batch,) or room < 0:
            raise ValueError(
                f"a constraint of {len(constraint.nodes)} rows and labels of up to "
                f"{constraint.trie.max_decode_len} tokens does not fit: make it for "
                f"{batch} rows and max_decode_len={length}"
            )
    if prefix is None:
        return jnp.zeros((batch, length), jnp.int32)
    if prefix.ndim != 2 or prefix.shape[0] != batch or prefix.shape[1] > room:
        raise ValueError(
            f"a decoder prefix of shape {prefix.shape} does not fit: pass [{batch}, Q] "
            f"with Q up to {room}, what max_decode_len={length} leaves to it"
        )
    prefix = jnp.where(prefix == strategy.eos_id, 0, prefix).astype(jnp.int32)
    return jnp.pad(prefix, ((0, 0), (0, length - prefix.shape[1])))


def check_lengths(strategy: Strategy) -> None:
    """Refuses a strategy that would decode nothing.

    Raises:
      UserError: ``max_decode_len`` or ``num_decodes`` is below 1.
    """
    for name in ("max_decode_len", "num_decodes"):
        if getattr(strategy, name) < 1:
            raise UserError(f"{name}={getattr(strategy, name)} must be 1 or more")


def _unbound(logits: Array) -> Array:
    return logits
