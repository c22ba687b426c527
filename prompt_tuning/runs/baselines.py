# SPDX-License-Identifier: Apache-2.0
"""What a tuned prompt has to beat: the majority, hand-written prompts, TF-IDF."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from prompt_tuning.network.model import Model
from prompt_tuning.runs import infer
from prompt_tuning.types import Params

Texts = Sequence[str]


@dataclasses.dataclass(frozen=True)
class HandWritten:
    """A prompt in words: a pattern around ``{text}`` and a verbalizer for each label."""

    pattern: str
    verbalizers: tuple[str, ...]


def majority(train_labels: Sequence[int], labels: Sequence[int]) -> np.ndarray:
    """Which examples the most frequent training label gets right: [N] bool."""
    answer, _ = collections.Counter(train_labels).most_common(1)[0]
    return np.asarray(labels) == answer


def hand_written(
    model: Model,
    params: Params,
    prompt: HandWritten,
    texts: Texts,
    labels: Sequence[int],
    vocabulary: str,
) -> np.ndarray:
    """Which examples the frozen model gets right by ranking the verbalizers: [N] bool."""
    rows = infer.answer_texts(
        model,
        params,
        [prompt.pattern.format(text=text) for text in texts],
        {"labels": list(prompt.verbalizers), "vocabulary": vocabulary},
        batch_size=64,
    )
    answers = [prompt.verbalizers.index(row["answer"]) for row in rows]
    return np.asarray(answers) == np.asarray(labels)


def tf_idf(
    train_texts: Texts, train_labels: Sequence[int], texts: Texts, labels: Sequence[int]
) -> np.ndarray:
    """Which examples logistic regression on TF-IDF of words gets right: [N] bool."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    classifier.fit(train_texts, train_labels)
    return classifier.predict(texts) == np.asarray(labels)


def margin_interval(
    ours: np.ndarray, theirs: np.ndarray, *, level: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """Bootstrap interval of the difference of two accuracies on the same examples.

    Args:
      ours: how often each example was answered right, in [0, 1]: [N]; the mean over
        seeds where there are several.
      theirs: likewise of the other method: [N].
      level: coverage of the interval.
      draws: resamples of the examples.
    """
    difference = np.asarray(ours, float) - np.asarray(theirs, float)
    rng = np.random.default_rng(0)
    sizes = (draws, len(difference))
    means = difference[rng.integers(0, len(difference), sizes)].mean(axis=1)
    tail = (1 - level) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))
