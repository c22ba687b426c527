# SPDX-License-Identifier: Apache-2.0
"""What prompts are worth on a task, alone and together: Lester et al.'s Table 3.

Every example is given to all prompts in shared batches, once; each prompt's metrics and
those of every rule of `ensembles` are computed from the same answers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from prompt_tuning import decoding
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.data import buckets
from prompt_tuning.data.label_sets import LabelSet
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.inference import answerer, ensembles
from prompt_tuning.inference.answerer import Evaluation
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.ensembles import Answer
from prompt_tuning.inference.evaluation import Split
from prompt_tuning.inference.prepared_rows import Item
from prompt_tuning.inference.store import PromptStore, StoredPrompt

# Of each task, of each of its examples, the answer of each prompt and its token ids.
Given = Sequence[Sequence[Sequence[tuple[Answer, np.ndarray]]]]


@dataclasses.dataclass(frozen=True)
class Table:
    """What prompts are worth on one split.

    Attributes:
      prompts: each prompt alone.
      combined: the prompts together, by each rule that they allow; ``best`` among them
        is the prompt with the best validation metric in its card.
    """

    prompts: Mapping[str, Evaluation]
    combined: Mapping[str, Evaluation]

    @property
    def mean(self) -> dict[str, float]:
        """Means of the metrics over the prompts."""
        found = [one.metrics for one in self.prompts.values()]
        return {
            name: float(np.mean([metrics[name] for metrics in found]))
            for name in found[0]
        }

    @property
    def best(self) -> Mapping[str, float]:
        """Metrics of the prompt that is best on this very split, as in the paper.

        Unlike all else here it is chosen with the split's labels.
        """
        found = [one.metrics for one in self.prompts.values()]
        return max(found, key=lambda metrics: np.mean(list(metrics.values())))


def evaluate(
    base: BaseModel,
    store: PromptStore,
    splits: Mapping[str, Split],
    vocabulary: Vocabulary,
    *,
    labels: LabelSet | None = None,
    strategy: decoding.Strategy | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Table:
    """Evaluates prompts, and what they say together.

    Args:
      base: the model that the store was made for.
      store: the prompts.
      splits: one split for each prompt that is evaluated, by its name; its rows hold
        the prompt's virtual tokens as ids of V and above. They may differ in lengths
        and placements, not in their examples.
      vocabulary: of the answers.
      labels: what is ranked, compared as each prompt's card says, if it does; None
        decodes free text.
      strategy: see `Engine`.
      seed: for strategies that draw.
      batch_size: rows of a batch.

    Raises:
      UserError: there is no such prompt.
    """
    prompts = [store.get(name) for name in splits]
    vocab_size = base.config.vocab_size
    compared = {
        prompt: labels
        and dataclasses.replace(
            labels, scores=prompt.card.get("label_scores") or labels.scores
        )
        for prompt in prompts
    }
    items = [
        Item(prompt, relative(row, vocab_size), compared[prompt])
        for of_task in zip(*(split.rows for split in splits.values()), strict=True)
        for rows in zip(*of_task, strict=True)
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    lengths = np.array([len(item.ids) for item in items])
    edges = answerer.edges_of(lengths, batch_size)
    engine = Engine(
        base,
        store,
        batch_sizes=(batch_size,),
        lengths=edges,
        strategy=strategy,
        seed=seed,
    )
    answers = map(_answer_of(labels, vocabulary), engine.outputs(items))
    first, *_ = splits.values()
    given = [
        [list(itertools.islice(answers, len(prompts))) for _ in rows]
        for rows in first.rows
    ]
    alone = {
        name: _measured(split, [[each[e] for each in task] for task in given])
        for e, (name, split) in enumerate(splits.items())
    }
    return Table(alone, dict(_combined(first, prompts, given)))


def relative(row: np.ndarray, vocab_size: int) -> np.ndarray:  # [T] -> [t]
    """A padded row as the engine takes it: position i of the prompt is -(i + 1)."""
    ids = row[: buckets.used(row[None])[0]]
    return np.where(ids < vocab_size, ids, vocab_size - 1 - ids)


def _answer_of(
    labels: LabelSet | None, vocabulary: Vocabulary
) -> Callable[[np.ndarray], tuple[Answer, np.ndarray]]:
    if labels is None:
        return lambda output: (Answer(vocabulary.decode(output.tolist())), output)
    names, tokens = labels.names, labels.tokens
    return lambda output: (
        ensembles.ranked(names, output),
        tokens[int(np.argmax(output))],
    )


def _combined(
    split: Split, prompts: Sequence[StoredPrompt], given: Given
) -> Iterator[tuple[str, Evaluation]]:
    metrics = [ensembles.validation_metric(prompt.card) for prompt in prompts]

    def together(each: Sequence[tuple[Answer, np.ndarray]], rule):
        answer = rule([answer for answer, _ in each], metrics)
        ids = next(ids for one, ids in each if one.text == answer.text)
        return answer, ids

    for name, rule in ensembles.RULES.items() if len(prompts) > 1 else ():
        try:
            answers = [[together(each, rule) for each in task] for task in given]
        except UserError:
            # A rule that these prompts do not allow has no place in the table.
            continue
        yield name, _measured(split, answers)


def _measured(
    split: Split, given: Sequence[Sequence[tuple[Answer, np.ndarray]]]
) -> Evaluation:
    """The evaluation of one answer to each example, with its labels' probabilities."""
    found = split.measure([[ids for _, ids in task] for task in given])
    scores = [answer.scores for answer, _ in given[0]]
    known = [each for each in scores if each is not None]
    if len(known) < len(scores):
        return found
    return dataclasses.replace(found, probabilities=known)
