# SPDX-License-Identifier: Apache-2.0
"""``eval``: the metrics of prompts, or of a model alone, on a split of a task."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prompt_tuning import decoding, files, processes, report
from prompt_tuning.checkpoints import base_models
from prompt_tuning.checkpoints import prompt_file as prompt_card
from prompt_tuning.data import answer_statistics, fairness
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError
from prompt_tuning.inference import ensembles
from prompt_tuning.inference.encoding import vocabulary_of
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.types import (
    ActivationDtype,
    BatchSize,
    FeatureLengths,
    NonNegativeInt,
    PathText,
    Seed,
    WeightDtype,
)

if TYPE_CHECKING:
    from prompt_tuning.inference.answerer import Evaluation
    from prompt_tuning.inference.prompt_evaluation import Table

ANSWERS = "predictions.jsonl"


def evaluate(
    *,
    config: T5Config,
    initial_checkpoint_path: str,
    mixture_or_task_name: str,
    task_feature_lengths: FeatureLengths,
    prompt_file: str | Sequence[str] | None = None,
    combine: str | None = None,
    mixture_or_task_module: str | None = None,
    local_task: LocalTask | None = None,
    split: str = "test",
    group_column: str | None = None,
    positive_label: str | None = None,
    batch_size: BatchSize = 64,
    strategy: Callable[..., decoding.Strategy] | None = None,
    seed: Seed = 0,
    bootstrap_samples: NonNegativeInt = 1000,
    output_dir: PathText | None = None,
    frozen_dtype: WeightDtype = "auto",
    activation_dtype: ActivationDtype = "auto",
    partitioner: Partitioner | None = None,
    force: bool = False,
    on_start: files.OnStart | None = None,
) -> dict[str, Any]:
    """Evaluates prompts, or a model without one, on a split of a task.

    Args:
      config: sizes of the model.
      initial_checkpoint_path: the model (see `formats.open_model`), or
        ``embedded:NAME``.
      mixture_or_task_name: a registered seqio task or mixture.
      task_feature_lengths: text tokens of ``inputs`` and ``targets``.
      prompt_file: the prompt, or a list of several, which answer together; None for the
        model alone.
      combine: how one answer is made of those of several prompts (see `ensembles`);
        by default by vote.
      mixture_or_task_module: imported to register the task.
      local_task: files to register as the task, if it is not a module's; template,
        labels and vocabulary are those of the prompt.
      split: split to evaluate on.
      group_column: the column of the local files whose groups are compared.
      positive_label: the label that counts as positive for it; of two the second by
        default.
      batch_size: rows of a batch.
      strategy: makes the strategy from ``max_decode_len``, the length of targets, and
        ``eos_id``, such as `decoding.Beam`. None ranks labels, and is greedy where
        there are none; a strategy searches among the labels in place of ranking them.
      seed: for strategies that draw.
      bootstrap_samples: how often rows are drawn for the metrics' 95 % intervals; 0 gives
        none.
      output_dir: where ``results.json`` and ``predictions.jsonl`` go; None prints only.
      frozen_dtype: dtype of the weights.
      activation_dtype: dtype of the computation.
      partitioner: how to spread over devices; by default a whole model on each.
      force: take a prompt that was tuned on another model or vocabulary.
      on_start: called with ``output_dir`` before anything else is written to it.

    Returns:
      The metrics with their intervals and what they were measured on; of a label set also
      what `answer_statistics.of_labels` says and the calibration error, and of groups
      ``fairness`` (see `fairness.of_groups`). Of several prompts also each one's own,
      their mean, the best prompt's, and those of every rule that combines them.

    Raises:
      UserError: something is missing or does not fit.
    """
    from prompt_tuning.runs import evaluations
    from prompt_tuning.runs.task_data import TaskData

    paths = [prompt_file] if isinstance(prompt_file, str) else list(prompt_file or ())
    if prompt_file is not None and not paths:
        raise UserError("PROMPT_FILE lists no prompt: leave it out for the model alone")
    several = len(paths) > 1
    if combine is not None and not several:
        raise UserError(
            f"COMBINE={combine!r} makes one answer of those of several prompts, and here "
            f"{'is one' if paths else 'is none'}: leave it out"
        )
    combine = combine or next(iter(ensembles.RULES))
    if combine not in ensembles.RULES:
        raise UserError(
            f"COMBINE={combine!r} must be one of {', '.join(ensembles.RULES)}"
        )
    partitioner = partitioner or Partitioner()
    partitioner.check_eval_batch(batch_size)
    if output_dir is not None:
        read = [] if local_task is None else local_task.files.values()
        names = (report.RESULTS_FILE, ANSWERS)
        written = (pathlib.Path(output_dir) / name for name in names)
        files.refuse_same([*paths, *read, initial_checkpoint_path], written)
    folder = None if output_dir is None else files.writable_folder(output_dir)
    source = base_models.load(
        config,
        initial_checkpoint_path,
        frozen_dtype=frozen_dtype,
        activation_dtype=activation_dtype,
        partitioner=partitioner,
    )
    prompts = evaluations.read(paths, source, force)
    if local_task is not None and not force:
        for _, card, _ in prompts.values():
            local_task = local_task.as_tuned(card)
            if local_task.vocabulary is None and card.get("vocabulary") is not None:
                vocabulary = vocabulary_of(card, source.vocabulary)
                local_task = dataclasses.replace(local_task, vocabulary=vocabulary.name)
    tasks: dict[str, TaskData] = {}
    for name, (array, card, _) in prompts.items():
        first = not tasks
        tasks[name] = TaskData(
            mixture_or_task_name,
            # The first registers it.
            mixture_or_task_module if first else None,
            local_task if first else None,
            task_feature_lengths,
            (Prompt(name, len(array)),) if len(array) else (),
            source.config.vocab_size,
            card.get("placement") or "prepend",
            source.vocabulary,
        )
        fingerprint = tasks[name].vocabulary_fingerprint
        prompt_card.check_vocabulary(dict(card), fingerprint, force)
        tasks[name].check(split)
    labels = tasks[next(iter(tasks))].labels
    columns = local_task and local_task.columns_of(split)
    groups: Sequence[str] = ()
    if group_column is not None:
        if local_task is None or columns is None:
            raise UserError(
                f"GROUP_COLUMN={group_column!r} is a column of local files, and "
                f"{mixture_or_task_name} has none: take tasks/local_file.gin"
            )
        positive_label = fairness.positive_of(labels, positive_label)
        groups = fairness.groups_of(columns, group_column, local_task.path(split))
    if output_dir is not None:
        # Now that nothing is refused: what an earlier call left there stays a whole.
        files.writable_folder(output_dir, on_start)
    table = evaluations.evaluate(
        source,
        prompts,
        tasks,
        split,
        strategy=strategy,
        seed=seed,
        batch_size=batch_size,
        max_decode_len=task_feature_lengths["targets"],
    )
    if several and combine not in table.combined:
        raise UserError(
            f"COMBINE={combine!r} does not go with these prompts: choose one of "
            f"{', '.join(table.combined)}"
        )
    outcome = (table.combined if several else table.prompts)[
        combine if several else next(iter(prompts))
    ]
    results = {
        "task": mixture_or_task_name,
        "split": split,
        "examples": len(outcome.answers),
        "prompt": prompt_file if isinstance(prompt_file, str | None) else paths,
        "base_model": source.identity,
        "metrics": dict(outcome.metrics),
        **_statistics(outcome, labels, bootstrap_samples),
        **(_of_several(table, combine) if several else {}),
        "versions": report.versions(),
    }
    if groups and positive_label is not None:
        results["fairness"] = fairness.of_groups(
            outcome.answers, outcome.targets, groups, positive_label, bootstrap_samples
        )
    if folder is not None and processes.is_first():
        files.write_json(folder / report.RESULTS_FILE, results)
        kept = _rows(outcome, labels, columns)
        lines = [json.dumps(row, ensure_ascii=False) for row in kept]
        files.write_text(folder / ANSWERS, "\n".join(lines) + "\n")
    return results


def _statistics(
    outcome: "Evaluation", labels: Sequence[str] | None, samples: int
) -> dict[str, Any]:
    """What ``results.json`` says beside the metrics."""
    found: dict[str, Any] = {}
    if samples and outcome.intervals is not None:
        found["intervals"] = outcome.intervals(samples)
    if labels is not None:
        found |= answer_statistics.of_labels(outcome.answers, outcome.targets, labels)
    if outcome.probabilities:
        found["calibration_error"] = answer_statistics.calibration_error(
            outcome.probabilities, outcome.targets
        )
    return found


def _rows(
    outcome: "Evaluation",
    labels: Sequence[str] | None,
    columns: Sequence[Mapping[str, Any]] | None,
) -> Iterator[dict[str, Any]]:
    """What is kept of each example, for people to read and for programs.

    Args:
      outcome: the evaluation.
      labels: the label set, or None where answers are free text.
      columns: the rows of the file that the examples came from, if they did.
    """
    told: dict[str, Sequence[Any] | None] = {
        "input": outcome.inputs and outcome.inputs(),
        "columns": columns,
        "answer": outcome.answers,
        "target": outcome.targets,
    }
    if labels is not None:
        pairs = zip(outcome.answers, outcome.targets, strict=True)
        told["right"] = [answer == target for answer, target in pairs]
    elif outcome.right is not None:
        told["right"] = outcome.right()
    told["scores"] = outcome.probabilities or None
    there = {name: values for name, values in told.items() if values is not None}
    for row in zip(*there.values(), strict=True):
        yield dict(zip(there, row))


def _of_several(table: "Table", combine: str) -> dict[str, Any]:
    """What ``results.json`` says of several prompts beside their common metrics."""
    return {
        "combine": combine,
        "combined": {name: one.metrics for name, one in table.combined.items()},
        "prompts": {name: one.metrics for name, one in table.prompts.items()},
        "mean": table.mean,
        "best": table.best,
    }
