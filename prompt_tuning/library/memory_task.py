# SPDX-License-Identifier: Apache-2.0
"""A task whose examples are in memory, as a training run sees it; no TensorFlow.

`MemoryData` stands where the command line has a seqio task, and what it opens does what
`runs.task_data.TaskData` does: the run does not know the difference.
"""

import dataclasses
import hashlib
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from prompt_tuning import report
from prompt_tuning.data import in_memory, label_sets, reach
from prompt_tuning.data.label_sets import label_tokens
from prompt_tuning.data.length_report import Fill, LengthReport
from prompt_tuning.data.metrics import Metric
from prompt_tuning.data.splits import TRAIN, VALIDATION
from prompt_tuning.data.template import Template
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.inference import likelihood
from prompt_tuning.inference.answerer import Answerer, Evaluation, answer_all
from prompt_tuning.inference.encoding import Encoding
from prompt_tuning.library.rows import TEXT, Rows, short
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.training.members import Batches
from prompt_tuning.types import Params

# No token: parts one example's ids from the next one's.
PAST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Tokenised:
    """A split's examples as token ids.

    Attributes:
      inputs: text tokens, EOS included; negative ones are the prompt's (see `template`).
      targets: EOS included.
      texts: what the inputs were, without the prompt.
      answers: what the targets were.
    """

    inputs: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]
    texts: Sequence[str]
    answers: Sequence[str]


class MemoryTask:
    """The examples of a task, tokenised.

    Attributes:
      name: of the task.
      vocabulary: of inputs and answers.
      labels: the label set, or None where answers are free text.
      label_scores: how labels are compared.
      template: how a row becomes the inputs.
      metrics: what is measured on the validation split.
      lengths: text tokens of ``inputs`` and ``targets`` that there is room for.
      splits: the examples by split.
    """

    def __init__(
        self,
        name: str,
        rows: Mapping[str, Rows],
        vocabulary: Vocabulary,
        *,
        labels: Sequence[str] | None,
        template: str | None,
        metrics: Sequence[Metric],
        input_length: int | None = None,
        label_scores: str = label_sets.SUM,
    ):
        """Tokenises.

        Args:
          name: of the task.
          rows: the examples by split.
          vocabulary: the model's.
          labels: the label set, if there is one.
          template: see `rows.read`.
          metrics: functions of targets and answers.
          input_length: text tokens that inputs are cut to; by default nothing is cut.
          label_scores: how labels are compared, one of `label_sets.SCORES`.

        Raises:
          UserError: a label is not in the vocabulary, or there is no room.
        """
        if input_length is not None and input_length < 1:
            raise UserError(f"input_length={input_length} must be 1 or more")
        self.name, self.vocabulary, self.metrics = name, vocabulary, tuple(metrics)
        self.labels = None if labels is None else list(labels)
        self.label_scores = label_sets.check_scores(label_scores, "label_scores")
        self.template = template
        if labels is not None:
            label_tokens(labels, vocabulary)
            for label in labels:
                reach.check_label(label, vocabulary)
        parsed = Template.parse(template or f"{{{TEXT}}}")
        for split, found in rows.items():
            texts = [parsed.render(row) for row in found.columns]
            for message in reach.messages(texts, found.answers, vocabulary):
                report.say(f"{name}, {split}: {message}")
        self.splits = {
            split: _tokenise(found, parsed, vocabulary) for split, found in rows.items()
        }
        longest = max(
            int(np.sum(ids >= 0))
            for each in self.splits.values()
            for ids in each.inputs
        )
        self.lengths = {
            "inputs": longest if input_length is None else input_length,
            "targets": max(
                len(ids) for each in self.splits.values() for ids in each.targets
            ),
        }


