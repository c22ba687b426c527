# SPDX-License-Identifier: Apache-2.0
"""What a base model knows of tasks that it was not trained on.

    python benchmarks/probe.py --tasks FOLDER --output benchmarks/results/probe.json

FOLDER holds NAME.jsonl as `scripts/mini/probe_tasks.py` writes them. For each task: the
test accuracy of the majority, of TF-IDF, of logistic regression on mean embeddings and
on mean encoder states (see `probing`), and, unless --steps is 0, of prompts of 20 tuned
for so many steps by `recipes/short.gin`; with --model_steps also of the model tuned for
so many steps as in the demo, and with --few of all but the majority on so many rows,
of prompt and model for a third of the steps. Nothing is chosen by any row: what is
measured is the last step. --model and --sizes name another model than the embedded one.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
from typing import Any

import environment
import numpy as np
from tail_average import ending_at_the_average

from prompt_tuning import report
from prompt_tuning.checkpoints import base_models, model_file
from prompt_tuning.commands import demo, train
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.runs import baselines
from prompt_tuning.runs.settings import Base, Data, Objective, Settings, Tuning
from prompt_tuning.training import optimizers, probing, prompt_starts
from prompt_tuning.training.schedule import Schedule
from prompt_tuning.types import Params

TARGETS_LENGTH = 8


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a prompt is tuned.

    Attributes:
      rate: the learning rate, in units of the root mean square of the table's entries.
      factors: of its schedule; warm-up takes a tenth of the steps.
      length: positions of the prompt.
      init: a name of `prompt_starts.named`.
      steps: of so many rows as ``batch_size`` says.
      batch_size: rows of a step.
      label_loss: see `Model`; None teaches target tokens.
      averaged: share of the steps whose prompts the last one is the mean of.
      method: 'model_tuning' takes the demo's rate, and neither rate nor prompt of this.
    """

    rate: float = 0.3
    factors: str = optimizers.DECAYED
    length: int = demo.PROMPT_LENGTH
    init: str = "class_labels"
    steps: int = 600
    batch_size: int = 32
    label_loss: str | None = demo.LABEL_LOSS
    averaged: float = 0.0
    method: str = "prompt_tuning"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A base model as the benchmarks take it.

    Attributes:
      base: for runs.
      loaded: its float32 weights.
      vocabulary: its SentencePiece model.
      table_rms: root mean square of the embedding table's entries.
    """

    base: Base
    loaded: base_models.BaseModel
    vocabulary: pathlib.Path
    table_rms: float

    @property
    def name(self) -> str:
        """What people call the model."""
        return self.loaded.name


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of both benchmarks: model, tasks and output."""
    parser.add_argument("--tasks", type=pathlib.Path, required=True)
    parser.add_argument(
        "--model",
        default=demo.CHECKPOINT,
        help="a folder with weights and spiece.model",
    )
    parser.add_argument(
        "--sizes", type=json.loads, default={}, help="of T5Config, where they differ"
    )
    parser.add_argument("--output", type=pathlib.Path)


def open_model(options: argparse.Namespace) -> Opened:
    """The model that `add_model_arguments` named."""
    config: T5Config = dataclasses.replace(demo.CONFIG, **options.sizes)
    loaded = base_models.load(config, options.model, frozen_dtype="float32")
    return Opened(
        Base(config=config, initial_checkpoint_path=options.model),
        loaded,
        pathlib.Path(loaded.path) / model_file.VOCABULARY,
        float(np.sqrt(np.mean(np.square(loaded.table)))),
    )


