# SPDX-License-Identifier: Apache-2.0
"""How unlike a prompt treats groups of rows: gaps between them, and how sure they are.

The figures are those of the field (Hardt et al. 2016, https://arxiv.org/abs/1610.02413):
a gap in the positive rate is one of demographic parity, in the true-positive rate one of
equal opportunity.
"""

import collections
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.data import answer_statistics
from prompt_tuning.errors import UserError
from prompt_tuning.network.losses import MOST_GROUPS

ACCURACY = "accuracy"
POSITIVE_RATE = "positive_rate"
TRUE_POSITIVE_RATE = "true_positive_rate"
FIGURES = (ACCURACY, POSITIVE_RATE, TRUE_POSITIVE_RATE)


def groups_of(
    rows: Sequence[Mapping[str, Any]],
    column: str,
    where: str,
    called: str = "GROUP_COLUMN",
) -> list[str]:
    """The group of each row, as text.

    Args:
      rows: column -> value.
      column: the one that holds the group.
      where: the file, for messages.
      called: what names the column, for messages.

    Raises:
      UserError: a row lacks the column or its value, or the column has one value, or so
        many that they are no groups.
    """
    found = []
    for number, row in enumerate(rows, start=1):
        if column not in row:
            raise UserError(
                f"{where}, row {number}: {called}={column!r} is no column of it; it "
                f"has {', '.join(map(str, row))}"
            )
        value = row[column]
        if value is None or not str(value).strip():
            raise UserError(
                f"{where}, row {number}: the group column {column!r} is empty: give it a "
                "value, such as 'unknown', or leave the row out"
            )
        found.append(str(value).strip())
    different = dict.fromkeys(found)
    if len(different) < 2:
        raise UserError(
            f"{where}: the group column {column!r} has only the value "
            f"{next(iter(different), '')!r}: there is nothing to compare; give rows of two "
            "groups or more"
        )
    if len(different) > MOST_GROUPS:
        raise UserError(
            f"{where}: the group column {column!r} has {len(different)} values, more than "
            f"{MOST_GROUPS}: name a column of groups"
        )
    return found


def cells(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], where: str
) -> list[str]:
    """Of each row its values of several columns, such as the group and the label.

    Raises:
      UserError: see `groups_of`, of each column.
    """
    values = [groups_of(rows, column, where, "BALANCE") for column in columns]
    return ["\t".join(cell) for cell in zip(*values, strict=True)]


def balanced(cells: Sequence[Hashable]) -> list[int]:
    """Places of rows, each at least once, as many of each cell as the largest has.

    Rows of a smaller cell are repeated, none of them more often than its neighbours by
    two or more.

    >>> balanced(["a", "a", "b", "a"])
    [0, 1, 2, 3, 2, 2]
    """
    places = collections.defaultdict(list)
    for place, cell in enumerate(cells):
        places[cell].append(place)
    most = max(map(len, places.values()), default=0)
    again = [np.resize(own, most)[len(own) :] for own in places.values()]
    return [*range(len(cells)), *map(int, np.concatenate(again or [[]]))]


def positive_of(labels: Sequence[str] | None, positive: str | None) -> str:
    """The label that counts as positive: of two the second, unless one is named.

    Raises:
      UserError: there are no labels, ``positive`` is none of them, or it has to be named.
    """
    if labels is None:
        raise UserError(
            "groups are compared by labels, and the answers here are free text: leave "
            "GROUP_COLUMN out"
        )
    if positive is None and len(labels) == 2:
        return labels[1]
    if positive is None or positive not in labels:
        why = (
            "is not set" if positive is None else f"is {positive!r}, which is no label"
        )
        raise UserError(
            f"POSITIVE_LABEL {why}: choose one of {', '.join(labels)}, the answer that "
            "people would rather have"
        )
    return positive


