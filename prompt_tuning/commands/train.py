# SPDX-License-Identifier: Apache-2.0
"""``train``: tunes a prompt, or the whole model, on a task.

Modules that load TensorFlow are imported inside the function, so that the commands that
do without it start at once; the same holds for the commands beside this one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from prompt_tuning import (
    base,
    methods,
    processes,
    quantization,
    report,
    sharding,
    topologies,
    trees,
)
from prompt_tuning import train as training
from prompt_tuning.base import BaseModel
from prompt_tuning.checkpoints import model_file, prompt_file
from prompt_tuning.commands.common import (
    PROMPT_FILE,
    RESULTS_FILE,
    TUNED_MODEL,
    OnStart,
    check_eval_batch,
    versions,
    writable_folder,
    write_json,
)
from prompt_tuning.errors import UserError
from prompt_tuning.local_task import LocalTask
from prompt_tuning.model import Model
from prompt_tuning.network import T5Config, Transformer
from prompt_tuning.partitioning import Partitioner
from prompt_tuning.planning import checks
from prompt_tuning.planning.workload import Workload
from prompt_tuning.prompt_inits import PromptInit, sampled_vocab_init
from prompt_tuning.prompts import Prompt


def train(
    *,
    config: T5Config,
    model_dir: str,
    initial_checkpoint_path: str,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    method: str,
    optimizer: optax.GradientTransformation,
    train_steps: int,
    batch_size: int,
    mixture_or_task_module: str | None = None,
    local_task: LocalTask | None = None,
    train_split: str = "train",
    eval_split: str | None = "validation",
    prompt_length: int = 100,
    prompt_init: PromptInit | None = None,
    placement: str = "prepend",
    eval_batch_size: int = 64,
    eval_period: int = 1000,
    checkpoint_period: int = 1000,
    log_period: int = 10,
    patience: int = 0,
    metric: str | None = None,
    seed: int = 0,
    z_loss: float = 1e-4,
    label_smoothing: float = 0.0,
    loss_normalizing_factor: str | float | None = None,
    frozen_dtype: str = "auto",
    activation_dtype: str = "auto",
    pack: bool = False,
    partitioner: Partitioner | None = None,
    num_microbatches: int = 1,
    num_eval_examples: int | None = None,
    on_start: OnStart | None = None,
) -> dict[str, Any]:
    """Tunes a prompt, or the whole model, on a task.

    Writes into ``model_dir``: ``prompt.safetensors`` (or ``model/``),
    ``metrics.jsonl``, TensorBoard events, ``learning_curve.png``, ``results.json`` and
    checkpoints, from which the same command resumes.

    Args:
      config: sizes of the model.
      model_dir: folder of the run.
      initial_checkpoint_path: the base model (see `formats.open_model`), or
        ``embedded:NAME``.
      mixture_or_task_name: a registered seqio task or mixture.
      task_feature_lengths: text tokens of ``inputs`` and ``targets``.
      method: a key of `methods.RULES`.
      optimizer: moves the tuned leaves.
      train_steps: steps in all, over all resumptions.
      batch_size: rows of a batch over all hosts.
      mixture_or_task_module: imported to register the task.
      local_task: files to register as the task, if it is not a module's.
      train_split: split to tune on.
      eval_split: split that chooses the best step; None keeps the last.
      prompt_length: positions of the prompt; 0 for methods without one.
      prompt_init: how it starts; sampled vocabulary by default.
      placement: 'prepend', 'append' or 'after_bos'.
      eval_batch_size: rows of an evaluation batch.
      eval_period: steps between evaluations.
      checkpoint_period: steps between checkpoints.
      log_period: steps between loss records.
      patience: evaluations without progress before stopping; 0 never stops early.
      metric: the metric that chooses; None takes the mean of all.
      seed: of the prompt, the order of the data and dropout.
      z_loss: weight of the z-loss.
      label_smoothing: probability taken off the target.
      loss_normalizing_factor: see `losses.weights_and_divisor`.
      frozen_dtype: dtype of frozen weights: 'auto', 'float32', 'bfloat16', 'int8'.
      activation_dtype: dtype of the computation, likewise.
      pack: several examples a row.
      partitioner: how to spread over devices; by default a whole model on each.
      num_microbatches: parts of a batch whose gradients are added up.
      num_eval_examples: evaluate on the first so many examples only.
      on_start: called with the folder before anything else is written to it.

    Returns:
      The content of ``results.json``.
    """
    from prompt_tuning import evaluate as evaluation
    from prompt_tuning.task_data import TaskData

    rules = methods.rules_of(method)
    weights_dtype = methods.weights_dtype(method, frozen_dtype)
    if train_steps < 1:
        raise UserError(f"TRAIN_STEPS={train_steps} must be 1 or more")
    partitioner = partitioner or Partitioner()
    partitioner.check_batch(batch_size, num_microbatches)
    check_eval_batch(eval_batch_size, partitioner)
    folder = writable_folder(model_dir, on_start)
    prompts = ()
    if prompt_length:
        prompts = (Prompt(mixture_or_task_name.replace("/", "_"), prompt_length),)
    task = TaskData(
        mixture_or_task_name,
        mixture_or_task_module,
        local_task,
        task_feature_lengths,
        prompts,
        config.vocab_size,
        placement,
    )
    batches = task.batches(train_split, batch_size, seed, pack=pack)
    fill = task.fill(train_split, batch_size, pack=pack)
    if eval_split is not None:
        task.check(eval_split)
    work = Workload(
        dataclasses.replace(config, dtype=base.resolve_dtype(activation_dtype)),
        batch_size,
        *(task_feature_lengths[name] for name in ("inputs", "targets")),
        optimizer,
        method,
        prompt_length,
        weights_dtype
        if weights_dtype == quantization.INT8
        else base.resolve_dtype(weights_dtype),
        partitioner.mesh.shape[sharding.MODEL],
        partitioner.parameter_partitioning_dims,
        num_microbatches,
    )
    checks.check_room(work, topologies.parse(topologies.LOCAL))
    source = base.load(
        config,
        initial_checkpoint_path,
        frozen_dtype=weights_dtype,
        activation_dtype=activation_dtype,
        partitioner=partitioner,
    )
    model = Model(
        Transformer(source.config, prompts),
        z_loss,
        label_smoothing,
        loss_normalizing_factor,
    )
    prompt_key, dropout_key = jax.random.split(jax.random.key(seed))
    params = source.params
    if prompts:
        make = prompt_init or sampled_vocab_init()
        start = start_prompt(source, make, task.vocabulary, prompt_length, prompt_key)
        params = trees.merge(params, {"prompts": {prompts[0].name: start}})

    evaluate_step = None
    if eval_split is not None:
        evaluator = evaluation.Evaluator(
            mixture_or_task_name,
            eval_split,
            task_feature_lengths,
            task.converter,
            evaluation.Answerer(
                model,
                task.vocabulary,
                labels=task.labels,
                max_decode_len=task_feature_lengths["targets"],
                mesh=source.mesh,
            ),
            batch_size=eval_batch_size,
            num_examples=num_eval_examples,
        )
        evaluate_step = lambda tuned, frozen: (
            evaluator(trees.merge(tuned, frozen)).metrics
        )
    result = training.fit(
        model,
        params,
        rules,
        optimizer,
        batches,
        training.Schedule(
            train_steps, eval_period, checkpoint_period, log_period, patience, metric
        ),
        key=dropout_key,
        model_dir=folder,
        evaluate=evaluate_step,
        num_microbatches=num_microbatches,
        partitioner=source.partitioner,
    )
    results = {
        "task": mixture_or_task_name,
        "method": method,
        "base_model": source.identity,
        "best_step": result.step,
        "last_step": result.last_step,
        "loss": result.loss,
        "pace": result.pace,
        "validation": result.metrics,
        "tokens_share": {"encoder": fill.encoder, "decoder": fill.decoder},
        "seed": seed,
        "versions": versions(),
    }
    if prompts:
        card = {
            "method": method,
            "length": prompt_length,
            "width": config.emb_dim,
            "placement": placement,
            "template": None if local_task is None else local_task.template,
            "task": mixture_or_task_name,
            "labels": task.labels,
            "vocabulary": task.vocabulary_name,
            "vocabulary_fingerprint": task.vocabulary_fingerprint,
            "task_feature_lengths": dict(task_feature_lengths),
            "base_model": source.identity,
            "recipe": {"steps": result.step, "batch_size": batch_size, "seed": seed},
            "metric": result.metrics,
            "versions": results["versions"],
        }
        tuned = np.asarray(result.tuned["prompts"][prompts[0].name])
        processes.in_first(
            lambda: prompt_file.save_prompt(folder / PROMPT_FILE, tuned, card)
        )
        report.say(f"wrote {folder / PROMPT_FILE}")
    else:
        processes.in_first(
            lambda: model_file.save_model(folder / TUNED_MODEL, result.tuned, results)
        )
        report.say(f"wrote {folder / TUNED_MODEL}")
    processes.in_first(lambda: write_json(folder / RESULTS_FILE, results))
    return results


def start_prompt(
    source: BaseModel, make: PromptInit, vocabulary: Any, length: int, key: jax.Array
) -> jax.Array:  # [P, H]
    """The prompt at step 0, float32.

    Raises:
      UserError: the initialisation does not fit the prompt or the vocabulary.
    """
    table = processes.whole(source.table)
    init = make(table, vocabulary.encode, vocabulary.unk_id)
    return init(key, (length, source.config.emb_dim), np.float32)
