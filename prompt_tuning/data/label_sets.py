# SPDX-License-Identifier: Apache-2.0
"""The answers that a row allows, as token ids."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from prompt_tuning.data import rows
from prompt_tuning.errors import UserError

# How labels are compared: by the log-likelihood of their tokens, or by its mean over
# them, in which a long label does not lose for its length (Brown et al. 2020, section
# 2.4, https://arxiv.org/abs/2005.14165).
SUM, MEAN = "sum", "mean"
SCORES = (SUM, MEAN)
# The names of a value's labels, or labels in order, whose index or name is the value.
LabelNames = Mapping[Any, str] | Sequence[str]


class Encoder(Protocol):
    """What labels are written with: a vocabulary of ours, or one of seqio."""

    @property
    def eos_id(self) -> int | None:
        """Ends a text."""
        ...

    @property
    def unk_id(self) -> int | None:
        """Stands for what has no piece."""
        ...

    def encode(self, text: str, /) -> Sequence[int]:
        """Ids of a text, without EOS."""
        ...


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """The answers that a row allows.

    Attributes:
      names: the labels.
      tokens: their ids, each ended by EOS and padded: ``[C, S]``.
      scores: one of `SCORES`.
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    scores: str = SUM

    def compared(self, log_likelihoods: np.ndarray) -> np.ndarray:  # [..., C]
        """What labels are compared by, from the log-likelihoods of their tokens."""
        return compared(log_likelihoods, self.tokens, self.scores)


def compared(
    log_likelihoods: np.ndarray,  # [..., C]
    tokens: np.ndarray,  # [C, S]
    scores: str,
) -> np.ndarray:
    """See `LabelSet.compared`."""
    if scores == SUM:
        return log_likelihoods
    return log_likelihoods / np.count_nonzero(tokens, axis=-1)


def check_scores(scores: Any, called: str = "LABEL_SCORES") -> str:
    """One of `SCORES`.

    Raises:
      UserError: it is another.
    """
    if scores not in SCORES:
        raise UserError(
            f"{called}={scores!r} must be '{SUM}', the likelihood of a label, or "
            f"'{MEAN}', its mean over the label's tokens"
        )
    return scores


def names_of_values(
    names: LabelNames | None, called: str = "LABEL_NAMES"
) -> dict[str, str] | None:
    """The label that each value of an answer, as text, stands for.

    >>> names_of_values(["no", "yes"])
    {'0': 'no', '1': 'yes', 'no': 'no', 'yes': 'yes'}

    Args:
      names: a mapping from values to labels, or labels in order, for which a value is an
        index or the name itself; None takes values as they are.
      called: what the user calls them.

    Raises:
      UserError: they are no texts, or a value is the index of one label and the name of
        another.
    """
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Mapping | Sequence):
        raise UserError(
            f"{called}={names!r}: give a list of texts, or a mapping from the data's "
            "values to them"
        )
    given = names.values() if isinstance(names, Mapping) else names
    for name in given:
        if not rows.is_text(name):
            raise UserError(
                f"{called} has {name!r}, which is no text: write it in quotes"
            )
    if isinstance(names, Mapping):
        # A truth value is called otherwise by JSON than by what Python writes.
        spelled = lambda value: {str(value), rows.text_of(value, called)}
        return {text: name for value, name in names.items() for text in spelled(value)}
    by_index = {str(i): name for i, name in enumerate(names)}
    for name in names:
        if by_index.get(name, name) != name:
            raise UserError(
                f"{called}={list(names)} is ambiguous: the value {name} may be the "
                f"label {name!r} by its name or {by_index[name]!r} by its index; give a "
                f"mapping, {dict(enumerate(names))} by index or { {n: n for n in names} } "
                "by name"
            )
    return by_index | {name: name for name in names}


def refuse_answers_in_inputs(
    columns: Sequence[str], target_column: str, names: LabelNames | None
) -> None:
    """Refuses inputs that hold the label that is asked for.

    Raises:
      UserError: they do.
    """
    if names is not None and target_column in columns:
        raise UserError(
            f"the template names the column {target_column!r}, which holds the answer: "
            "leave it out of the template"
        )


def with_labels(
    batches: Iterator[Mapping[str, np.ndarray]], tokens: np.ndarray, task: str
) -> Iterator[dict[str, np.ndarray]]:
    """Batches whose rows have ``label_tokens`` [B, C, S] as well.

    Args:
      batches: with ``decoder_target_tokens`` [B, S].
      tokens: the labels, [C, S].
      task: its name.

    Raises:
      UserError: a row's target is no label.
    """
    for batch in batches:
        targets = np.asarray(batch["decoder_target_tokens"])
        known = {row[row > 0].tobytes() for row in tokens.astype(targets.dtype)}
        right = np.array([row[row > 0].tobytes() in known for row in targets])
        if not right.all():
            raise UserError(
                f"{task} has a target that is none of its labels, with "
                f"{np.count_nonzero(targets[~right][0])} tokens: LABEL_LOSS compares "
                "labels; leave it out, or give the targets more room in "
                "TASK_FEATURE_LENGTHS"
            )
        yield {**batch, "label_tokens": np.tile(tokens, (len(targets), 1, 1))}


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
