# SPDX-License-Identifier: Apache-2.0
"""All methods on the same tasks with the same budget: how well, how large, how fast.

    python benchmarks/methods.py --tasks TASKS.json --runs FOLDER \
        --output benchmarks/results/methods.json --plot docs/images/methods.png

TASKS.json has the flags of `train` that describe each task::

    {"rotten_tomatoes": {"mixture_or_task_name": "rotten_tomatoes",
                         "task_feature_lengths": {"inputs": 64, "targets": 4}}}

A method chooses its learning rate by `LEARNING_RATE='auto'` on the first task and keeps it
on the others; all seeds are tuned side by side. Those that move the model itself cannot
share a batch: they run seed by seed, at the rate of their file. The metric is that of the last step, so that no evaluation chooses what it
measures. Runs lie in FOLDER and are resumed: the same command goes on where it was stopped,
and the output has those that are done. Hours on two cores.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import environment
import numpy as np

from prompt_tuning import files, report
from prompt_tuning.command_line import gin_files
from prompt_tuning.methods import registry

# Those that are made of others, or of saved prompts, or of a text.
LEFT_OUT = ("composed", "attempt", "wayward_prompt")
SHARE = 0.95
# What a run keeps of itself when it has ended.
RECORD = "benchmark.json"
Flags = Mapping[str, Any]


def methods() -> list[str]:
    """The methods of the package that have a file and need nothing else."""
    return [
        kind
        for kind in sorted(registry.METHODS)
        if kind not in LEFT_OUT and f"methods/{kind}.gin" in gin_files.shipped()
    ]


def commands(
    kind: str,
    task: Flags,
    folder: pathlib.Path,
    rate: float | str,
    options: argparse.Namespace,
) -> Iterator[tuple[pathlib.Path, list[str]]]:
    """The runs of a method on a task: their folders, and the words of each."""
    file = gin_files.read_shipped(f"methods/{kind}.gin")
    common = {
        "train_steps": options.steps,
        "batch_size": options.batch_size,
        "eval_period": max(1, options.steps // options.evaluations),
        "checkpoint_period": 0,
        **task,
    }
    if file.macros_set["PROMPT_LENGTH"]:
        common["prompt_length"] = options.length
    names = (*options.gin_files, f"methods/{kind}.gin")
    start = ["train", *(f"--gin_file={name}" for name in names)]
    if registry.named(kind).result == "model":
        runs = [
            (folder / f"seed_{seed}", {"seed": seed}) for seed in range(options.seeds)
        ]
    else:
        own = {"prompts": [{"seed": list(range(options.seeds))}]}
        runs = [(folder, {**own, "learning_rate": rate})]
    for place, own in runs:
        flags = {**common, **own, "model_dir": place}
        yield place, [*start, *(f"--{name}={value}" for name, value in flags.items())]


def run(words: Sequence[str], place: pathlib.Path) -> dict[str, Any]:
    """What a run ended with; one that has ended is not run again."""
    record = place / RECORD
    if record.is_file():
        return files.read_json(record)
    started = subprocess.Popen([sys.executable, "-m", "prompt_tuning", *words])
    _, status, usage = os.wait4(started.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(words)} ended with {code}")
    found = measured(place, usage.ru_maxrss * 1024)
    files.write_json(record, found)
    return found


def measured(place: pathlib.Path, peak_bytes: int) -> dict[str, Any]:
    """What a run's folder says of each of its members."""
    results = files.read_json(place / report.RESULTS_FILE)
    members = [row for row in results["members"] if not row.get("diverged")]
    records = report.read_metrics(place)
    pace = results["pace"].get("steps_per_second")
    return {
        "learning_rate": results.get("learning_rate"),
        "diverged": len(results["members"]) - len(members),
        # Of one member: the others' rows are in the same steps.
        "seconds_per_step": None if pace is None else 1 / pace / len(members),
        "peak_bytes": peak_bytes,
        "members": [
            {
                "curve": curve(records, row["name"], list(row["validation"])),
                "tuned": numbers(place / "best" / row["name"]),
                "bytes": size(place / row["file"]),
            }
            for row in members
        ],
    }


def curve(
    records: Sequence[Mapping[str, Any]], name: str, metrics: Sequence[str]
) -> dict[str, float]:
    """The mean of a member's metrics by the step of each evaluation."""
    own = [
        record
        for record in records
        if record["split"] == "validation" and record.get("member", name) == name
    ]
    return {
        str(record["step"]): float(np.mean([record[metric] for metric in metrics]))
        for record in own
    }


