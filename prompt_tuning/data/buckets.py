# SPDX-License-Identifier: Apache-2.0
"""Rows of many lengths in few shapes: what is computed follows what there is to read.

Every shape is a program to compile, so lengths are rounded up to a handful of edges.
All of this is arithmetic on lengths, the same in every process that is given the same
ones; it knows neither TensorFlow nor JAX.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

# Edges are multiples of this, as vector units like it.
MULTIPLE = 8
# What starting a batch costs besides its positions, in positions: a device reads all
# weights for it, in which time it could compute about so many.
BATCH_POSITIONS = 256


def used(tokens: np.ndarray) -> np.ndarray:  # [N, T] -> [N]
    """Length of every padded row up to its last token; 1 for a row without any."""
    return np.maximum(((tokens != 0) * np.arange(1, tokens.shape[1] + 1)).max(1), 1)


def edges(shortest: int, longest: int, count: int = 4) -> tuple[int, ...]:
    """Lengths that rows are padded to, ascending; the last is ``longest``.

    Each is about the same factor above the one before it, so that no row grows by more
    than this factor, ``(longest / shortest) ** (1 / count)``, and the rounding to
    `MULTIPLE`.

    Args:
      shortest: length of the shortest row; with a prompt, at least the prompt's.
      longest: length of the longest row, or the room that there is for it.
      count: the most edges, and so the most shapes that are compiled for them.

    Raises:
      ValueError: the lengths are not positive and ascending, or there is no edge.
    """
    if not 1 <= shortest <= longest or count < 1:
        raise ValueError(f"no {count} edges between lengths {shortest} and {longest}")
    factor = (longest / shortest) ** (1 / count)
    steps = [shortest * factor**i for i in range(1, count)]
    rounded = {MULTIPLE * round(step / MULTIPLE) for step in steps}
    return (*sorted(x for x in rounded if shortest <= x < longest), longest)


def edges_for(
    lengths: Sequence[int] | np.ndarray, most: int = 4, gain: float = 0.05
) -> tuple[int, ...]:
    """The edges that pad known lengths least, found by dynamic programming.

    Args:
      lengths: of every row, or the longest of every batch where those are what is
        padded.
      most: the most edges, and so the most shapes that are compiled for them.
      gain: the share of all positions that every further edge has to save.

    Returns:
      Ascending edges; the last is the longest of the lengths.

    Raises:
      ValueError: there are no lengths.
    """
    lengths = np.asarray(lengths, np.int64)
    if not lengths.size:
        raise ValueError("no lengths to find edges for")
    rounded = np.minimum(-(-lengths // MULTIPLE) * MULTIPLE, lengths.max())
    values, counts = np.unique(rounded, return_counts=True)
    below = np.cumsum(counts)
    # positions[j]: what the lengths up to values[j] take, the last edge being values[j]
    positions = (values * below).astype(float)
    chosen = [(int(value),) for value in values]
    least = gain * positions[-1]
    while len(chosen[-1]) < most:
        # Either values[j] is the only edge, or edges for values[: i + 1] come before.
        added = positions[:, None] + values * (below - below[:, None])  # [i, j]
        added[np.tril_indices(len(values))] = np.inf
        before = added.argmin(axis=0)
        better = added.min(axis=0)
        if not better[-1] <= positions[-1] - max(least, 1):
            break
        # The first value has nothing before it; it keeps its single edge.
        chosen = [
            chosen[j] if j == 0 else (*chosen[before[j]], int(values[j]))
            for j in range(len(values))
        ]
        positions = np.minimum(positions, better)
    return chosen[-1]


def fitting(length: int, edges: Sequence[int]) -> int:
    """The smallest edge that ``length`` fits in.

    Raises:
      ValueError: it fits in none.
    """
    at = bisect.bisect_left(edges, length)
    if at == len(edges):
        raise ValueError(f"length {length} is beyond the last of the edges {edges}")
    return edges[at]


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that make a batch.

    Attributes:
      indices: which rows, [b]; the caller fills b up to a size of a batch.
      length: the edge that they are padded to.
    """

    indices: np.ndarray
    length: int


def groups(
    lengths: Sequence[int] | np.ndarray, edges: Sequence[int], sizes: Sequence[int]
) -> list[Group]:
    """Batches of rows of like lengths, the longest first.

    Rows are sorted by length (those of one length stay in order) and cut where that
    costs least, a batch counting its size times its edge and `BATCH_POSITIONS`. With one
    size all batches are full but the last. No more shapes are compiled than there are
    pairs of an edge and a size; memory that does not suffice shows with the first batch.

    Args:
      lengths: of every row, [N].
      edges: see `edges`.
      sizes: numbers of rows that a batch may be filled up to, ascending.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    count = len(order)
    fitted = [fitting(int(lengths[index]), edges) for index in order]
    # least[i]: cost of the rows from the i-th on; later rows are no longer than earlier
    # ones, so a batch of a size takes as many as that holds.
    least, taken = [0] * (count + 1), [0] * count
    for at in reversed(range(count)):
        least[at], taken[at] = min(
            (size * fitted[at] + BATCH_POSITIONS + least[min(at + size, count)], size)
            for size in sizes
        )
    found, at = [], 0
    while at < count:
        found.append(Group(order[at : at + taken[at]], fitted[at]))
        at += taken[at]
    return found


def packed_rows(lengths: np.ndarray, room: Sequence[int]) -> int:
    """Rows that seqio packs examples into, in their order.

    An example goes into the row at hand or, if it does not fit, begins the next; as
    many examples as the longest row has positions are packed apart from the others.

    Args:
      lengths: tokens of every example, inputs and targets: [N, 2].
      room: positions of a row, inputs and targets.
    """
    rows = 0
    for start in range(0, len(lengths), max(room)):
        left = (0, 0)
        for example in lengths[start : start + max(room)].tolist():
            left = tuple(a - b for a, b in zip(left, example, strict=True))
            if min(left) < 0:
                rows += 1
                left = tuple(a - b for a, b in zip(room, example, strict=True))
    return rows
