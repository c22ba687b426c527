# SPDX-License-Identifier: Apache-2.0
"""Things of one process that are timed in turn, so that the machine meets all alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)


def seconds(
    calls: Mapping[Name, Callable[[], Any]], rounds: int
) -> dict[Name, list[float]]:
    """Seconds of each call, until its arrays are there, in every round."""
    found: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            found[name].append(time.perf_counter() - start)
    return found


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of neighbours, which share what disturbs them."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))
