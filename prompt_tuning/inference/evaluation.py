# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a split by the metrics that its seqio task names.

Answers are either ranked, where the task has a label set (the label of the highest
likelihood wins), or decoded. seqio postprocesses them and computes the metrics.
Examples are answered in batches of like lengths, so that the cost follows the texts and
not the room that there is for them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio

from prompt_tuning import decoding, processes
from prompt_tuning.data import batching, buckets, examples
from prompt_tuning.data.feature_converter import PromptFeatureConverter
from prompt_tuning.data.label_sets import label_tokens
from prompt_tuning.devices import sharding
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.types import Array, Params

# The most lengths that batches of a split are padded to: each is one more program.
MOST_LENGTHS = 4


class Answerer:
    """Gives token ids of answers to rows of encoder inputs.

    Attributes:
      labels: the label set that answers come from, or None where they are free text.
    """

    def __init__(
        self,
        model: Model,
        vocabulary: seqio.Vocabulary,
        *,
        labels: Sequence[str] | None = None,
        strategy: Callable[..., decoding.Strategy] | None = None,
        max_decode_len: int = 32,
        seed: int = 0,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Ranks ``labels`` or, given a ``strategy``, has it search among them.

        Without labels the strategy decodes free text; it is greedy by default. It is
        made of ``max_decode_len`` and ``eos_id``, by `decoding.Beam` for instance. What
        it draws follows from ``seed``: the same batches in the same order get the same
        answers.

        With a ``mesh`` the rows are spread over its devices. Several processes need
        one; each is given all rows, works on its share and gets all answers.

        Raises:
          UserError: a label has pieces outside the vocabulary, or is longer than what
            the strategy decodes.
        """
        self.labels = None if labels is None else list(labels)
        self._mesh = mesh
        self._ranks = self.labels is not None and strategy is None
        if self.labels is not None:
            self._label_ids = label_tokens(self.labels, vocabulary)  # [C, S]
        if self._ranks:
            self._rank = jax.jit(model.rank)
            return
        chosen = (strategy or decoding.Greedy)(
            max_decode_len=max_decode_len, eos_id=vocabulary.eos_id
        )
        self._trie = None
        if self.labels is not None:
            self._trie = decoding.LabelTrie.build(
                [self._label_ids], chosen.max_decode_len, chosen.eos_id
            )
        self._calls = itertools.count()

        def predict(params, tokens, call, constraint):
            key = jax.random.fold_in(jax.random.key(seed), call)
            decoded, _ = model.predict(
                params, tokens, chosen, key, constraint=constraint
            )
            return decoded[:, -1]

        self._predict = jax.jit(predict)

    def scores(self, params: Params, tokens: np.ndarray) -> Array:  # [B, C]
        """Log-likelihood of every label."""
        ranked = self._rank(params, self._spread(tokens), self._label_ids)
        return processes.whole(ranked)[: len(tokens)]

    def answer(self, params: Params, tokens: np.ndarray) -> np.ndarray:  # [B, S]
        """Token ids of the best answers."""
        if not self._ranks:
            constraint = None
            if self._trie is not None:
                constraint = self._trie.rows([0] * len(tokens))
                constraint = constraint.replace(nodes=self._spread(constraint.nodes))
            decoded = self._predict(
                params, self._spread(tokens), next(self._calls), constraint
            )
            return np.asarray(processes.whole(decoded))[: len(tokens)]
        best = np.argmax(np.asarray(self.scores(params, tokens)), axis=-1)
        return self._label_ids[best]

    def _spread(self, tokens: np.ndarray) -> Array:
        return (
            tokens if self._mesh is None else sharding.spread_rows(tokens, self._mesh)
        )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics of a split; answers and targets of its (first task's) examples."""

    metrics: Mapping[str, float]
    answers: Sequence[str]
    targets: Sequence[str]


class Split:
    """A split's examples as a prompt's encoder rows, and the metrics of answers to them.

    Attributes:
      rows: of each task that has a metric, its padded encoder rows: ``[N, T]``.
      targets: of the first task's examples.
    """

    def __init__(
        self,
        name: str,
        split: str,
        task_feature_lengths: Mapping[str, int],
        converter: PromptFeatureConverter,
        num_examples: int | None = None,
    ):
        """Reads the split, which `task_data.TaskData.check` has found sound.

        Raises:
          UserError: the task has no metric.
        """
        self._evaluator = seqio.Evaluator(
            name,
            # seqio would cut EOS and virtual tokens; the converter cuts text alone.
            converter.limited_to(task_feature_lengths["inputs"]),
            eval_split=split,
            use_cached=False,
            sequence_length=examples.lengths_for(
                examples.find(name), task_feature_lengths
            ),
            num_examples=num_examples,
            logger_cls=(),
        )
        if not self._evaluator.eval_tasks:
            raise UserError(f"{name} has no metric on split {split!r}")
        first = self._evaluator.eval_tasks[0]
        self._vocabulary = first.output_features["targets"].vocabulary
        cached = self._evaluator.cached_task_datasets[first.name]
        self.targets = [
            _target(example, self._vocabulary) for example in cached.as_numpy_iterator()
        ]
        self.rows = []
        for task in self._evaluator.eval_tasks:
            dataset = self._evaluator.cached_model_datasets[task.name]
            rows = [
                row["encoder_input_tokens"] for _, row in dataset.as_numpy_iterator()
            ]
            self.rows.append(np.stack(rows))

    def measure(self, answers: Sequence[Sequence[np.ndarray]]) -> Evaluation:
        """Computes the metrics.

        Args:
          answers: of each task, the token ids ``[S]`` of the answer to each row.
        """
        waiting = iter(answers)
        future, _ = self._evaluator.evaluate(
            compute_metrics=True,
            step=0,
            predict_fn=lambda _: [
                (i, ids.tolist()) for i, ids in enumerate(next(waiting))
            ],
        )
        results = future.result()
        metrics: dict[str, float] = {}
        for task in self._evaluator.eval_tasks:
            for name, value in results[task.name].items():
                value = getattr(value, "value", value)
                key = name if len(results) == 1 else f"{task.name}/{name}"
                metrics[key] = float(value)
        texts = [self._vocabulary.decode(ids.tolist()) for ids in answers[0]]
        return Evaluation(metrics, texts, self.targets)


class Evaluator(Split):
    """Evaluates parameters on one split, whose examples it keeps in memory."""

    def __init__(
        self,
        name: str,
        split: str,
        task_feature_lengths: Mapping[str, int],
        converter: PromptFeatureConverter,
        answerer: Answerer,
        *,
        batch_size: int,
        num_examples: int | None = None,
    ):
        """Reads the split; see `Split`."""
        super().__init__(name, split, task_feature_lengths, converter, num_examples)
        self._answerer = answerer
        self._batch_size = batch_size

    def __call__(self, params: Params) -> Evaluation:
        """Answers every example and computes the metrics."""
        return self.measure([self._answers(params, tokens) for tokens in self.rows])

    def _answers(self, params: Params, tokens: np.ndarray) -> list[np.ndarray]:
        """Answers to a task's rows ``[N, T]``, in their order: N of [S]."""
        found: dict[int, np.ndarray] = {}
        for part in batches_by_length(tokens, self._batch_size):
            batch = batching.pad_rows(
                tokens[part.indices, : part.length], self._batch_size
            )
            answers = self._answerer.answer(params, batch)
            found.update(zip(part.indices.tolist(), answers))
        return [found[i] for i in range(len(tokens))]


def _target(example: Mapping[str, Any], vocabulary: seqio.Vocabulary) -> str:
    """A target as its data has it, which the vocabulary need not be able to write."""
    raw = example.get("targets_pretokenized")
    if isinstance(raw, bytes):
        return raw.decode(errors="replace")
    return vocabulary.decode(example["targets"].tolist())


def batches_by_length(tokens: np.ndarray, rows: int) -> list[buckets.Group]:
    """Batches of encoder rows of like lengths, of at most `MOST_LENGTHS` shapes.

    A further shape has to save 5 % of all positions and at least a batch of them.

    Args:
      tokens: padded rows: [N, T].
      rows: rows of a batch.
    """
    lengths = buckets.used(tokens)
    return buckets.groups(lengths, edges_of(lengths, rows), [rows])


def edges_of(lengths: np.ndarray, rows: int) -> tuple[int, ...]:  # [N]
    """The lengths that `batches_by_length` pads rows of these lengths to."""
    longest = np.sort(lengths)[::-1][::rows]
    gain = max(0.05, 1 / len(longest))
    return buckets.edges_for(longest, MOST_LENGTHS, gain)
