# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a split by the metrics that its seqio task names.

Answers are either ranked, where the task has a label set (the label of the highest
likelihood wins), or decoded. seqio postprocesses them and computes the metrics.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
import seqio

from prompt_tuning import data, decoding, examples, processes, sharding
from prompt_tuning.errors import UserError
from prompt_tuning.feature_converter import PromptFeatureConverter
from prompt_tuning.model import Model
from prompt_tuning.types import Array, Params


class Answerer:
    """Gives token ids of answers to rows of encoder inputs.

    Attributes:
      labels: the label set that is ranked, or None where answers are decoded.
    """

    def __init__(
        self,
        model: Model,
        vocabulary: seqio.Vocabulary,
        *,
        labels: Sequence[str] | None = None,
        strategy: "decoding.Strategy | None" = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Ranks ``labels`` if there are any, else decodes by ``strategy``.

        With a ``mesh`` the rows are spread over its devices. Several processes need
        one; each is given all rows, works on its share and gets all answers.

        Raises:
          UserError: a label has pieces outside the vocabulary.
        """
        self.labels = None if labels is None else list(labels)
        self._mesh = mesh
        if self.labels is not None:
            self._label_ids = label_tokens(self.labels, vocabulary)  # [C, S]
            self._rank = jax.jit(model.rank)
        else:
            strategy = strategy or decoding.Greedy(
                max_decode_len=32, eos_id=vocabulary.eos_id
            )
            self._predict = jax.jit(
                lambda params, tokens: model.predict(params, tokens, strategy)[0]
            )

    def scores(self, params: Params, tokens: np.ndarray) -> Array:  # [B, C]
        """Log-likelihood of every label."""
        ranked = self._rank(params, self._spread(tokens), self._label_ids)
        return processes.whole(ranked)[: len(tokens)]

    def answer(self, params: Params, tokens: np.ndarray) -> np.ndarray:  # [B, S]
        """Token ids of the best answers."""
        if self.labels is None:
            decoded = self._predict(params, self._spread(tokens))
            return np.asarray(processes.whole(decoded))[: len(tokens), -1]
        best = np.argmax(np.asarray(self.scores(params, tokens)), axis=-1)
        return self._label_ids[best]

    def _spread(self, tokens: np.ndarray) -> Array:
        return (
            tokens if self._mesh is None else sharding.spread_rows(tokens, self._mesh)
        )


def label_tokens(labels: Sequence[str], vocabulary: seqio.Vocabulary) -> np.ndarray:
    """Ids of the labels, each ended by EOS and padded: [C, S].

    Raises:
      UserError: a label has pieces outside the vocabulary, or two labels are equal.
    """
    ids = [list(vocabulary.encode(label)) for label in labels]
    for label, pieces in zip(labels, ids):
        if not pieces or vocabulary.unk_id in pieces:
            raise UserError(
                f"label {label!r} has pieces that the vocabulary does not know; use "
                "another word for it"
            )
    if len(set(map(tuple, ids))) < len(ids):
        raise UserError(f"two of the labels {', '.join(labels)} are the same tokens")
    table = np.zeros((len(ids), 1 + max(map(len, ids))), np.int32)
    for row, pieces in zip(table, ids):
        row[: len(pieces) + 1] = [*pieces, vocabulary.eos_id]
    return table


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics of a split; answers and targets of its (first task's) examples."""

    metrics: Mapping[str, float]
    answers: Sequence[str]
    targets: Sequence[str]


class Evaluator:
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
        self._answerer = answerer
        self._batch_size = batch_size
        task = self._evaluator.eval_tasks[0]
        self._vocabulary = task.output_features["targets"].vocabulary
        self._targets = [
            self._vocabulary.decode(example["targets"].tolist())
            for example in self._evaluator.cached_task_datasets[
                task.name
            ].as_numpy_iterator()
        ]

    def __call__(self, params: Params) -> Evaluation:
        """Answers every example and computes the metrics."""
        answers: dict[int, np.ndarray] = {}

        def predict(dataset) -> list[tuple[int, list[int]]]:
            for indices, tokens in _padded(dataset, self._batch_size):
                rows = self._answerer.answer(params, tokens)
                answers.update(zip(indices, rows))
            return [(i, row.tolist()) for i, row in sorted(answers.items())]

        future, _ = self._evaluator.evaluate(
            compute_metrics=True, step=0, predict_fn=predict
        )
        results = future.result()
        metrics: dict[str, float] = {}
        for task in self._evaluator.eval_tasks:
            for name, value in results[task.name].items():
                value = getattr(value, "value", value)
                key = name if len(results) == 1 else f"{task.name}/{name}"
                metrics[key] = float(value)
        texts = [
            self._vocabulary.decode(row.tolist()) for _, row in sorted(answers.items())
        ]
        return Evaluation(metrics, texts, self._targets)


def _padded(dataset, batch_size: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """Indices and full batches of encoder tokens; rows past the indices are padding."""
    for indices, features in dataset.batch(batch_size).as_numpy_iterator():
        tokens = data.pad_rows(features["encoder_input_tokens"], batch_size)
        yield indices.tolist(), tokens
