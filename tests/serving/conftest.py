# SPDX-License-Identifier: Apache-2.0
"""A tiny model with four prompts, served in this process or in one of its own."""

import contextlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from prompt_tuning.checkpoints import base_models, prompt_file
from prompt_tuning.inference.answering import Answering
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.serving.batcher import Batcher
from prompt_tuning.serving.limits import Limits

H, V = 16, 8192
LIMITS = Limits(body=20_000, prompt=20_000, rows=8, seconds=20.0)
PAIR = {
    "labels": ["same", "other"],
    "template": "{prompt} {premise} and {hypothesis}",
}


@pytest.fixture(scope="session")
def source(tiny_checkpoint):
    config = T5Config(V, H, 2, 1, 1, 8, 32)
    return base_models.load(config, tiny_checkpoint, activation_dtype="float32")


@pytest.fixture(scope="session")
def save(source):
    """Writes a prompt that is far from zero, so that each answers differently."""

    def write(path, seed=0, length=3, **card):
        array = np.random.default_rng(seed).normal(scale=3, size=(length, H))
        card = {"base_model": source.identity, "vocabulary": "mini", **card}
        prompt_file.save_prompt(path, array.astype(np.float32), card)
        return path.read_bytes()

    return write


@pytest.fixture(scope="session")
def folder(save, tmp_path_factory):
    """Prompts as files: two that rank, one for pairs, one for free text."""
    folder = tmp_path_factory.mktemp("prompts")
    cards = {
        "first": {"labels": ["good", "bad"]},
        "second": {"labels": ["good", "bad"]},
        "pair": PAIR,
        "free": {},
    }
    for seed, (name, more) in enumerate(cards.items()):
        save(folder / f"{name}.safetensors", seed, **more)
    return folder


@pytest.fixture(scope="session")
def engine(source, folder):
    store = PromptStore(source, 64)
    assert not store.load_folder(folder)
    return Engine(source, store, batch_sizes=(1, 4), longest=64)


@pytest.fixture(scope="session")
def serving(engine):
    """Makes clients of an application in this process."""
    for package in ("fastapi", "httpx", "prometheus_client"):
        pytest.importorskip(package)
    from fastapi.testclient import TestClient

    from prompt_tuning.serving import app
    from prompt_tuning.serving.metrics import Metrics

    @contextlib.contextmanager
    def serve(token=None, limits=LIMITS, **kwargs):
        metrics = Metrics()
        batcher = Batcher(
            Answering(engine), max_batch=4, on_batch=metrics.batch, **kwargs
        )
        metrics.watch(engine, batcher)
        made = app.create(engine, batcher, metrics, limits, token)
        with TestClient(made, base_url="http://localhost") as client:
            client.batcher = batcher
            yield client

    return serve


@pytest.fixture
def client(serving):
    with serving() as client:
        yield client


@pytest.fixture(scope="session")
def process(tiny_checkpoint):
    """Starts servers of their own: gives the process and its address."""

    @contextlib.contextmanager
    def start(folder, *more, prefix=()):
        command = [*prefix, sys.executable, "-m", "prompt_tuning", "serve"]
        command += ["--model", tiny_checkpoint, "--prompts", folder]
        command += ["--port", "0", "--warm_up", "16", *more]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        with subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        ) as running:
            try:
                address = None
                for line in running.stderr:
                    if "serving" in line and "http://" in line:
                        address = line.split()[-1]
                        break
                assert address, "the server ended at its start"
                # What it prints later must not fill the pipe.
                threading.Thread(target=running.stderr.read, daemon=True).start()
                yield running, address
            finally:
                running.kill()

    return start
