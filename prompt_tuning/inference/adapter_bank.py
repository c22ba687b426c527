# SPDX-License-Identifier: Apache-2.0
"""The device's adapters: what prompts of a store put into the layers of the network.

Slots of all of them lie on the device together, each under its owner's number, behind
number 0 of the prompts that have none. Programs are compiled for the shapes of the whole,
so one that comes or goes means programs of other shapes; prompts without slots change
nothing.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning.devices import sharding
from prompt_tuning.inference.prepared_rows import Item
from prompt_tuning.inference.store import StoredPrompt
from prompt_tuning.network import adapters
from prompt_tuning.network.adapters import Where
from prompt_tuning.types import PyTree


class Adapters(NamedTuple):
    """The slots of some prompts, joined.

    Attributes:
      slots: the network's collection (see `adapters.join`).
      numbers: each prompt's number.
      starts: where its positions begin in `Where.positions`.
      shapes: equal for slots that the same programs take.
    """

    slots: PyTree
    numbers: dict[StoredPrompt, int]
    starts: dict[StoredPrompt, int]
    shapes: str


class AdapterBank:
    """Joins slots and keeps what it joined last; any thread may call it."""

    def __init__(self, mesh: jax.sharding.Mesh | None = None):
        """Holds nothing yet; ``mesh`` is that of the model."""
        self._mesh = mesh
        self._last: tuple[tuple[StoredPrompt, ...], Adapters] | None = None
        self._lock = threading.Lock()

    def of(self, prompts: Iterable[StoredPrompt]) -> Adapters | None:
        """The slots of these prompts, each once; None where none has any."""
        owners = tuple(dict.fromkeys(prompt for prompt in prompts if prompt.slots))
        if not owners:
            return None
        with self._lock:
            if self._last is None or self._last[0] != owners:
                self._last = (owners, self._joined(owners))
            return self._last[1]

    def _joined(self, owners: Sequence[StoredPrompt]) -> Adapters:
        ends = np.cumsum([len(prompt.array) for prompt in owners]).tolist()
        starts = [0, *ends[:-1]]
        positions = [slice(0, 0), *map(slice, starts, ends)]
        slots = {
            number: jax.tree.map(jnp.asarray, dict(prompt.slots))
            for number, prompt in enumerate(owners, start=1)
        }
        joined = adapters.join(slots, len(positions), positions)
        if self._mesh is not None:
            joined = sharding.replicate(joined, self._mesh)
        leaves, structure = jax.tree.flatten(joined)
        return Adapters(
            joined,
            {prompt: number for number, prompt in enumerate(owners, start=1)},
            dict(zip(owners, starts, strict=True)),
            f"{structure} {[leaf.shape for leaf in leaves]}",
        )


def where(
    found: Adapters, items: Sequence[Item | None], shape: tuple[int, int]
) -> Where:
    """Whose the rows of a batch are.

    Args:
      found: the slots at hand.
      items: the rows, None where there is none; there may be fewer than the batch has.
      shape: of the batch's tokens, [B, T].
    """
    owner = np.zeros(shape[0], np.int32)
    positions = np.full(shape, -1, np.int32)
    segments = np.zeros(shape, np.int32)
    for row, item in enumerate(items):
        if item is None:
            continue
        segments[row, : len(item.ids)] = item.ids != 0
        if item.prompt in found.numbers:
            owner[row] = found.numbers[item.prompt]
            # Position i of the prompt is -(i + 1).
            own = found.starts[item.prompt] - 1 - item.ids
            positions[row, : len(own)] = np.where(item.ids < 0, own, -1)
    return Where(positions, owner, segments)  # pyright: ignore[reportArgumentType]
