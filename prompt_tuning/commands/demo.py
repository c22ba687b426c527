# SPDX-License-Identifier: Apache-2.0
"""``demo``: prompt tuning of the embedded T5 on movie reviews, beside its baselines.

The recipe is here rather than in gin because it compares several runs; each of them is
what ``prompt-tuning train`` does with the same values.
"""

import json
import pathlib
import time
from typing import Any

import numpy as np
import rich.table

from prompt_tuning import files, plots, report
from prompt_tuning.checkpoints import base_models, formats, prompt_file
from prompt_tuning.commands import evaluate, train
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.runs import baselines, member_specs
from prompt_tuning.runs.baselines import HandWritten
from prompt_tuning.runs.settings import Base, Data, Settings, Tuning
from prompt_tuning.training import optimizers
from prompt_tuning.training.prompt_starts import class_labels_init
from prompt_tuning.training.schedule import Schedule
from prompt_tuning.types import PositiveInt

TASK = "rotten_tomatoes"
MODULE = "prompt_tuning.tasks.rotten_tomatoes"
CHECKPOINT = "embedded:t5_1_1_mini"
LENGTHS = {"inputs": 64, "targets": 4}
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
PROMPT_LENGTH = 20
# Prompts as people write them; the first word of the pair stands for "negative".
HAND_WRITTEN = (
    HandWritten(
        "Is this movie review positive or negative? {text}", ("negative", "positive")
    ),
    HandWritten("Review: {text} Sentiment:", ("negative", "positive")),
    HandWritten("{text} It was", ("terrible", "great")),
    HandWritten("Did the critic like the film? {text}", ("no", "yes")),
    HandWritten("sst2 sentence: {text}", ("negative", "positive")),
)


def run(*, output: str = "runs/demo", seeds: PositiveInt = 1) -> None:
    """Tunes, evaluates on the test split, prints the table and where things lie.

    The folder's ``results.json`` says the same.

    Args:
      output: folder for everything that is written.
      seeds: how many seeds to tune with; the table gives the mean.

    Raises:
      UserError: the sentences are not installed or the folder cannot be written.
    """
    started = time.monotonic()
    folder = files.writable_folder(output)
    right = _baselines()
    runs = []
    for seed in range(seeds):
        name = "prompt_tuning" if seeds == 1 else f"prompt_tuning_{seed}"
        report.say(f"\nprompt tuning, seed {seed}")
        tuning = Tuning(
            method="prompt_tuning",
            prompt_length=PROMPT_LENGTH,
            prompt_init=class_labels_init(("negative", "positive")),
            optimizer=optimizers.adafactor(
                optimizers.learning_rate_schedule("constant", 0.1),
                multiply_by_parameter_scale=False,
                weight_decay_rate=1e-5,
            ),
        )
        _tune(folder / name, seed, tuning, Schedule(1000, 100, 1000))
        prompt = folder / name / prompt_file.FILE
        runs.append(_test(folder / name, prompt=str(prompt)))
    report.say("\nmodel tuning")
    tuning = Tuning(
        method="model_tuning",
        prompt_length=0,
        optimizer=optimizers.adafactor(
            optimizers.learning_rate_schedule("constant", 0.001),
        ),
    )
    _tune(folder / "model_tuning", 0, tuning, Schedule(200, 50, 1000))
    tuned = _test(
        folder / "model_tuning",
        checkpoint=str(folder / "model_tuning" / member_specs.MODEL_FOLDER),
    )
    right["model tuning (all 7.3M parameters)"] = tuned
    prompts = np.mean(runs, axis=0)
    results = _summary(right, prompts, runs)
    results |= {
        "seeds": seeds,
        "prompt_length": PROMPT_LENGTH,
        "seconds": round(time.monotonic() - started, 1),
        "versions": report.versions(),
    }
    files.write_json(folder / report.RESULTS_FILE, results)
    _print_table(results)
    first = folder / ("prompt_tuning" if seeds == 1 else "prompt_tuning_0")
    report.say(f"learning curve: {first / plots.CURVE_FILE}")
    report.say(
        f"try the prompt: prompt-tuning infer --prompt_file={first / prompt_file.FILE} "
        "'a gorgeous , witty film'"
    )


