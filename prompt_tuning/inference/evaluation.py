# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a split by the metrics that its seqio task names.

An `Answerer` gives the answers; seqio postprocesses them and computes the metrics.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from prompt_tuning.data import answer_statistics, examples, metrics
from prompt_tuning.data.feature_converter import PromptFeatureConverter
from prompt_tuning.errors import UserError
from prompt_tuning.inference.answerer import Answerer, Evaluation, answer_all
from prompt_tuning.types import Params


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
            raise UserError(
                f"{name} has no metric on split {split!r}: give it one (TASK_METRICS of "
                "local files), or tune with EVAL_SPLIT=None"
            )
        first = self._evaluator.eval_tasks[0]
        self._vocabulary = first.output_features["targets"].vocabulary
        self._cached = self._evaluator.cached_task_datasets[first.name]
        self.targets = self._texts("targets")
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
            predict_fn=lambda _: [  # pyright: ignore[reportArgumentType]
                (i, ids.tolist()) for i, ids in enumerate(next(waiting))
            ],
        )
        results = future.result()
        figures: dict[str, float] = {}
        for task in self._evaluator.eval_tasks:
            for name, value in results[task.name].items():
                value = getattr(value, "value", value)
                figures[self._called(task, name)] = float(value)
        texts = [self._vocabulary.decode(ids.tolist()) for ids in answers[0]]
        return Evaluation(
            figures,
            texts,
            self.targets,
            intervals=functools.partial(self._intervals, answers),
            inputs=functools.partial(self._texts, "inputs"),
            right=functools.partial(self._right, answers[0]),
        )

    def _texts(self, side: str) -> list[str]:
        """Inputs or targets of the first task's examples, as its data has them."""
        return [
            _text(example, side, self._vocabulary)
            for example in self._cached.as_numpy_iterator()
        ]

    def _right(self, answers: Sequence[np.ndarray]) -> list[bool] | None:
        """See `Evaluation.right`; of the first task."""
        task = self._evaluator.eval_tasks[0]
        return metrics.right(task.predict_metric_fns, *self._compared(task, answers))  # pyright: ignore[reportArgumentType]

    def _called(self, task: seqio.Task, metric: str) -> str:
        """A metric's name among those of all tasks of the split."""
        alone = len(self._evaluator.eval_tasks) == 1
        return metric if alone else f"{task.name}/{metric}"

    def _intervals(
        self, answers: Sequence[Sequence[np.ndarray]], samples: int
    ) -> dict[str, tuple[float, float]]:
        """See `Evaluation.intervals`."""
        found: dict[str, tuple[float, float]] = {}
        for task, given in zip(self._evaluator.eval_tasks, answers, strict=True):
            targets, predictions = self._compared(task, given)
            for metric in task.predict_metric_fns:
                ends = answer_statistics.intervals(
                    metric,  # pyright: ignore[reportArgumentType]
                    targets,
                    predictions,
                    samples,
                )
                found |= {self._called(task, name): x for name, x in ends.items()}
        return found

    def _compared(
        self, task: seqio.Task, answers: Sequence[np.ndarray]
    ) -> tuple[list[Any], list[Any]]:
        """Targets and answers as the task's metrics are given them."""
        vocabulary = task.output_features["targets"].vocabulary
        cached = self._evaluator.cached_task_datasets[task.name].as_numpy_iterator()
        targets, predictions = [], []
        for example, ids in zip(cached, answers, strict=True):
            for side, tokens in ((targets, example["targets"]), (predictions, ids)):
                text = vocabulary.decode([int(i) for i in tokens])
                side.append(
                    task.postprocess_fn(
                        text, example=example, is_target=side is targets
                    )
                )
        return targets, predictions


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
        return self.measure(
            [
                answer_all(self._answerer, params, tokens, self._batch_size)
                for tokens in self.rows
            ]
        )


def _text(example: Mapping[str, Any], side: str, vocabulary: seqio.Vocabulary) -> str:
    """A text as its data has it, which the vocabulary need not be able to write."""
    raw = example.get(f"{side}_pretokenized")
    if isinstance(raw, bytes):
        return raw.decode(errors="replace")
    # Negative ids are places of the prompt.
    return vocabulary.decode([i for i in example[side].tolist() if i >= 0])
