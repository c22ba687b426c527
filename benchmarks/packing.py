# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation on real sentences, padded in several ways and packed.

    python benchmarks/packing.py --output benchmarks/results/packing.json

Rotten Tomatoes in the embedded vocabulary, on a model of the demo's sizes and one of
T5 1.1 Small's, random weights. Training batches come from the pipeline of a run:

* full: every row as long as TASK_FEATURE_LENGTHS allows;
* longest: to the longest row of the batch, as PEFT's collators pad;
* edges: to the smallest of a few lengths that the longest fits in, as a run does;
* packed: several examples a row (PACK), about as many examples a batch.

The ways take a batch each in turn. Seconds are those of the process on all cores, which
what else runs on the machine changes least; compilation is not among them, the number
of compiled shapes is given instead. Scores of evaluation are compared with those of
full rows.
"""

import argparse
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import environment
import jax
import numpy as np

from prompt_tuning.commands import demo
from prompt_tuning.data import batching, examples
from prompt_tuning.inference.answerer import Answerer, batches_by_length
from prompt_tuning.methods import registry
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.training import optimizers
from prompt_tuning.training.step import TrainState, make_train_step

SMALL = T5Config(32128, 512, 6, 8, 8, 64, 1024)
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its rows; ``packed`` are encoder lengths of packed rows."""

    config: T5Config
    batch: int
    lengths: dict[str, int]
    prompt_length: int
    packed: tuple[int, ...]


CASES = {
    "mini, prompt 20": Case(
        demo.CONFIG, 32, demo.ROTTEN_TOMATOES.lengths, 20, (128, 256)
    ),
    "mini, prompt 100": Case(
        demo.CONFIG, 32, demo.ROTTEN_TOMATOES.lengths, 100, (384, 512)
    ),
    "small, prompt 20": Case(SMALL, 16, {"inputs": 128, "targets": 8}, 20, (128, 256)),
    "small, prompt 100": Case(
        SMALL, 16, {"inputs": 128, "targets": 8}, 100, (384, 512)
    ),
}


def counted(batch: Batch) -> int:
    """Examples of a batch."""
    segments = batch.get("decoder_segment_ids")
    if segments is None:
        return int(batching.real_rows(batch).sum())
    return int(segments.max(axis=1).sum())


def ways_to_train(case: Case, prompts: tuple[Prompt, ...]) -> dict[str, Iterator]:
    """Streams of batches, by how they are padded."""

    def load(batch: int, room: dict[str, int], **options: Any) -> batching.Batches:
        return batching.load(
            demo.ROTTEN_TOMATOES.name,
            split="train",
            task_feature_lengths=room,
            prompts=prompts,
            vocab_size=case.config.vocab_size,
            batch_size=batch,
            module=demo.ROTTEN_TOMATOES.module,
            **options,
        )

    full = load(case.batch, case.lengths)
    assert full.report is not None
    edges = full.report.edges(case.batch)
    every_length = range(1, full.report.room[0] + 1)
    ways: dict[str, Iterator] = {
        "full": full,
        "longest": load(case.batch, case.lengths, edges=every_length),
        "edges": load(case.batch, case.lengths, edges=edges),
    }
    mean = full.report.tokens.mean(axis=0)
    for length in case.packed:
        # Room for the targets of twice as many examples as a row holds on average.
        most = 2 * length / mean[0]
        room = {"inputs": length, "targets": int(np.ceil(most * mean[1] / 8)) * 8}
        found = load(1, room, pack=True).report
        assert found is not None
        held = found.fill(1, pack=True).examples_per_row
        ways[f"packed to {length}"] = load(
            max(1, round(case.batch / held)), room, pack=True, examples_to_check=0
        )
    return ways


