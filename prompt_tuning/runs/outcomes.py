# SPDX-License-Identifier: Apache-2.0
"""What a training run leaves of its members: files, records, a table."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.markup
import rich.table

from prompt_tuning import processes, report, trees
from prompt_tuning.checkpoints import cards, formats, model_file, prompt_formats
from prompt_tuning.checkpoints.prompt_formats import Saved
from prompt_tuning.data import label_sets
from prompt_tuning.network.adapters import COLLECTION
from prompt_tuning.runs import answer_counts
from prompt_tuning.runs.member_specs import MemberSpec, identity, word
from prompt_tuning.training.best_evaluation import selection_value
from prompt_tuning.training.members import Result
from prompt_tuning.types import Params

if TYPE_CHECKING:
    from prompt_tuning.data.length_report import Fill
    from prompt_tuning.runs.task_data import TaskData


def saved(
    part: Params,
    spec: MemberSpec,
    task: "TaskData",
    result: Result,
    facts: Mapping[str, Any],
    width: int,
) -> Saved:
    """What a member has become, and its card.

    Args:
      part: what `Method.materialize` makes of it.
      spec: its values.
      task: its task.
      result: what training gave.
      facts: what the card says of the whole run: base_model, versions, and what was
        changed on its way.
      width: hidden width H of the model.
    """
    slots = part.get(COLLECTION, {})
    card = {
        "method": spec.method.describe(),
        "length": spec.prompt_length,
        "width": width,
        "placement": spec.placement,
        "template": task.template,
        "task": spec.data.mixture_or_task_name,
        "labels": task.labels,
        **_compared(task),
        "vocabulary": task.vocabulary_name,
        "vocabulary_fingerprint": task.vocabulary_fingerprint,
        "task_feature_lengths": dict(spec.data.task_feature_lengths),
        "base_model": facts["base_model"],
        "recipe": {
            "steps": result.step,
            "batch_size": spec.batch_size,
            "seed": spec.seed,
        },
        "metric": cards.finite_metrics(result.metrics),
        "versions": facts["versions"],
    }
    if "learning_rate" in facts:
        card["recipe"]["learning_rate"] = facts["learning_rate"]
    if "changes" in facts:
        card["changes"] = facts["changes"]
    prompt = part.get("prompts", {}).get(spec.name, np.zeros((0, width), np.float32))
    return Saved(np.asarray(prompt), card, slots)


def _compared(task: "TaskData") -> dict[str, str]:
    """What a card says of how labels are compared, if it is not as usual."""
    if task.labels is None or task.label_scores == label_sets.SUM:
        return {}
    return {"label_scores": task.label_scores}


def save_prompt(path: pathlib.Path, saved: Saved) -> None:
    """Writes a prompt's file, in process 0.

    Raises:
      UserError: it cannot be written.
    """
    processes.in_first(lambda: prompt_formats.save_own(path, saved))


def save_model(
    path: pathlib.Path, params: Params, metadata: Mapping[str, Any], base: str
) -> None:
    """Writes a tuned model's folder, in process 0, with the vocabulary of its base.

    Args:
      path: the folder.
      params: the network.
      metadata: what the weights' file says.
      base: the folder of the base model.

    Raises:
      UserError: it cannot be written.
    """
    vocabulary = formats.find_vocabulary(base)
    processes.in_first(
        lambda: model_file.save_model(path, params, metadata, vocabulary=vocabulary)
    )


def tell_tensorboard(
    folder: pathlib.Path, members: Sequence[MemberSpec], found: Mapping[str, Result]
) -> None:
    """Writes the values of each member and what they gave beside the run's events."""
    for spec in members:
        if (result := found.get(spec.name)) is not None:
            measured = {**result.metrics, "loss": result.loss}
            report.hyperparameters(
                folder,
                spec.name,
                trees.flatten(identity(spec, {})),
                {f"best/{name}": value for name, value in measured.items()},
                result.step,
            )


def say_answers(answers: Mapping[str, dict[str, Any] | None]) -> None:
    """Prints what each member answered, and where that is no better than nothing."""
    for name, found in answers.items():
        if found is not None:
            report.say(f"{name}: {answer_counts.line(found)}")
            if problem := answer_counts.warning(found):
                report.say(f"WARNING: {name}: {problem}")


def row(
    spec: MemberSpec,
    result: Result | None,
    fill: "Fill",
    metric: str | None,
    answers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What ``results.json`` says of a member.

    One without a result had a loss that was not finite; it has no file. ``answers`` are
    those of `answer_counts.summary`.
    """
    found = {
        "name": spec.name,
        "task": spec.data.mixture_or_task_name,
        "values": {key: word(value) for key, value in spec.own.items()},
        "tokens_share": {"encoder": fill.encoder, "decoder": fill.decoder},
    }
    if result is None:
        return {**found, "diverged": True}
    return {
        **found,
        "file": spec.file,
        "best_step": result.step,
        "last_step": result.last_step,
        "loss": result.loss,
        "validation": result.metrics,
        "answers": answers,
        "selected_by": selection_value(result.metrics, metric)
        if result.metrics
        else None,
    }


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows by task, the best first; those without evaluation are last."""

    def place(found: Mapping[str, Any]) -> tuple[str, float]:
        value = found.get("selected_by")
        return found["task"], math.inf if value is None else -value

    return sorted(rows, key=place)


def best(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The first of the `ranked` rows of each task, by the task; none if not evaluated."""
    names: dict[str, str] = {}
    for found in rows:
        if found.get("selected_by") is not None:
            names.setdefault(found["task"], found["name"])
    return names


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints `ranked` rows and which of them is the best, in process 0."""
    table = rich.table.Table()
    for name in ("name", "task", "best step", "last loss", "validation", "answers"):
        table.add_column(name, overflow="fold")
    for found in rows:
        if found.get("diverged"):
            values = ("", "diverged", "", "")
        else:
            metrics, answers = found["validation"].items(), found["answers"]
            values = (
                str(found["best_step"]),
                f"{found['loss']:.4f}",
                ", ".join(f"{name} {value:.4f}" for name, value in metrics),
                answers and answer_counts.cell(answers) or "",
            )
        table.add_row(rich.markup.escape(found["name"]), found["task"], *values)
    if processes.is_first():
        report.console.print(table)
    for task, name in best(rows).items():
        report.say(f"the best on {task}: {name}")