def numbers(folder: pathlib.Path) -> int:
    """How many numbers are tuned, by the leaves that a member's folder keeps."""
    newest = max(folder.glob("*.safetensors"), key=lambda path: int(path.stem))
    with files.reading(newest, "the best leaves of a run") as file:
        return sum(int(np.prod(file.get_slice(n).get_shape())) for n in file.keys())  # noqa: SIM118


def size(path: pathlib.Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    inside = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in inside)


def steps_to(found: Mapping[str, float], share: float = SHARE) -> int:
    """The first evaluated step with a share of the value of the last one."""
    last = max(found, key=int)
    return min(
        int(step) for step, value in found.items() if value >= share * found[last]
    )


def summary(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What the runs of a method say, by task and over all of them."""
    tasks: dict[str, Any] = {}
    for task, found in runs.items():
        curves = [row["curve"] for each in found for row in each["members"]]
        last = [each[max(each, key=int)] for each in curves]
        tasks[task] = {
            "mean": float(np.mean(last)),
            "spread": float(np.std(last, ddof=1)) if len(last) > 1 else None,
            "seeds": len(last),
            "diverged": sum(each["diverged"] for each in found),
            "steps_to_95": float(np.mean([steps_to(each) for each in curves])),
        }
    every = [each for found in runs.values() for each in found]
    rows = [row for each in every for row in each["members"]]
    times = [x for each in every if (x := each["seconds_per_step"]) is not None]
    return {
        "tasks": tasks,
        "learning_rate": next(iter(runs.values()))[0]["learning_rate"],
        "mean": float(np.mean([each["mean"] for each in tasks.values()])),
        "tuned": max(row["tuned"] for row in rows),
        "bytes": max(row["bytes"] for row in rows),
        "seconds_per_step": float(np.median(times)) if times else None,
        "peak_bytes": max(each["peak_bytes"] for each in every),
        "steps_to_95": float(np.mean([x["steps_to_95"] for x in tasks.values()])),
    }


def table(results: Mapping[str, Any]) -> str:
    """Markdown, the best mean first."""
    found = sorted(results.items(), key=lambda pair: -pair[1]["mean"])
    tasks = list(next(iter(results.values()))["tasks"])
    heads = ["method", *tasks, "mean", "tuned", "s / step", "peak MiB", "bytes a task"]
    heads.append("steps to 95 %")
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    for kind, row in found:
        cells = [f"`{kind}`"]
        for task in tasks:
            own = row["tasks"][task]
            spread = "" if own["spread"] is None else f" ± {own['spread']:.1f}"
            cells.append(f"{own['mean']:.1f}{spread}")
        pace = row["seconds_per_step"]
        cells += [f"{row['mean']:.1f}", f"{row['tuned']:,}"]
        cells += ["" if pace is None else f"{pace:.3f}"]
        cells += [f"{row['peak_bytes'] / 2**20:.0f}", f"{row['bytes']:,}"]
        cells.append(f"{row['steps_to_95']:.0f}")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def draw(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """The mean over tasks against how many numbers are tuned."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    found = sorted(results.items(), key=lambda pair: pair[1]["tuned"])
    for number, (kind, row) in enumerate(found):
        axes.plot(row["tuned"], row["mean"], "o", markersize=4)
        # Neighbours have their names on either side.
        sign, side = (1, "left") if number % 2 else (-1, "right")
        axes.annotate(
            kind,
            (row["tuned"], row["mean"]),
            (4 * sign, 2),
            textcoords="offset points",
            ha=side,
            fontsize=7,
        )
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set_xlabel("numbers that are tuned")
    axes.set_ylabel("mean of the tasks' metrics at the last step")
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main() -> None:
    """Runs what is missing, and writes all that is done after each method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=pathlib.Path, required=True)
    parser.add_argument("--runs", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    parser.add_argument("--methods", nargs="+", default=methods(), choices=methods())
    parser.add_argument(
        "--gin_files", nargs="+", default=["models/t5_1_1_mini.gin"], metavar="FILE"
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=20)
    options = parser.parse_args()
    tasks: dict[str, Flags] = json.loads(options.tasks.read_text())
    budget = {
        k: getattr(options, k) for k in ("steps", "batch_size", "length", "seeds")
    }
    results: dict[str, Any] = {}
    for kind in options.methods:
        runs: dict[str, list[dict[str, Any]]] = {}
        rate: float | str = "auto"
        for name, task in tasks.items():
            words = commands(kind, task, options.runs / name / kind, rate, options)
            runs[name] = [run(line, place) for place, line in words]
            if rate == "auto" and (tried := runs[name][0]["learning_rate"]):
                rate = tried["chosen"]
        results[kind] = summary(runs)
        environment.publish({"budget": budget, "methods": results}, options.output)
    print(table(results))
    if options.plot is not None:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
