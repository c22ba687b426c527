# SPDX-License-Identifier: Apache-2.0
"""Examples per second with 1,000 prompts mixed at random against one prompt.

    python benchmarks/mixed_inference.py \
        --output benchmarks/results/mixed_inference.json

The rows are the test sentences of Rotten Tomatoes on the embedded model, from text to
answer. What a prompt says does not matter to its cost, so prompts are drawn from the
embedding table. The ways to answer take turns, so that whatever else the machine does
meets all alike; a ratio is the median over rounds of one prompt's seconds over the
others'. Beside the ratio of seconds on the clock stands that of the processor's time,
which other work on the machine touches less.

- ``one``: all rows have one prompt, as long as the mean of the 1,000.
- ``mixed``: prompts of length 20 to 100, all on the device.
- ``mixed, one length``: 1,000 prompts of the length of ``one``.
- ``mixed, small table``: as ``mixed``, with room for 1 in 15 prompts on the device.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import environment
import numpy as np

from prompt_tuning.checkpoints import base_models, prompt_file
from prompt_tuning.commands import demo
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.tasks import rotten_tomatoes

ONE, ALIKE = "one", "alike"
SHORTEST, LONGEST = 20, 100
SMALL_TABLE = 4096


def write_prompts(folder: pathlib.Path, source, lengths: dict[str, int]) -> None:
    """Writes a prompt of rows of the table for each name and length."""
    rng = np.random.default_rng(0)
    table = np.asarray(source.table, np.float32)
    card = {
        "base_model": source.identity,
        "labels": list(rotten_tomatoes.LABELS),
        "vocabulary": "mini",
    }
    for name, length in lengths.items():
        array = table[rng.integers(3, 5000, length)]
        prompt_file.save_prompt(folder / f"{name}.safetensors", array, card)


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--copies", type=int, default=2, help="of the sentences")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    source = base_models.load(demo.CONFIG, demo.CHECKPOINT)
    rng = np.random.default_rng(1)
    drawn = rng.integers(SHORTEST, LONGEST + 1, options.prompts).tolist()
    mean = round(statistics.mean(drawn))
    lengths = {f"p{i}": length for i, length in enumerate(drawn)}
    lengths |= {f"{ALIKE}{i}": mean for i in range(options.prompts)}
    lengths[ONE] = mean
    store = PromptStore(source, sum(lengths.values()))
    small = PromptStore(source, SMALL_TABLE)
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(pathlib.Path(folder), source, lengths)
        start = time.perf_counter()
        assert not store.load_folder(folder)
        load_seconds = time.perf_counter() - start
    for prompt in store.prompts():
        small.add(prompt.name, prompt.array, prompt.card)

    texts = rotten_tomatoes.texts_and_labels("test")[0] * options.copies
    which = rng.integers(0, options.prompts, len(texts))

    def rows(name: str) -> list[dict[str, str]]:
        return [
            {"prompt": name.format(i), "text": text}
            for i, text in zip(which, texts, strict=True)
        ]

    engine, tight = Engine(source, store), Engine(source, small)
    ways = {
        "one": (engine, rows(ONE)),
        "mixed": (engine, rows("p{}")),
        "mixed, one length": (engine, rows(ALIKE + "{}")),
        "mixed, small table": (tight, rows("p{}")),
    }
    answers = {name: way.answer(given) for name, (way, given) in ways.items()}
    same = [
        max(
            abs(one["scores"][label] - other["scores"][label])
            for label in rotten_tomatoes.LABELS
        )
        for one, other in zip(answers["mixed"], answers["mixed, small table"])
    ]
    clocks = {"clock": time.perf_counter, "processor": time.process_time}
    seconds = {clock: {name: [] for name in ways} for clock in clocks}
    for _ in range(options.rounds):
        for name, (way, given) in ways.items():
            start = {clock: now() for clock, now in clocks.items()}
            way.answer(given)
            for clock, now in clocks.items():
                seconds[clock][name].append(now() - start[clock])

    def ratio(one: list[float], other: list[float]) -> float:
        return round(statistics.median(np.divide(one, other).tolist()), 3)

    results = {
        "prompts": options.prompts,
        "prompt_lengths": [SHORTEST, LONGEST],
        "length_of_one": mean,
        "rows": len(texts),
        "batch_rows": 32,
        "examples_per_second": {
            name: round(len(texts) / statistics.median(times), 1)
            for name, times in seconds["clock"].items()
        },
        "ratio_to_one_prompt": {
            clock: {name: ratio(times["one"], times[name]) for name in times}
            for clock, times in seconds.items()
        },
        "programs": engine.num_programs,
        "largest_score_difference_small_table": max(same),
        "seconds_to_load_prompts": round(load_seconds, 2),
        "prompts_loaded": len(lengths),
        "rounds": options.rounds,
    }
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
