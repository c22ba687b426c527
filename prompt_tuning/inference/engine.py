# SPDX-License-Identifier: Apache-2.0
"""Answers rows of many prompts in shared batches.

    engine = Engine(base, store)
    engine.answer([{"prompt": "boolq", "text": "..."},
                   {"prompt": ["rte_0", "rte_1"], "premise": "...", "hypothesis": "..."}])

Rows are sorted by length into batches of few shapes, whatever prompts they name: each
shape is one compiled program, which no prompt that comes or goes changes. A row is
answered as it would be alone. Free text is decoded in batches whose rows come and go (see
`running_batch`).

`Engine.prepare` finds out all that can be wrong with a row, without the device, and
`Engine.run` answers what was prepared; a server calls them from different threads.
"""

import dataclasses
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning import decoding, processes
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.data import buckets
from prompt_tuning.errors import UserError
from prompt_tuning.inference import ensembles, prepared_rows
from prompt_tuning.inference.adapter_bank import Adapters
from prompt_tuning.inference.ensembles import Answer
from prompt_tuning.inference.prepared_rows import Item, LabelShape, Request
from prompt_tuning.inference.programs import Does, Key, Programs
from prompt_tuning.inference.running_batch import RunningBatch
from prompt_tuning.inference.store import PromptStore, StoredPrompt
from prompt_tuning.types import Array

# Inputs that say nothing, by which a prompt's leaning to a label is measured.
CONTENT_FREE = ("N/A", "[MASK]", "")
SHORTEST_EDGE = 16
# How much longer an edge is than the one below, at most.
EDGE_FACTOR = 1.5
# Rows may bring labels of their own, so that there is no end to what could be kept of a
# prompt's label sets.
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
        self._sizes = sizes
        self._longest = longest
        self._edges = _edges(longest) if lengths is None else tuple(lengths)
        strategy = strategy or decoding.Greedy(max_decode_len=32)
        self._programs = Programs(base, store, strategy, sizes, seed)
        # Of each prompt that is still there: log-probabilities of its label sets.
        self._leanings: weakref.WeakKeyDictionary[
            StoredPrompt, dict[tuple[str, ...], np.ndarray]
        ] = weakref.WeakKeyDictionary()

    @property
    def is_continuous(self) -> bool:
        """Whether free text is decoded in batches whose rows come and go."""
        return self._programs.is_continuous

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
        held = self._programs.held()
        for shape in shapes:
            for key in self._keys(min(longest, self._longest), shape):
                self._programs.get(key, held)

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
        held = self._programs.held()
        for key in self._missing(requests, held):
            self._programs.get(key, held)

    def is_compiled_for(self, requests: Sequence[Request]) -> bool:
        """Whether `compile_for` has nothing to do."""
        return next(self._missing(requests, self._programs.held()), None) is None

    def _missing(
        self, requests: Sequence[Request], held: Adapters | None
    ) -> Iterator[Key]:
        longest: dict[LabelShape | None, int] = {}
        for request in requests:
            silent = self._longest_silent(request) if request.calibrate else 0
            for item in request.items:
                before = longest.get(item.label_shape, 0)
                longest[item.label_shape] = max(before, silent, len(item.ids))
        for shape, length in longest.items():
            yield from self._programs.missing(self._keys(length, shape), held)

    def _keys(self, length: int, shape: LabelShape | None) -> Iterator[Key]:
        """The programs that rows of up to ``length`` tokens may get into."""
        return self._programs.keys(length, shape, self._edges)

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
        self.measure_leanings(requests)
        outputs = iter(self.outputs([item for r in requests for item in r.items]))
        return [self.answers_of(r, [next(outputs) for _ in r.items]) for r in requests]

    def answers_of(
        self, request: Request, outputs: Iterable[np.ndarray]
    ) -> list[Answer]:
        """What the outputs of a row's prompts answer, when its leanings are measured."""
        pairs = zip(request.items, outputs, strict=True)
        return [self._answer(item, out, request.calibrate) for item, out in pairs]

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
        results: list[Any] = [None] * len(items)
        # Who finds a seat at once is answered sooner in a batch that is whole.
        texts = sum(item.labels is None for item in items)
        come_and_go = self.is_continuous and texts > self._sizes[-1]
        pending: list[tuple[np.ndarray, Array]] = []
        running: dict[int, RunningBatch] = {}
        for shape in {item.label_shape: None for item in items}:
            chosen = [i for i, item in enumerate(items) if item.label_shape == shape]
            for indices, length in self.groups([items[i] for i in chosen]):
                indices = np.array(chosen)[indices]
                if shape is None and come_and_go:
                    if length not in running:
                        running[length] = self.running_batch(items, length)
                    running[length].add((i, items[i]) for i in indices)
                    continue
                for part in self._fitting_the_store(items, indices):
                    rows = [items[i] for i in part]
                    started = self._start(rows, length, shape, len(pending))
                    pending.append((part, started))
        for batch in running.values():
            while batch:
                for index, output in batch.advance():
                    results[index] = output
        for part, started in pending:
            for index, output in zip(part, np.asarray(processes.whole(started))):
                labels = items[index].labels
                results[index] = (
                    labels.compared(output[: len(labels.names)]) if labels else output
                )
        return results

    def groups(self, items: Sequence[Item]) -> Iterator[tuple[np.ndarray, int]]:
        """Which rows make a batch, and what length they are padded to."""
        lengths = [len(item.ids) for item in items]
        for group in buckets.groups(lengths, self._edges, self._sizes):
            yield group.indices, group.length

    def running_batch(self, items: Iterable[Item], length: int) -> RunningBatch:
        """A batch for rows like these, which come and go."""
        held = self._programs.held(item.prompt for item in items)
        return RunningBatch(self._programs, length, held)

    def _fitting_the_store(
        self, items: Sequence[Item], indices: np.ndarray
    ) -> Iterator[np.ndarray]:
        """Parts of a batch whose prompts fit the store together."""
        while len(indices):
            count = self._programs.fitting_the_store([items[i] for i in indices])
            yield indices[:count]
            indices = indices[count:]

    def _start(
        self, items: Sequence[Item], length: int, shape: LabelShape | None, batch: int
    ) -> Array:
        """Starts the program of a batch: [B, C] or [B, S], to be waited for."""
        programs, size = self._programs, buckets.fitting(len(items), self._sizes)
        does, argument = Does.DECODE, np.uint32(batch)
        if shape is not None:
            table = np.zeros((size, *shape), np.int32)
            labels = [item.labels.tokens for item in items if item.labels is not None]
            for row, own in zip(table, labels):
                row[: own.shape[0], : own.shape[1]] = own
            does, argument = Does.RANK, programs.spread(table)
        held = programs.held(item.prompt for item in items)
        program = programs.get(Key(does, size, length, shape), held)
        with programs.leased(items, (size, length)) as (table, tokens):
            where = programs.where(held, items, tokens.shape)
            params = programs.params(table, held)
            return program(params, programs.spread(tokens), argument, where)

    def measure_leanings(self, requests: Iterable[Request]) -> None:
        """Sees to it that each prompt's leaning to its labels is known where it is asked."""
        items = [item for each in requests if each.calibrate for item in each.items]
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


def _edges(longest: int) -> tuple[int, ...]:
    """Lengths up to the longest, each at most `EDGE_FACTOR` times the one below."""
    shortest = min(SHORTEST_EDGE, longest)
    steps = math.ceil(math.log(longest / shortest) / math.log(EDGE_FACTOR))
    return buckets.edges(shortest, longest, max(1, steps))
