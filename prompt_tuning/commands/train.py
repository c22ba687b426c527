# SPDX-License-Identifier: Apache-2.0
"""``train``: tunes a prompt, several prompts, or the whole model, on tasks."""

import pathlib
from typing import Any

from prompt_tuning import files
from prompt_tuning.runs import identity, rate_trial, tune
from prompt_tuning.runs.settings import Settings
from prompt_tuning.types import PathText


def train(
    *,
    model_dir: PathText,
    settings: Settings,
    allow_changes: bool = False,
    on_start: files.OnStart | None = None,
) -> dict[str, Any]:
    """Tunes a prompt, several prompts, or the whole model.

    Writes into ``model_dir``: ``prompt.safetensors`` (or ``prompts/``, or ``model/``),
    ``metrics.jsonl``, TensorBoard events, ``learning_curve.png``, ``results.json`` and
    checkpoints, from which the same command resumes.

    Args:
      model_dir: folder of the run.
      settings: the run.
      allow_changes: resume a run although it differs from this one, and say so in
        ``results.json`` and the cards.
      on_start: called with the folder before anything else is written to it.

    Returns:
      The content of ``results.json``.
    """
    base = tasks = None
    if settings.rates:
        trial = rate_trial.run(
            settings,
            pathlib.Path(model_dir),
            allow_changes=allow_changes,
            on_start=on_start,
        )
        settings, base, tasks = trial.settled(settings), trial.base, trial.tasks
    loaded = tune.load(tune.plan(settings), base, tasks)
    folder = identity.open_folder(
        model_dir, loaded.identity, allow_changes=allow_changes, on_start=on_start
    )
    return tune.write(loaded, tune.run(loaded, folder), folder)
