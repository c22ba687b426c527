# SPDX-License-Identifier: Apache-2.0
"""``loop``: tunes a prompt, several prompts, or the whole model, on tasks.

Modules that load TensorFlow are imported inside the function, so that the commands that
do without it start at once; the same holds for the commands beside this one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from prompt_tuning import processes, report, trees
from prompt_tuning.checkpoints import base_models, model_file
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.devices import sharding, topologies
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.network import quantization
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.planning import checks
from prompt_tuning.planning.workload import Workload
from prompt_tuning.runs import outcomes, prompt_specs
from prompt_tuning.runs.common import (
    PROMPT_FILE,
    RESULTS_FILE,
    TUNED_MODEL,
    OnStart,
    check_eval_batch,
    versions,
    writable_folder,
    write_json,
)
from prompt_tuning.training import loop, members
from prompt_tuning.training.prompt_starts import PromptInit


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
    prompt_init: PromptInit | str | None = None,
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
    prompts: Sequence[Mapping[str, Any]] | None = None,
    optimizer_at: Callable[[float], optax.GradientTransformation] | None = None,
    on_start: OnStart | None = None,
) -> dict[str, Any]:
    """Tunes a prompt, several prompts, or the whole model.

    Writes into ``model_dir``: ``prompt.safetensors`` (or ``prompts/``, or ``model/``),
    ``metrics.jsonl``, TensorBoard events, ``learning_curve.png``, ``results.json`` and
    checkpoints, from which the same command resumes.

    Args:
      config: sizes of the model.
      model_dir: folder of the run.
      initial_checkpoint_path: the base model (see `formats.open_model`), or
        ``embedded:NAME``.
      mixture_or_task_name: a registered seqio task or mixture.
      task_feature_lengths: text tokens of ``inputs`` and ``targets``.
      method: a key of `registry.RULES`.
      optimizer: moves the tuned leaves.
      train_steps: steps in all, over all resumptions.
      batch_size: rows of a batch over all hosts.
      mixture_or_task_module: imported to register the task.
      local_task: files to register as the task, if it is not a module's.
      train_split: split to tune on.
      eval_split: split that chooses the best step; None keeps the last.
      prompt_length: positions of the prompt; 0 for methods without one.
      prompt_init: how it starts (see `prompt_starts.named` for texts); sampled
        vocabulary by default.
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
      prompts: several prompts to tune side by side: for each, the values in which it
        differs from this run's own (see `prompt_lists` and `prompt_specs.OWN_VALUES`).
      optimizer_at: makes the optimizer at another learning rate, for ``prompts`` that
        give one.
      on_start: called with the folder before anything else is written to it.

    Returns:
      The content of ``results.json``.
    """
    rules = registry.rules_of(method)
    weights_dtype = registry.weights_dtype(method, frozen_dtype)
    if train_steps < 1:
        raise UserError(f"TRAIN_STEPS={train_steps} must be 1 or more")
    if prompts is not None and not prompt_length:
        raise UserError(
            f"PROMPTS lists prompts, but {method} tunes none: leave PROMPTS out or use "
            "a method file of prompt tuning"
        )
    specs = prompt_specs.specs(
        prompt_specs.PromptSpec(
            mixture_or_task_name=mixture_or_task_name,
            mixture_or_task_module=mixture_or_task_module,
            local_task=local_task,
            task_feature_lengths=task_feature_lengths,
            train_split=train_split,
            eval_split=eval_split,
            batch_size=batch_size,
            prompt_length=prompt_length,
            prompt_init=prompt_init,
            placement=placement,
            seed=seed,
        ),
        prompts,
    )
    partitioner = partitioner or Partitioner()
    if prompts is None:
        partitioner.check_batch(batch_size, num_microbatches)
    check_eval_batch(eval_batch_size, partitioner)
    folder = writable_folder(model_dir, on_start)
    tasks = prompt_specs.Tasks(config.vocab_size)
    batches = {}
    for spec in specs:
        task = tasks.of(spec)
        batches[spec.name] = task.batches(
            spec.train_split, spec.batch_size, spec.seed, pack=pack
        )
        if spec.eval_split is not None:
            task.check(spec.eval_split)
    fill = None
    if prompts is None:
        fill = tasks.of(specs[0]).fill(train_split, batch_size, pack=pack)
    longest = {
        name: max(spec.task_feature_lengths[name] for spec in specs)
        for name in task_feature_lengths
    }
    work = Workload(
        dataclasses.replace(config, dtype=base_models.resolve_dtype(activation_dtype)),
        sum(spec.batch_size for spec in specs),
        longest["inputs"],
        longest["targets"],
        optimizer,
        method,
        max(spec.prompt_length for spec in specs),
        weights_dtype
        if weights_dtype == quantization.INT8
        else base_models.resolve_dtype(weights_dtype),
        partitioner.mesh.shape[sharding.MODEL],
        partitioner.parameter_partitioning_dims,
        num_microbatches,
    )
    checks.check_room(work, topologies.parse(topologies.LOCAL))
    source = base_models.load(
        config,
        initial_checkpoint_path,
        frozen_dtype=weights_dtype,
        activation_dtype=activation_dtype,
        partitioner=partitioner,
    )
    if prompts is None:
        bank = tasks.of(specs[0]).prompts
    else:
        bank = tuple(Prompt(spec.name, spec.prompt_length) for spec in specs)
    model = Model(
        Transformer(source.config, bank),
        z_loss,
        label_smoothing,
        loss_normalizing_factor,
    )
    params = source.params
    if bank:
        starts = {
            prompt.name: prompt_specs.start(source, tasks.of(spec), spec)
            for prompt, spec in zip(bank, specs, strict=True)
        }
        params = trees.merge(params, {"prompts": starts})
    everyone = [
        members.Member(
            spec.name,
            prompt_specs.optimizer_of(spec, optimizer, optimizer_at),
            batches[spec.name],
            tasks.evaluate(
                spec, model, source.mesh, eval_batch_size, num_eval_examples
            ),
        )
        for spec in specs
    ]
    found = loop.fit_many(
        model,
        params,
        rules,
        everyone,
        loop.Schedule(
            train_steps, eval_period, checkpoint_period, log_period, patience, metric
        ),
        key=prompt_specs.keys(seed)[1],
        model_dir=folder,
        num_microbatches=num_microbatches,
        partitioner=source.partitioner,
    )
    facts = {
        "method": method,
        "base_model": source.identity,
        "seed": seed,
        "versions": versions(),
    }
    if prompts is None:
        (spec,), (result,) = specs, found.values()
        results = {
            "task": mixture_or_task_name,
            **facts,
            "best_step": result.step,
            "last_step": result.last_step,
            "loss": result.loss,
            "pace": result.pace,
            "validation": result.metrics,
            "tokens_share": {"encoder": fill.encoder, "decoder": fill.decoder},
        }
        if bank:
            written = folder / PROMPT_FILE
            outcomes.save(written, spec, tasks.of(spec), result, facts)
        else:
            written = folder / TUNED_MODEL
            processes.in_first(
                lambda: model_file.save_model(written, result.tuned, results)
            )
    else:
        written = folder / outcomes.PROMPTS_FOLDER
        for spec in specs:
            if spec.name in found:
                path = written / f"{spec.name}.safetensors"
                outcomes.save(path, spec, tasks.of(spec), found[spec.name], facts)
        rows = outcomes.ranked(
            [outcomes.row(spec, found.get(spec.name), metric) for spec in specs]
        )
        pace = next(iter(found.values())).pace
        results = {**facts, "pace": pace, "best": outcomes.best(rows), "prompts": rows}
        outcomes.print_table(rows)
    report.say(f"wrote {written}")
    processes.in_first(lambda: write_json(folder / RESULTS_FILE, results))
    return results
