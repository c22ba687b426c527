# SPDX-License-Identifier: Apache-2.0
"""What tuning methods put into the layers of a frozen network, and where.

A *site* is a place in a layer that lets something be put there: the input and the output
of a `Dense`, the hidden state before a layer of the encoder, the keys and the values of
encoder positions. A *slot* is what lies at a site: an array with a rule by which it
changes the value that passes. Slots are variables of the collection `COLLECTION`, at the
path of their module, so that scans over layers and remat treat them as parameters; a site
without one is the identity. The network knows sites, never methods.

Rows of several owners share a batch: a slot of several owners holds one array for each,
behind a neutral one for the rows of owners that have none at this site.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, Self

import flax.linen as nn
import flax.struct
import jax.numpy as jnp

from prompt_tuning import trees
from prompt_tuning.types import Array, Params

COLLECTION = "adapters"
# The sites of a `Dense`, of a layer, of an attention over encoder positions.
INPUT, OUTPUT = "input", "output"
HIDDEN = "hidden"
KEYS, VALUES = "key_rows", "value_rows"


class Where(NamedTuple):
    """Whose the rows of a batch are, and where prompts stand in them.

    Attributes:
      positions: the place in the bank of prompts of each encoder position; below 0 for
        text: [B, T].
      owner: of each row the member it belongs to; None where there is but one: [B].
    """

    positions: Array
    owner: Array | None


class Slot(Protocol):
    """Something at a site. Every array has the layers' axis L in front."""

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Layers and widths that it needs at its site, or beside it."""
        ...

    def __call__(self, y: Array, where: Where, x: Array) -> Array:
        """What becomes of ``y``; ``x`` is what a `Dense` made it of, else ``y``."""
        ...

    @classmethod
    def joined(
        cls, slots: Mapping[int, Self], owners: int, positions: Sequence[slice]
    ) -> Self:
        """One slot for the rows of many owners.

        Args:
          slots: of each owner that has one, by its number.
          owners: how many there are.
          positions: which places of the bank are each owner's.
        """
        ...


def widths_at(site: str, base: Params) -> tuple[int, int] | None:
    """Layers and width of what passes a site of a model, or None where it has none."""
    flat = trees.flatten(base)
    path, _, place = site.rpartition("/")
    of = lambda name, axis: (
        (flat[name].shape[0], flat[name].shape[axis]) if name in flat else None
    )
    if place in (INPUT, OUTPUT):
        return of(f"{path}/kernel", 1 if place == INPUT else 2)
    if place == HIDDEN and path == "encoder/layers":
        return of(f"{path}/pre_mlp_layer_norm/scale", 1)
    if place in (KEYS, VALUES) and not path.endswith("self_attention"):
        return of(f"{path}/key/kernel", 2)
    return None


def at(module: nn.Module, site: str, y: Array, where: Where | None, x=None) -> Array:
    """The value that leaves a site of a module."""
    if where is None or not module.has_variable(COLLECTION, site):
        return y
    for slot in module.get_variable(COLLECTION, site):
        y = slot(y, where, y if x is None else x)
    return y


def join(
    parts: Mapping[int, Params], owners: int, positions: Sequence[slice]
) -> dict[str, tuple[Slot, ...]]:
    """The slots of many owners at each site, laid out as a collection.

    Args:
      parts: of each owner that has any, its slots by the path of their site.
      owners: how many there are. One keeps its slots as they are.
      positions: which places of the bank of prompts are each owner's.
    """
    sites: dict[str, dict[type, dict[int, Slot]]] = {}
    for owner, slots in parts.items():
        for site, slot in slots.items():
            sites.setdefault(site, {}).setdefault(type(slot), {})[owner] = slot
    joined = {
        site: tuple(
            next(iter(own.values()))
            if owners == 1
            else kind.joined(own, owners, positions)
            for kind, own in kinds.items()
        )
        for site, kinds in sites.items()
    }
    return trees.unflatten(joined)


@flax.struct.dataclass
class LowRank:
    """Adds a product of low rank (LoRA): ``y + x a b``.

    Attributes:
      a: [L, K, in, r].
      b: [L, K, r, out].
      place: of each owner its array among the K, of which the first is neutral; of
        size 0 where the one array is that of all rows: [L, E].
    """

    a: Array
    b: Array
    place: Array

    @classmethod
    def of(cls, a: Array, b: Array) -> "LowRank":
        """That of one owner: [L, in, r] and [L, r, out]."""
        return cls(a[:, None], b[:, None], _nobody(a))

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Those of the input and of the output of the `Dense`."""
        layers = self.a.shape[0]
        return {INPUT: (layers, self.a.shape[2]), OUTPUT: (layers, self.b.shape[3])}

    def __call__(self, y: Array, where: Where, x: Array) -> Array:  # [B, T, out]
        """Adds to the output of a `Dense` what its input gives."""
        a, b = (own.astype(y.dtype) for own in (self.a, self.b))
        if self.place.size == 0:
            return y + jnp.einsum(
                "btr,ro->bto", jnp.einsum("bti,ir->btr", x, a[0]), b[0]
            )
        place = self.place[where.owner]
        low = jnp.einsum("bti,bir->btr", x, a[place])
        return y + jnp.einsum("btr,bro->bto", low, b[place])

    @classmethod
    def joined(cls, slots, owners, positions) -> "LowRank":
        """Ranks are filled up to the largest with zeros, which add nothing."""
        del positions
        rank = max(slot.a.shape[-1] for slot in slots.values())
        fill = lambda x, axis: _padded(x, axis, rank)
        a = [fill(slot.a, -1) for slot in slots.values()]
        b = [fill(slot.b, -2) for slot in slots.values()]
        return cls(
            jnp.concatenate([jnp.zeros_like(a[0]), *a], axis=1),
            jnp.concatenate([jnp.zeros_like(b[0]), *b], axis=1),
            _places(slots, owners, a[0]),
        )


