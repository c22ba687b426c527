# SPDX-License-Identifier: Apache-2.0
"""One answer from the answers of several prompts (Lester et al. 2021, section 6).

The paper votes by simple majority and says nothing of ties, which five prompts and two
labels do not have. Here a tie goes to the tied answer that the earliest prompt gave, so
the order in which a row names its prompts decides.

References: https://arxiv.org/abs/2104.08691
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.errors import UserError


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one prompt, or all of them together, answer to a row.

    Attributes:
      text: the answer.
      scores: label to probability, or to its share of the votes; None where the answer
        is free text.
      log_probs: label to log-probability, where labels were ranked.
    """

    text: str
    scores: Mapping[str, float] | None = None
    log_probs: Mapping[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """What users are told: ``answer`` and, with labels, ``scores``."""
        scores = {} if self.scores is None else {"scores": dict(self.scores)}
        return {"answer": self.text, **scores}


def ranked(labels: Sequence[str], log_likelihoods: np.ndarray) -> Answer:  # [C]
    """The label of the highest log-likelihood; the first of those that tie."""
    log_probs = log_softmax(log_likelihoods)
    return Answer(
        labels[int(np.argmax(log_likelihoods))],
        dict(zip(labels, np.exp(log_probs).tolist(), strict=True)),
        dict(zip(labels, log_probs.tolist(), strict=True)),
    )


def log_softmax(log_likelihoods: np.ndarray) -> np.ndarray:  # [C] -> [C] float64
    """Log-probabilities of labels among each other."""
    shifted = log_likelihoods - np.max(log_likelihoods).astype(np.float64)
    return shifted - np.log(np.exp(shifted).sum())


def vote(answers: Sequence[Answer], metrics: Sequence[float | None]) -> Answer:
    """The answer that most prompts gave; of tied ones that of the earliest prompt."""
    del metrics
    votes = collections.Counter(answer.text for answer in answers)
    names = [*(answers[0].scores or ()), *votes]
    shares = {name: votes[name] / len(answers) for name in names}
    # Counters keep the order in which answers were met, also among equal counts.
    return Answer(votes.most_common(1)[0][0], shares)


def mean(answers: Sequence[Answer], metrics: Sequence[float | None]) -> Answer:
    """The label of the highest mean log-probability over the prompts.

    Raises:
      UserError: the prompts do not rank the same labels.
    """
    del metrics
    tables = [answer.log_probs or {} for answer in answers]
    labels = tuple(tables[0])
    if not labels or any(set(table) != set(labels) for table in tables):
        raise UserError(
            "the prompts do not rank the same labels, so there is no mean: give the row "
            "'labels'"
        )
    logs = np.array([[table[label] for label in labels] for table in tables])
    return ranked(labels, logs.mean(axis=0))


def best(answers: Sequence[Answer], metrics: Sequence[float | None]) -> Answer:
    """The answer of the prompt with the best validation metric; ties go to the first.

    Raises:
      UserError: a prompt's card has no metric.
    """
    if None in metrics:
        raise UserError(
            "which prompt is best is not known: a card has no validation metric; "
            "combine by 'vote' or 'mean'"
        )
    return answers[int(np.argmax(np.asarray(metrics, float)))]


# How a row may ask for its prompts' answers to be combined. Each is given one answer
# and one validation metric for each prompt, in the row's order.
RULES: dict[str, Callable[[Sequence[Answer], Sequence[float | None]], Answer]] = {
    "vote": vote,
    "mean": mean,
    "best": best,
}


def validation_metric(card: Mapping[str, Any]) -> float | None:
    """The number that chose the prompt's step: the mean of its validation metrics."""
    values = list((card.get("metric") or {}).values())
    return float(np.mean(values)) if values and None not in values else None
