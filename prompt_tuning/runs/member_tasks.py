# SPDX-License-Identifier: Apache-2.0
"""The tasks of a run's members; what several of them share is made once."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from prompt_tuning import processes, trees
from prompt_tuning.data import label_sets
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.inference.likelihood import LOG_LIKELIHOOD
from prompt_tuning.methods.method import assemble
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.runs import answer_counts, baselines
from prompt_tuning.runs.member_specs import PROMPT, MemberSpec
from prompt_tuning.training.members import Evaluate
from prompt_tuning.types import Params

if TYPE_CHECKING:
    from prompt_tuning.data.length_report import Fill
    from prompt_tuning.inference.answerer import Evaluation
    from prompt_tuning.runs.task_data import TaskData


class MemberTasks:
    """The data and evaluations of members, each as if there were no other."""

    def __init__(self, vocab_size: int, models_vocabulary: Vocabulary | None):
        """Knows no task yet, only the rows of the model's table and its vocabulary."""
        self._vocab_size, self._models_vocabulary = vocab_size, models_vocabulary
        self._tasks: dict[Any, TaskData] = {}
        self._evaluators: dict[Any, Callable[[Params], Evaluation]] = {}
        self._fills: dict[Any, Fill] = {}
        self._tf_idfs: dict[Any, float | None] = {}

    def of(self, spec: MemberSpec) -> "TaskData":
        """The data of a member.

        Raises:
          UserError: see `TaskData`; the members' tasks have several vocabularies.
        """
        key = self._key(spec)
        if key not in self._tasks:
            length = spec.prompt_length
            prompts = (Prompt(PROMPT, length),) if length else ()
            task = spec.data.open(
                prompts, self._vocab_size, spec.placement, self._models_vocabulary
            )
            for other, known in self._tasks.items():
                if known.vocabulary_fingerprint != task.vocabulary_fingerprint:
                    raise UserError(
                        f"{spec.data.mixture_or_task_name} has another vocabulary "
                        f"({task.vocabulary_name}) than {other[0]} "
                        f"({known.vocabulary_name}): the prompts of a run share a "
                        "model; choose the tasks' variants of its vocabulary"
                    )
            self._tasks[key] = task
        return self._tasks[key]

    def label_shape(self, specs: Sequence[MemberSpec]) -> tuple[int, int] | None:
        """The most labels of any of these members' tasks, and the longest's tokens.

        None where one of them has no label set.
        """
        tasks = [self.of(spec) for spec in specs]
        if not all(task.labels for task in tasks):
            return None
        counts, lengths = zip(
            *(
                label_sets.label_tokens(t.labels or (), t.vocabulary).shape
                for t in tasks
            )
        )
        return max(counts), max(lengths)

    def fill(self, spec: MemberSpec) -> "Fill":
        """How full a member's rows are; says it once for all whose rows are alike."""
        data = spec.data
        key = (*self._key(spec), data.train_split, data.pack, spec.batch_size)
        if key not in self._fills:
            self._fills[key] = self.of(spec).fill(
                data.train_split, spec.batch_size, pack=data.pack
            )
        return self._fills[key]

    def content(self, spec: MemberSpec) -> dict[str, str]:
        """What tells the data of a member's splits from others."""
        task, data = self.of(spec), spec.data
        found = {data.train_split: task.content(data.train_split, pack=data.pack)}
        if data.eval_split is not None:
            found[data.eval_split] = task.content(data.eval_split)
        return found

    def evaluate(
        self,
        spec: MemberSpec,
        model: Model,
        mesh: jax.sharding.Mesh | None,
        batch_size: int,
        num_examples: int | None,
        *,
        by_likelihood: bool = False,
    ) -> Evaluate | None:
        """The evaluation of a member; None where it has no split for it.

        Args:
          spec: the member.
          model: what answers.
          mesh: the devices, where there are several.
          batch_size: rows of a batch.
          num_examples: take the first so many examples only.
          by_likelihood: by that of the right answers in place of the task's metrics.

        Raises:
          UserError: see `TaskData.evaluator`.
        """
        if spec.data.eval_split is None:
            return None
        task, key = self.of(spec), self._evaluator_key(spec)
        make = task.evaluator
        if by_likelihood:
            make, key = task.likelihood, (*key, LOG_LIKELIHOOD)
        if key not in self._evaluators:
            self._evaluators[key] = make(
                spec.data.eval_split, model, mesh, batch_size, num_examples
            )
        return functools.partial(_metrics, self._evaluators[key], spec)

    def answers(
        self, spec: MemberSpec, tuned: Params, frozen: Params
    ) -> dict[str, Any] | None:
        """What a member answers on its split (see `answer_counts.summary`).

        None where there are no labels, or `evaluate` was not asked for.
        """
        task = self.of(spec)
        evaluator = self._evaluators.get(self._evaluator_key(spec))
        if evaluator is None or task.labels is None:
            return None
        found = _outcome(evaluator, spec, tuned, frozen)
        return answer_counts.summary(
            found.answers,
            found.targets,
            task.labels,
            self._tf_idf(spec, len(found.targets)),
        )

    def _tf_idf(self, spec: MemberSpec, examples: int) -> float | None:
        """What TF-IDF gets right of the split's first examples, in the first process."""
        data = spec.data
        key = (*data.key, data.train_split, data.eval_split)
        if key not in self._tf_idfs and processes.is_first():
            task, accuracy = self.of(spec), None
            train = task.texts(data.train_split, baselines.MOST_FITTED)
            split = data.eval_split and task.texts(data.eval_split, examples)
            if train and split:
                accuracy = baselines.tf_idf_accuracy(train, split)
            self._tf_idfs[key] = accuracy
        return self._tf_idfs.get(key)

    def _evaluator_key(self, spec: MemberSpec) -> tuple:
        return (*self._key(spec), spec.data.eval_split)

    def _key(self, spec: MemberSpec) -> tuple:
        return (*spec.data.key, spec.prompt_length, spec.placement)


def _metrics(
    evaluator: "Callable[[Params], Evaluation]",
    spec: MemberSpec,
    tuned: Params,
    frozen: Params,
) -> Mapping[str, float]:
    return _outcome(evaluator, spec, tuned, frozen).metrics


def _outcome(
    evaluator: "Callable[[Params], Evaluation]",
    spec: MemberSpec,
    tuned: Params,
    frozen: Params,
) -> "Evaluation":
    """Of a member; a prompt goes by the name that all have when evaluated."""
    part = spec.method.materialize(tuned, frozen)
    bank = ()
    if spec.prompt_length:
        part = {**part, "prompts": {PROMPT: part["prompts"][spec.name]}}
        bank = (Prompt(PROMPT, spec.prompt_length),)
    params = assemble({PROMPT: part}, [PROMPT], bank)
    return evaluator(trees.merge(params, frozen))