@flax.struct.dataclass
class Scale:
    """Multiplies element by element (IA3).

    Attributes:
      by: [L, K, width].
      place: see `LowRank`.
    """

    by: Array
    place: Array

    @classmethod
    def of(cls, by: Array) -> "Scale":
        """That of one owner: [L, width]."""
        return cls(by[:, None], _nobody(by))

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Those of the value that passes."""
        return {"": (self.by.shape[0], self.by.shape[2])}

    def __call__(self, y: Array, where: Where, x: Array) -> Array:  # [B, T, width]
        """Multiplies every position of a row."""
        del x
        by = self.by.astype(y.dtype)
        if self.place.size == 0:
            return y * by[0]
        return y * by[self.place[where.owner]][:, None]

    @classmethod
    def joined(cls, slots, owners, positions) -> "Scale":
        """Ones for those who have none."""
        del positions
        by = [slot.by for slot in slots.values()]
        return cls(
            jnp.concatenate([jnp.ones_like(by[0]), *by], axis=1),
            _places(slots, owners, by[0]),
        )


@flax.struct.dataclass
class Rows:
    """Puts rows of its own at the positions of prompts.

    Attributes:
      table: [L, R, width].
      owned: which of the bank's places have a row here: [L, R].
    """

    table: Array
    owned: Array

    @classmethod
    def of(cls, table: Array) -> "Rows":
        """Those of one owner, whose prompt is the whole bank: [L, P, width]."""
        return cls(table, jnp.ones(table.shape[:2], bool))

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Those of the value that passes."""
        return {"": (self.table.shape[0], self.table.shape[2])}

    def __call__(self, y: Array, where: Where, x: Array) -> Array:  # [B, T, width]
        """The value with the rows in place."""
        del x
        place = jnp.clip(where.positions, 0, self.table.shape[0] - 1)
        here = (where.positions >= 0) & self.owned[place]
        return jnp.where(here[..., None], self.table.astype(y.dtype)[place], y)

    @classmethod
    def joined(cls, slots, owners, positions) -> "Rows":
        """Laid end to end, as prompts are in the bank."""
        some = next(iter(slots.values())).table
        tables, owned = [], []
        for owner in range(owners):
            length = positions[owner].stop - positions[owner].start
            shape = (some.shape[0], length)
            has = owner in slots
            tables.append(
                slots[owner].table if has else jnp.zeros((*shape, some.shape[2]))
            )
            owned.append(jnp.full(shape, has))
        return cls(jnp.concatenate(tables, axis=1), jnp.concatenate(owned, axis=1))


def _nobody(array: Array) -> Array:
    """The `LowRank.place` of an array that is everybody's: [L, 0]."""
    return jnp.zeros((array.shape[0], 0), jnp.int32)


def _places(slots: Mapping[int, Slot], owners: int, array: Array) -> Array:  # [L, E]
    place = {owner: number for number, owner in enumerate(slots, start=1)}
    row = jnp.array([place.get(owner, 0) for owner in range(owners)], jnp.int32)
    return jnp.tile(row, (array.shape[0], 1))


def _padded(x: Array, axis: int, size: int) -> Array:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pad)
