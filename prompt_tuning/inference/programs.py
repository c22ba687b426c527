# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of an engine: what each one is, and when it is made.

A program is compiled for a number of rows and a length, and for the shapes of the
adapters that it takes, never for a prompt. Those used last are kept.
"""

import collections
import contextlib
import enum
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from prompt_tuning import decoding
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.devices import sharding
from prompt_tuning.inference import adapter_bank
from prompt_tuning.inference.adapter_bank import AdapterBank, Adapters
from prompt_tuning.inference.prepared_rows import Item, LabelShape
from prompt_tuning.inference.store import PromptStore, StoredPrompt
from prompt_tuning.network import continuous, token_step
from prompt_tuning.network.adapters import COLLECTION, Where
from prompt_tuning.network.model import Model
from prompt_tuning.types import Array, Params

# Rows may bring labels of their own, so that there is no end to what could be kept.
MOST_PROGRAMS = 512
# Where there is but one size, this share of its rows is encoded together, too, when so many
# seats are free: fewer rows cost the encoder more each, and more seats are empty for longer.
BOARDING_SHARE = 8


class Does(enum.Enum):
    """What a program does."""

    RANK = enum.auto()
    DECODE = enum.auto()
    # Of `network.continuous`.
    BOARD = enum.auto()
    ADVANCE = enum.auto()
    REORDER = enum.auto()
    ROLL = enum.auto()


class Key(NamedTuple):
    """What a program is compiled for.

    Attributes:
      does: what it does.
      rows: rows of its batch.
      length: encoder tokens of a row.
      labels: the shape of the table of labels that is ranked.
    """

    does: Does
    rows: int
    length: int
    labels: LabelShape | None = None


class Programs:
    """Programs over a store's prompts; any thread may call every method.

    Attributes:
      store: the prompts.
      strategy: decodes free text.
      columns: of the cache of rows that come and go; 0 where none do. They do in free
        text that is decoded greedily, on one device.
      sizes: numbers of rows of a batch, ascending.
      boarding: numbers of rows that are encoded together to be decoded so, ascending.
    """

    def __init__(
        self,
        base: BaseModel,
        store: PromptStore,
        strategy: decoding.Strategy,
        sizes: Sequence[int],
        seed: int,
    ):
        """Compiles nothing yet."""
        self.store, self.strategy, self.sizes = store, strategy, sizes
        self._mesh = base.mesh
        self._config = base.config
        few = -(-sizes[-1] // BOARDING_SHARE)
        self.boarding = tuple(sorted({*sizes, *(sizes[:-1] or [few])}))
        self._model = model = Model(store.network)
        self._adapters = AdapterBank(base.mesh)
        self._programs: collections.OrderedDict[tuple, Any] = collections.OrderedDict()
        # One program is compiled at a time, while those that are there may be used.
        self._compiling, self._changing = threading.Lock(), threading.Lock()

        def decode(params, tokens, batch, where):
            key = jax.random.fold_in(jax.random.key(seed), batch)
            return model.predict(params, tokens, strategy, key, where=where)[0][:, -1]

        self._functions = {Does.RANK: jax.jit(model.rank), Does.DECODE: jax.jit(decode)}
        self.columns = 0
        if isinstance(strategy, decoding.Greedy) and not base.mesh:
            self.columns = continuous.columns(strategy)
            self._functions |= _continuous(model, strategy)
        self._shapes_of_seats: dict[tuple[int, str], continuous.Seats] = {}
        # The decoder's layers one by one, where rows come and go.
        self._apart: Params | None = None

    @property
    def is_continuous(self) -> bool:
        """Whether free text is decoded in rows that come and go."""
        return self.columns > 0

    def __len__(self) -> int:
        """How many programs there are."""
        return len(self._programs)

    def keys(
        self, longest: int, labels: LabelShape | None, edges: Iterable[int]
    ) -> Iterator[Key]:
        """The programs that rows of up to ``longest`` tokens may get into."""
        for edge in edges:
            if labels is not None or not self.is_continuous:
                does = Does.DECODE if labels is None else Does.RANK
                for size in self.sizes:
                    yield Key(does, size, edge, labels)
            else:
                for size in self.boarding:
                    yield Key(Does.BOARD, size, edge)
                for size in self.sizes:
                    yield Key(Does.ADVANCE, size, edge)
                for does in (Does.REORDER, Does.ROLL):
                    yield Key(does, self.sizes[-1], edge)
            if edge >= longest:
                break

    def held(self, prompts: Iterable[StoredPrompt] = ()) -> Adapters | None:
        """The adapters of the store's prompts, and of these: some may be removed."""
        return self._adapters.of(itertools.chain(self.store.prompts(), prompts))

    def where(
        self,
        held: Adapters | None,
        items: Sequence[Item | None],
        shape: tuple[int, int],
    ) -> Where | None:
        """Whose the rows of a batch [B, T] are; see `adapter_bank.where`."""
        if held is None:
            return None
        return jax.tree.map(self.spread, adapter_bank.where(held, items, shape))

    def spread(self, rows: np.ndarray) -> Any:
        """Rows where the model's devices have them."""
        return rows if self._mesh is None else sharding.spread_rows(rows, self._mesh)

    def params(self, table: Any, held: Adapters | None) -> Params:
        """What programs read with a table of prompts."""
        params = self.store.params(table)
        return params if held is None else {**params, COLLECTION: held.slots}

    def decoder_params(self, held: Adapters | None) -> Params:
        """What programs that `Does.ADVANCE` read."""
        with self._changing:
            if self._apart is None:
                base = dict(self.store.params(None))
                del base["prompts"]
                self._apart = token_step.apart(base, self._config)
        if held is None:
            return self._apart
        return {**self._apart, COLLECTION: held.slots}

    def empty_seats(self, length: int, held: Adapters | None) -> continuous.Seats:
        """Seats for rows of a length, as many as a batch has at most."""
        return continuous.empty(self._seats(length, held))

    def fitting_the_store(self, items: Sequence[Item]) -> int:
        """How many of these rows, from the first on, have prompts that it holds at once."""
        prompts, used = set(), 0
        for count, item in enumerate(items):
            if item.prompt not in prompts:
                prompts.add(item.prompt)
                used += len(item.prompt.array)
                if used > self.store.capacity:
                    return count
        return len(items)

    @contextlib.contextmanager
    def leased(
        self, items: Sequence[Item], shape: tuple[int, int]
    ) -> Iterator[tuple[Array, np.ndarray]]:
        """The table with these rows' prompts, and the rows' ids [B, T] in it.

        It is for starting programs; see `table.PromptTable.lease`.
        """
        tokens = np.zeros(shape, np.int32)
        arrays = {item.prompt: item.prompt.array for item in items}
        with self.store.table.lease(arrays) as lease:
            for row, item in zip(tokens, items):
                place = lease.rows[item.prompt] + self._config.vocab_size
                ids = item.ids
                row[: len(ids)] = ids
                row[: len(ids)][ids < 0] = place[-1 - ids[ids < 0]]
            yield lease.array, tokens

    def missing(self, keys: Iterable[Key], held: Adapters | None) -> Iterator[Key]:
        """Those of these programs that are not there."""
        return (key for key in keys if (key, _shapes(held)) not in self._programs)

    def get(self, key: Key, held: Adapters | None) -> Any:
        """A program, compiled unless it is there."""
        with_held = (key, _shapes(held))
        if (found := self._used(with_held)) is not None:
            return found
        with self._compiling:
            if (found := self._used(with_held)) is not None:
                return found
            found = self._functions[key.does].lower(*self._given(key, held)).compile()
            with self._changing:
                self._programs[with_held] = found
                if len(self._programs) > MOST_PROGRAMS:
                    self._programs.popitem(last=False)
        return found

    def _used(self, key: tuple) -> Any:
        """A program that is there, which now is the one used last."""
        with self._changing:
            if key in self._programs:
                self._programs.move_to_end(key)
            return self._programs.get(key)

    def _given(self, key: Key, held: Adapters | None) -> tuple:
        """What a program is called with, or its shapes."""
        ids = lambda *shape: self.spread(np.zeros(shape, np.int32))
        where = self.where(held, (), (key.rows, key.length))
        if key.does in (Does.RANK, Does.DECODE):
            params = self.params(self.store.table.shape, held)
            tokens = ids(key.rows, key.length)
            if key.labels is None:
                return params, tokens, np.uint32(0), where
            return params, tokens, ids(key.rows, *key.labels), where
        seats = self._seats(key.length, held)
        if key.does is Does.BOARD:
            params = self.params(self.store.table.shape, held)
            return params, seats, ids(key.rows, key.length), ids(key.rows), where
        if key.does is Does.ADVANCE:
            return self.decoder_params(held), seats, where, key.rows
        return seats, ids(key.rows) if key.does is Does.REORDER else np.int32(0)

    def _seats(self, length: int, held: Adapters | None) -> continuous.Seats:
        """The shapes of seats."""
        rows = self.sizes[-1]
        key = (length, _shapes(held))
        if key not in self._shapes_of_seats:
            tokens = jax.ShapeDtypeStruct((rows, length), np.int32)
            self._shapes_of_seats[key] = continuous.shapes(
                self._model,
                self.params(self.store.table.shape, held),
                self.strategy,  # pyright: ignore[reportArgumentType]
                tokens,
                self.where(held, (), tokens.shape),
            )
        return self._shapes_of_seats[key]


def _shapes(held: Adapters | None) -> str:
    """What of the adapters a program is compiled for."""
    return held.shapes if held else ""


def _continuous(model: Model, strategy: decoding.Greedy) -> dict[Does, Any]:
    """The programs of `network.continuous`; what becomes of seats is in their place."""

    def board(params, seats, tokens, places, where):
        return continuous.board(model, params, strategy, seats, tokens, places, where)

    def advance(params, seats, where, rows):
        return continuous.advance(model, params, strategy, seats, where, rows)

    def roll(seats, count):
        return continuous.rolled(strategy, seats, count)

    return {
        Does.BOARD: jax.jit(board, donate_argnames="seats"),
        Does.ADVANCE: jax.jit(advance, donate_argnames="seats", static_argnames="rows"),
        Does.REORDER: jax.jit(continuous.reordered),
        Does.ROLL: jax.jit(roll),
    }
