# SPDX-License-Identifier: Apache-2.0
"""Answers of free length: rows that come and go against whole batches.

    python benchmarks/continuous_batching.py \
        --output benchmarks/results/continuous_batching.json

T5 1.1 Small of random weights, prompts of 20 before the sentences of Rotten Tomatoes, up
to 32 new tokens. An answer ends after as many of them as its first token says, between 1
and 32, so that both sides decode the same whoever sits beside whom.

- ``job``: many rows at once, as `prompt-tuning infer` answers a file: rows a second.
- ``one batch``: as many rows as a batch has, all at once.
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

import environment
import jax
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

LENGTH, TOKENS = 20, 32
PROMPTS = 64
BATCH = 32
CLIENTS = 24
PERCENTILES = (50, 90, 99)


class Ends:
    """An answer's first token says how long it is."""

    def extend(self, state, step, *given):
        """See `decoding.Strategy`."""
        state, token, parents = super().extend(state, step, *given)  # pyright: ignore[reportAttributeAccessIssue]
        wanted = 1 + (state.tokens[:, 0] * 7919 + 13) % 101 * TOKENS // 101
        return state._replace(ended=state.ended | (step + 1 >= wanted)), token, parents


@dataclasses.dataclass(frozen=True)
class ComeAndGo(Ends, decoding.Greedy):
    """Decoded in rows that come and go."""


@dataclasses.dataclass(frozen=True)
class Whole(Ends, decoding.Sampling):
    """The same, by a strategy that is decoded in whole batches."""


SIDES = {
    "come and go": ComeAndGo(TOKENS, eos_id=-1),
    "whole": Whole(TOKENS, temperature=0.0, eos_id=-1),
}


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
    texts = rotten_tomatoes.texts_and_labels("test")[0][: options.rows]
    rows = [
        {"prompt": f"p{number % PROMPTS}", "text": text}
        for number, text in enumerate(texts)
    ]
    job = {
        name: Engine(base, store, batch_sizes=(BATCH,), longest=96, strategy=strategy)
        for name, strategy in SIDES.items()
    }
    server = {
        name: Engine(
            base, store, batch_sizes=(1, 4, 16, BATCH), longest=96, strategy=strategy
        )
        for name, strategy in SIDES.items()
    }
    found = {
        name: np.stack(engine.outputs([engine.prepare(row).items[0] for row in rows]))
        for name, engine in job.items()
    }
    same = np.all(found["whole"] == found["come and go"], axis=1)
    lengths = np.sum(found["whole"] > 0, axis=1)
    times = {
        kind: turns.seconds(
            {
                name: lambda engine=engine, own=own: engine.answer(own)
                for name, engine in job.items()
            },
            options.rounds + 1,
        )
        for kind, own in [("job", rows), ("one batch", rows[:BATCH])]
    }
    taken = {name: [] for name in SIDES}
    latencies = {name: [] for name in SIDES}
    for round_ in range(options.rounds + 1):
        for name, engine in server.items():
            seconds, own = served(engine, rows)
            # The first compiles.
            if round_:
                taken[name].append(seconds)
                latencies[name] += own
    ratio = lambda found: turns.ratio(
        found["whole"][-options.rounds :], found["come and go"][-options.rounds :]
    )
    results = {
        "rows": len(rows),
        "rounds": options.rounds,
        "same_answers": float(same.mean()),
        "tokens_of_an_answer": [
            int(lengths.min()),
            float(lengths.mean()),
            int(lengths.max()),
        ],
        "times_whole": {
            **{kind: ratio(own) for kind, own in times.items()},
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
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
