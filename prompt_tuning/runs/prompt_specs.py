# SPDX-License-Identifier: Apache-2.0
"""What ``loop`` knows of each prompt that it tunes.

A run has one prompt, or those that PROMPTS lists, each with values of its own. What
several of them share (a task's data, its evaluation) is made once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from prompt_tuning import processes, trees
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import Transformer
from prompt_tuning.training import prompt_lists, prompt_starts
from prompt_tuning.training.members import Evaluate
from prompt_tuning.training.prompt_starts import PromptInit

if TYPE_CHECKING:
    from prompt_tuning.inference.evaluation import Evaluator
    from prompt_tuning.runs.task_data import TaskData


@dataclasses.dataclass(frozen=True)
class PromptSpec:
    """The values of one prompt, named and meant as the arguments of ``loop``.

    Attributes:
      name: '' where the run tunes no other.
      own: the values that PROMPTS gives it.
      learning_rate: instead of the optimizer's.
    """

    mixture_or_task_name: str
    mixture_or_task_module: str | None
    local_task: LocalTask | None
    task_feature_lengths: Mapping[str, int]
    train_split: str
    eval_split: str | None
    batch_size: int
    prompt_length: int
    prompt_init: PromptInit | str | None
    placement: str
    seed: int
    learning_rate: float | None = None
    name: str = ""
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# What PROMPTS may set, and the kinds of values that it takes.
OWN_VALUES: dict[str, tuple[type, ...]] = {
    "mixture_or_task_name": (str,),
    "mixture_or_task_module": (str, type(None)),
    "task_feature_lengths": (Mapping,),
    "train_split": (str,),
    "eval_split": (str, type(None)),
    "batch_size": (int,),
    "prompt_length": (int,),
    "prompt_init": (str, type(None), type(lambda: None)),
    "placement": (str,),
    "seed": (int,),
    "learning_rate": (int, float),
}


def specs(
    default: PromptSpec, prompts: Sequence[Mapping[str, Any]] | None
) -> tuple[PromptSpec, ...]:
    """The prompts of a run: the one of its own values, or those that PROMPTS lists.

    Raises:
      UserError: see `prompt_lists.expand`; a value is of the wrong kind or out of range.
    """
    found = [default]
    if prompts is not None:
        found = []
        for variant in prompt_lists.expand(prompts, tuple(OWN_VALUES)):
            for key, value in variant.values.items():
                if not isinstance(value, OWN_VALUES[key]) or isinstance(value, bool):
                    raise UserError(f"PROMPTS: {key}={value!r} is no value for {key}")
            spec = dataclasses.replace(
                default, name=variant.name, own=variant.values, **variant.values
            )
            if spec.mixture_or_task_name != default.mixture_or_task_name:
                # The files that a configuration describes are its own task's.
                spec = dataclasses.replace(spec, local_task=None)
            found.append(spec)
    for spec in found:
        if spec.batch_size < 1:
            raise UserError(f"BATCH_SIZE={spec.batch_size} must be 1 or more")
        if spec.learning_rate is not None and not spec.learning_rate > 0:
            raise UserError(f"learning_rate={spec.learning_rate} must be above 0")
    return tuple(found)


class Tasks:
    """The tasks and evaluations of a run's prompts; what prompts share is made once."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._tasks: dict[Any, TaskData] = {}
        self._evaluators: dict[Any, Evaluator] = {}

    def of(self, spec: PromptSpec) -> "TaskData":
        """The data of a prompt, as if there were no other prompt.

        Raises:
          UserError: see `TaskData`; the prompts' tasks have several vocabularies.
        """
        from prompt_tuning.runs.task_data import TaskData

        key = self._key(spec)
        if key not in self._tasks:
            name, length = spec.mixture_or_task_name, spec.prompt_length
            prompts = (Prompt(name.replace("/", "_"), length),) if length else ()
            task = TaskData(
                name,
                spec.mixture_or_task_module,
                spec.local_task,
                spec.task_feature_lengths,
                prompts,
                self._vocab_size,
                spec.placement,
            )
            for other, known in self._tasks.items():
                if known.vocabulary_fingerprint != task.vocabulary_fingerprint:
                    raise UserError(
                        f"{name} has another vocabulary ({task.vocabulary_name}) than "
                        f"{other[0]} ({known.vocabulary_name}): the prompts of a run "
                        "share a model; choose the tasks' variants of its vocabulary"
                    )
            self._tasks[key] = task
        return self._tasks[key]

    def evaluate(
        self,
        spec: PromptSpec,
        model: Model,
        mesh: jax.sharding.Mesh | None,
        batch_size: int,
        num_examples: int | None,
    ) -> Evaluate | None:
        """The evaluation of a prompt; None where it has no split for it.

        Raises:
          UserError: see `Evaluator`.
        """
        from prompt_tuning.inference import evaluation

        if spec.eval_split is None:
            return None
        task = self.of(spec)
        key = (*self._key(spec), spec.eval_split)
        if key not in self._evaluators:
            # Each prompt is evaluated alone: those of one length share a program.
            network = Transformer(model.network.config, task.prompts)
            self._evaluators[key] = evaluation.Evaluator(
                spec.mixture_or_task_name,
                spec.eval_split,
                spec.task_feature_lengths,
                task.converter,
                evaluation.Answerer(
                    dataclasses.replace(model, network=network),
                    task.vocabulary,
                    labels=task.labels,
                    max_decode_len=spec.task_feature_lengths["targets"],
                    mesh=mesh,
                ),
                batch_size=batch_size,
                num_examples=num_examples,
            )
        evaluator = self._evaluators[key]

        def evaluate(tuned, frozen):
            if task.prompts:
                (prompt,) = tuned["prompts"].values()
                tuned = {**tuned, "prompts": {task.prompts[0].name: prompt}}
            return evaluator(trees.merge(tuned, frozen)).metrics

        return evaluate

    def _key(self, spec: PromptSpec) -> tuple:
        return (
            spec.mixture_or_task_name,
            spec.mixture_or_task_module,
            tuple(sorted(spec.task_feature_lengths.items())),
            spec.prompt_length,
            spec.placement,
        )


def start(source: BaseModel, task: "TaskData", spec: PromptSpec) -> jax.Array:  # [P, H]
    """The prompt at step 0, float32.

    Raises:
      UserError: the initialisation does not fit the prompt or the vocabulary.
    """
    make = spec.prompt_init or prompt_starts.sampled_vocab_init()
    if isinstance(make, str):
        make = prompt_starts.named(make, task.labels)
    key, _ = keys(spec.seed)
    table = processes.whole(source.table)
    init = make(table, task.vocabulary.encode, task.vocabulary.unk_id)
    return init(key, (spec.prompt_length, source.config.emb_dim), np.float32)


def optimizer_of(
    spec: PromptSpec,
    optimizer: optax.GradientTransformation,
    optimizer_at: Callable[[float], optax.GradientTransformation] | None,
) -> optax.GradientTransformation:
    """The optimizer of a prompt: the run's, or that at the prompt's own rate.

    Raises:
      UserError: it has a rate and nothing makes an optimizer of it.
    """
    if spec.learning_rate is None:
        return optimizer
    if optimizer_at is None:
        raise UserError(
            f"prompt {spec.name!r} has a learning_rate: give train an optimizer_at that "
            "makes the optimizer of it"
        )
    return optimizer_at(spec.learning_rate)


def keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of a prompt's start and of dropout."""
    prompt_key, dropout_key = jax.random.split(jax.random.key(seed))
    return prompt_key, dropout_key
