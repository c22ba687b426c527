# SPDX-License-Identifier: Apache-2.0
"""The answers that a row allows, as token ids."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from prompt_tuning.errors import UserError


class Encoder(Protocol):
    """What labels are written with: a vocabulary of ours, or one of seqio."""

    @property
    def eos_id(self) -> int | None:
        """Ends a text."""

    @property
    def unk_id(self) -> int | None:
        """Stands for what has no piece."""

    def encode(self, text: str, /) -> Sequence[int]:
        """Ids of a text, without EOS."""


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """The answers that a row allows.

    Attributes:
      names: the labels.
      tokens: their ids, each ended by EOS and padded: ``[C, S]``.
    """

    names: tuple[str, ...]
    tokens: np.ndarray


def label_tokens(labels: Sequence[str], vocabulary: Encoder) -> np.ndarray:
    """Ids of the labels, each ended by EOS and padded: [C, S].

    Raises:
      UserError: a label has pieces outside the vocabulary, or two labels are equal.
    """
    ids = [list(vocabulary.encode(label)) for label in labels]
    for label, pieces in zip(labels, ids):
        if not pieces or vocabulary.unk_id in pieces:
            raise UserError(
                f"label {label!r} has pieces that the vocabulary does not know; use "
                "another word for it"
            )
    if len(set(map(tuple, ids))) < len(ids):
        raise UserError(f"two of the labels {', '.join(labels)} are the same tokens")
    table = np.zeros((len(ids), 1 + max(map(len, ids))), np.int32)
    for row, pieces in zip(table, ids):
        row[: len(pieces) + 1] = [*pieces, vocabulary.eos_id]
    return table
