# SPDX-License-Identifier: Apache-2.0
"""Splits and slices of them, written as TFDS writes them: ``train[:32]``."""

import re

from prompt_tuning.errors import UserError

TRAIN, VALIDATION = "train", "validation"
_SLICE = re.compile(r"(?P<name>[^\[\]]+)\[(?P<first>[^:\[\]]*):(?P<end>[^:\[\]]*)\]")
_BOUND = re.compile(r"(\d{1,12})(%?)")


def name_of(split: str) -> str:
    """The split that ``split`` is, or is a slice of.

    >>> name_of("train[:32]"), name_of("test")
    ('train', 'test')
    """
    match = _SLICE.fullmatch(split)
    return match["name"] if match else split


def rows_of(split: str, count: int) -> slice:
    """Which of a split's rows are meant.

    >>> rows_of("train[32:]", 100), rows_of("train[:10%]", 50), rows_of("test", 3)
    (slice(32, 100, None), slice(0, 5, None), slice(0, 3, None))

    Args:
      split: a name, or a slice of it by rows or percent.
      count: its rows.

    Raises:
      UserError: it is no slice, or one without rows.
    """
    match = _SLICE.fullmatch(split)
    if match is None:
        return slice(0, count)
    first = _bound(match["first"], 0, count, split)
    end = _bound(match["end"], count, count, split)
    if first >= end:
        raise UserError(f"{split} has no rows: {match['name']} has {count}")
    return slice(first, end)


def _bound(text: str, default: int, count: int, split: str) -> int:
    if not text:
        return default
    match = _BOUND.fullmatch(text)
    if match is None or (match[2] and int(match[1]) > 100):
        raise UserError(
            f"{split} is no slice of a split: write NAME[FIRST:END] in rows, END "
            "excluded, or in percent (train[:32], train[90%:])"
        )
    if match[2]:
        return count * int(match[1]) // 100
    if int(match[1]) > count:
        raise UserError(f"{split} names more rows than there are: {count}")
    return int(match[1])
