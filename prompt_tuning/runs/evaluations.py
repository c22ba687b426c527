# SPDX-License-Identifier: Apache-2.0
"""Prompts of files, or a model alone, on a split of a task."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning import decoding, report, trees
from prompt_tuning.checkpoints import prompt_file, prompt_formats
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.checkpoints.prompt_formats import Saved
from prompt_tuning.data.label_sets import LabelSet, label_tokens
from prompt_tuning.devices import sharding
from prompt_tuning.errors import UserError
from prompt_tuning.inference import prompt_evaluation
from prompt_tuning.inference.prompt_evaluation import Table
from prompt_tuning.inference.store import PromptStore, names_of
from prompt_tuning.methods.method import assemble
from prompt_tuning.network.adapters import COLLECTION
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import Transformer
from prompt_tuning.runs.task_data import TaskData
from prompt_tuning.tasks import features

# What a model without a prompt is called among prompts.
ALONE = "model"


def read(paths: Sequence[str], base: BaseModel, force: bool) -> dict[str, Saved]:
    """The prompts of files by name; one without positions where there are no files.

    Raises:
      UserError: a file is none of a prompt, or one that was tuned on another model, or
        two have one name.
    """
    width = base.config.emb_dim
    if not paths:
        return {ALONE: Saved(np.zeros((0, width), np.float32), {})}
    found: dict[str, Saved] = {}
    for path, name in zip(paths, names_of(paths), strict=True):
        saved = prompt_formats.load_with_slots(path)
        for note in saved.card.get("notes", ()):
            report.say(note)
        prompt_file.check_compatible(saved.card, base.fingerprint, width, force=force)
        if saved.card.get("verbalizers"):
            raise UserError(
                f"{path} is a prompt in words, with a template and answers of its own, "
                "and eval takes those of the task: answer rows with it by infer"
            )
        found[name] = saved
    return found


def evaluate(
    base: BaseModel,
    prompts: Mapping[str, Saved],
    tasks: Mapping[str, TaskData],
    split: str,
    *,
    strategy: Callable[..., decoding.Strategy] | None,
    seed: int,
    batch_size: int,
    max_decode_len: int,
) -> Table:
    """Evaluates prompts, each on its view of one and the same task.

    Args:
      base: the model.
      prompts: what `read` gave.
      tasks: of each prompt, the task with the prompt's virtual tokens.
      split: which of its splits.
      strategy: see `commands.evaluate`.
      seed: for strategies that draw.
      batch_size: rows of a batch.
      max_decode_len: tokens of a decoded answer.

    Raises:
      UserError: the task has no metric, or several prompts are to search among labels.
    """
    task = next(iter(tasks.values()))
    vocabulary = features.plain(task.vocabulary)
    if vocabulary is None or (task.labels is not None and strategy is not None):
        if len(prompts) > 1:
            raise UserError(
                "several prompts cannot search among labels: leave out the file of "
                "decoding/, and labels are ranked"
            )
        ((name, prompt),) = prompts.items()
        evaluator = task.evaluator(
            split,
            Model(Transformer(base.config)),
            base.mesh,
            batch_size,
            strategy=strategy,
            seed=seed,
        )
        return Table({name: evaluator(_params(base, task, prompt))}, {})
    store = PromptStore(
        base, max(1, sum(len(prompt.array) for prompt in prompts.values())), force=True
    )
    for name, prompt in prompts.items():
        store.add(name, prompt.array, prompt.card, vocabulary, prompt.slots)
    labels = None
    if task.labels:
        labels = LabelSet(tuple(task.labels), label_tokens(task.labels, vocabulary))
    make = strategy or decoding.Greedy
    return prompt_evaluation.evaluate(
        base,
        store,
        {name: tasks[name].split(split) for name in prompts},
        vocabulary,
        labels=labels,
        strategy=make(max_decode_len=max_decode_len, eos_id=vocabulary.eos_id),
        seed=seed,
        batch_size=batch_size,
    )


def _params(base: BaseModel, task: TaskData, saved: Saved) -> Any:
    """All parameters, what is saved among them."""
    part: dict[str, Any] = {COLLECTION: saved.slots}
    if task.prompts:
        part["prompts"] = {task.prompts[0].name: saved.array}
    own = assemble({ALONE: part}, [ALONE], task.prompts)
    if base.mesh is not None:
        own = sharding.replicate(own, base.mesh)
    return trees.merge(base.params, own)
