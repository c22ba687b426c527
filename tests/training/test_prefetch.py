# SPDX-License-Identifier: Apache-2.0
"""Batches come ahead of the step, late ones are told apart, and no thread is left."""

import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.training import prefetch
from prompt_tuning.training.prefetch import Pace, Prefetch

SLOW = 0.05  # seconds that a batch, or a step, takes


def numbered(seconds: float = 0.0, stop: int | None = None):
    """Batches that hold their numbers, each of which takes its time."""
    for number in itertools.count() if stop is None else range(stop):
        time.sleep(seconds)
        yield {"rows": np.full(2, number, np.int32)}


class Step:
    """What the devices are at, for as long as it is told to last."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def is_ready(self) -> bool:
        return time.monotonic() >= self.end

    def block_until_ready(self):
        time.sleep(max(0.0, self.end - time.monotonic()))
        return self


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "prefetch"]


def run(drawing: float, computing: float, steps: int = 12) -> tuple[float, float, dict]:
    """Seconds of a loop of so many steps, those of waiting, and its pace."""
    with Prefetch(numbered(drawing), jax.device_put) as feed:
        pace = Pace(feed)
        start = time.monotonic()
        for number in range(steps):
            batch = next(feed)
            np.testing.assert_array_equal(batch["rows"], number)
            step = Step(computing)
            pace.step(step)
            step.block_until_ready()
        seconds = time.monotonic() - start
        figures = pace.run()
    assert not threads()
    return seconds, feed.waited, figures


def test_batches_come_placed_in_order_and_end():
    with Prefetch(numbered(stop=5), jax.device_put) as feed:
        found = [batch["rows"] for batch in feed]
        assert next(feed, None) is None
    assert all(isinstance(rows, jax.Array) for rows in found)
    np.testing.assert_array_equal([rows[0] for rows in found], range(5))


def test_drawing_overlaps_with_computing():
    seconds, waited, figures = run(SLOW, SLOW)
    # One after the other they take 24 times as long.
    assert 12 * SLOW < seconds < 20 * SLOW
    assert waited < 6 * SLOW
    assert figures["input_idle"] < 0.4
    assert figures["steps_per_second"] == pytest.approx(1 / SLOW, rel=0.4)


def test_data_that_are_late_are_counted():
    seconds, waited, figures = run(3 * SLOW, SLOW)
    # The devices compute for one of three parts of the time.
    assert figures["input_idle"] == pytest.approx(2 / 3, abs=0.15)
    assert waited == pytest.approx(seconds - 12 * SLOW, rel=0.15)


def test_devices_that_are_busy_do_not_wait():
    """The loop runs ahead of the devices; data they do not miss yet are not late."""
    with Prefetch(numbered(SLOW), jax.device_put) as feed:
        next(feed)
        before = feed.waited
        feed.computing(Step(30 * SLOW))
        for _ in range(5):
            next(feed)
        assert feed.waited == before


def test_pauses_are_left_out():
    with Prefetch(numbered(), jax.device_put) as feed:
        pace = Pace(feed)
        assert pace.lap() == {}
        for _ in range(5):
            next(feed)
            pace.step(jnp.zeros(()))
            time.sleep(SLOW)
            with pace.paused():
                time.sleep(4 * SLOW)
        lap = pace.lap()
        # 4 steps in 5 times SLOW; with the pauses these were 25.
        assert 4 / (15 * SLOW) < lap["steps_per_second"] < 4 / (5 * SLOW)
        assert pace.lap() == {} and pace.run()["steps_per_second"] > 0


@pytest.mark.parametrize("error", [UserError("row 3 is broken"), KeyError("rows")])
def test_an_error_of_the_thread_is_raised_as_itself(error):
    def broken():
        yield from numbered(stop=2)
        raise error

    with (
        pytest.raises(type(error)) as caught,
        Prefetch(broken(), jax.device_put) as feed,
    ):
        for number in range(3):
            np.testing.assert_array_equal(next(feed)["rows"], number)
    assert caught.value is error
    assert not threads()


def test_no_thread_survives_an_error_of_the_loop():
    with pytest.raises(ZeroDivisionError), Prefetch(numbered(), jax.device_put) as feed:
        next(feed)
        assert threads()
        1 / 0  # noqa: B018
    assert not threads()


def test_no_more_is_drawn_than_was_asked_for():
    drawn = []
    count = (drawn.append(i) or {"rows": np.zeros(1)} for i in itertools.count())
    with Prefetch(count, jax.device_put, ahead=3) as feed:
        next(feed)
        end = time.monotonic() + 5
        while len(drawn) < 4 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(SLOW)
        assert len(drawn) == 4
    assert len(drawn) == 4
    assert prefetch.AHEAD >= 1
