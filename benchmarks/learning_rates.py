# SPDX-License-Identifier: Apache-2.0
"""Whether LEARNING_RATE='auto' takes a rate as good as the best of the grid, and its cost.

    python benchmarks/learning_rates.py --runs FOLDER \
        --output benchmarks/results/learning_rates.json

A run with 'auto' and a run of every rate of the same grid, seeds side by side, on slices of
Rotten Tomatoes. Both are resumed from FOLDER. The loss is that of choosing: the metric of the
best grid point at the last step, less that of the rate that was chosen. The cost is that of
trial and run together, in rows and in seconds, in units of the run.
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import environment
import methods
import numpy as np

from prompt_tuning import files, report
from prompt_tuning.methods import registry
from prompt_tuning.training import optimizers


def words(
    kind: str, folder: pathlib.Path, options: Any, own: Mapping[str, Any]
) -> list[str]:
    """The words of a run of `train`."""
    files_ = ("models/t5_1_1_mini.gin", f"methods/{kind}.gin")
    flags = {
        "mixture_or_task_name": "rotten_tomatoes_shuffled",
        "task_feature_lengths": {"inputs": 32, "targets": 4},
        "eval_split": f"validation[:{options.validation}]",
        "train_steps": options.steps,
        "eval_period": options.steps,
        "batch_size": options.batch_size,
        "checkpoint_period": 0,
        "model_dir": folder,
        **own,
    }
    if registry.named(kind).has_prompt:
        flags["prompt_length"] = options.length
    named = (f"--gin_file={name}" for name in files_)
    return ["train", *named, *(f"--{name}={value}" for name, value in flags.items())]


def measure(kind: str, options: Any) -> dict[str, Any]:
    """What a method's trial chose, and what each rate of the grid gives."""
    seeds, place = list(range(options.seeds)), options.runs / kind
    auto = {"prompts": [{"seed": seeds}], "learning_rate": "auto"}
    methods.run(words(kind, place / "auto", options, auto), place / "auto")
    rates = optimizers.rates_around(registry.named(kind).learning_rate)
    both = itertools.product(rates, seeds)
    grid = {
        "prompts": [
            {"name": f"{rate:g}_{seed}", "learning_rate": rate, "seed": seed}
            for rate, seed in both
        ]
    }
    methods.run(words(kind, place / "grid", options, grid), place / "grid")
    trial = files.read_json(place / "auto" / report.RESULTS_FILE)
    found = files.read_json(place / "grid" / report.RESULTS_FILE)
    values = {row["name"]: row.get("validation") for row in found["members"]}
    means = {
        f"{rate:g}": float(
            np.mean(
                [
                    (values[f"{rate:g}_{s}"] or {"accuracy": 0})["accuracy"]
                    for s in seeds
                ]
            )
        )
        for rate in rates
    }
    chosen = trial["learning_rate"]
    best = max(means.values())
    run_seconds = trial["cost"]["wall_seconds"]
    return {
        "grid": means,
        "chosen": chosen["chosen"],
        "tried": chosen["tried"],
        "best": best,
        "of_chosen": means[f"{chosen['chosen']:g}"],
        "loss": best - means[f"{chosen['chosen']:g}"],
        "rows_of_run": 1 + chosen["share_of_run"],
        "seconds_of_run": 1 + chosen["seconds"] / run_seconds,
    }


def main() -> None:
    """Measures each method, and writes all that is done after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--methods", nargs="+", default=["prompt_tuning", "lora"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--validation", type=int, default=500)
    options = parser.parse_args()
    budget = {k: v for k, v in vars(options).items() if isinstance(v, int)}
    results: dict[str, Any] = {}
    for kind in options.methods:
        results[kind] = measure(kind, options)
        environment.publish({"budget": budget, "methods": results}, options.output)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
