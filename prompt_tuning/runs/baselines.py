# SPDX-License-Identifier: Apache-2.0
"""What a tuned prompt has to beat: the majority, hand-written prompts, TF-IDF."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.data.label_sets import LabelSet, label_tokens
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.prepared_rows import Item
from prompt_tuning.inference.store import PromptStore

Texts = Sequence[str]
BATCH_SIZE = 64
# Training examples that TF-IDF is fitted to beside a run: seconds, however many there are.
MOST_FITTED = 10_000


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
    base: BaseModel,
    prompts: Sequence[HandWritten],
    texts: Texts,
    labels: Sequence[int],
    vocabulary: Vocabulary,
) -> np.ndarray:
    """Which examples the frozen model gets right by ranking the verbalizers.

    Returns:
      For each prompt, each example: ``[prompts, N]`` bool.
    """
    rows = [[{"text": text} for text in texts]] * len(prompts)
    found = log_likelihoods(base, prompts, rows, vocabulary)
    return np.stack([each.argmax(axis=1) for each in found]) == np.asarray(labels)


def log_likelihoods(
    base: BaseModel,
    prompts: Sequence[HandWritten],
    rows: Sequence[Sequence[Mapping[str, str]]],
    vocabulary: Vocabulary,
) -> Iterator[np.ndarray]:
    """What the frozen model gives the verbalizers of each prompt, prompt by prompt.

    Rows and verbalizers of all prompts are padded to the longest: one program answers.

    Args:
      base: the model.
      prompts: those to ask by.
      rows: of each prompt the columns of its rows.
      vocabulary: of the texts.

    Yields:
      Of each prompt the log-likelihoods of its verbalizers: ``[N, C]``.
    """
    if not prompts:
        return
    store = PromptStore(base, 1)
    words = np.zeros((0, store.width), np.float32)
    tables = [label_tokens(prompt.verbalizers, vocabulary) for prompt in prompts]
    widest = max(table.shape[1] for table in tables)
    asked = []
    for prompt, table, own in zip(prompts, tables, rows, strict=True):
        card = {"template": prompt.pattern}
        stored = store.add(prompt.pattern, words, card, vocabulary)
        tokens = np.pad(table, ((0, 0), (0, widest - table.shape[1])))
        verbalizers = LabelSet(prompt.verbalizers, tokens)
        asked.append(
            [Item(stored, stored.encoding.encode(row), verbalizers) for row in own]
        )
    longest = max(len(item.ids) for items in asked for item in items)
    engine = Engine(base, store, batch_sizes=(BATCH_SIZE,), lengths=(longest,))
    for items in asked:
        yield np.stack(engine.outputs(items))


def tf_idf(
    train_texts: Texts, train_labels: Sequence, texts: Texts, labels: Sequence
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


def tf_idf_accuracy(
    train: tuple[Texts, Texts], split: tuple[Texts, Texts]
) -> float | None:
    """The share of a split's examples that `tf_idf` gets right, in percent.

    Args:
      train: texts and labels to fit.
      split: texts and labels to answer.

    Returns:
      None where there is nothing to fit: a single label, or texts without a word.
    """
    if len(set(train[1])) < 2:
        return None
    try:
        right = tf_idf(*train, *split)
    except ValueError:
        # What scikit-learn says of texts in which it finds no word.
        return None
    return 100 * float(right.mean())


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