def _tune(
    model_dir: pathlib.Path, seed: int, tuning: Tuning, schedule: Schedule
) -> None:
    """A run of the demo, through the ``train`` command."""
    data = Data(
        mixture_or_task_name=TASK,
        mixture_or_task_module=MODULE,
        task_feature_lengths=LENGTHS,
    )
    settings = Settings(
        base=Base(config=CONFIG, initial_checkpoint_path=CHECKPOINT),
        data=data,
        tuning=tuning,
        schedule=schedule,
        batch_size=32,
        seed=seed,
    )
    train.train(model_dir=str(model_dir), settings=settings)


def _test(
    folder: pathlib.Path, *, checkpoint: str = CHECKPOINT, prompt: str | None = None
) -> np.ndarray:
    """Which test examples are answered right, through the ``eval`` command: [N]."""
    output = folder / "test"
    evaluate.evaluate(
        config=CONFIG,
        initial_checkpoint_path=checkpoint,
        mixture_or_task_name=TASK,
        mixture_or_task_module=MODULE,
        task_feature_lengths=LENGTHS,
        prompt_file=prompt,
        split="test",
        output_dir=str(output),
    )
    lines = (output / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return np.array([row["answer"] == row["target"] for row in rows])


def _baselines() -> dict[str, np.ndarray]:
    """Which test examples each baseline answers right: name -> [N]."""
    from prompt_tuning.tasks import rotten_tomatoes

    texts, labels = rotten_tomatoes.texts_and_labels("test")
    train_texts, train_labels = rotten_tomatoes.texts_and_labels("train")
    held_texts, held_labels = rotten_tomatoes.texts_and_labels("validation")
    held_out = len(held_texts)
    checkpoint = base_models.open_checkpoint(CHECKPOINT)
    report.say("hand-written prompts, by rank classification on the frozen model")
    found = baselines.hand_written(
        base_models.load(CONFIG, checkpoint),
        HAND_WRITTEN,
        held_texts + texts,
        held_labels + labels,
        formats.needed_vocabulary(checkpoint.path),
    )
    right_by = dict(zip(HAND_WRITTEN, found, strict=True))
    chosen = max(HAND_WRITTEN, key=lambda prompt: right_by[prompt][:held_out].mean())
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
    right["hand-written, the best of five on validation"] = right[
        f"hand-written: {chosen.pattern}"
    ]
    return right


def _summary(
    right: dict[str, np.ndarray], prompts: np.ndarray, runs: list[np.ndarray]
) -> dict[str, Any]:
    best = right["hand-written, the best of five on validation"]
    low, high = baselines.margin_interval(prompts, best)
    return {
        "task": TASK,
        "split": "test",
        "examples": len(prompts),
        "accuracy": {
            **{name: float(values.mean()) for name, values in right.items()},
            "prompt tuning": float(prompts.mean()),
        },
        "prompt_tuning_by_seed": [float(values.mean()) for values in runs],
        "margin_over_hand_written": {
            "mean": float((prompts - best).mean()),
            "interval_95": [low, high],
        },
    }


def _print_table(results: dict[str, Any]) -> None:
    seeds = results["seeds"]
    title = f"Rotten Tomatoes, {results['examples']} test sentences, frozen T5 of 7.3M"
    table = rich.table.Table("method", "accuracy", title=title)
    shown = {
        name: value
        for name, value in results["accuracy"].items()
        if not name.startswith("hand-written: ")
    }
    for name, value in sorted(shown.items(), key=lambda item: item[1]):
        if name == "prompt tuning":
            name = f"prompt tuning ({PROMPT_LENGTH} x 192 parameters)"
            name += f", mean of {seeds} seeds" if seeds > 1 else ""
        table.add_row(name, f"{value:.3f}")
    report.console.print(table)
    margin = results["margin_over_hand_written"]
    low, high = margin["interval_95"]
    report.say(
        f"prompt tuning over the best hand-written prompt: {margin['mean']:+.3f} "
        f"(95% bootstrap interval {low:+.3f} to {high:+.3f})"
    )
