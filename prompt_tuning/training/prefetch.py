# SPDX-License-Identifier: Apache-2.0
"""Batches that are on the devices before the step asks for them.

A thread draws batches and copies them to the devices while the step computes. What the
devices lose to data that is late all the same is measured, not guessed.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np

from prompt_tuning.types import Batch

# Two may be ready: one for the next step, and one more while the thread draws a late one.
AHEAD = 2
# How finely waiting is measured, in seconds.
GRAIN = 0.001


class Prefetch(Iterator[Batch]):
    """Iterates over placed batches; a context manager that owns the thread.

    An error of the thread, the end of the batches included, is raised by ``next``.

    Attributes:
      waited: seconds that the devices have had nothing to do for want of a batch.
    """

    def __init__(
        self,
        batches: Iterator[Mapping[str, Any]],
        place: Callable[[Mapping[str, Any]], Batch],
        ahead: int = AHEAD,
    ):
        """Starts drawing.

        Args:
          batches: where they come from.
          place: puts a batch on the devices. It runs in the thread, and so must not be
            a collective operation: processes would meet in different orders.
          ahead: batches that may be ready.
        """
        self.waited = 0.0
        self._batches = batches
        self._place = place
        self._computing: jax.Array | None = None
        self._ready: queue.SimpleQueue[tuple[Batch, BaseException | None]]
        self._ready = queue.SimpleQueue()
        self._room = threading.Semaphore(ahead)
        self._closed = False
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, name="prefetch")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        """Stops the thread; a batch that is being drawn is waited for."""
        self._closed = True
        self._room.release()
        self._thread.join()

    def computing(self, result: jax.Array) -> None:
        """Says what the devices are at: they are busy until ``result`` is there."""
        self._computing = result

    def __next__(self) -> Batch:
        if self._ended is not None:
            raise self._ended
        since = time.monotonic()
        while True:
            try:
                batch, self._ended = self._ready.get(timeout=GRAIN)
                break
            except queue.Empty:
                if self._busy():
                    since = time.monotonic()
        if not self._busy():
            self.waited += time.monotonic() - since
        if self._ended is not None:
            raise self._ended
        self._room.release()
        return batch

    def _busy(self) -> bool:
        return self._computing is not None and not self._computing.is_ready()

    def _fill(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._closed:
                    return
                self._ready.put((self._place(next(self._batches)), None))
        # Whatever it is, it belongs to the loop that asks for batches.
        except BaseException as error:  # noqa: BLE001
            self._ready.put(({}, error))


class Pace:
    """How fast steps follow each other, and the share of that time that data were late.

    Compiling, evaluations and checkpoints are left out, or they would hide what is lost
    between steps.
    """

    def __init__(self, feed: Prefetch | None = None):
        self._feed = feed
        self._result: jax.Array | None = None
        self._since = np.zeros(2)
        self._run = self._before = np.zeros(3)  # steps, seconds, seconds waited

    def follow(self, feed: Prefetch) -> None:
        """Takes the next steps to get their batches from ``feed``."""
        self._read()
        self._feed, self._result = feed, None

    def step(self, result: jax.Array) -> None:
        """Counts a step that will give ``result``; the first one starts the clock."""
        self._followed.computing(result)
        if self._result is None:
            self._since = self._now()
        else:
            self._run = self._run + (1, 0, 0)
        self._result = result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock once the devices have done what they were given."""
        jax.block_until_ready(self._result)
        self._read()
        yield
        self._since = self._now()

    def lap(self) -> dict[str, float]:
        """The figures since the last lap; none if that was less than a step."""
        self._read()
        since, self._before = self._run - self._before, self._run
        return _rates(*since)

    def run(self) -> dict[str, float]:
        """The figures since the start."""
        self._read()
        return _rates(*self._run)

    def busy(self) -> float:
        """Seconds since the start in which the devices had a step to compute."""
        self._read()
        _, seconds, waited = self._run
        return float(seconds - waited)

    def _now(self) -> np.ndarray:
        return np.array([time.monotonic(), self._followed.waited])

    @property
    def _followed(self) -> Prefetch:
        if self._feed is None:
            raise ValueError("say which feed the steps take their batches from: follow")
        return self._feed

    def _read(self) -> None:
        if self._result is not None:
            now = self._now()
            self._run = self._run + (0, *(now - self._since))
            self._since = now


def _rates(steps: float, seconds: float, waited: float) -> dict[str, float]:
    if not steps:
        return {}
    rates = {"steps_per_second": steps / seconds, "input_idle": waited / seconds}
    return {name: float(rate) for name, rate in rates.items()}
