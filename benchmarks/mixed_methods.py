# SPDX-License-Identifier: Apache-2.0
"""Rows of many tuning methods in one batch against rows grouped by method.

    python benchmarks/mixed_methods.py --output benchmarks/results/mixed_methods.json

The rows are test sentences of Rotten Tomatoes on the embedded model, from text to answer,
in batches of 32. What a method learned does not matter to its cost, so each starts from
rows of the embedding table. The ways take turns; a ratio is the median over rounds of
seconds over the mean of the groups', on the clock and of the processor's time.

- ``mixed``: each batch holds rows of every method, one after the other.
- ``groups``: every method has an engine to itself, which answers as many rows in batches
  that it fills; the mean over methods.
- ``single``: the rows of the first batch, one at a time.
"""

import argparse
import statistics
import time

import environment
import jax
import numpy as np

from prompt_tuning.checkpoints import base_models
from prompt_tuning.commands import demo
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.methods import registry
from prompt_tuning.methods.method import COLLECTION, Start
from prompt_tuning.tasks import rotten_tomatoes

# Of each name its kind and the length of its prompt.
MEMBERS = {
    "lora": ("lora", 0),
    "ia3": ("ia3", 0),
    "prompt 10": ("prompt_tuning", 10),
    "prompt 20": ("prompt_tuning", 20),
    "prompt 50": ("prompt_tuning", 50),
    "prompt 100": ("prompt_tuning", 100),
    "deep prompt": ("deep_prompt", 20),
    "prefix": ("prefix_tuning", 20),
}
BATCH = 32


def add(store: PromptStore, name: str, source: base_models.BaseModel) -> None:
    """Adds a member that its method starts, moved a little from there."""
    kind, length = MEMBERS[name]
    method = registry.named(kind)
    rng = np.random.default_rng(len(name))
    table = np.asarray(source.table, np.float32)
    rows = table[rng.integers(3, 5000, length)]
    leaves = method.init(jax.random.key(0), Start(rows, table, source.params))
    leaves = jax.tree.map(lambda leaf: leaf + 0.01, leaves)
    part = method.materialize(method.place(name, leaves), source.params)
    array = np.asarray(part.get("prompts", {}).get(name, rows))
    card = {
        "base_model": source.identity,
        "labels": list(rotten_tomatoes.LABELS),
        "vocabulary": "mini",
    }
    store.add(name, array, card, slots=part.get(COLLECTION, {}))


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512, help="of each way")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output")
    options = parser.parse_args()
    source = base_models.load(demo.CONFIG, demo.CHECKPOINT)
    texts = rotten_tomatoes.texts_and_labels("test")[0][: options.rows]

    def engine(names, sizes=(BATCH,)) -> Engine:
        store = PromptStore(source, 512)
        for name in names:
            add(store, name, source)
        return Engine(source, store, batch_sizes=sizes)

    names = list(MEMBERS)
    mixed = [
        {"prompt": names[i % len(names)], "text": text} for i, text in enumerate(texts)
    ]
    together, one_by_one = engine(names), engine(names, (1,))
    alone = {name: engine([name]) for name in names}
    groups = {
        name: [{"prompt": name, "text": text} for text in texts] for name in names
    }

    def single() -> list:
        return [one_by_one.answer([row])[0] for row in mixed[:BATCH]]

    ways = {
        "mixed": lambda: together.answer(mixed),
        "single": single,
        **{name: lambda n=name: alone[n].answer(groups[n]) for name in names},
    }
    answers = {name: way() for name, way in ways.items()}
    # An answer is the same whatever shares its batch.
    difference = max(
        abs(score - answers[row["prompt"]][i]["scores"][label])
        for i, row in enumerate(mixed)
        for label, score in answers["mixed"][i]["scores"].items()
    )
    clocks = {"clock": time.perf_counter, "processor": time.process_time}
    seconds = {clock: {name: [] for name in ways} for clock in clocks}
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = {clock: now() for clock, now in clocks.items()}
            way()
            for clock, now in clocks.items():
                seconds[clock][name].append(now() - start[clock])
    ratios = {}
    for clock, times in seconds.items():
        mean = np.mean([times[name] for name in names], axis=0) / len(texts)
        per_row = {
            "mixed": np.divide(times["mixed"], len(texts)),
            "single": np.divide(times["single"], BATCH),
            **{name: np.divide(times[name], len(texts)) for name in names},
        }
        ratios[clock] = {
            name: round(statistics.median((own / mean).tolist()), 3)
            for name, own in per_row.items()
        }
    environment.publish(
        {
            "members": {name: list(member) for name, member in MEMBERS.items()},
            "rows": len(texts),
            "batch_rows": BATCH,
            "rounds": options.rounds,
            "seconds_a_row_over_the_groups_mean": ratios,
            "largest_score_difference": difference,
        },
        options.output,
    )


if __name__ == "__main__":
    main()
