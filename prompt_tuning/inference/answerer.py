# SPDX-License-Identifier: Apache-2.0
"""Answers to rows of one prompt, in batches of like lengths; no TensorFlow.

Answers are either ranked, where there is a label set (the label of the highest
likelihood wins), or decoded. Training evaluates with this; `engine` answers rows of
many prompts.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prompt_tuning import decoding, processes
from prompt_tuning.data import buckets, label_sets
from prompt_tuning.data.label_sets import Encoder, label_tokens
from prompt_tuning.devices import sharding
from prompt_tuning.network.model import Model
from prompt_tuning.types import Params

# The most lengths that batches of a split are padded to: each is one more program.
MOST_LENGTHS = 4


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics of a split; answers and targets of its (first task's) examples.

    Attributes:
      metrics: by name.
      answers: one for each example.
      targets: likewise.
      probabilities: of each example, those of the labels; empty where none were ranked.
      intervals: bootstrap intervals of the metrics, from a number of samples; None where
        nobody can say.
      inputs: gives the text of each example, without its prompt; likewise.
      right: gives whether each answer is right, or None where no metric says it of one
        answer; likewise.
    """

    metrics: Mapping[str, float]
    answers: Sequence[str]
    targets: Sequence[str]
    probabilities: Sequence[Mapping[str, float]] = ()
    intervals: Callable[[int], Mapping[str, tuple[float, float]]] | None = None
    inputs: Callable[[], Sequence[str]] | None = None
    right: Callable[[], Sequence[bool] | None] | None = None


class Answerer:
    """Gives token ids of answers to rows of encoder inputs.

    Attributes:
      labels: the label set that answers come from, or None where they are free text.
    """

    def __init__(
        self,
        model: Model,
        vocabulary: Encoder,
        *,
        labels: Sequence[str] | None = None,
        label_scores: str = label_sets.SUM,
        strategy: Callable[..., decoding.Strategy] | None = None,
        max_decode_len: int = 32,
        seed: int = 0,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Ranks ``labels`` or, given a ``strategy``, has it search among them.

        Ranked labels are compared by ``label_scores`` (see `label_sets`).

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
        self._label_scores = label_scores
        self._ranks = self.labels is not None and strategy is None
        if self.labels is not None:
            self._label_ids = label_tokens(self.labels, vocabulary)  # [C, S]
        if self._ranks:
            self._rank = jax.jit(model.rank)
            return
        chosen = (strategy or decoding.Greedy)(
            max_decode_len=max_decode_len,
            eos_id=vocabulary.eos_id,  # pyright: ignore[reportArgumentType]
        )
        self._trie = None
        if self.labels is not None:
            self._trie = decoding.LabelTrie.build(
                [self._label_ids],  # pyright: ignore[reportArgumentType]
                chosen.max_decode_len,
                chosen.eos_id,
            )
        self._calls = itertools.count()

        def predict(params, tokens, call, constraint):
            key = jax.random.fold_in(jax.random.key(seed), call)
            decoded, _ = model.predict(
                params, tokens, chosen, key, constraint=constraint
            )
            return decoded[:, -1]

        self._predict = jax.jit(predict)

    def scores(
        self, params: Params, tokens: np.ndarray
    ) -> jax.Array | np.ndarray:  # [B, C]
        """Log-likelihood of every label."""
        ranked = self._rank(params, self._spread(tokens), self._label_ids)
        return processes.whole(ranked)[: len(tokens)]

    def answer(self, params: Params, tokens: np.ndarray) -> np.ndarray:  # [B, S]
        """Token ids of the best answers."""
        if not self._ranks:
            constraint = None
            if self._trie is not None:
                constraint = self._trie.rows([0] * len(tokens))
                constraint = dataclasses.replace(
                    constraint, nodes=self._spread(constraint.nodes)
                )
            decoded = self._predict(
                params, self._spread(tokens), next(self._calls), constraint
            )
            return np.asarray(processes.whole(decoded))[: len(tokens)]
        found = np.asarray(self.scores(params, tokens))
        compared = label_sets.compared(found, self._label_ids, self._label_scores)
        best = np.argmax(compared, axis=-1)
        return self._label_ids[best]

    def _spread(self, tokens: Any) -> Any:
        return (
            tokens if self._mesh is None else sharding.spread_rows(tokens, self._mesh)
        )


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


def answer_all(
    answerer: Answerer,
    params: Params,
    tokens: np.ndarray,  # [N, T]
    batch_size: int,
) -> list[np.ndarray]:  # N of [S]
    """Token ids of the answers to padded rows, in their order.

    Rows are answered in batches of like lengths, so that the cost follows the texts and
    not the room that there is for them.
    """
    found: dict[int, np.ndarray] = {}
    for part in batches_by_length(tokens, batch_size):
        batch = np.zeros((batch_size, part.length), np.int32)
        batch[: len(part.indices)] = tokens[part.indices, : part.length]
        given = answerer.answer(params, batch)
        found.update(zip(part.indices.tolist(), given))
    return [found[i] for i in range(len(tokens))]
