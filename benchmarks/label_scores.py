# SPDX-License-Identifier: Apache-2.0
"""Labels compared by their likelihood, or by its mean over their tokens.

    python benchmarks/label_scores.py --task stars TRAIN.tsv DEV.tsv '{text}' \\
        "{'0': 'very negative', '1': 'negative', ...}" --output benchmarks/results/...

Of each task the accuracy on DEV of the model alone and of tuned prompts, answered in both
ways by the same prompts. Files are tables with a column ``label``; the prompts are those
of the last step, so that neither way has chosen them.
"""

import argparse
import ast
import csv
import pathlib
import sys

import environment
import numpy as np

import prompt_tuning as pt
from prompt_tuning.data import label_sets
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore


def rows_of(path: str, most: int) -> list[dict[str, str]]:
    """The first rows of a table, texts cut to what the model reads."""
    with open(path, newline="") as file:
        lines = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [row for row, _ in zip(lines, range(most))]


def accuracies(base, prompts, rows, names) -> dict[str, list[float]]:
    """Of each way, the accuracy of each prompt: an array and its card."""
    store = PromptStore(base)
    for number, (array, card) in enumerate(prompts):
        for scores in label_sets.SCORES:
            store.add(f"{number} {scores}", array, {**card, "label_scores": scores})
    engine = Engine(base, store, batch_sizes=(64,), longest=256)
    wanted = [names[row["label"]] for row in rows]
    found: dict[str, list[float]] = {scores: [] for scores in label_sets.SCORES}
    for name in store.names():
        answers = engine.answer({"prompt": name, **row} for row in rows)
        right = [a["answer"] == w for a, w in zip(answers, wanted, strict=True)]
        found[name.split()[1]].append(100 * float(np.mean(right)))
    return found


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs=5, action="append", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--dev", type=int, default=500)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    base = pt.load("embedded:t5_1_1_mini")
    given = {"steps": options.steps, "learning_rate": options.rate, "length": 20}
    results: dict = {**given, "tasks": {}}
    for name, train, dev, template, mapping in options.task:
        names = {str(k): v for k, v in ast.literal_eval(mapping).items()}
        rows = rows_of(dev, options.dev)
        run = pt.tune(
            base,
            rows_of(train, options.rows),
            labels=names,
            template=template,
            input_length=96,
            prompts=[{"seed": list(range(options.seeds))}],
            quiet=True,
            **given,
        )
        labels = list(dict.fromkeys(names.values()))
        alone = np.zeros((0, base.config.emb_dim), np.float32)
        card = {"labels": labels, "template": template, "base_model": base.identity}
        targets = [names[row["label"]] for row in rows]
        vocabulary = base.vocabulary
        results["tasks"][name] = {
            "labels": {label: len(vocabulary.encode(label)) + 1 for label in labels},
            "examples": len(rows),
            "majority": 100 * max(map(targets.count, labels)) / len(targets),
            "alone": accuracies(base, [(alone, card)], rows, names),
            "tuned": accuracies(
                base, [(p.array, p.card) for p in run.prompts.values()], rows, names
            ),
        }
        print(name, results["tasks"][name], file=sys.stderr, flush=True)
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
