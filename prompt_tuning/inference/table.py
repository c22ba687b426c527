# SPDX-License-Identifier: Apache-2.0
"""The device's table of prompts: those in use lie in it, the others wait on the host.

To the network the table is one `Prompt` of ``capacity`` rows. A prompt that is needed
takes any free rows of it, next to each other or not, since every position of a prompt
is a virtual token of its own; where none are free, the prompts that were not used for
longest give up theirs. So prompts of any length come and go, and no program is compiled
for it.
"""

import collections
import contextlib
import functools
import threading
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning.devices import sharding
from prompt_tuning.types import Array

# Rows that one call of the compiled program writes.
CHUNK = 128


class Lease(NamedTuple):
    """The table as it is now, and where prompts lie in it.

    Attributes:
      array: ``[capacity, H]`` float32.
      rows: the array's row of each position of each prompt: ``[P]``.
    """

    array: Array
    rows: Mapping[Hashable, np.ndarray]


class PromptTable:
    """Rows on the device that prompts take in turn; any thread may lease it.

    Attributes:
      shape: shape, dtype and place of the array.
    """

    def __init__(
        self, capacity: int, width: int, mesh: jax.sharding.Mesh | None = None
    ):
        """Makes a table of zeros ``[capacity, width]``, whole on every device."""
        self._capacity = capacity
        # What lies in the table, the least recently used first.
        self._resident: collections.OrderedDict[Hashable, np.ndarray] = (
            collections.OrderedDict()
        )
        self._free = list(reversed(range(capacity)))
        self._lock = threading.Lock()
        self._array = jnp.zeros((capacity, width), jnp.float32)
        if mesh is not None:
            self._array = sharding.replicate(self._array, mesh)
        self.shape = jax.ShapeDtypeStruct(
            (capacity, width),
            jnp.float32,
            sharding=None if mesh is None else sharding.replicated(mesh),
        )

    @property
    def rows_in_use(self) -> int:
        """Rows that hold a prompt."""
        return self._capacity - len(self._free)

    @contextlib.contextmanager
    def lease(self, prompts: Mapping[Any, np.ndarray]) -> Iterator[Lease]:
        """Gives the table with these prompts in it, for starting programs that read it.

        While a lease lasts, others wait. It need not last until the programs end: JAX
        writes into an array only when the programs that were started on it are done.

        Args:
          prompts: what stands for a prompt, and its ``[P, H]`` float32, which is
            always the same; no more than the table's rows in all.
        """
        with self._lock:
            self._place(prompts)
            yield Lease(self._array, {key: self._resident[key] for key in prompts})

    def _place(self, prompts: Mapping[Any, np.ndarray]) -> None:
        total = sum(map(len, prompts.values()))
        if total > self._capacity:
            raise ValueError(f"{total} positions in a table of {self._capacity}")
        missing = {k: v for k, v in prompts.items() if k not in self._resident}
        for key in prompts.keys() - missing.keys():
            self._resident.move_to_end(key)
        if not missing:
            return
        wanted = sum(map(len, missing.values()))
        # Those in use were moved behind the others, so these are met first.
        while len(self._free) < wanted:
            _, rows = self._resident.popitem(last=False)
            self._free += rows[::-1].tolist()
        for key, array in missing.items():
            taken = [self._free.pop() for _ in range(len(array))]
            self._resident[key] = np.array(taken, np.int32)
        self._write(
            np.concatenate([self._resident[key] for key in missing]),
            np.concatenate(list(missing.values())),
        )

    def _write(self, rows: np.ndarray, values: np.ndarray) -> None:
        short = -len(rows) % CHUNK
        # Rows beyond the table are not written.
        rows = np.pad(rows, (0, short), constant_values=self._capacity)
        values = np.pad(values, ((0, short), (0, 0)))
        for at in range(0, len(rows), CHUNK):
            chunk = slice(at, at + CHUNK)
            self._array = _write_rows(self._array, rows[chunk], values[chunk])


@functools.partial(jax.jit, donate_argnums=0)
def _write_rows(
    table: Array,  # [capacity, H]
    rows: Array,  # [CHUNK]
    values: Array,  # [CHUNK, H]
) -> Array:  # [capacity, H]
    return table.at[rows].set(values, mode="drop")
