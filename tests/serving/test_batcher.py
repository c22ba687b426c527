# SPDX-License-Identifier: Apache-2.0
"""Requests share batches, in order, within bounds, and none is lost at the end."""

import threading
import time

import pytest

from prompt_tuning.serving.batcher import Batcher, ClosedError, QueueFullError


class AtOnce:
    """Answers all that came with one call of a function."""

    def __init__(self, run):
        self.run = run
        self.waiting = {}

    def __len__(self):
        return len(self.waiting)

    def add(self, requests):
        self.waiting |= requests

    def advance(self):
        requests, self.waiting = self.waiting, {}
        return dict(zip(requests, self.run(list(requests.values())), strict=True))

    def clear(self):
        self.waiting = {}


class Device:
    """Doubles numbers, one batch at a time, each when it is let."""

    def __init__(self):
        self.batches = []
        self.may_go = threading.Event()
        self.busy = threading.Event()

    def run(self, requests):
        self.batches.append(list(requests))
        self.busy.set()
        assert self.may_go.wait(10)
        return [{"twice": 2 * request} for request in requests]


@pytest.fixture
def device():
    device = Device()
    yield device
    device.may_go.set()


def start(device, **kwargs):
    return Batcher(AtOnce(device.run), **{"max_delay": 0.0, **kwargs})


def occupied(device, batcher):
    """Keeps the worker busy with request 0."""
    first = batcher.submit([0])
    assert device.busy.wait(10)
    return first


def test_what_arrives_meanwhile_is_the_next_batch(device):
    batcher = start(device, max_batch=3)
    futures = occupied(device, batcher)
    for number in range(1, 6):
        futures += batcher.submit([number])
    device.may_go.set()
    assert [f.result(10)["twice"] for f in futures] == [0, 2, 4, 6, 8, 10]
    assert device.batches == [[0], [1, 2, 3], [4, 5]]
    batcher.close()


def test_the_first_request_waits_a_little_for_others(device):
    device.may_go.set()
    batcher = start(device, max_delay=10.0, max_batch=2)
    futures = batcher.submit([1])
    time.sleep(0.05)
    assert not device.batches
    futures += batcher.submit([2])
    assert [f.result(5)["twice"] for f in futures] == [2, 4]
    assert device.batches == [[1, 2]]
    batcher.close()


def test_a_full_queue_takes_all_or_nothing(device):
    batcher = start(device, max_queue=4)
    futures = occupied(device, batcher) + batcher.submit([1, 2, 3])
    with pytest.raises(QueueFullError):
        batcher.submit([4, 5])
    assert batcher.waiting == 3
    futures += batcher.submit([4])
    device.may_go.set()
    assert [f.result(10)["twice"] for f in futures] == [0, 2, 4, 6, 8]
    batcher.close()


def test_closing_answers_what_waits_and_takes_no_more(device):
    batcher = start(device, max_batch=1)
    futures = occupied(device, batcher) + batcher.submit([1, 2])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    time.sleep(0.02)
    assert closing.is_alive() and not batcher.alive
    with pytest.raises(ClosedError):
        batcher.submit([3])
    device.may_go.set()
    closing.join(10)
    assert [f.result(0)["twice"] for f in futures] == [0, 2, 4]


def test_what_nobody_waits_for_is_not_run(device):
    batcher = start(device)
    first = occupied(device, batcher)
    gone, stays = batcher.submit([1, 2])
    assert gone.cancel()
    device.may_go.set()
    assert stays.result(10) == {"twice": 4} and first[0].done()
    assert device.batches == [[0], [2]]
    batcher.close()


def test_an_error_is_its_batch_s_alone():
    def run(requests):
        if "bad" in requests:
            raise ArithmeticError("no")
        return [{"ok": request} for request in requests]

    sizes = []
    batcher = Batcher(
        AtOnce(run), max_batch=1, on_batch=lambda size, seconds: sizes.append(size)
    )
    bad, good = batcher.submit(["bad", "good"])
    with pytest.raises(ArithmeticError):
        bad.result(10)
    assert good.result(10) == {"ok": "good"} and batcher.alive
    batcher.close()
    assert sizes == [1, 1]


def test_a_batch_takes_of_each_submission_in_turn(device):
    batcher = start(device, max_batch=4)
    futures = occupied(device, batcher)
    futures += batcher.submit([1, 2, 3, 4, 5, 6]) + batcher.submit([7])
    futures += batcher.submit([8, 9])
    device.may_go.set()
    assert [f.result(10)["twice"] for f in futures] == [2 * i for i in range(10)]
    assert device.batches == [[0], [1, 7, 8, 2], [9, 3, 4, 5], [6]]
    batcher.close()


def test_a_request_that_fails_fails_alone():
    def run(requests):
        if "bad" in requests:
            raise ArithmeticError("no")
        return [{"ok": request} for request in requests]

    batcher = Batcher(AtOnce(run), max_batch=3, max_delay=10.0)
    first, bad, last = batcher.submit(["first", "bad", "last"])
    assert first.result(10) == {"ok": "first"} and last.result(10) == {"ok": "last"}
    with pytest.raises(ArithmeticError):
        bad.result(10)
    batcher.close()


class Stepwise:
    """Numbers that take as many steps as they say."""

    def __init__(self):
        self.left, self.may_go, self.most = {}, threading.Semaphore(0), 0

    def __len__(self):
        return len(self.left)

    def add(self, requests):
        self.left |= requests
        self.most = max(self.most, len(self.left))

    def advance(self):
        assert self.may_go.acquire(timeout=10)
        if "bad" in self.left.values():
            raise ArithmeticError("no")
        self.left = {ticket: left - 1 for ticket, left in self.left.items()}
        done = [ticket for ticket, left in self.left.items() if not left]
        for ticket in done:
            del self.left[ticket]
        return {ticket: {"done": True} for ticket in done}

    def clear(self):
        self.left = {}


def test_what_is_short_is_answered_before_what_is_long():
    work = Stepwise()
    batcher = Batcher(work, max_batch=2, max_delay=0.0)
    (long,) = batcher.submit([4])
    short, waiting = batcher.submit([1, 1])
    work.may_go.release(3)
    assert waiting.result(10) and short.done() and not long.done()
    work.may_go.release()
    assert long.result(10) and work.most == 2
    batcher.close()


def test_what_is_in_work_is_answered_when_another_request_fails():
    work = Stepwise()
    work.may_go.release(10)
    batcher = Batcher(work, max_batch=3, max_delay=10.0)
    first, bad, last = batcher.submit([2, "bad", 1])
    assert first.result(10) and last.result(10)
    with pytest.raises(ArithmeticError):
        bad.result(10)
    batcher.close()
