# SPDX-License-Identifier: Apache-2.0
"""A batch whose rows come and go: a long answer holds up no short one.

Between any `STEPS` tokens the rows that have ended leave, with their answers, and others
take their seats (see `network.continuous`). Where few rows are left they move to the front
seats, and the others take no part in a step.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from prompt_tuning.data import buckets
from prompt_tuning.inference.adapter_bank import Adapters
from prompt_tuning.inference.prepared_rows import Item
from prompt_tuning.inference.programs import BOARDING_SHARE, Does, Key, Programs
from prompt_tuning.network import continuous

# What an answer is asked for by, and what is to be answered.
Ticket = tuple[Any, Item]


class RunningBatch:
    """Rows of up to a length that are decoded together; one thread may use it.

    Attributes:
      length: encoder tokens of a row.
      held: the adapters that its rows may use.
    """

    def __init__(self, programs: Programs, length: int, held: Adapters | None):
        """Takes no memory of the device before `advance`."""
        self.length, self.held = length, held
        self._programs = programs
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._sitting: list[Ticket | None] = [None] * programs.sizes[-1]
        self._starts = np.zeros(programs.sizes[-1], np.int32)
        self._column = 0
        self._seats: Any = None

    def __len__(self) -> int:
        """Rows that have no answer yet."""
        return len(self._waiting) + sum(each is not None for each in self._sitting)

    def add(self, tickets: Iterable[Ticket]) -> None:
        """Lets rows wait for a seat."""
        self._waiting.extend(tickets)

    def advance(self) -> Iterator[tuple[Any, np.ndarray]]:
        """Seats rows, decodes some tokens, and gives the token ids [S] of who has ended."""
        if self._seats is None:
            self._seats = self._programs.empty_seats(self.length, self.held)
        self._board()
        rows = self._close_up()
        self._make_room()
        program = self._program(Does.ADVANCE, rows)
        items = [each and each[1] for each in self._sitting[:rows]]
        where = self._programs.where(self.held, items, (rows, self.length))
        params = self._programs.decoder_params(self.held)
        self._seats = program(params, self._seats, where)
        column, ended, tokens = jax.device_get(
            (self._seats.column, self._seats.state.ended, self._seats.state.tokens)
        )
        self._column = int(column)
        for seat, each in enumerate(self._sitting):
            if each is not None and ended[seat]:
                self._sitting[seat] = None
                yield each[0], tokens[seat]

    def _board(self) -> None:
        """Gives free seats to those who wait, where it pays."""
        enough = -(-len(self._sitting) // BOARDING_SHARE)
        while self._waiting:
            free = [seat for seat, each in enumerate(self._sitting) if each is None]
            if len(free) < min(len(self._waiting), enough):
                return
            tickets = self._fitting_the_store(self._together(len(free)))
            size = buckets.fitting(len(tickets), self._programs.boarding)
            program = self._program(Does.BOARD, size)
            places = np.full(size, len(self._sitting), np.int32)
            places[: len(tickets)] = free[: len(tickets)]
            items = [item for _, item in tickets]
            with self._programs.leased(items, (size, self.length)) as (table, tokens):
                params = self._programs.params(table, self.held)
                where = self._programs.where(self.held, items, tokens.shape)
                self._seats = program(params, self._seats, tokens, places, where)
            for seat, ticket in zip(free, tickets):
                self._sitting[seat] = ticket
                self._starts[seat] = self._column

    def _together(self, free: int) -> int:
        """How many rows to encode together, so that most of their program's are there."""
        sizes, rows = self._programs.boarding, min(free, len(self._waiting))
        if buckets.fitting(rows, sizes) <= 2 * rows:
            return rows
        return max((size for size in sizes if size <= rows), default=rows)

    def _fitting_the_store(self, most: int) -> list[Ticket]:
        """The next of those who wait, as many as have room in the table of prompts."""
        found = list(itertools.islice(self._waiting, most))
        fits = self._programs.fitting_the_store([item for _, item in found])
        return [self._waiting.popleft() for _ in range(fits)]

    def _close_up(self) -> int:
        """Moves rows to the front where fewer may then take part; returns how many do."""
        sizes = self._programs.sizes
        taken = [seat for seat, each in enumerate(self._sitting) if each is not None]
        rows = buckets.fitting(taken[-1] + 1, sizes)
        fewer = buckets.fitting(len(taken), sizes)
        if fewer == rows:
            return rows
        free = [seat for seat, each in enumerate(self._sitting) if each is None]
        order = np.array([*taken, *free], np.int32)
        program = self._program(Does.REORDER, len(self._sitting))
        self._seats = program(self._seats, order)
        self._sitting = [self._sitting[seat] for seat in order]
        self._starts = self._starts[order]
        return fewer

    def _make_room(self) -> None:
        """Gives up the columns before all rows, if those behind do not suffice."""
        if self._column + continuous.STEPS <= self._programs.columns:
            return
        taken = [seat for seat, each in enumerate(self._sitting) if each is not None]
        before = int(self._starts[taken].min())
        program = self._program(Does.ROLL, len(self._sitting))
        self._seats = program(self._seats, np.int32(before))
        self._starts -= before
        self._column -= before

    def _program(self, does: Does, rows: int) -> Any:
        return self._programs.get(Key(does, rows, self.length), self.held)