def train(case: Case, rounds: int) -> dict[str, Any]:
    """Examples per second of training, by how batches are padded."""
    prompts = (Prompt("task", case.prompt_length),)
    model = Model(Transformer(case.config, prompts))
    params = jax.jit(model.init)(jax.random.key(0))
    tuned, frozen = registry.split(params, registry.rules_of("prompt_tuning"))
    tx = optimizers.adafactor(0.1, multiply_by_parameter_scale=False)
    state = TrainState.create({"task": tuned}, tx, jax.random.key(1))
    step = jax.jit(make_train_step(model, tx))

    def run(batch: Batch) -> None:
        jax.block_until_ready(step(state, frozen, batch))

    ways = {
        name: list(itertools.islice(stream, rounds))
        for name, stream in ways_to_train(case, prompts).items()
    }
    seconds = in_turn(
        {name: [lambda b=b: run(b) for b in part] for name, part in ways.items()},
        {name: [shape_of(b) for b in part] for name, part in ways.items()},
    )
    results = {}
    for name, batches in ways.items():
        tokens = [batch["encoder_input_tokens"] for batch in batches]
        results[name] = {
            "examples": sum(map(counted, batches)),
            "seconds": seconds[name],
            "shapes": len(set(map(shape_of, batches))),
            "rows": batches[0]["encoder_input_tokens"].shape[0],
            "tokens_share": sum(np.count_nonzero(t) for t in tokens)
            / sum(t.size for t in tokens),
        }
    return with_ratios(results, "longest")


def evaluation(case: Case, batch_size: int, rows: int) -> dict[str, Any]:
    """Examples per second of ranking two labels: full rows against like lengths."""
    prompts = (Prompt("task", case.prompt_length),)
    model = Model(Transformer(case.config, prompts))
    params = jax.jit(model.init)(jax.random.key(0))
    provider = examples.find(demo.ROTTEN_TOMATOES.name, demo.ROTTEN_TOMATOES.module)
    vocabulary = provider.output_features["targets"].vocabulary
    answerer = Answerer(model, vocabulary, labels=("negative", "positive"))
    tokens = next(
        batching.load(
            demo.ROTTEN_TOMATOES.name,
            split="validation",
            task_feature_lengths=case.lengths,
            prompts=prompts,
            vocab_size=case.config.vocab_size,
            batch_size=rows,
            shuffle=False,
            num_epochs=1,
        )
    )["encoder_input_tokens"]
    scores = {name: np.zeros((rows, 2)) for name in ("full", "like lengths")}

    def job(name: str, indices: np.ndarray, length: int) -> Callable[[], None]:
        def run() -> None:
            batch = batching.pad_rows(tokens[indices, :length], batch_size)
            found = np.asarray(answerer.scores(params, batch))
            scores[name][indices] = found[: len(indices)]

        return run

    plain = [np.arange(rows)[at : at + batch_size] for at in range(0, rows, batch_size)]
    groups = batches_by_length(tokens, batch_size)
    jobs = {
        "full": [(part, tokens.shape[1]) for part in plain],
        "like lengths": [(group.indices, group.length) for group in groups],
    }
    seconds = in_turn(
        {name: [job(name, *item) for item in part] for name, part in jobs.items()},
        {name: [length for _, length in part] for name, part in jobs.items()},
    )
    results: dict[str, Any] = {
        name: {
            "examples": rows,
            "seconds": seconds[name],
            "shapes": len({length for _, length in part}),
        }
        for name, part in jobs.items()
    }
    results = with_ratios(results, "full")
    results["largest_difference_of_scores"] = float(
        np.abs(scores["full"] - scores["like lengths"]).max()
    )
    return results


def shape_of(batch: Batch) -> tuple[int, ...]:
    """What decides which program a batch is compiled into."""
    return batch["encoder_input_tokens"].shape


def in_turn(
    jobs: dict[str, list[Callable[[], None]]], shapes: dict[str, list]
) -> dict[str, float]:
    """Seconds that the jobs of each way take, one of each way after the other.

    The first job of a shape is run before, uncounted, so that nothing compiles.
    """
    for name, part in jobs.items():
        for shape in set(shapes[name]):
            part[shapes[name].index(shape)]()
    seconds = dict.fromkeys(jobs, 0.0)
    for turn in itertools.zip_longest(*jobs.values()):
        for name, run in zip(jobs, turn, strict=True):
            if run is not None:
                start = time.process_time()
                run()
                seconds[name] += time.process_time() - start
    return seconds


def with_ratios(results: dict[str, dict], base: str) -> dict[str, Any]:
    """Adds examples per second, and by what factor they exceed those of ``base_models``."""
    for row in results.values():
        row["examples_per_second"] = row["examples"] / row["seconds"]
    for row in results.values():
        row[f"times {base}"] = (
            row["examples_per_second"] / results[base]["examples_per_second"]
        )
    return results


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"seconds": "CPU seconds of the process, all cores"}
    for name in options.cases:
        case = CASES[name]
        results[name] = {
            "batch": case.batch,
            "task_feature_lengths": case.lengths,
            "train": train(case, options.rounds),
            "evaluation": evaluation(case, batch_size=32, rows=256),
        }
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
