# SPDX-License-Identifier: Apache-2.0
"""Which recipe of prompt tuning learns: one value changed at a time, on several tasks.

    python benchmarks/recipe.py --tasks FOLDER --output benchmarks/results/recipe.json

FOLDER holds NAME.jsonl as `scripts/mini/probe_tasks.py` writes them. A quarter of each
task's training rows is held out and measured on; its test rows are not read. Rates are in
units of the root mean square of the embedding table's entries. Every run is written to
the output when it ends, and the same command goes on with those that are missing.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import environment
import numpy as np
from probe import Recipe, add_model_arguments, open_model, tune, write_splits

from prompt_tuning import files
from prompt_tuning.training import probing

# `recipes/short.gin`.
BASE = Recipe()
# What each study changes of it.
STUDIES: dict[str, list[dict[str, Any]]] = {
    "base": [{}],
    "rate": [{"rate": rate} for rate in (0.03, 0.1, 1.0)],
    "schedule": [
        {"factors": "constant"},
        {"factors": "constant * linear_to_zero"},
        {"factors": "constant * cosine_to_zero"},
    ],
    # The paper's constant rate, and a third of the steps without it.
    "third": [
        {"rate": 0.03, "factors": "constant", "label_loss": None},
        {"steps": 100},
    ],
    "loss": [{"label_loss": None}],
    "length": [{"length": length} for length in (6, 50, 100)],
    "init": [{"init": init} for init in ("sampled_vocab", "random")],
    "steps": [{"steps": steps} for steps in (300, 900)],
    # Half and a quarter of the work, and all of it in smaller steps.
    "batch": [
        {"batch_size": 16},
        {"batch_size": 8},
        {"batch_size": 16, "steps": 1200},
    ],
    "average": [
        {"averaged": 0.3},
        {"averaged": 0.3, "factors": "constant * linear_warmup"},
        {"factors": "constant * linear_warmup"},
    ],
}
HELD_OUT_PERIOD = 4


def recipes(studies: list[str]) -> Iterator[tuple[str, Recipe]]:
    """What the studies make of the base recipe, by what they change of it."""
    for study in studies:
        for changes in STUDIES[study]:
            name = ", ".join(f"{key}={value}" for key, value in changes.items())
            yield name or "base", dataclasses.replace(BASE, **changes)


def held_out(task: probing.ProbeTask) -> probing.ProbeTask:
    """The task with a part of its training rows in the place of its test rows."""
    chosen = np.arange(len(task.train.texts)) % HELD_OUT_PERIOD == 0

    def part(mask: np.ndarray) -> probing.Split:
        places = np.flatnonzero(mask).tolist()
        return probing.Split(
            [task.train.texts[i] for i in places],
            [task.train.ids[i] for i in places],
            task.train.labels[places],
        )

    return dataclasses.replace(task, train=part(~chosen), test=part(chosen))


def steps_to(curve: dict[int, float], share: float, chance: float) -> int:
    """The first evaluated step with so large a share of the final gain over chance."""
    final = curve[max(curve)]
    wanted = chance + share * (final - chance)
    return min(step for step, accuracy in curve.items() if accuracy >= wanted)


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over tasks and seeds of each recipe, and over how many runs."""
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for run in runs.values():
        by_recipe.setdefault(run["recipe"], []).append(run)
    return {
        name: {
            "runs": len(group),
            "accuracy": float(np.mean([run["accuracy"] for run in group])),
            "above_chance": float(
                np.mean([run["accuracy"] - 1 / run["classes"] for run in group])
            ),
            "steps_to_95_percent": float(
                np.mean([run["steps_to_95_percent"] for run in group])
            ),
        }
        for name, group in by_recipe.items()
    }


def main() -> None:
    """Measures what is missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--studies", nargs="*", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--only", nargs="*", help="names of tasks; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="end after so many new runs")
    options = parser.parse_args()
    opened = open_model(options)
    runs: dict[str, dict[str, Any]] = {}
    if options.output and options.output.exists():
        known = files.read_json(options.output)
        if known["model"] != opened.name:
            raise SystemExit(f"{options.output} is of {known['model']}")
        runs = known["runs"]
    tasks = [
        held_out(task)
        for task in probing.load(options.tasks, opened.vocabulary)
        if not options.only or task.name in options.only
    ]
    todo = [
        (f"{task.name}, seed {seed}: {name}", task, seed, name, recipe)
        for seed in range(options.seeds)
        for name, recipe in recipes(options.studies)
        for task in tasks
    ]
    # Values that were changed since make another run of a recipe of the same name.
    done = lambda key, recipe: (
        key in runs and runs[key]["values"] == dataclasses.asdict(recipe)
    )
    todo = [each for each in todo if not done(each[0], each[-1])][: options.limit]
    for key, task, seed, name, recipe in todo:
        with tempfile.TemporaryDirectory() as folder:
            local_task = write_splits(task, pathlib.Path(folder), opened.vocabulary)
            curve = tune(task, opened, recipe, seed, local_task, evaluations=12)
        runs[key] = {
            "recipe": name,
            "values": dataclasses.asdict(recipe),
            "task": task.name,
            "classes": len(task.labels),
            "seed": seed,
            "accuracy": curve[recipe.steps],
            "steps_to_95_percent": steps_to(curve, 0.95, 1 / len(task.labels)),
            "curve": curve,
        }
        results = {
            "model": opened.name,
            "table_rms": opened.table_rms,
            "base": dataclasses.asdict(BASE),
            "summary": summary(runs),
            "runs": runs,
        }
        environment.publish(results, options.output)
    print(json.dumps(summary(runs), indent=2))


if __name__ == "__main__":
    main()
