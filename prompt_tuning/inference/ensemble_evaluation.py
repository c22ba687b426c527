# SPDX-License-Identifier: Apache-2.0
"""What an ensemble of prompts is worth on a task: the rows of Lester et al.'s Table 3.

Every example is given to all prompts in shared batches, once; each prompt's metrics and
those of every rule of `ensembles` are computed from the same answers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.data import examples
from prompt_tuning.data.feature_converter import cut
from prompt_tuning.errors import UserError
from prompt_tuning.inference import ensembles
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.ensembles import Answer
from prompt_tuning.inference.prepared_rows import Item, Request

Metrics = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Table:
    """Metrics of an ensemble and of its prompts on one split.

    Attributes:
      prompts: of each prompt alone.
      mean: means over the prompts.
      best: of the prompt that is best on this very split, as in the paper; unlike all
        else here it is chosen with the split's labels.
      combined: of each rule that the prompts allow; ``best`` among them is the prompt
        with the best validation metric in its card.
    """

    prompts: Mapping[str, Metrics]
    mean: Metrics
    best: Metrics
    combined: Mapping[str, Metrics]


def evaluate(
    engine: Engine,
    names: Sequence[str],
    task: str,
    split: str,
    task_feature_lengths: Mapping[str, int],
) -> Table:
    """Evaluates prompts, and what they say together, on a split of a seqio task.

    Args:
      engine: has the prompts in its store.
      names: the prompts, of any lengths and placements.
      task: a registered seqio task, not a mixture.
      split: which of its splits.
      task_feature_lengths: text tokens of ``inputs``, as in training; longer ones lose
        their end.

    Raises:
      UserError: a prompt, the task or the split does not exist, or the task has no
        metric.
    """
    provider = examples.find(task)
    metric_fns = getattr(provider, "metric_fns", None)
    if not metric_fns:
        raise UserError(f"{task} has no metric: give a seqio task that has one")
    prompts = [engine.store.get(name) for name in names]
    vocabulary = provider.output_features["targets"].vocabulary
    rows = [
        *examples.examples(provider, split, task_feature_lengths).as_numpy_iterator()
    ]
    requests = []
    for row in rows:
        ids = cut(row["inputs"], task_feature_lengths["inputs"], vocabulary.eos_id)
        placed = [prompt.encoding.place(ids.numpy()) for prompt in prompts]
        requests.append(
            Request(
                tuple(
                    Item(prompt, each, prompt.encoding.labels)
                    for prompt, each in zip(prompts, placed, strict=True)
                )
            )
        )
    answers = engine.opinions(requests)  # N of E
    targets = [
        provider.postprocess_fn(
            vocabulary.decode(row["targets"].tolist()), example=row, is_target=True
        )
        for row in rows
    ]

    def measure(given: Sequence[Answer]) -> Metrics:
        said = [
            provider.postprocess_fn(answer.text, example=row, is_target=False)
            for answer, row in zip(given, rows, strict=True)
        ]
        found: dict[str, Any] = {}
        for metric in metric_fns:
            found |= metric(targets, said)
        return {name: float(value) for name, value in found.items()}

    alone = {
        name: measure([each[e] for each in answers]) for e, name in enumerate(names)
    }
    metrics = [ensembles.validation_metric(prompt.card) for prompt in prompts]
    combined = {}
    for name, rule in ensembles.RULES.items():
        try:
            combined[name] = measure([rule(each, metrics) for each in answers])
        except UserError:
            # A rule that these prompts do not allow has no place in the table.
            continue
    best = max(alone.values(), key=lambda found: np.mean(list(found.values())))
    mean = {
        name: float(np.mean([found[name] for found in alone.values()])) for name in best
    }
    return Table(alone, mean, best, combined)
