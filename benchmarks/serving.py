# SPDX-License-Identifier: Apache-2.0
"""A server under load: right answers, latencies, throughput, and a SIGTERM in the middle.

    python benchmarks/serving.py --seconds 600 --output benchmarks/results/serving.json

64 clients on loopback ask without pause for answers to Rotten Tomatoes sentences by
prompts of many lengths, while others are added, used and removed. Each answer is
compared with the engine's own; then the server gets SIGTERM while all clients wait, and
whatever it had accepted has to be answered. The clients use the same cores as the server,
so latencies are those of a machine that does both. They need: pip install aiohttp
"""

import argparse
import asyncio
import collections
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import aiohttp
import environment
import mixed_inference
import numpy as np

from prompt_tuning.checkpoints import base_models
from prompt_tuning.commands import demo
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.tasks import rotten_tomatoes

LENGTHS = (5, 10, 20, 50)
PERCENTILES = (50, 90, 99, 100)
LATE = "late"


class Load:
    """Clients of one server, and what became of their requests."""

    def __init__(self, address: str, rows: list[dict], expected: list[str]):
        self.address = address
        self.rows = rows
        self.expected = expected
        self.latencies: list[float] = []
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.turns = 0
        self.ending = False

    async def client(self, http: aiohttp.ClientSession) -> None:
        """Asks for random rows until the end."""
        while not self.ending:
            index = random.randrange(len(self.rows))
            started = time.perf_counter()
            try:
                status, body = await self.ask(http, self.rows[index])
            except aiohttp.ClientError as error:
                # While the server ends it takes no connections; before, this is a loss.
                self.outcomes["not accepted" if self.ending else repr(error)] += 1
                continue
            self.latencies.append(time.perf_counter() - started)
            if status != 200:
                self.outcomes[f"status {status}"] += 1
            elif body["answer"] != self.expected[index]:
                self.outcomes["wrong"] += 1
            else:
                self.outcomes["right"] += 1

    async def ask(self, http: aiohttp.ClientSession, row: dict) -> tuple[int, dict]:
        """The status and the answer to a row."""
        async with http.post(f"{self.address}/v1/predict", json=row) as response:
            return response.status, await response.json()

    async def turnover(self, http: aiohttp.ClientSession, data: bytes) -> None:
        """Adds a prompt, uses it and removes it, again and again."""
        row = {**self.rows[0], "prompt": LATE}
        url = f"{self.address}/v1/prompts/{LATE}"
        headers = {"Content-Type": "application/octet-stream"}
        while not self.ending:
            async with http.put(url, data=data, headers=headers) as response:
                added = response.status
            answered, body = await self.ask(http, row)
            async with http.delete(url) as response:
                removed = response.status
            codes = (added, answered, removed)
            if codes == (201, 200, 204) and body["answer"] == self.expected[0]:
                self.turns += 1
            elif not self.ending:
                self.outcomes[f"turnover {codes}"] += 1
            await asyncio.sleep(0.2)

    async def run(
        self, clients: int, seconds: float, data: bytes, server: subprocess.Popen
    ) -> float:
        """Loads the server, then ends it; returns the seconds until then."""
        timeout = aiohttp.ClientTimeout(total=60)
        # One connection for each client, and one for the turnover.
        connector = aiohttp.TCPConnector(limit=clients + 1)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
            tasks = [asyncio.create_task(self.client(http)) for _ in range(clients)]
            turnover = asyncio.create_task(self.turnover(http, data))
            started = time.perf_counter()
            await asyncio.sleep(seconds)
            turnover.cancel()
            lasted = time.perf_counter() - started
            self.ending = True
            server.send_signal(signal.SIGTERM)
            await asyncio.gather(*tasks)
        return lasted


def start(folder: pathlib.Path) -> tuple[subprocess.Popen, str]:
    """A server of its own and its address."""
    command = [sys.executable, "-m", "prompt_tuning", "serve", "--port", "0"]
    command += ["--model", demo.CHECKPOINT, "--prompts", str(folder)]
    server = subprocess.Popen(
        [*command, "--warm_up", "80"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    for line in server.stderr:
        if "http://" in line:
            return server, line.split()[-1]
    raise RuntimeError("the server ended at its start")


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    source = base_models.load(demo.CONFIG, demo.CHECKPOINT)
    lengths = {f"p{i}": LENGTHS[i % len(LENGTHS)] for i in range(20)}
    texts, _ = rotten_tomatoes.texts_and_labels("test")
    rng = np.random.default_rng(1)
    rows = [
        {"prompt": f"p{i}", "text": text}
        for i, text in zip(rng.integers(0, len(lengths), len(texts)), texts)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        mixed_inference.write_prompts(folder, source, lengths)
        store = PromptStore(source)
        assert not store.load_folder(folder)
        engine = Engine(source, store)
        expected = [answer["answer"] for answer in engine.answer(rows)]
        began = time.perf_counter()
        engine.answer(rows)
        alone = len(rows) / (time.perf_counter() - began)
        data = (folder / f"{rows[0]['prompt']}.safetensors").read_bytes()
        server, address = start(folder)
        try:
            load = Load(address, rows, expected)
            lasted = asyncio.run(
                load.run(options.clients, options.seconds, data, server)
            )
            code = server.wait(60)
        finally:
            server.kill()
    answered = sum(load.outcomes.values()) - load.outcomes["not accepted"]
    results = {
        "seconds": lasted,
        "clients": options.clients,
        "prompts": len(lengths),
        "outcomes": dict(load.outcomes),
        "prompts_added_and_removed": load.turns,
        "exit_code": code,
        "rows_per_second": answered / lasted,
        "engine_rows_per_second": alone,
        "throughput_ratio": answered / lasted / alone,
        "latency_ms": {
            f"p{percent}": 1000 * float(np.percentile(load.latencies, percent))
            for percent in PERCENTILES
        },
    }
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
