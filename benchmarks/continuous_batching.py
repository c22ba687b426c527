# SPDX-License-Identifier: Apache-2.0
"""Answers of free length: rows that come and go against whole batches.

    python benchmarks/continuous_batching.py \
        --output benchmarks/results/continuous_batching.json

T5 1.1 Small of random weights, prompts of 20 before the sentences of Rotten Tomatoes. An
answer ends after as many tokens as its first one says, so that both sides decode the same
whoever sits beside whom: ``even`` are 1 to 32, each as likely as the others, ``long tail``
are up to 64 of which most are short.

- ``job``: many rows at once, as `prompt-tuning infer` answers a file: rows a second.
- ``clients``: each asks for the next answer when it has the last one, as a server is
  asked: answers a second, and the seconds that an answer takes.

The two sides take turns; a ratio is the median over rounds.
"""

import argparse
import concurrent.futures
import dataclasses
import pathlib
import tempfile
import time
from typing import Any

import environment
import jax
import jax.numpy as jnp
import load
import numpy as np
import turns

from prompt_tuning import decoding
from prompt_tuning.checkpoints import base_models, model_file
from prompt_tuning.inference.answering import Answering
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import Transformer
from prompt_tuning.serving.batcher import Batcher
from prompt_tuning.tasks import rotten_tomatoes

# Positions of a prompt, and of a row at most.
LENGTH, LONGEST = 20, 64
PROMPTS = 64
# Of a text at most, so that all rows have room in that length.
WORDS = 16
BATCH = 32
CLIENTS = 24
PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class Ends:
    """An answer's first token says how long it is."""

    mean: float = 0.0

    def extend(self, state, step, *given):
        """See `decoding.Strategy`."""
        state, token, parents = super().extend(state, step, *given)  # pyright: ignore[reportAttributeAccessIssue]
        share = ((state.tokens[:, 0] * 7919 + 13) % 101 + 0.5) / 101
        if self.mean:
            wanted = -self.mean * jnp.log(share)
        else:
            wanted = share * self.max_decode_len  # pyright: ignore[reportAttributeAccessIssue]
        ended = state.ended | (step + 1 >= wanted)
        return state._replace(ended=ended), token, parents


@dataclasses.dataclass(frozen=True)
class ComeAndGo(Ends, decoding.Greedy):
    """Decoded in rows that come and go."""


@dataclasses.dataclass(frozen=True)
class Whole(Ends, decoding.Sampling):
    """The same, by a strategy that is decoded in whole batches."""


SIDES = ("come and go", "whole")
# The most tokens, and the mean of those of the long tail before they are cut there.
ENDS = {"even": (32, 0.0), "long tail": (64, 12.0)}


def served(engine: Engine, rows: list[dict]) -> tuple[float, list[float]]:
    """Seconds until clients have all answers, and those that each answer takes."""
    batcher = Batcher(Answering(engine), max_batch=BATCH)
    waiting, latencies = iter([engine.prepare(row) for row in rows]), []

    def client() -> None:
        for request in waiting:
            start = time.perf_counter()
            (future,) = batcher.submit([request])
            future.result()
            latencies.append(time.perf_counter() - start)

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        for each in [pool.submit(client) for _ in range(CLIENTS)]:
            each.result()
    seconds = time.perf_counter() - start
    batcher.close()
    return seconds, latencies


def measured(
    base: base_models.BaseModel,
    store: PromptStore,
    rows: list[dict],
    ends: str,
    rounds: int,
) -> dict[str, Any]:
    """Both sides in turns, on answers that end as `ENDS` says."""
    tokens, mean = ENDS[ends]
    strategies = {
        "come and go": ComeAndGo(tokens, eos_id=-1, mean=mean),
        "whole": Whole(tokens, temperature=0.0, eos_id=-1, mean=mean),
    }
    job = {
        name: Engine(
            base, store, batch_sizes=(BATCH,), lengths=(LONGEST,), strategy=how
        )
        for name, how in strategies.items()
    }
    server = {
        name: Engine(
            base, store, batch_sizes=(1, 4, 16, BATCH), lengths=(LONGEST,), strategy=how
        )
        for name, how in strategies.items()
    }
    found = {
        name: np.stack(engine.outputs([engine.prepare(row).items[0] for row in rows]))
        for name, engine in job.items()
    }
    same = np.all(found["whole"] == found["come and go"], axis=1)
    lengths = np.sum(found["whole"] > 0, axis=1)
    times = turns.seconds(
        {
            name: lambda engine=engine: engine.answer(rows)
            for name, engine in job.items()
        },
        rounds + 1,
    )
    taken = {name: [] for name in SIDES}
    latencies = {name: [] for name in SIDES}
    for round_ in range(rounds + 1):
        for name, engine in server.items():
            seconds, own = served(engine, rows)
            # The first compiles.
            if round_:
                taken[name].append(seconds)
                latencies[name] += own

    def ratio(found: dict[str, list[float]]) -> float:
        """How many times as fast rows that come and go are, after the first round."""
        own, others = (found[name][-rounds:] for name in SIDES)
        return round(turns.ratio(others, own), 3)

    return {
        "same_answers": float(same.mean()),
        "tokens_of_an_answer": [
            int(lengths.min()),
            float(lengths.mean()),
            int(lengths.max()),
        ],
        "times_whole": {
            "job": ratio(times),
            "clients": ratio(taken),
        },
        "latency_to_whole": {
            str(p): round(
                np.percentile(latencies["come and go"], p)
                / np.percentile(latencies["whole"], p),
                3,
            )
            for p in PERCENTILES
        },
    }


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="small")
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load.t5_config(options.size)
        params = jax.jit(Model(Transformer(config)).init)(jax.random.key(0))
        model_file.save_model(folder, params, {})
        base = base_models.load(config, folder, activation_dtype="float32")
    store = PromptStore(base, PROMPTS * LENGTH, force=True)
    rng = np.random.default_rng(0)
    for number in range(PROMPTS):
        array = rng.normal(0, 3, (LENGTH, config.emb_dim)).astype(np.float32)
        store.add(f"p{number}", array, {"vocabulary": "mini"})
    texts = [
        text
        for text in rotten_tomatoes.texts_and_labels("test")[0]
        if len(text.split()) <= WORDS
    ][: options.rows]
    rows = [
        {"prompt": f"p{number % PROMPTS}", "text": text}
        for number, text in enumerate(texts)
    ]
    results = {
        "rows": len(rows),
        "rounds": options.rounds,
        **{ends: measured(base, store, rows, ends, options.rounds) for ends in ENDS},
    }
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
