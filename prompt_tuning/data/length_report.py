# SPDX-License-Identifier: Apache-2.0
"""What the lengths of a split's examples say before anything is trained on them.

Which inputs lose their end, how much of the rows is padding, and to which few lengths
batches are worth padding instead. Arithmetic alone: `split_lengths` measures seqio's
tasks, `in_memory` the examples that it holds.
"""

import dataclasses

import numpy as np

from prompt_tuning.data import buckets


def told_of_cut(count: int, which: str, room: int, longest: int) -> str:
    """Says that inputs are cut: how many, of which, to how many tokens."""
    return (
        f"{count} {which} lose their end: they are longer than {room} tokens (the "
        f"longest has {longest})"
    )


@dataclasses.dataclass(frozen=True)
class Fill:
    """How much of the rows is tokens; the rest is padding.

    Attributes:
      encoder: share of the encoder's positions that hold tokens.
      decoder: likewise of the decoder's.
      examples_per_row: examples that a row holds on average.
    """

    encoder: float
    decoder: float
    examples_per_row: float


@dataclasses.dataclass(frozen=True)
class LengthReport:
    """How the lengths of a split's examples compare with the room for them.

    Attributes:
      examples: examples that were looked at.
      complete: whether those are all of the split.
      inputs_cut: inputs with more text tokens than there is room for.
      longest_inputs: text tokens of the longest inputs.
      longest_targets: tokens of the longest targets.
      inputs_length: text tokens that there is room for.
      room: positions of an encoder and of a decoder row, (T + P, S).
      tokens: what each example takes of such rows once it is cut: [examples, 2].
      digest: hash of the examples, or '' where they are told apart otherwise.
    """

    examples: int
    complete: bool
    inputs_cut: int
    longest_inputs: int
    longest_targets: int
    inputs_length: int
    room: tuple[int, int]
    tokens: np.ndarray
    digest: str = ""

    def message(self, room: str = "TASK_FEATURE_LENGTHS['inputs']") -> str | None:
        """One line for the user, if any inputs lose their end; ``room`` is its name."""
        if not self.inputs_cut:
            return None
        seen = f"of {'' if self.complete else 'the first '}{self.examples} inputs"
        said = told_of_cut(
            self.inputs_cut, seen, self.inputs_length, self.longest_inputs
        )
        return f"{said}; raise {room} to keep them whole"

    def edges(self, batch_size: int) -> tuple[int, ...]:
        """The few lengths that batches of this split are padded to, ascending.

        The last is the whole room, for a batch with a longer row than was seen.
        """
        found = buckets.edges_for(self._longest_of_batches(batch_size), most=3)
        return tuple(sorted({*found, self.room[0]}))

    def fill(self, batch_size: int, *, pack: bool = False) -> Fill:
        """How full the rows are: packed, or padded to `edges`."""
        inputs_length, targets_length = self.room
        if pack:
            rows = buckets.packed_rows(self._shuffled(), self.room)
            positions = rows * inputs_length
        else:
            rows = self.examples
            edges = self.edges(batch_size)
            longest = self._longest_of_batches(batch_size)
            positions = rows * np.mean([buckets.fitting(n, edges) for n in longest])
        inputs, targets = self.tokens.sum(axis=0)
        return Fill(
            float(inputs / positions),
            float(targets / (rows * targets_length)),
            self.examples / rows,
        )

    def _shuffled(self) -> np.ndarray:  # [examples, 2]
        """The examples in an order like training's; a file may be sorted."""
        return np.random.default_rng(0).permutation(self.tokens)

    def _longest_of_batches(self, batch_size: int) -> np.ndarray:
        lengths = self._shuffled()[:, 0]
        return np.maximum.reduceat(lengths, np.arange(0, len(lengths), batch_size))