def of_groups(
    answers: Sequence[str],
    targets: Sequence[str],
    groups: Sequence[str],
    positive: str,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """What answers are worth to each group, and how far the groups lie apart.

    >>> gaps = of_groups("aabb", "abab", ["x", "x", "y", "y"], "a", samples=0)["gaps"]
    >>> gaps["positive_rate"]
    {'gap': 100.0, 'highest': 'x', 'lowest': 'y'}

    Args:
      answers: one for each row.
      targets: likewise.
      groups: likewise.
      positive: the label that counts as positive.
      samples: how often rows are drawn for the 95 % intervals; 0 gives none.
      seed: of the drawing.

    Returns:
      All figures in percent. ``groups``, of each its ``rows``, ``accuracy``, the
      ``positive_rate`` (how often it is answered ``positive``), the
      ``true_positive_rate`` (how often it is where the target is; None where no target
      is) and ``intervals``; ``gaps``, of each figure the largest ``gap`` between two
      groups in percentage points, which two, and the ``interval`` of the difference of
      these two, which lies on both sides of 0 where the rows do not tell them apart.
      None in place of a gap where fewer than two groups have the figure.
    """
    rates = _Rates(answers, targets, groups, positive)
    names = rates.names
    whole = rates(np.arange(len(groups)))
    # The first of the highest and the last of the lowest: two groups, though all be alike.
    ends = {
        figure: (
            int(np.nanargmax(values)),
            len(names) - 1 - int(np.nanargmin(values[::-1])),
        )
        for figure, values in whole.items()
        if np.count_nonzero(~np.isnan(values)) > 1
    }

    def drawn(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
        """A metric of row numbers, for `answer_statistics.intervals`."""
        del predictions
        found = rates(np.asarray(targets))
        figures = {
            f"{figure} {i}": float(value)
            for figure, values in found.items()
            for i, value in enumerate(values)
        }
        gaps = {
            figure: float(found[figure][high] - found[figure][low])
            for figure, (high, low) in ends.items()
        }
        # A group that was not drawn says nothing.
        return {k: x for k, x in (figures | gaps).items() if not np.isnan(x)}

    sure: dict[str, tuple[float, float]] = {}
    if samples:
        rows = range(len(groups))
        sure = answer_statistics.intervals(drawn, rows, rows, samples, seed)
    counts = collections.Counter(groups)
    told: dict[str, Any] = {}
    for i, name in enumerate(names):
        values = {figure: float(whole[figure][i]) for figure in FIGURES}
        told[name] = {
            "rows": counts[name],
            **{k: None if np.isnan(x) else x for k, x in values.items()},
        }
        if samples:
            told[name]["intervals"] = {
                k: sure[f"{k} {i}"] for k in FIGURES if f"{k} {i}" in sure
            }
    gaps: dict[str, Any] = dict.fromkeys(FIGURES)
    for figure, (high, low) in ends.items():
        gaps[figure] = {
            "gap": float(whole[figure][high] - whole[figure][low]),
            "highest": names[high],
            "lowest": names[low],
        }
        if figure in sure:
            gaps[figure]["interval"] = sure[figure]
    return {"positive": positive, "groups": told, "gaps": gaps}


class _Rates:
    """The figures of every group, of any choice of rows."""

    def __init__(
        self,
        answers: Sequence[str],
        targets: Sequence[str],
        groups: Sequence[str],
        positive: str,
    ):
        self.names = sorted(set(groups))
        self._group = np.array([self.names.index(group) for group in groups])
        said = np.array([answer == positive for answer in answers])
        meant = np.array([target == positive for target in targets])
        right = np.array([a == t for a, t in zip(answers, targets, strict=True)])
        every = np.ones(len(said), bool)
        # What is averaged for each figure, and over which rows.
        self._parts = {
            ACCURACY: (right, every),
            POSITIVE_RATE: (said, every),
            TRUE_POSITIVE_RATE: (said, meant),
        }

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Of each figure, the percentage in every group; NaN where it has no row."""
        found = {}
        for figure, (value, counted) in self._parts.items():
            inside = rows[counted[rows]]
            size = len(self.names)
            total = np.bincount(self._group[inside], value[inside], size)
            count = np.bincount(self._group[inside], minlength=size)
            with np.errstate(invalid="ignore"):
                found[figure] = 100 * total / count
        return found
