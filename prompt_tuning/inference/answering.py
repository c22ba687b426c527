# SPDX-License-Identifier: Apache-2.0
"""Requests that are answered while others come: what a server's worker does.

    answering = Answering(engine)
    answering.add({"first": request, "second": another})
    while answering:
        for ticket, result in answering.advance().items(): ...

Labels are ranked at once, all that came. Free text is decoded some tokens at a time, so
that a request gets its answer when it has ended, and those that came meanwhile are begun.
"""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.prepared_rows import Item, Request
from prompt_tuning.inference.running_batch import RunningBatch

# A request, and which of its prompts.
Part = tuple[Hashable, int]


@dataclasses.dataclass
class _Begun:
    request: Request
    outputs: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)


class Answering:
    """Requests in work; one thread may use it."""

    def __init__(self, engine: Engine):
        """Nothing is in work yet."""
        self._engine = engine
        self._begun: dict[Hashable, _Begun] = {}
        # Of a whole batch: all that is not decoded in rows that come and go.
        self._waiting: dict[Part, Item] = {}
        self._running: list[RunningBatch] = []

    def __len__(self) -> int:
        """Requests that have no result yet."""
        return len(self._begun)

    def add(self, requests: Mapping[Hashable, Request]) -> None:
        """Takes requests, each by what its result is to be known by."""
        texts: dict[Part, Item] = {}
        for ticket, request in requests.items():
            self._begun[ticket] = _Begun(request)
            for number, item in enumerate(request.items):
                is_text = item.labels is None and self._engine.is_continuous
                (texts if is_text else self._waiting)[ticket, number] = item
        tickets = list(texts.items())
        for indices, length in self._engine.groups(list(texts.values())):
            own = [tickets[index] for index in indices]
            self._batch_for([item for _, item in own], length).add(own)

    def advance(self) -> dict[Hashable, dict[str, Any]]:
        """Goes on a little with all that is in work.

        Returns:
          The results that this gave, as those of `Engine.run`.
        """
        waiting, self._waiting = self._waiting, {}
        outputs: list[tuple[Any, np.ndarray]] = []
        if waiting:
            requests = {ticket: self._begun[ticket].request for ticket, _ in waiting}
            self._engine.measure_leanings(requests.values())
            outputs += zip(waiting, self._engine.outputs(list(waiting.values())))
        for batch in self._running:
            outputs += batch.advance()
        self._running = [batch for batch in self._running if batch]
        results = {}
        for (ticket, number), output in outputs:
            begun = self._begun[ticket]
            begun.outputs[number] = output
            if len(begun.outputs) == len(begun.request.items):
                del self._begun[ticket]
                in_order = [begun.outputs[i] for i in range(len(begun.outputs))]
                answers = self._engine.answers_of(begun.request, in_order)
                results[ticket] = begun.request.result(answers)
        return results

    def clear(self) -> None:
        """Gives up all that is in work."""
        self._begun, self._waiting, self._running = {}, {}, []

    def _batch_for(self, items: list[Item], length: int) -> RunningBatch:
        new = self._engine.running_batch(items, length)
        for batch in self._running:
            if batch.length == length and batch.held is new.held:
                return batch
        self._running.append(new)
        return new
