# SPDX-License-Identifier: Apache-2.0
"""``pretrain``: makes a base model from arrays of token ids."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import optax

from prompt_tuning import files, report
from prompt_tuning.checkpoints import base_models, model_file
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.runs import identity
from prompt_tuning.runs.member_specs import MODEL, MODEL_FOLDER
from prompt_tuning.training import loop, pretraining
from prompt_tuning.training.members import Member
from prompt_tuning.training.schedule import Schedule


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
    eval_period: int | None = None,
    checkpoint_period: int | None = None,
    initial_checkpoint_path: str | None = None,
    seed: int = 0,
    activation_dtype: str = "auto",
    allow_changes: bool = False,
    on_start: files.OnStart | None = None,
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
    model = Model(Transformer(config), loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")

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
        params = base_models.load(
            config, initial_checkpoint_path, frozen_dtype="float32"
        ).params
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
        evaluate=pretraining.held_out_metrics(model, held_out),
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
    model_file.save_model(
        folder / MODEL_FOLDER, result.tuned, results, dtype="bfloat16"
    )
    files.write_json(folder / report.RESULTS_FILE, results)
    report.say(f"wrote {folder / MODEL_FOLDER}")
    return results
