# SPDX-License-Identifier: Apache-2.0
"""What the commands do, as functions of plain arguments: the recipes of a run.

Each puts the pieces of the lower layers together: task, base model, prompt, optimizer.
Modules that load TensorFlow are imported inside the functions that need them, so that
`pretrain`, `inspect` and ``--help`` do without.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
import optax

from prompt_tuning import base, methods, pretraining, report, train as training, trees
from prompt_tuning.base import BaseModel
from prompt_tuning.checkpoints import model_file, prompt_file
from prompt_tuning.errors import UserError
from prompt_tuning.model import Model
from prompt_tuning.network import T5Config, Transformer
from prompt_tuning.prompt_inits import PromptInit, sampled_vocab_init
from prompt_tuning.prompts import Prompt
from prompt_tuning.types import Params

PROMPT_FILE = "prompt.safetensors"
TUNED_MODEL = "model"
RESULTS_FILE = "results.json"


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
    num_partitions: int = 1,
    num_microbatches: int = 1,
    num_eval_examples: int | None = None,
) -> dict[str, Any]:
    """Tunes a prompt, or the whole model, on a task.

    Writes into ``model_dir``: ``prompt.safetensors`` (or ``model/``),
    ``metrics.jsonl``, TensorBoard events, ``learning_curve.png``, ``results.json`` and
    checkpoints, from which the same command resumes.

    Args:
      config: sizes of the model.
      model_dir: folder of the run.
      initial_checkpoint_path: folder of the base model, or ``embedded:NAME``.
      mixture_or_task_name: a registered seqio task or mixture.
      task_feature_lengths: text tokens of ``inputs`` and ``targets``.
      method: a key of `methods.RULES`.
      optimizer: moves the tuned leaves.
      train_steps: steps in all, over all resumptions.
      batch_size: rows of a batch over all hosts.
      mixture_or_task_module: imported to register the task.
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
      frozen_dtype: dtype of frozen weights: 'auto', 'float32', 'bfloat16'.
      activation_dtype: dtype of the computation, likewise.
      pack: several examples a row.
      num_partitions: devices that share one copy of the model.
      num_microbatches: parts of a batch whose gradients are added up.
      num_eval_examples: evaluate on the first so many examples only.

    Returns:
      The content of ``results.json``.
    """
    from prompt_tuning import evaluate as evaluation
    from prompt_tuning.task_data import TaskData

    if method not in methods.RULES:
        raise UserError(
            f"no method is called {method!r}; choose {', '.join(methods.RULES)}"
        )
    folder = writable_folder(model_dir)
    prompts = ()
    if prompt_length:
        prompts = (Prompt(mixture_or_task_name.replace("/", "_"), prompt_length),)
    task = TaskData(
        mixture_or_task_name,
        mixture_or_task_module,
        task_feature_lengths,
        prompts,
        config.vocab_size,
        placement,
    )
    batches = task.batches(train_split, batch_size, seed, pack=pack)
    if eval_split is not None:
        task.check(eval_split)
    source = base.load(
        config,
        initial_checkpoint_path,
        frozen_dtype="float32" if method == "model_tuning" else frozen_dtype,
        activation_dtype=activation_dtype,
        num_partitions=num_partitions,
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
            evaluation.Answerer(model, task.vocabulary, labels=task.labels),
            batch_size=eval_batch_size,
            num_examples=num_eval_examples,
        )
        evaluate_step = lambda tuned, frozen: (
            evaluator(trees.merge(tuned, frozen)).metrics
        )
    result = training.fit(
        model,
        params,
        methods.RULES[method],
        optimizer,
        batches,
        training.Schedule(
            train_steps, eval_period, checkpoint_period, log_period, patience, metric
        ),
        key=dropout_key,
        model_dir=folder,
        evaluate=evaluate_step,
        num_microbatches=num_microbatches,
        mesh=source.mesh,
    )
    results = {
        "task": mixture_or_task_name,
        "method": method,
        "base_model": source.identity,
        "best_step": result.step,
        "last_step": result.last_step,
        "loss": result.loss,
        "validation": result.metrics,
        "seed": seed,
        "versions": versions(),
    }
    if prompts:
        card = {
            "method": method,
            "length": prompt_length,
            "width": config.emb_dim,
            "placement": placement,
            "task": mixture_or_task_name,
            "labels": task.labels,
            "vocabulary": task.vocabulary_name,
            "task_feature_lengths": dict(task_feature_lengths),
            "base_model": source.identity,
            "recipe": {"steps": result.step, "batch_size": batch_size, "seed": seed},
            "metric": result.metrics,
            "versions": results["versions"],
        }
        tuned = np.asarray(result.tuned["prompts"][prompts[0].name])
        prompt_file.save_prompt(folder / PROMPT_FILE, tuned, card)
        report.say(f"wrote {folder / PROMPT_FILE}")
    else:
        model_file.save_model(folder / TUNED_MODEL, result.tuned, results)
        report.say(f"wrote {folder / TUNED_MODEL}")
    write_json(folder / RESULTS_FILE, results)
    return results


def start_prompt(
    source: BaseModel, make: PromptInit, vocabulary: Any, length: int, key: jax.Array
) -> jax.Array:  # [P, H]
    """The prompt at step 0, float32.

    Raises:
      UserError: the initialisation does not fit the prompt or the vocabulary.
    """
    try:
        init = make(source.table, vocabulary.encode, vocabulary.unk_id)
        return init(key, (length, source.config.emb_dim), np.float32)
    except ValueError as error:
        raise UserError(str(error)) from error


def evaluate(
    *,
    config: T5Config,
    initial_checkpoint_path: str,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    prompt_file: str | None = None,
    mixture_or_task_module: str | None = None,
    split: str = "test",
    batch_size: int = 64,
    output_dir: str | None = None,
    frozen_dtype: str = "auto",
    activation_dtype: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """Evaluates a prompt, or a model without one, on a split of a task.

    Args:
      config: sizes of the model.
      initial_checkpoint_path: folder of the model, or ``embedded:NAME``.
      mixture_or_task_name: a registered seqio task or mixture.
      task_feature_lengths: text tokens of ``inputs`` and ``targets``.
      prompt_file: the prompt, or None for the model alone.
      mixture_or_task_module: imported to register the task.
      split: split to evaluate on.
      batch_size: rows of a batch.
      output_dir: where ``results.json`` and ``predictions.jsonl`` go; None prints only.
      frozen_dtype: dtype of the weights.
      activation_dtype: dtype of the computation.
      force: take a prompt that was tuned on another model.

    Returns:
      The metrics and what they were measured on.
    """
    from prompt_tuning import evaluate as evaluation
    from prompt_tuning.task_data import TaskData

    folder = None if output_dir is None else writable_folder(output_dir)
    source = base.load(
        config,
        initial_checkpoint_path,
        frozen_dtype=frozen_dtype,
        activation_dtype=activation_dtype,
    )
    prompts, params, card = attach(source, prompt_file, force)
    task = TaskData(
        mixture_or_task_name,
        mixture_or_task_module,
        task_feature_lengths,
        prompts,
        config.vocab_size,
        card.get("placement", "prepend"),
    )
    task.check(split)
    model = Model(Transformer(source.config, prompts))
    outcome = evaluation.Evaluator(
        mixture_or_task_name,
        split,
        task_feature_lengths,
        task.converter,
        evaluation.Answerer(model, task.vocabulary, labels=task.labels),
        batch_size=batch_size,
    )(params)
    results = {
        "task": mixture_or_task_name,
        "split": split,
        "examples": len(outcome.answers),
        "prompt": prompt_file,
        "base_model": source.identity,
        "metrics": dict(outcome.metrics),
        "versions": versions(),
    }
    if folder is not None:
        write_json(folder / RESULTS_FILE, results)
        lines = [
            json.dumps({"answer": answer, "target": target})
            for answer, target in zip(outcome.answers, outcome.targets)
        ]
        write_text(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    return results


def attach(
    source: BaseModel, path: str | None, force: bool = False
) -> tuple[tuple[Prompt, ...], Params, Mapping[str, Any]]:
    """Loads a prompt beside a base model.

    Returns:
      The network's prompts, all parameters and the prompt's card.

    Raises:
      UserError: the prompt was tuned on another model (unless ``force``), or has
        another width.
    """
    if path is None:
        return (), source.params, {}
    array, card = prompt_file.load_prompt(path)
    prompt_file.check_compatible(
        card, source.fingerprint, source.config.emb_dim, force=force
    )
    prompt = Prompt(str(card.get("task") or "prompt").replace("/", "_"), len(array))
    params = trees.merge(source.params, {"prompts": {prompt.name: array}})
    return (prompt,), params, card


def infer(
    *,
    config: T5Config,
    initial_checkpoint_path: str,
    prompt_file: str,
    texts: Sequence[str] = (),
    input_file: str | None = None,
    output_file: str | None = None,
    batch_size: int = 32,
    max_decode_length: int = 32,
    frozen_dtype: str = "auto",
    activation_dtype: str = "auto",
    force: bool = False,
) -> list[dict[str, Any]]:
    """Answers texts with a tuned prompt.

    Args:
      config: sizes of the model.
      initial_checkpoint_path: folder of the base model, or ``embedded:NAME``.
      prompt_file: the prompt; its card says which labels and vocabulary it has.
      texts: texts to answer.
      input_file: more of them, one a line.
      output_file: JSONL of the answers; None prints them.
      batch_size: rows of a batch.
      max_decode_length: longest answer where the prompt has no label set.
      frozen_dtype: dtype of the weights.
      activation_dtype: dtype of the computation.
      force: take a prompt that was tuned on another model.

    Returns:
      For each text ``input``, ``answer`` and, with a label set, ``scores``: the
      probability of each label among them.
    """
    texts = [*texts, *(read_lines(input_file) if input_file else ())]
    if not texts:
        raise UserError("no text to answer: give texts or --gin.INPUT_FILE=FILE")
    if empty := [i + 1 for i, text in enumerate(texts) if not text.strip()]:
        raise UserError(f"text {empty[0]} is empty; leave it out")
    from prompt_tuning import infer as inference

    source = base.load(
        config,
        initial_checkpoint_path,
        frozen_dtype=frozen_dtype,
        activation_dtype=activation_dtype,
    )
    prompts, params, card = attach(source, prompt_file, force)
    rows = inference.answer_texts(
        Model(Transformer(source.config, prompts)),
        params,
        texts,
        card,
        batch_size=batch_size,
        max_decode_len=max_decode_length,
    )
    if output_file is not None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(pathlib.Path(output_file), text)
    return rows


def pretrain(
    *,
    config: T5Config,
    model_dir: str,
    arrays_dir: str,
    task_weights: Mapping[str, float],
    optimizer: optax.GradientTransformation,
    train_steps: int,
    batch_size: int,
    inputs_length: int = 128,
    targets_length: int = 32,
    span_corruption: float = 0.2,
    prefix_lm: float = 0.15,
    eval_period: int = 500,
    checkpoint_period: int = 500,
    initial_checkpoint_path: str | None = None,
    seed: int = 0,
    activation_dtype: str = "auto",
) -> dict[str, Any]:
    """Pre-trains a model from arrays of token ids, without TensorFlow.

    Args:
      config: sizes of the model.
      model_dir: folder of the run; the model is written to ``model/`` in it.
      arrays_dir: folder with ``text.npy``, ``labelled.npz`` and their
        ``*_validation`` counterparts (see `pretraining`).
      task_weights: how often each labelled task is drawn.
      optimizer: moves all parameters.
      train_steps: steps in all, over all resumptions.
      batch_size: rows of a batch.
      inputs_length: encoder tokens of a row.
      targets_length: decoder tokens of a row.
      span_corruption: share of the rows.
      prefix_lm: share of the rows; what is left is labelled.
      eval_period: steps between evaluations.
      checkpoint_period: steps between checkpoints.
      initial_checkpoint_path: a model to go on from; None starts from random weights.
      seed: of weights and data.
      activation_dtype: dtype of the computation.

    Returns:
      The content of ``results.json``.
    """
    folder = writable_folder(model_dir)
    config = dataclasses.replace(config, dtype=base.resolve_dtype(activation_dtype))
    model = Model(
        Transformer(config), loss_normalizing_factor="NUM_REAL_TARGET_TOKENS"
    )

    def mixture(suffix: str, seed: int) -> pretraining.Mixture:
        return pretraining.load(
            arrays_dir,
            suffix,
            vocab_size=config.vocab_size,
            batch_size=batch_size,
            inputs_length=inputs_length,
            targets_length=targets_length,
            span_corruption=span_corruption,
            prefix_lm=prefix_lm,
            task_weights=task_weights,
            seed=seed,
        )

    stream, held_out = mixture("", seed), mixture("_validation", seed + 1)
    if initial_checkpoint_path is None:
        params = model.init(jax.random.key(seed))
    else:
        params = base.load(
            config, initial_checkpoint_path, frozen_dtype="float32"
        ).params
    result = training.fit(
        model,
        params,
        methods.RULES["model_tuning"],
        optimizer,
        stream.batches,
        training.Schedule(train_steps, eval_period, checkpoint_period),
        key=jax.random.key(seed + 1),
        model_dir=folder,
        evaluate=pretraining.held_out_metrics(model, held_out),
    )
    results = {
        "steps": result.last_step,
        "best_step": result.step,
        "tokens": result.last_step * batch_size * (inputs_length + targets_length),
        "validation": result.metrics,
        "versions": versions(),
    }
    model_file.save_model(
        folder / TUNED_MODEL, result.tuned, results, dtype="bfloat16"
    )
    write_json(folder / RESULTS_FILE, results)
    report.say(f"wrote {folder / TUNED_MODEL}")
    return results


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    names = ("prompt-tuning", "jax", "flax", "optax")
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def writable_folder(path: str) -> pathlib.Path:
    """Makes a folder and tries to write into it.

    Raises:
      UserError: it cannot be written.
    """
    folder = pathlib.Path(path)
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}); choose another folder"
        ) from error
    return folder


def read_lines(path: str) -> list[str]:
    """The lines of a UTF-8 file, empty ones left out.

    Raises:
      UserError: the file is missing or not UTF-8.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    return [line for line in text.splitlines() if line.strip()]


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON under a temporary name, then renames it."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes text under a temporary name, then renames it.

    Raises:
      UserError: the folder cannot be written or the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


