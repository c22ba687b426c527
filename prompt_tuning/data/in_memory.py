# SPDX-License-Identifier: Apache-2.0
"""Batches of tokenised examples that are held in memory; NumPy alone.

What `batching` does for seqio's tasks: the stream of global batches depends on the
examples, the seed and the batch size alone, and a run goes on with any batch of it.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from prompt_tuning.data import buckets
from prompt_tuning.data.length_report import LengthReport
from prompt_tuning.errors import UserError


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a split as token ids.

    Attributes:
      inputs: of every example, those of its prompt included: ``[T]`` each.
      targets: of every example, EOS included: ``[S]`` each.
    """

    inputs: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.inputs)

    def features(
        self, indices: Sequence[int] | np.ndarray, length: int, targets_length: int
    ) -> dict[str, np.ndarray]:
        """T5X's features of some examples.

        Args:
          indices: which examples: [B].
          length: what encoder rows are padded to, T.
          targets_length: what decoder rows are padded to, S.

        Returns:
          ``encoder_input_tokens`` [B, T], and [B, S] ``decoder_input_tokens``,
          ``decoder_target_tokens``, ``decoder_loss_weights``.
        """
        targets = padded([self.targets[i] for i in indices], targets_length)
        shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
        return {
            "encoder_input_tokens": padded([self.inputs[i] for i in indices], length),
            "decoder_input_tokens": shifted,
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (targets > 0).astype(np.float32),
        }


class ShuffledBatches(Iterator[dict[str, np.ndarray]]):
    """One process's rows of shuffled batches without end, from any batch on.

    Every pass over the examples has an order of its own, which the seed decides; a batch
    that meets the end of a pass is filled up from the next one.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        *,
        edges: Sequence[int],
        targets_length: int,
        start_batch: int = 0,
        shard_info: tuple[int, int] = (0, 1),
    ):
        """Draws nothing yet.

        Args:
          examples: one or more.
          batch_size: rows of a batch over all processes.
          seed: of the order.
          edges: the lengths that encoder rows may have, ascending; a batch, over all
            processes, is padded to the smallest that its longest row fits in.
          targets_length: the length of decoder rows.
          start_batch: number of the first batch to give.
          shard_info: this process's index and the number of processes.

        Raises:
          UserError: the rows do not divide among the processes.
        """
        process, count = shard_info
        if batch_size % count:
            raise UserError(
                f"a batch of {batch_size} does not divide among {count} processes"
            )
        rows = batch_size // count
        self._own = slice(process * rows, (process + 1) * rows)
        self._examples = examples
        self._lengths = np.array([len(ids) for ids in examples.inputs])
        self._batch_size = batch_size
        self._seed = seed
        self._edges = tuple(edges)
        self._targets_length = targets_length
        self._position = start_batch
        self._orders: dict[int, np.ndarray] = {}

    def __next__(self) -> dict[str, np.ndarray]:
        size = len(self._examples)
        first = self._position * self._batch_size
        places = np.arange(first, first + self._batch_size)
        passes = {
            number: self._order(number) for number in set((places // size).tolist())
        }
        self._orders = passes
        indices = np.array([passes[place // size][place % size] for place in places])  # pyright: ignore[reportArgumentType]
        self._position += 1
        # Padding follows the batch of all processes, so that they run one program.
        length = buckets.fitting(int(self._lengths[indices].max()), self._edges)
        return self._examples.features(indices[self._own], length, self._targets_length)

    def _order(self, number: int) -> np.ndarray:
        """The order of a pass over the examples."""
        if number in self._orders:
            return self._orders[number]
        random = np.random.default_rng([self._seed, number])
        return random.permutation(len(self._examples))


def padded(rows: Sequence[np.ndarray], length: int) -> np.ndarray:  # [B, length] int32
    """Rows of token ids, filled up with zeros."""
    table = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(table, rows, strict=True):
        row[: len(ids)] = ids
    return table


def cut(ids: np.ndarray, text_length: int, eos_id: int) -> np.ndarray:
    """Cuts the text of one example to ``text_length`` tokens, as `batching` does.

    Text goes off the end; a final EOS stays, and so do positions of a prompt, which are
    negative.

    >>> cut(np.array([-1, 5, 6, 7, 1]), 3, eos_id=1).tolist()
    [-1, 5, 6, 1]
    """
    text = np.flatnonzero(ids >= 0)
    if len(text) <= text_length:
        return ids
    ends = ids[text[-1]] == eos_id
    dropped = text[text_length - 1 : -1] if ends else text[text_length:]
    return np.delete(ids, dropped)


def report_of(
    examples: Examples,
    text_lengths: Sequence[int],
    inputs_length: int,
    prompt_length: int,
) -> LengthReport:
    """How the lengths of examples compare with the room for them.

    Args:
      examples: all of a split, their texts cut already.
      text_lengths: text tokens of every example before it was cut.
      inputs_length: text tokens that there is room for.
      prompt_length: positions of the prompt.
    """
    targets = [len(ids) for ids in examples.targets]
    rows = [len(ids) for ids in examples.inputs]
    return LengthReport(
        examples=len(examples),
        complete=True,
        inputs_cut=int(np.sum(np.asarray(text_lengths) > inputs_length)),
        longest_inputs=max(text_lengths),
        longest_targets=max(targets),
        inputs_length=inputs_length,
        room=(inputs_length + prompt_length, max(targets)),
        tokens=np.stack([rows, targets], axis=1),
    )