def _tokenise(rows: Rows, template: Template, vocabulary: Vocabulary) -> Tokenised:
    end = [vocabulary.eos_id]
    return Tokenised(
        [
            np.array([*template.encode(row, vocabulary.encode), *end], np.int32)
            for row in rows.columns
        ],
        [np.array([*vocabulary.encode(x), *end], np.int32) for x in rows.answers],
        [" ".join(template.render(row)) for row in rows.columns],
        [answer.strip() for answer in rows.answers],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryData:
    """A task in memory; see `runs.settings.TaskSource`.

    Attributes:
      task: the task.
      train_split: split to tune on.
      eval_split: split that chooses the best step; None keeps the last.
      pack: rows hold one example each.
    """

    task: MemoryTask
    train_split: str = TRAIN
    eval_split: str | None = VALIDATION
    pack: bool = False
    without_evaluation: ClassVar[str] = "leave validation out to tune without one"

    @property
    def mixture_or_task_name(self) -> str:
        """What the task is called."""
        return self.task.name

    @property
    def task_feature_lengths(self) -> Mapping[str, int]:
        """Text tokens of ``inputs`` and ``targets``."""
        return self.task.lengths

    @property
    def template(self) -> str | None:
        """How a row becomes the inputs."""
        return self.task.template

    @property
    def label_scores(self) -> str:
        """How labels are compared."""
        return self.task.label_scores

    @property
    def key(self) -> tuple:
        """Equal for sources whose opened tasks may be shared."""
        return (self.mixture_or_task_name,)

    def open(
        self,
        prompts: Sequence[Prompt],
        vocab_size: int,
        placement: str,
        models_vocabulary: Vocabulary | None,
    ) -> "OpenedTask":
        """The task with the prompts that its rows may carry.

        Raises:
          UserError: the template names positions that the prompt does not have, or the
            model has no rows for the vocabulary.
        """
        del models_vocabulary  # the task was written in it
        return OpenedTask(self.task, prompts, vocab_size, placement)


class OpenedTask:
    """A task with a prompt's place in its rows.

    Attributes:
      prompts: those that rows may carry.
      vocabulary: of inputs and targets.
      labels: the label set, or None where answers are free text.
      label_scores: how labels are compared.
      template: how a row becomes the inputs, or None where it is a text.
    """

    def __init__(
        self,
        task: MemoryTask,
        prompts: Sequence[Prompt],
        vocab_size: int,
        placement: str,
    ):
        """See `MemoryData.open`."""
        self.prompts = tuple(prompts)
        self.vocabulary, self.labels = task.vocabulary, task.labels
        self.label_scores, self.template = task.label_scores, task.template
        self._task = task
        self._vocab_size = vocab_size
        self._length = sum(prompt.length for prompt in prompts)
        card = {"template": task.template, "placement": placement}
        self._encoding = Encoding(card, self._length, vocab_size, task.vocabulary)
        self._examples: dict[str, in_memory.Examples] = {}
        self._reports: dict[str, LengthReport] = {}

    @property
    def vocabulary_name(self) -> str:
        """What a prompt's card calls the vocabulary."""
        return self.vocabulary.name

    @property
    def vocabulary_fingerprint(self) -> str:
        """Tells the vocabulary from others, whatever their names."""
        return self.vocabulary.fingerprint

    def examples(self, split: str) -> in_memory.Examples:
        """The examples of a split, with virtual tokens in their places."""
        if split not in self._examples:
            found = self._task.splits[split]
            inputs = [self._placed(ids) for ids in found.inputs]
            self._examples[split] = in_memory.Examples(inputs, found.targets)
        return self._examples[split]

    def _placed(self, ids: np.ndarray) -> np.ndarray:
        """An example's input, cut and with its prompt: [T]."""
        text_length = self._task.lengths["inputs"]
        ids = in_memory.cut(ids, text_length, self.vocabulary.eos_id)
        ids = self._encoding.place(ids) if self._length else ids[ids >= 0]
        return np.where(ids < 0, self._vocab_size - 1 - ids, ids).astype(np.int32)

    def content(self, split: str, *, pack: bool = False) -> str:
        """What tells a split's examples from others."""
        del pack
        found, digest = self._task.splits[split], hashlib.sha256()
        for ids in (*found.inputs, *found.targets):
            digest.update(np.append(ids, PAST).astype("<i4").tobytes())
        return digest.hexdigest()

    def texts(self, split: str, most: int) -> tuple[list[str], list[str]]:
        """Texts and answers of a split's first ``most`` examples, as they were given."""
        found = self._task.splits[split]
        return list(found.texts[:most]), list(found.answers[:most])

    def check(self, split: str, *, pack: bool = False) -> LengthReport:
        """Says, once, which inputs lose their end."""
        del pack
        if split not in self._reports:
            found = self._task.splits[split]
            lengths = [int(np.sum(ids >= 0)) for ids in found.inputs]
            self._reports[split] = in_memory.report_of(
                self.examples(split),
                lengths,
                self._task.lengths["inputs"],
                self._length,
            )
            if message := self._reports[split].message("input_length"):
                report.say(message)
        return self._reports[split]

    def batches(
        self, split: str, batch_size: int, seed: int, *, pack: bool = False
    ) -> Batches:
        """Shuffled batches without end, from any batch on.

        Raises:
          UserError: see `in_memory.ShuffledBatches`.
        """
        del pack
        found, edges = self.examples(split), self.check(split).edges(batch_size)
        return lambda start: in_memory.ShuffledBatches(
            found,
            batch_size,
            seed,
            edges=edges,
            targets_length=self._task.lengths["targets"],
            start_batch=start,
            shard_info=(jax.process_index(), jax.process_count()),
        )

    def fill(self, split: str, batch_size: int, *, pack: bool = False) -> Fill:
        """How full the rows of `batches` are."""
        del pack
        return self.check(split).fill(batch_size)

    def evaluator(
        self,
        split: str,
        model: Model,
        mesh: jax.sharding.Mesh | None,
        batch_size: int,
        num_examples: int | None = None,
    ) -> Callable[[Params], Evaluation]:
        """The evaluation of a split: a function of all parameters.

        Args:
          split: the split.
          model: what answers; its network is given this task's prompts alone, so that
            prompts of one length share a program.
          mesh: the devices, where there are several.
          batch_size: rows of a batch.
          num_examples: take the first so many examples only.
        """
        some = self._first(split, num_examples)
        answerer = Answerer(
            model.with_prompts(self.prompts),
            self.vocabulary,
            labels=self.labels,
            label_scores=self.label_scores,
            max_decode_len=self._task.lengths["targets"],
            mesh=mesh,
        )
        tokens = in_memory.padded(some.inputs, max(map(len, some.inputs)))
        # What the vocabulary cannot write is not in what a target's tokens decode to.
        targets = self._task.splits[split].answers[:num_examples]

        def evaluate(params: Params) -> Evaluation:
            given = answer_all(answerer, params, tokens, batch_size)
            answers = [self._said(ids) for ids in given]
            values: dict[str, float] = {}
            for metric in self._task.metrics:
                values |= _numbers(metric(targets, answers))
            return Evaluation(values, answers, targets)

        return evaluate

    def likelihood(
        self,
        split: str,
        model: Model,
        mesh: jax.sharding.Mesh | None,
        batch_size: int,
        num_examples: int | None = None,
    ) -> Callable[[Params], Evaluation]:
        """The same by the likelihood of the right answers alone."""
        some = self._first(split, num_examples)
        return likelihood.evaluator(
            model.with_prompts(self.prompts), some, mesh, batch_size
        )

    def _first(self, split: str, count: int | None) -> in_memory.Examples:
        """A split's first so many examples; all where there is no number."""
        found = self.examples(split)
        return in_memory.Examples(found.inputs[:count], found.targets[:count])

    def _said(self, ids: np.ndarray) -> str:
        """An answer as it is compared."""
        return self.vocabulary.decode(ids.tolist()).strip()


def _numbers(found: Any) -> Mapping[str, float]:
    """What a metric gave, which is anybody's function.

    Raises:
      UserError: it is no mapping of names to numbers.
    """
    sound = isinstance(found, Mapping) and all(
        isinstance(name, str) and isinstance(value, numbers.Real)
        for name, value in found.items()
    )
    if not sound:
        raise UserError(
            f"a metric gave {short(found)}: let it return numbers by name, such as "
            '{"accuracy": 87.5}'
        )
    return {name: float(value) for name, value in found.items()}
