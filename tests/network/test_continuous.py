# SPDX-License-Identifier: Apache-2.0
"""Rows that come and go are decoded as they would be alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.decoding import Greedy
from prompt_tuning.network import continuous, token_step

# A row may take so many tokens, and its columns roll several times while others come.
LENGTH = 12
SEATS = 4


@dataclasses.dataclass(frozen=True)
class Once(Greedy):
    """Greedy, and a row ends with one of several tokens, so that all lengths occur."""

    def extend(self, state, step, logits, mask, given):
        state, token, parents = super().extend(state, step, logits, mask, given)
        return state._replace(ended=state.ended | (token % 5 == 1)), token, parents


STRATEGY = Once(LENGTH, eos_id=1)


def inputs(count: int) -> np.ndarray:
    """Rows of 3 to 10 tokens."""
    drawn = np.random.default_rng(0)
    tokens = drawn.integers(2, 256, (count, 10)).astype(np.int32)
    for row in tokens:
        row[drawn.integers(3, 11) :] = 0
    return tokens


def in_turn(model, params, tokens, strategy=STRATEGY, reorder=False):
    """What seats give that are filled again as soon as one is free: [rows, LENGTH]."""
    known = token_step.apart(params, model.network.config)
    like = continuous.shapes(model, params, strategy, tokens[:SEATS], None)
    board = jax.jit(functools.partial(continuous.board, model, strategy=strategy))
    go = jax.jit(
        functools.partial(continuous.advance, model, strategy=strategy),
        static_argnames="rows",
    )
    seats, sitting, waiting = (
        continuous.empty(like),
        [None] * SEATS,
        list(range(len(tokens))),
    )
    found = {}
    turns = 0
    while waiting or any(row is not None for row in sitting):
        if int(seats.column) + continuous.STEPS > continuous.columns(strategy):
            starts = [
                int(seats.start[i]) for i, row in enumerate(sitting) if row is not None
            ]
            count = min(starts, default=int(seats.column))
            seats = continuous.rolled(strategy, seats, jnp.int32(count))
        if reorder:
            order = np.random.default_rng(turns).permutation(SEATS)
            seats = continuous.reordered(seats, jnp.asarray(order))
            sitting = [sitting[i] for i in order]
        # One at a time, so that rows begin in different columns.
        free = [i for i, row in enumerate(sitting) if row is None]
        if free and waiting:
            sitting[free[0]] = waiting.pop(0)
            one = tokens[[sitting[free[0]], 0]]
            places = jnp.array([free[0], SEATS])
            seats = board(
                params=params, seats=seats, tokens=one, places=places, where=None
            )
        rows = SEATS if any(sitting[i] is not None for i in range(2, SEATS)) else 2
        seats = go(params=known, seats=seats, where=None, rows=rows)
        for seat, row in enumerate(sitting):
            if row is not None and bool(seats.state.ended[seat]):
                found[row] = np.asarray(seats.state.tokens[seat])
                sitting[seat] = None
        turns += 1
    return np.stack([found[row] for row in range(len(tokens))])


@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("reorder", [False, True], ids=["in place", "moved"])
def test_rows_that_come_and_go_give_what_a_batch_gives(
    stacked, reorder, tiny_model, tiny_params, monkeypatch
):
    if stacked:
        monkeypatch.setattr(token_step, "TAKEN_APART_BYTES", 0)
    tokens = inputs(9)
    want = tiny_model.predict(tiny_params, tokens, STRATEGY)[0][:, 0]
    lengths = {int((row != 0).sum()) for row in np.asarray(want)}
    assert len(lengths) > 2 and max(lengths) == LENGTH
    got = in_turn(tiny_model, tiny_params, tokens, reorder=reorder)
    np.testing.assert_array_equal(got, want)
