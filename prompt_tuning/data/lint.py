# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a task, told from its labels and its rows; no TensorFlow.

A fault is what makes a run's figures wrong or impossible; a warning is what may be meant.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from prompt_tuning.data import label_sets, length_report, reach
from prompt_tuning.data.reach import WITHHELD
from prompt_tuning.data.splits import TRAIN
from prompt_tuning.errors import UserError

FAULT, WARNING = "fault", "warning"
# From these shares of a train split on a label is said to be rare, or to be nearly all.
RARE, MOSTLY = 0.01, 0.95


class Vocabulary(label_sets.Encoder, reach.Vocabulary, Protocol):
    """What labels are written with, and read back."""

    def encode(self, text: str, /) -> Sequence[int]: ...


@dataclasses.dataclass(frozen=True)
class Row:
    """An example as the model is given it.

    Attributes:
      inputs: its text.
      target: likewise.
      input_tokens: text tokens, EOS included.
      target_tokens: likewise.
    """

    inputs: str
    target: str
    input_tokens: int
    target_tokens: int


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is wrong: one of `FAULT` and `WARNING`, and a line that says it."""

    level: str
    text: str


def of_labels(
    labels: Sequence[str] | None,
    vocabulary: Vocabulary,
    lengths: Mapping[str, int] | None = None,
) -> Iterator[Finding]:
    """Whether labels can be written, told apart, and fit.

    Args:
      labels: the label set, if there is one.
      vocabulary: of the targets.
      lengths: ``TASK_FEATURE_LENGTHS``, if they are known.
    """
    if labels is None:
        return
    try:
        tokens = label_sets.label_tokens(labels, vocabulary)
    except UserError as error:
        yield Finding(FAULT, str(error))
        return
    for label in labels:
        try:
            reach.check_label(label, vocabulary)
        except UserError as error:
            yield Finding(FAULT, str(error))
    if lengths is not None and tokens.shape[1] > lengths["targets"]:
        yield Finding(
            FAULT,
            f"the longest label has {tokens.shape[1]} tokens: "
            f"TASK_FEATURE_LENGTHS['targets'] is {lengths['targets']}",
        )


def of_rows(
    splits: Mapping[str, Sequence[Row]],
    labels: Sequence[str] | None = None,
    lengths: Mapping[str, int] | None = None,
) -> Iterator[Finding]:
    """What rows say: lengths, answers, duplicates, rows of one split in another.

    Args:
      splits: rows by split.
      labels: the label set, if there is one.
      lengths: ``TASK_FEATURE_LENGTHS``, if they are known.
    """
    for split, rows in splits.items():
        if not rows:
            yield Finding(FAULT, f"{split} has no rows")
            continue
        yield from _of_split(split, rows, lengths)
        if labels is not None:
            yield from _of_answers(split, rows, labels)
    seen: dict[str, str] = {}
    for split, rows in splits.items():
        texts = {row.inputs for row in rows}
        shared = collections.Counter(seen[text] for text in texts if text in seen)
        for other, count in shared.items():
            example = next(x for x in texts if seen.get(x) == other)
            yield Finding(
                FAULT if TRAIN in (split, other) else WARNING,
                f"{count} of {len(texts)} different inputs of {split} are in {other}, "
                f"too, such as {_short(example)}",
            )
        seen |= dict.fromkeys(texts - seen.keys(), split)


def _of_split(
    split: str, rows: Sequence[Row], lengths: Mapping[str, int] | None
) -> Iterator[Finding]:
    room = lengths or {}
    longest = max(row.target_tokens for row in rows)
    if longest > room.get("targets", longest):
        count = sum(row.target_tokens > room["targets"] for row in rows)
        yield Finding(
            FAULT,
            f"{count} targets of {split} are longer than {room['targets']} tokens, the "
            f"longest has {longest}: raise TASK_FEATURE_LENGTHS['targets']",
        )
    longest = max(row.input_tokens for row in rows)
    if longest > room.get("inputs", longest):
        cut = sum(row.input_tokens > room["inputs"] for row in rows)
        said = length_report.told_of_cut(
            cut, f"inputs of {split}", room["inputs"], longest
        )
        yield Finding(WARNING, said)
    for name, texts in [
        ("inputs", [row.inputs for row in rows]),
        ("targets", [row.target for row in rows]),
    ]:
        if empty := sum(not text.strip() for text in texts):
            yield Finding(FAULT, f"{empty} {name} of {split} are empty")
    answers: dict[str, set[str]] = collections.defaultdict(set)
    for row in rows:
        answers[row.inputs].add(row.target)
    if torn := [text for text, targets in answers.items() if len(targets) > 1]:
        yield Finding(
            WARNING,
            f"{len(torn)} inputs of {split} have more than one target, such as "
            f"{_short(torn[0])}",
        )
    pairs = len({(row.inputs, row.target) for row in rows})
    if pairs < len(rows):
        yield Finding(
            WARNING, f"{len(rows) - pairs} rows of {split} are there before already"
        )


def _of_answers(
    split: str, rows: Sequence[Row], labels: Sequence[str]
) -> Iterator[Finding]:
    counts = collections.Counter(row.target.strip() for row in rows)
    strange = [x for x in counts if x not in labels and x != WITHHELD]
    if strange:
        yield Finding(
            FAULT,
            f"{sum(counts[x] for x in strange)} targets of {split} are none of the "
            f"labels, such as {_short(strange[0])}",
        )
    if counts[WITHHELD]:
        yield Finding(
            WARNING, f"{counts[WITHHELD]} targets of {split} are withheld: no metric"
        )
    if split != TRAIN:
        return
    missing = [label for label in labels if not counts[label]]
    if missing:
        yield Finding(FAULT, f"no row of {split} has the label {_short(missing[0])}")
    for label in labels:
        share = counts[label] / len(rows)
        if 0 < share < RARE or share > MOSTLY:
            yield Finding(
                WARNING, f"{share:.1%} of {split} have the label {_short(label)}"
            )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