def write_splits(
    task: probing.ProbeTask, folder: pathlib.Path, vocabulary: pathlib.Path
) -> LocalTask:
    """The task as files that the ``train`` command reads; its input is the text alone."""
    files = {}
    for name, split in (("train", task.train), ("validation", task.test)):
        path = folder / f"{task.name}_{name}.jsonl"
        rows = [
            {"text": text, "label": task.labels[label]}
            for text, label in zip(split.texts, split.labels, strict=True)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        files[name] = str(path)
    return LocalTask(
        files, "{text}", label_names=list(task.labels), vocabulary=str(vocabulary)
    )


def tune(
    task: probing.ProbeTask,
    opened: Opened,
    recipe: Recipe,
    seed: int,
    local_task: LocalTask,
    evaluations: int = 1,
) -> dict[int, float]:
    """Accuracy on the task's test part, by step; the last one is the recipe's steps."""
    if recipe.method == "model_tuning":
        tuning = Tuning(
            method="model_tuning",
            prompt_length=0,
            optimizer=optimizers.adafactor(
                optimizers.learning_rate_schedule("constant", demo.MODEL_RATE)
            ),
        )
    else:
        optimizer = optimizers.decayed(
            recipe.rate * opened.table_rms, recipe.steps, recipe.factors
        )
        if recipe.averaged:
            optimizer = ending_at_the_average(optimizer, recipe.steps, recipe.averaged)
        tuning = Tuning(
            method=recipe.method,
            prompt_length=recipe.length,
            prompt_init=prompt_starts.named(recipe.init, task.labels),
            optimizer=optimizer,
        )
    longest = max(len(ids) for ids in [*task.train.ids, *task.test.ids])
    settings = Settings(
        base=opened.base,
        data=Data(
            mixture_or_task_name=f"probe_{task.name}",
            local_task=local_task,
            task_feature_lengths={"inputs": longest, "targets": TARGETS_LENGTH},
        ),
        tuning=tuning,
        objective=Objective(label_loss=recipe.label_loss),
        schedule=Schedule(recipe.steps, recipe.steps // evaluations, 0),
        batch_size=recipe.batch_size,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        train.train(model_dir=folder, settings=settings)
        records = report.read_metrics(pathlib.Path(folder))
    return {
        record["step"]: record["accuracy"] / 100
        for record in records
        if record["split"] == "validation"
    }


def by_seed(
    task: probing.ProbeTask, opened: Opened, recipe: Recipe, seeds: int
) -> list[float]:
    """Accuracy on the task's test part after a recipe, by seed."""
    with tempfile.TemporaryDirectory() as name:
        local_task = write_splits(task, pathlib.Path(name), opened.vocabulary)
        return [
            tune(task, opened, recipe, seed, local_task)[recipe.steps]
            for seed in range(seeds)
        ]


def few(task: probing.ProbeTask, rows: int) -> probing.ProbeTask:
    """The task with so many training rows, of each label alike, the first there are."""
    labels = task.train.labels
    each = rows // len(task.labels)
    places = np.concatenate(
        [np.flatnonzero(labels == label)[:each] for label in range(len(task.labels))]
    ).tolist()
    train_part = probing.Split(
        [task.train.texts[i] for i in places],
        [task.train.ids[i] for i in places],
        labels[places],
    )
    return dataclasses.replace(task, train=train_part)


def linear(
    task: probing.ProbeTask, encoder: probing.Encoder, params: Params
) -> dict[str, float]:
    """Accuracy of logistic regression on TF-IDF, mean embeddings and mean states."""
    learned, test = task.train, task.test
    right = baselines.tf_idf(
        learned.texts, learned.labels.tolist(), test.texts, test.labels.tolist()
    )
    return {"tf_idf": float(right.mean()), **probing.probe(encoder, params, task)}


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--model_steps", type=int, default=0)
    parser.add_argument("--few", type=int, default=0, help="rows; 0 leaves it out")
    parser.add_argument("--only", nargs="*", help="names of tasks; default: all")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    opened = open_model(options)
    recipe = Recipe(steps=options.steps)
    recipes = {"prompt": recipe} if options.steps else {}
    if options.model_steps:
        recipes["model"] = Recipe(steps=options.model_steps, method="model_tuning")
    encoder = probing.Encoder(Model(Transformer(opened.loaded.config)))
    tasks: dict[str, dict[str, Any]] = {}
    for task in probing.load(options.tasks, opened.vocabulary):
        if options.only and task.name not in options.only:
            continue
        learned, test = task.train, task.test
        found = tasks[task.name] = {
            "classes": len(task.labels),
            "train_rows": len(learned.texts),
            "test_rows": len(test.texts),
            "majority": float(
                baselines.majority(learned.labels.tolist(), test.labels.tolist()).mean()
            ),
            **linear(task, encoder, opened.loaded.params),
        }
        fewer = few(task, options.few) if options.few else None
        if fewer is not None:
            readers = linear(fewer, encoder, opened.loaded.params)
            found |= {f"{name}_of_{options.few}": readers[name] for name in readers}
        for name, each in recipes.items():
            found[f"{name}_by_seed"] = by_seed(task, opened, each, options.seeds)
            if fewer is not None:
                third = dataclasses.replace(each, steps=each.steps // 3)
                found[f"{name}_of_{options.few}_by_seed"] = by_seed(
                    fewer, opened, third, options.seeds
                )
        report.say(f"{task.name}: {found}")
    results = {
        "model": opened.name,
        "sizes": options.sizes,
        "recipe": dataclasses.asdict(recipe) if recipe.steps else None,
        "tasks": tasks,
    }
    environment.publish(results, options.output, ["scikit-learn"])


if __name__ == "__main__":
    main()
