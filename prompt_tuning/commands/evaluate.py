# SPDX-License-Identifier: Apache-2.0
"""``eval``: the metrics of a prompt, or of a model alone, on a split of a task."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from prompt_tuning import decoding, files, processes, report
from prompt_tuning.checkpoints import base_models
from prompt_tuning.checkpoints import prompt_file as prompt_card
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer


def evaluate(
    *,
    config: T5Config,
    initial_checkpoint_path: str,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    prompt_file: str | None = None,
    mixture_or_task_module: str | None = None,
    local_task: LocalTask | None = None,
    split: str = "test",
    batch_size: int = 64,
    strategy: Callable[..., decoding.Strategy] | None = None,
    seed: int = 0,
    output_dir: str | None = None,
    frozen_dtype: str = "auto",
    activation_dtype: str = "auto",
    partitioner: Partitioner | None = None,
    force: bool = False,
    on_start: files.OnStart | None = None,
) -> dict[str, Any]:
    """Evaluates a prompt, or a model without one, on a split of a task.

    Args:
      config: sizes of the model.
      initial_checkpoint_path: the model (see `formats.open_model`), or
        ``embedded:NAME``.
      mixture_or_task_name: a registered seqio task or mixture.
      task_feature_lengths: text tokens of ``inputs`` and ``targets``.
      prompt_file: the prompt, or None for the model alone.
      mixture_or_task_module: imported to register the task.
      local_task: files to register as the task, if it is not a module's.
      split: split to evaluate on.
      batch_size: rows of a batch.
      strategy: makes the strategy from ``max_decode_len``, the length of targets, and
        ``eos_id``, such as `decoding.Beam`. None ranks labels, and is greedy where
        there are none; a strategy searches among the labels in place of ranking them.
      seed: for strategies that draw.
      output_dir: where ``results.json`` and ``predictions.jsonl`` go; None prints only.
      frozen_dtype: dtype of the weights.
      activation_dtype: dtype of the computation.
      partitioner: how to spread over devices; by default a whole model on each.
      force: take a prompt that was tuned on another model or vocabulary.
      on_start: called with ``output_dir`` before anything else is written to it.

    Returns:
      The metrics and what they were measured on.
    """
    from prompt_tuning.inference import evaluation
    from prompt_tuning.runs.task_data import TaskData

    partitioner = partitioner or Partitioner()
    partitioner.check_eval_batch(batch_size)
    folder = None if output_dir is None else files.writable_folder(output_dir, on_start)
    source = base_models.load(
        config,
        initial_checkpoint_path,
        frozen_dtype=frozen_dtype,
        activation_dtype=activation_dtype,
        partitioner=partitioner,
    )
    prompts, params, card = base_models.attach(source, prompt_file, force)
    task = TaskData(
        mixture_or_task_name,
        mixture_or_task_module,
        local_task,
        task_feature_lengths,
        prompts,
        config.vocab_size,
        card.get("placement", "prepend"),
    )
    prompt_card.check_vocabulary(card, task.vocabulary_fingerprint, force)
    task.check(split)
    model = Model(Transformer(source.config, prompts))
    outcome = evaluation.Evaluator(
        mixture_or_task_name,
        split,
        task_feature_lengths,
        task.converter,
        evaluation.Answerer(
            model,
            task.vocabulary,
            labels=task.labels,
            strategy=strategy,
            max_decode_len=task_feature_lengths["targets"],
            seed=seed,
            mesh=source.mesh,
        ),
        batch_size=batch_size,
    )(params)
    results = {
        "task": mixture_or_task_name,
        "split": split,
        "examples": len(outcome.answers),
        "prompt": prompt_file,
        "base_model": source.identity,
        "metrics": dict(outcome.metrics),
        "versions": report.versions(),
    }
    if folder is not None and processes.is_first():
        files.write_json(folder / report.RESULTS_FILE, results)
        lines = [
            json.dumps({"answer": answer, "target": target})
            for answer, target in zip(outcome.answers, outcome.targets)
        ]
        files.write_text(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    return results
