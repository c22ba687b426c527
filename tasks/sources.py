# SPDX-License-Identifier: Apache-2.0
"""A seqio source of rows that are held in memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from prompt_tuning.data import fairness
from prompt_tuning.data import splits as slices
from prompt_tuning.errors import UserError

Columns = Mapping[str, Sequence[Any]]


class SplitNames(tuple[str, ...]):
    """Names of splits; the slices of them (see `data.splits`) are in it, too."""

    def __contains__(self, split: object) -> bool:
        return isinstance(split, str) and super().__contains__(slices.name_of(split))


class Rows(seqio.DataSource):
    """Rows by split, read when a split is first asked for.

    Unlike `seqio.FunctionDataSource` it shuffles all rows, anew in every epoch and
    repeatably by its seed, so that a file sorted by label does no harm.
    """

    def __init__(
        self,
        read: Callable[[str], Columns],
        splits: Sequence[str],
        cell: str | None = None,
    ):
        """Takes a function from a split to its columns, all of one length.

        Args:
          read: that function.
          splits: names of the splits.
          cell: a column that splits may have and datasets do not: rows of each of its
            values are drawn equally often (see `fairness.balanced`).
        """
        super().__init__(splits=SplitNames(splits), caching_permitted=False)
        self._read = read
        self._cell = cell
        self._names = SplitNames(splits)

    @property
    def splits(self) -> SplitNames:
        """The splits, of which any slice may be asked for."""
        return self._names

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused_kwargs,
    ) -> tf.data.Dataset:
        """All rows of a split or of a slice of it; a shard of them is taken by the task itself.

        Raises:
          UserError: there are none, or it is no slice.
        """
        columns = self._read(slices.name_of(split))
        rows = slices.rows_of(split, len(next(iter(columns.values()))))
        columns = {name: values[rows] for name, values in columns.items()}
        if self._cell is not None and self._cell in columns:
            places = fairness.balanced(columns.pop(self._cell))
            columns = {
                name: [values[place] for place in places]
                for name, values in columns.items()
            }
        size = len(next(iter(columns.values())))
        if not size:
            raise UserError(f"split {split!r} is empty: choose another")
        ds = tf.data.Dataset.from_tensor_slices(dict(columns))  # pyright: ignore[reportArgumentType]
        if shuffle:
            ds = ds.shuffle(size, seed=seed, reshuffle_each_iteration=True)
        return ds
