# SPDX-License-Identifier: Apache-2.0
"""What keeps a task's figures from what they seem to say, told before training: texts and
targets that the vocabulary lacks, rows that are trained on as well."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

from prompt_tuning.errors import UserError

# Texts that are looked at, and the share of unknown pieces from which one is said to be
# mostly unknown; neighbouring characters without a piece count as one.
EXAMPLES = 10_000
MOSTLY = 0.5
# The target of rows whose labels are kept secret, such as GLUE's test rows.
WITHHELD = "<unk>"


class Vocabulary(Protocol):
    """What is asked of a vocabulary."""

    @property
    def unk_id(self) -> int | None: ...

    def encode(self, text: str, /) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int], /) -> str: ...


def unknown_share(ids: Sequence[int], vocabulary: Vocabulary) -> float:
    """The share of a text's pieces that the vocabulary does not know."""
    ids = list(ids)
    unknown = sum(i == vocabulary.unk_id for i in ids)
    return unknown / len(ids) if ids else 0.0


def is_reachable(target: str, vocabulary: Vocabulary) -> bool:
    """Whether an answer in this vocabulary can be the target, outer spaces aside."""
    return vocabulary.decode(list(vocabulary.encode(target))).strip() == target.strip()


def check_label(label: str, vocabulary: Vocabulary) -> None:
    """Refuses a label that no answer is ever equal to.

    Raises:
      UserError: the vocabulary writes it as another text.
    """
    if not is_reachable(label, vocabulary):
        written = vocabulary.decode(list(vocabulary.encode(label))).strip()
        raise UserError(
            f"the vocabulary writes the label {label!r} as {written!r}: call it so"
        )


def messages(
    texts: Sequence[Sequence[str]],
    targets: Sequence[str],
    vocabulary: Vocabulary,
    most: int = EXAMPLES,
) -> list[str]:
    """Lines for the user on what the vocabulary lacks, none where it lacks nothing.

    Args:
      texts: of each row, the texts between the pieces of a prompt.
      targets: of each row; those that are withheld say nothing.
      vocabulary: of both.
      most: rows that are looked at.
    """
    found = []
    told = [i for i, target in enumerate(targets) if target.strip() != WITHHELD]
    texts, targets = [texts[i] for i in told], [targets[i] for i in told]
    seen = min(len(targets), most)
    of = f"of {'' if seen == len(targets) else 'the first '}{seen}"
    shares = [
        unknown_share(vocabulary.encode(" ".join(row)), vocabulary)
        for row in texts[:seen]
    ]
    if mostly := sum(share >= MOSTLY for share in shares):
        found.append(
            f"half or more of the pieces of {mostly} {of} texts are unknown to the vocabulary, which "
            "cannot tell such texts from one another"
        )
    lost = [t for t in targets[:seen] if not is_reachable(t, vocabulary)]
    if lost:
        found.append(
            f"the vocabulary cannot write {len(lost)} {of} targets, such as "
            f"{lost[0][:80]!r}: no answer is ever equal to them"
        )
    return found


def shared_rows(train: Iterable[Hashable], evaluated: Sequence[Hashable]) -> str | None:
    """A line for the user if texts of a split are texts of the training split, too."""
    seen = set(train)
    if not (shared := sum(text in seen for text in evaluated)):
        return None
    return (
        f"{shared} of {len(evaluated)} rows have the text of a row of train: their "
        "metrics say more than the prompt can do"
    )
