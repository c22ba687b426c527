# SPDX-License-Identifier: Apache-2.0
"""Answers rows of many prompts in shared batches.

    engine = Engine(base, store)
    engine.answer([{"prompt": "boolq", "text": "..."},
                   {"prompt": ["rte_0", "rte_1"], "premise": "...", "hypothesis": "..."}])

Rows are sorted by length into batches of few shapes, whatever prompts they name: each
shape is one compiled program, which no prompt that comes or goes changes. A row is
answered as it would be alone.

`Engine.prepare` finds out all that can be wrong with a row, without the device, and
`Engine.run` answers what was prepared; a server calls them from different threads.
"""

import collections
import dataclasses
import itertools
import math
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prompt_tuning import decoding, processes
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.data import buckets
from prompt_tuning.devices import sharding
from prompt_tuning.errors import UserError
from prompt_tuning.inference import adapter_bank, ensembles, prepared_rows
from prompt_tuning.inference.adapter_bank import AdapterBank, Adapters
from prompt_tuning.inference.ensembles import Answer
from prompt_tuning.inference.prepared_rows import Item, LabelShape, Request
from prompt_tuning.inference.store import PromptStore, StoredPrompt
from prompt_tuning.network.adapters import COLLECTION, Where
from prompt_tuning.network.model import Model
from prompt_tuning.types import Array, Params

# Rows and tokens of a batch, and the table of labels that is ranked in it.
ProgramKey = tuple[int, int, LabelShape | None]
# Inputs that say nothing, by which a prompt's leaning to a label is measured.
CONTENT_FREE = ("N/A", "[MASK]", "")
SHORTEST_EDGE = 16
# How much longer an edge is than the one below, at most.
EDGE_FACTOR = 1.5
# Rows may bring labels of their own, so that there is no end to what could be kept:
# programs, of which those used last stay, and label sets calibrated for each prompt.
MOST_PROGRAMS = 512
MOST_LEANINGS = 256


