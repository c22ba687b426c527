# SPDX-License-Identifier: Apache-2.0
"""A server under attack: what others notice of it, and what memory it takes.

    python benchmarks/attacks.py --output benchmarks/results/attacks.json

Clients that do no harm ask for an answer ten times a second each, while one attacker
after the other does what the list below says. Of each attack: latencies and errors of
the others, the server's memory, and how the attacker was answered. Every attack has a
server of its own, with 256 file descriptors. `--python` serves with another interpreter,
and so with another version of the package. A soak is an attack of 600 seconds (`--seconds`).
"""

import argparse
import collections
import contextlib
import http.client
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import environment
import numpy as np

from prompt_tuning import files
from prompt_tuning.checkpoints import base_models, cards
from prompt_tuning.commands import demo

CLIENTS = 4
FILES = 256
# What a server may take, so that an attack that works does not end this machine.
MOST_BYTES = 8 << 30
JSON, BYTES = "application/json", "application/octet-stream"
MIB = 1 << 20
GOOD = {"prompt": "good", "text": "a gorgeous , witty film"}


class Server:
    """A server of its own."""

    def __init__(self, python: str, folder: pathlib.Path):
        command = [python, "-m", "prompt_tuning", "serve", "--port", "0"]
        command += ["--model", demo.CHECKPOINT, "--prompts", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--warm_up", "32", "--max_input_length", "256"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        process = self.process.pid
        resource.prlimit(process, resource.RLIMIT_NOFILE, (FILES, FILES))
        resource.prlimit(process, resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
        self.port = 0
        for line in self.process.stderr:
            if "http://" in line:
                self.port = int(line.rsplit(":", 1)[1])
                break
        if not self.port:
            raise RuntimeError("the server ended at its start")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def send(
        self, method: str, path: str, body: bytes = b"", kind: str = JSON
    ) -> tuple[int, bytes]:
        """The status of a request and what came with it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": kind})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def ask(self, content: object) -> str:
        """How an attacker's rows are answered: the status, or the error's name."""
        return self._outcome("POST", "/v1/predict", json.dumps(content).encode(), JSON)

    def upload(self, name: str, data: bytes) -> str:
        """How an attacker's prompt is answered."""
        return self._outcome("PUT", f"/v1/prompts/{name}", data, BYTES)

    def _outcome(self, *request) -> str:
        try:
            return str(self.send(*request)[0])
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__

    def memory(self) -> float:
        """Anonymous memory in MiB; 0 after its end."""
        with contextlib.suppress(OSError):
            status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
            for line in status.splitlines():
                if line.startswith("RssAnon"):
                    return int(line.split()[1]) / 1024
        return 0.0


class Others:
    """Clients that do no harm, from the beginning of the block to its end."""

    def __init__(self, server: Server):
        self._server = server
        self._ended = threading.Event()
        self.latencies: list[float] = []
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.memory: list[float] = []

    def __enter__(self):
        threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        self._threads = [*threads, threading.Thread(target=self._watch)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        body = json.dumps(GOOD).encode()
        while not self._ended.wait(0.1):
            started = time.perf_counter()
            try:
                status, _ = self._server.send("POST", "/v1/predict", body)
                self.outcomes[str(status)] += 1
            except (OSError, http.client.HTTPException) as error:
                self.outcomes[type(error).__name__] += 1
            self.latencies.append(time.perf_counter() - started)

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self.memory.append(self._server.memory())


def prompt(path: pathlib.Path, **card) -> bytes:
    """A prompt with any card, which nobody has checked."""
    width = demo.CONFIG.emb_dim
    array = np.random.default_rng(0).normal(size=(4, width)).astype(np.float32)
    card = {"length": len(array), "width": width, **card}
    files.write(path, {"prompt": array}, {cards.CARD: json.dumps(card)})
    return path.read_bytes()


class Attacks:
    """What is done to a server: each takes seconds and returns the attacker's answers."""

    def __init__(self, facts: dict, folder: pathlib.Path):
        self._facts = facts
        self._folder = folder

    def _prompt(self, **card) -> bytes:
        return prompt(self._folder / "bad.safetensors", **{**self._facts, **card})

    def nothing(self, server: Server, until: float):
        while time.monotonic() < until:
            time.sleep(0.1)
            yield "none"

    def one_label_of_3500_words(self, server: Server, until: float):
        row = {**GOOD, "labels": ["word " * 3500, "good"]}
        while time.monotonic() < until:
            yield server.ask(row)

    def five_thousand_labels(self, server: Server, until: float):
        row = {**GOOD, "labels": [f"film {i}" for i in range(5000)]}
        while time.monotonic() < until:
            yield server.ask(row)

    def labels_of_ever_other_shapes(self, server: Server, until: float):
        count = 0
        while time.monotonic() < until:
            count += 1
            labels = [
                f"a {'film ' * (count % 9)}{i}" for i in range(2 + 5 * count % 60)
            ]
            yield server.ask({**GOOD, "labels": labels})

    def rows_as_many_and_long_as_may_be(self, server: Server, until: float):
        row = {**GOOD, "text": "film " * 150}
        while time.monotonic() < until:
            yield server.ask({"rows": [row] * 256})

    def template_of_three_billion_positions(self, server: Server, until: float):
        data = self._prompt(template="{prompt:0:3000000000} {text}")
        while time.monotonic() < until:
            yield server.upload("bomb", data)

    def template_that_repeats_its_text(self, server: Server, until: float):
        yield server.upload("echo", self._prompt(template="{text} " * 5000))
        while time.monotonic() < until:
            yield server.ask({"prompt": "echo", "text": "word " * 800})

    def cards_that_break_the_list(self, server: Server, until: float):
        bad = [{"metric": {"accuracy": float("inf")}}, {"task": "\ud800"}]
        for number, card in enumerate(bad):
            yield server.upload(f"bad{number}", self._prompt(**card))
        while time.monotonic() < until:
            time.sleep(0.1)
            yield "list " + server._outcome("GET", "/v1/prompts", b"", JSON)

    def bad_prompts(self, server: Server, until: float):
        """Cards that are none, cut and changed files, and removals, ten a second."""
        bad = [
            {"metric": {"accuracy": float("nan")}},
            {"task": "\ud800"},
            {"base_model": "x"},
            {"template": 3},
            {"template": "{prompt:0:3000000000} {text}"},
            {"labels": ["word " * 1000, "good"]},
            {"vocabulary": "gs://nowhere/spiece.model"},
            {"notes": "x" * 100_000},
        ]
        made = [self._prompt(**card) for card in bad]
        sound = self._prompt(labels=["negative", "positive"])
        rng = np.random.default_rng(0)
        while time.monotonic() < until:
            kind = rng.integers(len(made) + 3)
            if kind < len(made):
                data = made[kind]
            elif kind == len(made):
                data = sound[: rng.integers(len(sound))]
            else:
                changed = bytearray(sound)
                for at in rng.integers(len(sound), size=rng.integers(1, 9)):
                    changed[at] ^= 1 << rng.integers(8)
                data = bytes(changed)
            answered = server.upload("bad", data)
            yield answered
            if answered == "201":
                # A change that left the prompt sound: what came is taken away again.
                yield "removal " + server._outcome(
                    "DELETE", "/v1/prompts/bad", b"", JSON
                )
            time.sleep(0.1)

    def good_prompts_without_end(self, server: Server, until: float):
        data, count = self._prompt(), 0
        while time.monotonic() < until:
            count += 1
            yield server.upload(f"p{count}", data)

    def half_sent_headers(self, server: Server, until: float):
        connections = []
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                one = socket.create_connection(("127.0.0.1", server.port), timeout=1)
                one.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n")
                connections.append(one)
            if len(connections) > 400:
                connections.pop(0).close()
            yield "sent"
            time.sleep(0.005)
        for one in connections:
            one.close()

    def half_sent_bodies(self, server: Server, until: float):
        header = (
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{"
        )
        connections = []
        for _ in range(150):
            with contextlib.suppress(OSError):
                one = socket.create_connection(("127.0.0.1", server.port), timeout=1)
                one.sendall(header)
                connections.append(one)
        while time.monotonic() < until:
            yield "held"
            time.sleep(0.1)
        for one in connections:
            one.close()


LIST = [name for name in vars(Attacks) if not name.startswith("_")]


def measure(
    attack: Callable, python: str, folder: pathlib.Path, seconds: float
) -> dict[str, object]:
    """One attack on one server."""
    server = Server(python, folder)
    try:
        for _ in range(3):
            server.ask(GOOD)
        before = server.memory()
        answers: collections.Counter[str] = collections.Counter()
        with Others(server) as others:
            for answer in attack(server, time.monotonic() + seconds):
                answers[answer] += 1
        alive = server.process.poll() is None
        after = server.memory()
    finally:
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    return {
        "attacker": dict(answers),
        "others": dict(others.outcomes),
        "others_latency_ms": {
            f"p{percent}": round(1000 * float(np.percentile(others.latencies, percent)))
            for percent in (50, 99, 100)
        },
        "memory_mib": {
            "before": round(before),
            "peak": round(max(others.memory)),
            "after": round(after),
            # Ten equal parts of the time, the median of each.
            "parts": [
                round(float(np.median(x))) for x in np.array_split(others.memory, 10)
            ],
        },
        "alive": alive,
    }


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attacks", nargs="+", default=LIST, choices=LIST)
    parser.add_argument("--seconds", type=float, default=20, help="of each attack")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    source = base_models.load(demo.CONFIG, demo.CHECKPOINT)
    facts = {"base_model": source.identity, "vocabulary": "mini"}
    results: dict = {"seconds": options.seconds, "clients": CLIENTS, "attacks": {}}
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as bad:
        folder = pathlib.Path(made)
        labels = ["negative", "positive"]
        prompt(folder / "good.safetensors", **facts, labels=labels)
        attacks = Attacks(facts, pathlib.Path(bad))
        for name in options.attacks:
            found = measure(
                getattr(attacks, name), options.python, folder, options.seconds
            )
            results["attacks"][name] = found
            print(name, json.dumps(found), file=sys.stderr, flush=True)
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
