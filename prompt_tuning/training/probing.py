# SPDX-License-Identifier: Apache-2.0
"""What a frozen model's encoder knows of tasks that it was not trained on.

A logistic regression reads the mean of an encoder's states, another one the mean of
the embeddings that went in. An encoder whose states tell no more than its embeddings
adds nothing that a prompt could steer, however low its pre-training loss is.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning.data import rows as row_files
from prompt_tuning.data.span_corruption import EOS_ID
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.types import Array, Params

BATCH_SIZE = 64
# Rows are padded to multiples of the first and cut at the second.
LENGTH_STEP, LONGEST = 32, 96


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of one part of a task.

    Attributes:
      texts: of every row.
      ids: token ids of every row, each ended by EOS.
      labels: index into the task's labels: [N].
    """

    texts: Sequence[str]
    ids: Sequence[np.ndarray]
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class ProbeTask:
    """A labelled task in two parts.

    Attributes:
      name: of the task.
      labels: what the classes are called, in alphabetical order.
      train: what is learned from.
      test: what is measured.
    """

    name: str
    labels: tuple[str, ...]
    train: Split
    test: Split


def load(folder: str | pathlib.Path, vocabulary: str | pathlib.Path) -> list[ProbeTask]:
    """Reads every ``NAME.jsonl`` of a folder, whose rows have text, label and split.

    Args:
      folder: where the files lie (see `scripts/mini/probe_tasks.py`).
      vocabulary: the SentencePiece model to encode with.

    Raises:
      UserError: the folder has no task, or the vocabulary is missing.
    """
    # Not at the top: most of the package does without it.
    import sentencepiece

    files = sorted(pathlib.Path(folder).glob("*.jsonl"))
    if not files:
        raise UserError(f"{folder} holds no task to probe, which is a NAME.jsonl")
    if not pathlib.Path(vocabulary).exists():
        raise UserError(f"{vocabulary} is missing; probed texts are encoded by it")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    return [_read(file, processor) for file in files]


def _read(path: pathlib.Path, processor) -> ProbeTask:
    rows = [record.values for record in row_files.read(path)]
    labels = tuple(sorted({row["label"] for row in rows}))

    def split(name: str) -> Split:
        chosen = [row for row in rows if row["split"] == name]
        texts = [row["text"] for row in chosen]
        ids = [
            np.array([*item[: LONGEST - 1], EOS_ID], np.int32)
            for item in processor.encode(texts)
        ]
        return Split(
            texts, ids, np.array([labels.index(row["label"]) for row in chosen])
        )

    return ProbeTask(path.stem, labels, split("train"), split("test"))


class Encoder:
    """Mean states of a model, compiled once for every length of rows."""

    def __init__(self, model: Model):
        """Of a model without prompts."""
        network = model.network

        def means(params: Params, ids: Array) -> tuple[Array, Array]:
            encoded = network.apply(
                {"params": params}, ids, enable_dropout=False, method="encode"
            )
            embedded = params["token_embedder"]["embedding"][ids]
            there = (ids > 0)[..., None]
            total = jnp.sum(there, 1)
            mean = lambda x: jnp.sum(x.astype(jnp.float32) * there, 1) / total
            return mean(encoded), mean(embedded)

        self._means = jax.jit(means)

    def __call__(
        self, params: Params, rows: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:  # [N, H] each
        """Means of the encoder's states, and of the embeddings, of every row."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        encoded, embedded = [], []
        for begin in range(0, len(order), BATCH_SIZE):
            places = order[begin : begin + BATCH_SIZE]
            longest = max(len(rows[i]) for i in places)
            ids = np.zeros((BATCH_SIZE, -(-longest // LENGTH_STEP) * LENGTH_STEP), int)
            ids[len(places) :, 0] = EOS_ID
            for row, i in enumerate(places):
                ids[row, : len(rows[i])] = rows[i]
            first, second = jax.device_get(self._means(params, ids))
            encoded.append(first[: len(places)])
            embedded.append(second[: len(places)])
        back = np.argsort(order)
        return np.concatenate(encoded)[back], np.concatenate(embedded)[back]


def linear_accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, labels: np.ndarray
) -> float:
    """Test accuracy of logistic regression on standardised features [N, H].

    The strength of its penalty is scikit-learn's default: it is chosen on no row.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    return float(classifier.fit(train, train_labels).score(test, labels))


def probe(encoder: Encoder, params: Params, task: ProbeTask) -> dict[str, float]:
    """Test accuracy on mean encoder states (``states``) and on mean ``embeddings``."""
    train = encoder(params, task.train.ids)
    test = encoder(params, task.test.ids)
    return {
        name: linear_accuracy(x, task.train.labels, y, task.test.labels)
        for name, x, y in zip(("states", "embeddings"), train, test, strict=True)
    }
