# SPDX-License-Identifier: Apache-2.0
"""Five seeds tuned in one run against five runs one after the other.

    python benchmarks/train_many.py --output benchmarks/results/train_many.json

Both are the commands that a user types, each in processes of its own: starting, reading
data, compiling, evaluating and saving are counted. The rounds alternate, and the figures
are of their sums. Memory is the peak of what a process had resident.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import environment
import numpy as np

from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.commands import demo

# Compiling is a part of what is compared.
UNCACHED = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}


def tune(folder: pathlib.Path, steps: int, **values) -> dict[str, float]:
    """Runs the ``loop`` command; gives its seconds and peak memory."""
    values = {
        "MODEL_DIR": folder,
        "MIXTURE_OR_TASK_NAME": demo.ROTTEN_TOMATOES.name,
        "TASK_FEATURE_LENGTHS": demo.ROTTEN_TOMATOES.lengths,
        "PROMPT_LENGTH": demo.PROMPT_LENGTH,
        "LEARNING_RATE": 0.1,
        "TRAIN_STEPS": steps,
        "EVAL_PERIOD": steps // 2,
        **values,
    }
    words = [sys.executable, "-m", "prompt_tuning", "train"]
    words += [
        "--gin_file=models/t5_1_1_mini.gin",
        "--gin_file=methods/prompt_tuning.gin",
    ]
    words += [f"--gin.{name}={value}" for name, value in values.items()]
    start = time.monotonic()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, env=UNCACHED) as process:
        # wait4 alone tells what this one process used.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed")
    return {
        "seconds": time.monotonic() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
    }


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    seeds = list(range(options.seeds))
    together, apart, differences, validation = [], [], [], {}
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            prompts = [{"seed": seeds}]
            together.append(tune(folder / "many", options.steps, PROMPTS=prompts))
            runs = [tune(folder / str(s), options.steps, SEED=s) for s in seeds]
            apart.append(
                {
                    "seconds": sum(run["seconds"] for run in runs),
                    "cpu_seconds": sum(run["cpu_seconds"] for run in runs),
                    "peak_bytes": max(run["peak_bytes"] for run in runs),
                }
            )
            for seed in seeds:
                one, _ = prompt_file.load_prompt(
                    folder / str(seed) / "prompt.safetensors"
                )
                many = folder / "many/prompts" / f"seed_{seed}.safetensors"
                differences.append(np.abs(prompt_file.load_prompt(many)[0] - one).max())
                results = json.loads((folder / str(seed) / "results.json").read_text())
                validation[seed] = results["members"][0]["validation"]
            print(f"round {number + 1}: {together[-1]} {apart[-1]}", file=sys.stderr)
    mean = lambda runs: {key: float(np.mean([r[key] for r in runs])) for key in runs[0]}
    one, five = mean(together), mean(apart)
    results = {
        "shape": vars(options)
        | {"output": None, "batch_size": 32, **demo.ROTTEN_TOMATOES.lengths},
        "together": one,
        "one_after_the_other": five,
        "time_ratio": one["seconds"] / five["seconds"],
        "cpu_time_ratio": one["cpu_seconds"] / five["cpu_seconds"],
        "memory_ratio": one["peak_bytes"] / five["peak_bytes"],
        "memory_ratio_to_five_at_once": one["peak_bytes"]
        / (five["peak_bytes"] * options.seeds),
        "largest_difference_of_prompts": float(max(differences)),
        "validation_by_seed": validation,
    }
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
