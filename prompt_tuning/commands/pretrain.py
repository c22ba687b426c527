# SPDX-License-Identifier: Apache-2.0
"""``pretrain``: makes a base model from arrays of token ids."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import optax

from prompt_tuning import files, report, trees
from prompt_tuning.checkpoints import base_models, model_file
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.runs import identity
from prompt_tuning.runs.member_specs import MODEL, MODEL_FOLDER
from prompt_tuning.training import distillation, loop, pretraining, probing
from prompt_tuning.training.members import Evaluate, Member
from prompt_tuning.training.schedule import Schedule
from prompt_tuning.types import (
    ActivationDtype,
    BatchSize,
    NonNegativeFloat,
    NonNegativeInt,
    Params,
    PathText,
    PositiveInt,
    Seed,
    Share,
    TokenLength,
)


def pretrain(
    *,
    config: T5Config,
    model_dir: PathText,
    arrays_dir: PathText,
    task_weights: Mapping[str, NonNegativeFloat],
    optimizer: optax.GradientTransformation,
    train_steps: PositiveInt,
    batch_size: BatchSize,
    inputs_length: TokenLength = 128,
    targets_length: TokenLength = 32,
    span_corruption: Share = 0.2,
    prefix_lm: Share = 0.15,
    distilled: Share = 0.0,
    distillation_weight: NonNegativeFloat = 1.0,
    start_table: bool = False,
    eval_period: NonNegativeInt | None = None,
    checkpoint_period: NonNegativeInt | None = None,
    initial_checkpoint_path: str | None = None,
    seed: Seed = 0,
    activation_dtype: ActivationDtype = "auto",
    allow_changes: bool = False,
    on_start: files.OnStart | None = None,
) -> dict[str, Any]:
    """Pre-trains a model from arrays of token ids, without TensorFlow.

    Args:
      config: sizes of the model.
      model_dir: folder of the run; the model, with the vocabulary of the arrays, is
        written to ``model/`` in it.
      arrays_dir: folder with ``text.npy``, ``labelled.npz`` and their
        ``*_validation`` counterparts (see `pretraining`). Tasks in its folder
        ``probe`` are part of every evaluation (see `probing`).
      task_weights: how often each labelled task is drawn.
      optimizer: moves all parameters.
      train_steps: steps in all, over all resumptions.
      batch_size: rows of a batch.
      inputs_length: encoder tokens of a row.
      targets_length: decoder tokens of a row.
      span_corruption: share of the rows.
      prefix_lm: share of the rows.
      distilled: share of the rows, of sentences with the vectors of
        ``sentences.npz`` (see `distillation`); what is left is labelled.
      distillation_weight: see `DistilledModel`.
      start_table: start the embedding table from the word vectors of ``table.npy``,
        reduced to the model's width, and the output layer, too, if it is its own.
      eval_period: see `Schedule`.
      checkpoint_period: see `Schedule`.
      initial_checkpoint_path: a model to go on from; None starts from random weights.
      seed: of weights and data.
      activation_dtype: dtype of the computation.
      allow_changes: resume a run although it differs from this one, and say so in
        ``results.json``.
      on_start: called with the folder before anything else is written to it.

    Returns:
      The content of ``results.json``.
    """
    config = dataclasses.replace(
        config, dtype=base_models.resolve_dtype(activation_dtype)
    )
    model = distillation.DistilledModel(
        Transformer(config),
        loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
        distillation_weight=distillation_weight,
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
            distilled=distilled,
            task_weights=task_weights,
            seed=seed,
        )

    stream, held_out = mixture("", seed), mixture("_validation", seed + 1)
    if initial_checkpoint_path is None:
        params = model.init(jax.random.key(seed))
        if start_table:
            table = pathlib.Path(arrays_dir) / "table.npy"
            params = distillation.start_from(table, params)
    else:
        params = base_models.load(
            config, initial_checkpoint_path, frozen_dtype="float32"
        ).params
    if stream.sentences is not None:
        width = stream.sentences.vectors.shape[1]
        key = jax.random.key(seed + 2)
        params = trees.merge(params, distillation.init_map(key, config.emb_dim, width))
    folder = identity.open_folder(
        model_dir,
        {
            "config": dataclasses.asdict(config),
            "arrays": {
                path.name: path.stat().st_size
                for path in sorted(pathlib.Path(arrays_dir).glob("*.np[yz]"))
            },
            "task_weights": dict(task_weights),
            "batch_size": batch_size,
            "inputs_length": inputs_length,
            "targets_length": targets_length,
            "span_corruption": span_corruption,
            "prefix_lm": prefix_lm,
            "distilled": distilled,
            "distillation_weight": distillation_weight,
            "start_table": start_table,
            "initial_checkpoint_path": initial_checkpoint_path,
            "seed": seed,
            identity.STEPS: train_steps,
            **identity.describe_optimizer(optimizer),
        },
        allow_changes=allow_changes,
        on_start=on_start,
    )
    member = Member(
        name=MODEL,
        tuned=params,
        tx=optimizer,
        batches=stream.batches,
        evaluate=_evaluation(model, held_out, pathlib.Path(arrays_dir)),
    )
    result = loop.fit(
        model,
        {},
        [member],
        Schedule(train_steps, eval_period, checkpoint_period, keep_last=True),
        key=jax.random.key(seed + 1),
        model_dir=folder,
    )[MODEL]
    results = {
        "steps": result.last_step,
        "best_step": result.step,
        "tokens": result.last_step * batch_size * (inputs_length + targets_length),
        "validation": result.metrics,
        "versions": report.versions(),
    }
    if changes := identity.changes(folder):
        results["changes"] = changes
    network = {k: v for k, v in result.tuned.items() if k != distillation.MAP}
    vocabulary = pathlib.Path(arrays_dir) / model_file.VOCABULARY
    model_file.save_model(
        folder / MODEL_FOLDER,
        network,
        results,
        dtype="bfloat16",
        vocabulary=vocabulary if vocabulary.exists() else None,
    )
    files.write_json(folder / report.RESULTS_FILE, results)
    report.say(f"wrote {folder / MODEL_FOLDER}")
    return results


def _evaluation(
    model: Model, held_out: pretraining.Mixture, arrays: pathlib.Path
) -> Evaluate:
    """Held-out metrics, and those of the probed tasks that lie beside the arrays."""
    metrics = pretraining.held_out_metrics(model, held_out)
    if not (arrays / "probe").is_dir():
        return metrics
    tasks = probing.load(arrays / "probe", arrays / model_file.VOCABULARY)
    encoder = probing.Encoder(model)

    def evaluate(tuned: Params, frozen: Params) -> dict[str, float]:
        params = trees.merge(tuned, frozen)
        values = metrics(tuned, frozen)
        for task in tasks:
            for kind, accuracy in probing.probe(encoder, params, task).items():
                values[f"{task.name}_{kind}"] = accuracy
        return values

    return evaluate
