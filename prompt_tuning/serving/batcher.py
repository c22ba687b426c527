# SPDX-License-Identifier: Apache-2.0
"""Requests that arrive one by one share batches: a bounded queue and one worker.

While the device works, what arrives meanwhile waits and is begun next: the busier the
server, the fuller the batches, without anyone waiting for company. A row of each
submission is begun in turn, so that many rows at once keep nobody waiting for longer than
what is in work. Each request has its result as soon as it is there, whatever others of
its batch still have before them.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from prompt_tuning.inference.prepared_rows import Request


class Work(Protocol):
    """Answers requests while others come, as `inference.answering.Answering` does."""

    def __len__(self) -> int:
        """Requests that have no result yet."""
        ...

    def add(self, requests: Mapping[Hashable, Request]) -> None:
        """Takes requests, each by what its result is to be known by."""
        ...

    def advance(self) -> Mapping[Hashable, dict[str, Any]]:
        """Goes on a little; gives what results this gave."""
        ...

    def clear(self) -> None:
        """Gives up all that is in work."""
        ...


_logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """There is no room for these requests now."""


class ClosedError(Exception):
    """The batcher takes no more requests."""


class Batcher:
    """Works off requests, each submission's in its order; any thread may submit."""

    def __init__(
        self,
        work: Work,
        *,
        max_batch: int = 64,
        max_queue: int = 1024,
        max_delay: float = 0.002,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        """Starts the worker.

        Args:
          work: answers requests.
          max_batch: requests that are in work at most.
          max_queue: requests that may wait.
          max_delay: seconds that a request waits for others where nothing is in work.
          on_batch: told of each call of ``advance`` how many requests were in work and
            the seconds it took.
        """
        self._work = work
        # Of each request in work.
        self._begun: dict[Hashable, tuple[Request, Future]] = {}
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._max_delay = max_delay
        self._on_batch = on_batch
        # What is left of each submission, with the time it came; the first is the next.
        self._waiting: collections.deque[
            tuple[float, collections.deque[tuple[Request, Future]]]
        ] = collections.deque()
        self._size = 0
        self._changed = threading.Condition()
        self._closed = False
        # A daemon, so that an error of the server's own does not leave a process behind.
        self._worker = threading.Thread(
            target=self._answer_all, name="batcher", daemon=True
        )
        self._worker.start()

    def submit(self, requests: Sequence[Request]) -> list[Future]:
        """Queues requests, all of them or none.

        Returns:
          A future of the result of each. One that is cancelled before its batch begins
          is not run.

        Raises:
          QueueFullError: they do not fit into the queue.
          ClosedError: `close` was called.
        """
        with self._changed:
            if self._closed:
                raise ClosedError
            if self._size + len(requests) > self._max_queue:
                raise QueueFullError
            futures = [Future() for _ in requests]
            if requests:
                pairs = collections.deque(zip(requests, futures, strict=True))
                self._waiting.append((time.monotonic(), pairs))
                self._size += len(requests)
                self._changed.notify()
        return futures

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._size

    @property
    def alive(self) -> bool:
        """Whether requests are taken and answered."""
        return not self._closed and self._worker.is_alive()

    def close(self) -> None:
        """Takes no more requests, and returns when those in the queue are answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    def _answer_all(self) -> None:
        """Works until there is nothing left, and nothing can come any more."""
        number = 0
        while (batch := self._next_batch()) or self._begun:
            begun = {}
            for request, future in batch:
                if future.set_running_or_notify_cancel():
                    begun[number] = request, future
                    number += 1
            self._advance(begun)

    def _next_batch(self) -> list[tuple[Request, Future]]:
        """Waits for requests unless some are in work; takes those that there is room for."""
        with self._changed:
            while not (self._waiting or self._closed or self._begun):
                self._changed.wait()
            while self._waiting and not (self._closed or self._begun):
                oldest = min(came for came, _ in self._waiting)
                left = oldest + self._max_delay - time.monotonic()
                if self._size >= self._max_batch or left <= 0:
                    break
                self._changed.wait(left)
            batch = []
            while self._waiting and len(batch) + len(self._begun) < self._max_batch:
                came, pairs = self._waiting.popleft()
                batch.append(pairs.popleft())
                if pairs:
                    self._waiting.append((came, pairs))
            self._size -= len(batch)
            return batch

    def _advance(self, begun: Mapping[Hashable, tuple[Request, Future]]) -> None:
        """Begins requests, and goes on with those in work."""
        self._begun |= begun
        if not self._begun:
            return
        started, size = time.monotonic(), len(self._begun)
        try:
            self._work.add({ticket: pair[0] for ticket, pair in begun.items()})
            results = self._work.advance()
        except Exception as error:
            _logger.exception("a batch of %d requests failed", size)
            self._work.clear()
            failed, self._begun = self._begun, {}
            if size == 1:
                next(iter(failed.values()))[1].set_exception(error)
                return
            # The others are not to pay for the one that fails.
            for ticket, pair in failed.items():
                self._advance({ticket: pair})
                while self._begun:
                    self._advance({})
            return
        finally:
            self._on_batch(size, time.monotonic() - started)
        for ticket, result in results.items():
            self._begun.pop(ticket)[1].set_result(result)
