# SPDX-License-Identifier: Apache-2.0
"""Requests that arrive one by one share batches: a bounded queue and one worker.

While the device answers a batch, what arrives meanwhile waits and becomes the next one:
the busier the server, the fuller the batches, without anyone waiting for company. A batch
takes a row of each submission in turn, so that many rows at once keep nobody waiting for
longer than the batch that runs.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from prompt_tuning.inference.prepared_rows import Request

Run = Callable[[Sequence[Request]], list[dict[str, Any]]]

_logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """There is no room for these requests now."""


class ClosedError(Exception):
    """The batcher takes no more requests."""


class Batcher:
    """Runs requests in batches, each submission's in its order; any thread may submit."""

    def __init__(
        self,
        run: Run,
        *,
        max_batch: int = 64,
        max_queue: int = 1024,
        max_delay: float = 0.002,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        """Starts the worker.

        Args:
          run: answers requests, in their order (see `engine.Engine.run`).
          max_batch: requests that one call of ``run`` is given at most.
          max_queue: requests that may wait.
          max_delay: seconds that the first request of a batch waits for others.
          on_batch: told the size of each batch and the seconds it took.
        """
        self._run = run
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
        self._worker = threading.Thread(target=self._work, name="batcher", daemon=True)
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

    def _work(self) -> None:
        while batch := self._next_batch():
            wanted = [
                (request, future)
                for request, future in batch
                if future.set_running_or_notify_cancel()
            ]
            if wanted:
                self._answer(wanted)

    def _next_batch(self) -> list[tuple[Request, Future]]:
        """Waits for requests; none is left when it returns an empty list."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            while self._waiting and not self._closed:
                oldest = min(came for came, _ in self._waiting)
                left = oldest + self._max_delay - time.monotonic()
                if self._size >= self._max_batch or left <= 0:
                    break
                self._changed.wait(left)
            batch = []
            while self._waiting and len(batch) < self._max_batch:
                came, pairs = self._waiting.popleft()
                batch.append(pairs.popleft())
                if pairs:
                    self._waiting.append((came, pairs))
            self._size -= len(batch)
            return batch

    def _answer(self, batch: list[tuple[Request, Future]]) -> None:
        started = time.monotonic()
        try:
            results = self._run([request for request, _ in batch])
        except Exception as error:
            _logger.exception("a batch of %d requests failed", len(batch))
            if len(batch) > 1:
                # The others are not to pay for the one that fails.
                for alone in batch:
                    self._answer([alone])
            else:
                batch[0][1].set_exception(error)
            return
        finally:
            self._on_batch(len(batch), time.monotonic() - started)
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
