# SPDX-License-Identifier: Apache-2.0
"""What a server says of itself to Prometheus."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from prompt_tuning.inference.engine import Engine
from prompt_tuning.serving.batcher import Batcher

PREFIX = "prompt_tuning_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server; two in one process do not meet."""

    def __init__(self):
        """Makes all counters, at zero."""
        self._registry = CollectorRegistry()
        self._responses = Counter(
            PREFIX + "http_responses",
            "Responses",
            ["route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            PREFIX + "http_seconds",
            "Seconds from a request to its response",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._rows = Counter(
            PREFIX + "rows",
            "Rows answered or refused",
            ["outcome"],
            registry=self._registry,
        )
        self._batch_rows = Histogram(
            PREFIX + "batch_rows",
            "Rows that shared a batch",
            buckets=ROWS,
            registry=self._registry,
        )
        self._batch_seconds = Histogram(
            PREFIX + "batch_seconds",
            "Seconds that a batch took",
            buckets=SECONDS,
            registry=self._registry,
        )

    def watch(self, engine: Engine, batcher: Batcher) -> None:
        """Adds what can be read off these whenever somebody asks."""
        for name, text, read in (
            ("queue_rows", "Rows that wait", lambda: batcher.waiting),
            ("prompts", "Prompts that rows may name", lambda: len(engine.store)),
            (
                "table_rows_in_use",
                "Rows of the device's prompt table that hold a prompt",
                lambda: engine.store.table.rows_in_use,
            ),
            ("programs", "Compiled programs", lambda: engine.num_programs),
        ):
            Gauge(PREFIX + name, text, registry=self._registry).set_function(read)

    def response(self, route: str, status: int, seconds: float) -> None:
        """Counts a response."""
        self._responses.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def rows(self, outcome: str, number: int = 1) -> None:
        """Counts rows: 'answered', 'refused', 'rejected' (no room) or 'failed'."""
        self._rows.labels(outcome).inc(number)

    def batch(self, rows: int, seconds: float) -> None:
        """Counts a batch."""
        self._batch_rows.observe(rows)
        self._batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
