# SPDX-License-Identifier: Apache-2.0
"""Decoding of rows that come and go: a row that has ended gives its seat to another one.

All seats write their token of a step into the same *column* of the cache, whenever their
rows began: a row's mask hides the columns before its first, and relative positions only
know how far apart tokens are. So a step is the one of `token_step`, writes in place, and
no row waits for another one.

What is done between steps, these functions do; each is a program to compile. They take
`Seats` and give what becomes of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prompt_tuning import decoding
from prompt_tuning.network.adapters import Where
from prompt_tuning.network.model import Model, variables
from prompt_tuning.network.token_step import Memory, TokenStep
from prompt_tuning.types import Array, Params, PyTree

# Steps between which rows may come and go: a row that has ended keeps its seat for half as
# many, and the device waits for the host once in so many.
STEPS = 4
# A row takes as many columns as it may have tokens. Some more, for after every so many
# steps all columns move to the front.
SPARE_SHARE = 4


class Seats(NamedTuple):
    """B rows that are decoded, or that have ended, and what is kept of them.

    Attributes:
      column: the one that the next token goes to: [].
      start: the column of each row's first token: [B].
      last: the newest tokens: [B].
      state: the strategy's.
      cache: see `TokenStep`, a step being a column.
      memory: of the rows' inputs.
    """

    column: Array
    start: Array
    last: Array
    state: Any
    cache: PyTree
    memory: Memory


def columns(strategy: decoding.Greedy) -> int:
    """How many columns the cache has."""
    length = strategy.max_decode_len
    return length + max(STEPS, length // SPARE_SHARE)


def shapes(
    model: Model,
    params: Params,
    strategy: decoding.Greedy,
    tokens: Any,  # [B, M]
    where: Where | None,
) -> Seats:
    """The shapes of seats for rows like these; arguments may be shapes, too."""

    def seats(params: Params, tokens: Array, where: Where | None) -> Seats:
        rows = len(tokens)
        cache, memory = _inputs(model, strategy, params, tokens, where)
        number = jnp.zeros(rows, jnp.int32)
        state = strategy.start(rows, None)
        return Seats(jnp.zeros((), jnp.int32), number, number, state, cache, memory)

    return jax.eval_shape(seats, params, tokens, where)


def empty(shapes: Seats) -> Seats:
    """Seats of these shapes, where nobody sits."""
    seats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    ended = jnp.ones_like(seats.state.ended)
    return seats._replace(state=seats.state._replace(ended=ended))


def board(
    model: Model,
    params: Params,
    strategy: decoding.Greedy,
    seats: Seats,
    tokens: Array,  # [b, M]
    places: Array,  # [b]
    where: Where | None,
) -> Seats:
    """Encodes rows and seats them; a place beyond the last is none."""
    rows = len(tokens)
    cache, memory = _inputs(model, strategy, params, tokens, where)
    put = lambda old, new, lead=(): old.at[(*lead, places)].set(new, mode="drop")
    return Seats(
        column=seats.column,
        start=put(seats.start, jnp.broadcast_to(seats.column, rows)),
        last=put(seats.last, jnp.zeros(rows, jnp.int32)),
        state=jax.tree.map(put, seats.state, strategy.start(rows, None)),
        cache=_by_rows(put, seats.cache, cache),
        memory=_by_rows(put, seats.memory, memory),
    )


def advance(
    model: Model,
    params: Params,
    strategy: decoding.Greedy,
    seats: Seats,
    where: Where | None,
    rows: int,
) -> Seats:
    """Decodes up to `STEPS` tokens of the first rows; there must be as many columns.

    Args:
      model: the model.
      params: see `token_step.apart`; prompts may be missing.
      strategy: takes the tokens.
      seats: all.
      where: whose the first rows are.
      rows: how many of the seats take part.
    """
    front = lambda x, lead=(): x[(*lead, slice(rows))]
    memory = _by_rows(front, seats.memory)
    start, length = seats.start[:rows], strategy.max_decode_len
    step = _step(model, strategy, params, where, rows)
    nothing_given = jnp.zeros(rows, jnp.int32)

    def unfinished(loop: tuple) -> Array:
        count, _, _, state, _ = loop
        return (count < STEPS) & strategy.unfinished(state)

    def extend(loop: tuple) -> tuple:
        count, column, last, state, cache = loop
        logits, cache = step(last[:, None], column, None, cache, memory, start)
        # Rows that ended long ago may have begun in columns that are given up.
        told = jnp.where(state.ended, length, column - start)
        state, last, _ = strategy.extend(
            state, told, logits, lambda logits: logits, nothing_given
        )
        state = state._replace(ended=state.ended | (told + 1 >= length))
        return count + 1, column + 1, last, state, cache

    own = (
        jnp.zeros((), jnp.int32),
        seats.column,
        seats.last[:rows],
        jax.tree.map(front, seats.state),
        _by_rows(front, seats.cache),
    )
    _, column, last, state, cache = jax.lax.while_loop(unfinished, extend, own)
    put = lambda old, new, lead=(): old.at[(*lead, slice(rows))].set(new)
    return seats._replace(
        column=column,
        last=put(seats.last, last),
        state=jax.tree.map(put, seats.state, state),
        cache=_by_rows(put, seats.cache, cache),
    )


def reordered(seats: Seats, order: Array) -> Seats:  # [B]
    """Rows in another order: those that are left in front, say."""
    take = lambda x, lead=(): x[(*lead, order)]
    return Seats(
        column=seats.column,
        start=take(seats.start),
        last=take(seats.last),
        state=jax.tree.map(take, seats.state),
        cache=_by_rows(take, seats.cache),
        memory=_by_rows(take, seats.memory),
    )


def rolled(
    strategy: decoding.Greedy,
    seats: Seats,
    count: Array,  # []
) -> Seats:
    """Without the first columns, which no row that is left has written."""

    def roll(x: Array) -> Array:  # [..., P + columns, D]
        axis = x.ndim - 2
        before = x.shape[axis] - columns(strategy)
        prefix, written = jnp.split(x, [before], axis)
        return jnp.concatenate([prefix, jnp.roll(written, -count, axis)], axis)

    return seats._replace(
        column=seats.column - count,
        start=seats.start - count,
        cache=jax.tree.map(roll, seats.cache),
    )


def _inputs(
    model: Model,
    strategy: decoding.Greedy,
    params: Params,
    tokens: Array,
    where: Where | None,
) -> tuple[PyTree, Memory]:
    """The cache of rows before their first token, and what is read of their inputs."""
    encoded = model.network.apply(
        variables(params), tokens, enable_dropout=False, where=where, method="encode"
    )
    step = _step(model, strategy, params, where, len(tokens))
    return step.cache, step.memorize(encoded, tokens)  # pyright: ignore[reportArgumentType]


def _step(
    model: Model,
    strategy: decoding.Greedy,
    params: Params,
    where: Where | None,
    rows: int,
) -> TokenStep:
    """The step of so many rows, in a cache of all columns."""
    return TokenStep(
        model.network,
        variables(params),
        where,
        rows=rows,
        decodes=1,
        max_decode_length=columns(strategy),
    )


def _by_rows(function: Any, tree: PyTree, *others: PyTree) -> PyTree:
    """Maps functions of arrays and of what their index begins with before that of rows."""
    # Keys and values of stacked layers are [L, B, N, M, D].
    lead = lambda x: (slice(None),) if x.ndim > 4 else ()
    return jax.tree.map(
        lambda x, *more: function(x, *more, lead=lead(x)), tree, *others
    )