class Engine:
    """Answers rows with the prompts of a store; any thread may call every method.

    Attributes:
      store: the prompts.
    """

    def __init__(
        self,
        base: BaseModel,
        store: PromptStore,
        *,
        batch_sizes: Sequence[int] = (32,),
        longest: int = 1024,
        lengths: Sequence[int] | None = None,
        strategy: decoding.Strategy | None = None,
        seed: int = 0,
    ):
        """Compiles nothing yet; see `warm_up`.

        Args:
          base: the model that the store was made for.
          store: the prompts.
          batch_sizes: numbers of rows to compile programs for. Several let few rows, or
            rows of unlike lengths, go into batches that they fill (see `buckets.groups`).
          longest: encoder tokens of a row, those of its prompt included; longer rows
            are refused.
          lengths: encoder lengths to compile programs for, ascending, in place of some
            up to ``longest``; the last is the longest.
          strategy: decodes free text; greedy, 32 tokens, by default.
          seed: for strategies that draw; a call with the same rows gives the same.

        Raises:
          UserError: a size is below 1.
        """
        sizes = tuple(sorted(set(batch_sizes)))
        longest = longest if lengths is None else lengths[-1]
        if not sizes or sizes[0] < 1 or longest < 1:
            raise UserError(
                f"batches of {list(batch_sizes)} rows of {longest} tokens: give sizes "
                "of 1 or more"
            )
        self.store = store
        self._mesh = base.mesh
        self._sizes = sizes
        self._longest = longest
        self._edges = _edges(longest) if lengths is None else tuple(lengths)
        self._vocab_size = base.config.vocab_size
        model = Model(store.network)
        strategy = strategy or decoding.Greedy(max_decode_len=32)

        def decode(params, tokens, batch, where):
            key = jax.random.fold_in(jax.random.key(seed), batch)
            return model.predict(params, tokens, strategy, key, where=where)[0][:, -1]

        self._rank, self._decode = jax.jit(model.rank), jax.jit(decode)
        self._adapters = AdapterBank(base.mesh)
        # By their keys and the shapes of the adapters that they take.
        self._programs: collections.OrderedDict[tuple, Any] = collections.OrderedDict()
        # One program is compiled at a time, while those that are there may be used.
        self._compiling, self._changing = threading.Lock(), threading.Lock()
        # Of each prompt that is still there: log-probabilities of its label sets.
        self._leanings: weakref.WeakKeyDictionary[
            StoredPrompt, dict[tuple[str, ...], np.ndarray]
        ] = weakref.WeakKeyDictionary()

    @property
    def num_programs(self) -> int:
        """How many programs were compiled to answer rows."""
        return len(self._programs)

    def warm_up(self, longest: int, names: Iterable[str] | None = None) -> None:
        """Compiles what rows of these prompts will need, so that none has to wait.

        Args:
          longest: encoder tokens of the longest row that is awaited.
          names: prompts; all by default.

        Raises:
          UserError: there is no such prompt.
        """
        names = self.store.names() if names is None else names
        label_sets = [self.store.get(name).encoding.labels for name in names]
        shapes = {labels and prepared_rows.label_shape(labels) for labels in label_sets}
        held = self._held()
        for shape in shapes:
            for key in self._keys(min(longest, self._longest), shape):
                self._program(key, held)

    def prepare(self, row: Mapping[str, Any]) -> Request:
        """Checks and encodes a row.

        Args:
          row: ``prompt``, the name of a prompt, or a list of names whose answers are
            combined by the rule ``combine`` (see `ensembles`; 'vote' by default); the
            columns of the prompt's template, or ``text``; perhaps ``labels`` to rank
            in place of those of the card, and ``calibrate``, true to set each label's
            score off against those for inputs without content (Zhao et al. 2021,
            https://arxiv.org/abs/2102.09690). Anything else is left alone. A key that
            a template names is a column, whatever it means otherwise.

        Raises:
          UserError: the row cannot be answered, and why.
        """
        request = prepared_rows.prepare(self.store, row, self._longest)
        if request.calibrate and self._longest_silent(request) > self._longest:
            raise UserError(
                f"its prompt leaves no room to calibrate in {self._longest} tokens: "
                "leave 'calibrate' out"
            )
        return request

    def compile_for(self, requests: Sequence[Request]) -> None:
        """Compiles what these rows may need, alone or with others, unless it is there.

        A server calls this from another thread than `run`, which then keeps nobody
        waiting for a compiler because of somebody's unusual labels or length.
        """
        held = self._held()
        for key in self._missing(requests, held):
            self._program(key, held)

    def is_compiled_for(self, requests: Sequence[Request]) -> bool:
        """Whether `compile_for` has nothing to do."""
        return next(self._missing(requests, self._held()), None) is None

    def _missing(
        self, requests: Sequence[Request], held: Adapters | None
    ) -> Iterator[ProgramKey]:
        longest: dict[LabelShape | None, int] = {}
        for request in requests:
            silent = self._longest_silent(request) if request.calibrate else 0
            for item in request.items:
                before = longest.get(item.label_shape, 0)
                longest[item.label_shape] = max(before, silent, len(item.ids))
        for shape, length in longest.items():
            for key in self._keys(length, shape):
                if _with_held(key, held) not in self._programs:
                    yield key

    def _keys(self, length: int, shape: LabelShape | None) -> Iterator[ProgramKey]:
        """The programs that rows of up to ``length`` tokens may get into."""
        last = buckets.fitting(length, self._edges)
        for edge in (edge for edge in self._edges if edge <= last):
            for size in self._sizes:
                yield size, edge, shape

    def _longest_silent(self, request: Request) -> int:
        return max(
            len(item.prompt.encoding.encode_same(text))
            for item in request.items
            for text in CONTENT_FREE
        )

    def run(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """Answers what was prepared, in its order.

        Returns:
          For each row ``prompt`` as the row has it, ``answer`` and, with labels,
          ``scores``: the probability of each label among them, or its share of the
          votes. Rows of several prompts also have ``combine`` and ``answers``: those
          of each prompt, in the row's order.
        """
        answers = self.opinions(requests)
        return [r.result(given) for r, given in zip(requests, answers, strict=True)]

    def opinions(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """Of each row, the answer of each of its prompts."""
        self._measure_leanings(
            [item for r in requests if r.calibrate for item in r.items]
        )
        outputs = iter(self.outputs([item for r in requests for item in r.items]))
        return [
            [self._answer(item, next(outputs), r.calibrate) for item in r.items]
            for r in requests
        ]

    def answer(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answers rows (see `prepare`), in their order (see `run`).

        Raises:
          UserError: a row cannot be answered; the message says which, counted from 1.
        """
        requests = []
        for number, row in enumerate(rows, start=1):
            try:
                requests.append(self.prepare(row))
            except UserError as error:
                raise UserError(f"row {number}: {error}") from error
        return self.run(requests)

    def outputs(self, items: Sequence[Item]) -> list[np.ndarray]:
        """What the model gives for each item, in their order.

        Returns:
          What labels are compared by ``[C]`` (see `LabelSet.compared`), or token ids of decoded text ``[S]``.
        """
        pending: list[tuple[np.ndarray, Array]] = []
        for shape in {item.label_shape: None for item in items}:
            chosen = np.array(
                [i for i, item in enumerate(items) if item.label_shape == shape]
            )
            lengths = [len(items[i].ids) for i in chosen]
            for group in buckets.groups(lengths, self._edges, self._sizes):
                for part in self._fitting_the_store(items, chosen[group.indices]):
                    rows = [items[i] for i in part]
                    started = self._start(rows, group.length, shape, len(pending))
                    pending.append((part, started))
        results: list[Any] = [None] * len(items)
        for part, started in pending:
            for index, output in zip(part, np.asarray(processes.whole(started))):
                labels = items[index].labels
                results[index] = (
                    labels.compared(output[: len(labels.names)]) if labels else output
                )
        return results

    def _fitting_the_store(
        self, items: Sequence[Item], indices: np.ndarray
    ) -> Iterator[np.ndarray]:
        """Parts of a batch whose prompts fit the store together."""
        start, prompts, used = 0, set(), 0
        for at, index in enumerate(indices):
            prompt = items[index].prompt
            if prompt in prompts:
                continue
            if used + len(prompt.array) > self.store.capacity:
                yield indices[start:at]
                start, prompts, used = at, set(), 0
            prompts.add(prompt)
            used += len(prompt.array)
        yield indices[start:]

    def _start(
        self, items: Sequence[Item], length: int, shape: LabelShape | None, batch: int
    ) -> Array:
        """Starts the program of a batch: [B, C] or [B, S], to be waited for."""
        size = buckets.fitting(len(items), self._sizes)
        held = self._held(item.prompt for item in items)
        program = self._program((size, length, shape), held)
        tokens = np.zeros((size, length), np.int32)
        argument = np.uint32(batch)
        if shape is not None:
            table = np.zeros((size, *shape), np.int32)
            labels = [item.labels.tokens for item in items if item.labels is not None]
            for row, own in zip(table, labels):
                row[: own.shape[0], : own.shape[1]] = own
            argument = self._spread(table)
        arrays = {item.prompt: item.prompt.array for item in items}
        with self.store.table.lease(arrays) as lease:
            for row, item in zip(tokens, items):
                place = lease.rows[item.prompt] + self._vocab_size
                ids = item.ids
                row[: len(ids)] = ids
                row[: len(ids)][ids < 0] = place[-1 - ids[ids < 0]]
            where = self._where(held, items, tokens.shape)
            params = self._params(lease.array, held)
            return program(params, self._spread(tokens), argument, where)

    def _held(self, prompts: Iterable[StoredPrompt] = ()) -> Adapters | None:
        """The adapters of the store's prompts, and of these: some may be removed."""
        return self._adapters.of(itertools.chain(self.store.prompts(), prompts))

    def _where(
        self, held: Adapters | None, items: Sequence[Item], shape: tuple[int, int]
    ) -> Where | None:
        if held is None:
            return None
        return jax.tree.map(self._spread, adapter_bank.where(held, items, shape))

    def _params(self, table: Any, held: Adapters | None) -> Params:
        params = self.store.params(table)
        return params if held is None else {**params, COLLECTION: held.slots}

    def _program(self, key: ProgramKey, held: Adapters | None) -> Any:
        with_held = _with_held(key, held)
        if (found := self._used(with_held)) is not None:
            return found
        with self._compiling:
            if (found := self._used(with_held)) is not None:
                return found
            found = self._compile(*key, held)
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

    def _compile(
        self, size: int, length: int, shape: LabelShape | None, held: Adapters | None
    ) -> Any:
        params = self._params(self.store.table.shape, held)
        where = self._where(held, (), (size, length))
        tokens = self._spread(np.zeros((size, length), np.int32))
        if shape is None:
            return self._decode.lower(params, tokens, np.uint32(0), where).compile()
        table = self._spread(np.zeros((size, *shape), np.int32))
        return self._rank.lower(params, tokens, table, where).compile()

    def _spread(self, rows: np.ndarray) -> Any:
        return rows if self._mesh is None else sharding.spread_rows(rows, self._mesh)

    def _measure_leanings(self, items: Iterable[Item]) -> None:
        """Sees to it that the leaning of each item's prompt to its labels is known."""
        needed = {
            (item.prompt, item.labels.names): item
            for item in items
            if item.labels is not None
        }
        for prompt in {prompt for prompt, _ in needed}:
            known = self._leanings.setdefault(prompt, {})
            if len(known) > MOST_LEANINGS:
                for names in [n for n in known if (prompt, n) not in needed]:
                    del known[names]
        missing = {
            (prompt, names): item
            for (prompt, names), item in needed.items()
            if names not in self._leanings[prompt]
        }
        silent = [
            dataclasses.replace(item, ids=item.prompt.encoding.encode_same(text))
            for item in missing.values()
            for text in CONTENT_FREE
        ]
        if not silent:
            return
        log_probs = [ensembles.log_softmax(output) for output in self.outputs(silent)]
        for (prompt, names), first in zip(
            missing, range(0, len(silent), len(CONTENT_FREE))
        ):
            measured = np.stack(log_probs[first : first + len(CONTENT_FREE)])
            leaning = np.logaddexp.reduce(measured) - np.log(len(measured))
            self._leanings[prompt][names] = leaning

    def _answer(self, item: Item, output: np.ndarray, calibrate: bool) -> Answer:
        if item.labels is None:
            return Answer(item.prompt.encoding.vocabulary.decode(output.tolist()))
        if calibrate:
            output = output - self._leanings[item.prompt][item.labels.names]
        return ensembles.ranked(item.labels.names, output)


def _with_held(key: ProgramKey, held: Adapters | None) -> tuple:
    """A program's key with the shapes of the adapters that it takes."""
    return (*key, held.shapes if held else "")


def _edges(longest: int) -> tuple[int, ...]:
    """Lengths up to the longest, each at most `EDGE_FACTOR` times the one below."""
    shortest = min(SHORTEST_EDGE, longest)
    steps = math.ceil(math.log(longest / shortest) / math.log(EDGE_FACTOR))
    return buckets.edges(shortest, longest, max(1, steps))
