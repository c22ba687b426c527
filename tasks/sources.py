# SPDX-License-Identifier: Apache-2.0
"""A seqio source of rows that are held in memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from prompt_tuning.errors import UserError

Columns = Mapping[str, Sequence[Any]]


class Rows(seqio.DataSource):
    """Rows by split, read when a split is first asked for.

    Unlike `seqio.FunctionDataSource` it shuffles all rows, anew in every epoch and
    repeatably by its seed, so that a file sorted by label does no harm.
    """

    def __init__(self, read: Callable[[str], Columns], splits: Sequence[str]):
        """Takes a function from a split to its columns, all of one length."""
        super().__init__(splits=splits, caching_permitted=False)
        self._read = read

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
        """All rows of a split; a shard of them is taken by the task itself.

        Raises:
          UserError: there are none.
        """
        columns = self._read(split)
        size = len(next(iter(columns.values())))
        if not size:
            raise UserError(f"split {split!r} is empty: choose another")
        ds = tf.data.Dataset.from_tensor_slices(dict(columns))
        if shuffle:
            ds = ds.shuffle(size, seed=seed, reshuffle_each_iteration=True)
        return ds
