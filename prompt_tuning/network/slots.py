# SPDX-License-Identifier: Apache-2.0
"""What may lie at a site of the network: kinds of `adapters.Slot`.

Those that read the text of their row are in `text_slots`. Slots but `Rows` have one array for each of their owners, on an axis behind that of the
layers: K arrays, of which the first is neutral as soon as there are several owners.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

import flax.struct
import jax.numpy as jnp

from prompt_tuning.network.adapters import INPUT, OUTPUT, Where
from prompt_tuning.types import Array

SlotType = TypeVar("SlotType")
# The ranks of all owners together are few up to one in so many of the site's width.
FEW_SHARE = 4


class ByOwner:
    """Slots that differ by the owner of a row.

    Their last two fields are:
      place: of each owner its array among the K; of size 0 where the one array is that
        of all rows: [L, E].
      start: of each array the first of its owner's positions in the bank: [L, K].
    """

    FIELDS: ClassVar[tuple[str, ...]]
    # What follows from the fields and is kept beside them.
    DERIVED: ClassVar[tuple[str, ...]] = ()
    NEUTRAL: ClassVar[float] = 0.0
    place: Array
    start: Array

    @classmethod
    def of(cls, *arrays: Array) -> Self:
        """That of one owner: `FIELDS` without the axis K."""
        layers = arrays[0].shape[0]
        nobody = jnp.zeros((layers, 0), jnp.int32)
        first = jnp.zeros((layers, 1), jnp.int32)
        return _make(cls, *(array[:, None] for array in arrays), nobody, first)

    def arrays(self) -> dict[str, Array]:
        """What `of` was given, of the last owner."""
        return {name: getattr(self, name)[:, -1] for name in self.FIELDS}

    @classmethod
    def joined(
        cls, slots: Mapping[int, Self], owners: int, positions: Sequence[slice]
    ) -> Self:
        """See `adapters.Slot`; arrays are filled up to the largest."""
        arrays = []
        for name in (*cls.FIELDS, *cls.DERIVED):
            own = [getattr(slot, name) for slot in slots.values()]
            shape = (
                tuple(map(max, *(array.shape for array in own))) if own[1:] else None
            )
            own = [cls._filled(name, array, shape) for array in own]
            neutral = jnp.full_like(own[0], cls.NEUTRAL)
            arrays.append(jnp.concatenate([neutral, *own], axis=1))
        place = {owner: number for number, owner in enumerate(slots, start=1)}
        row = [place.get(owner, 0) for owner in range(owners)]
        first = [0, *(positions[owner].start for owner in slots)]
        layers = arrays[0].shape[0]
        each = lambda row: jnp.tile(jnp.array(row, jnp.int32), (layers, 1))
        return _make(cls, *arrays, each(row), each(first))

    @classmethod
    def _filled(cls, name: str, array: Array, shape: tuple[int, ...] | None) -> Array:
        """With zeros at the ends of its axes, which change nothing there."""
        del name
        return array if shape is None else _padded(array, shape)

    def _own(self, where: Where) -> list[Array]:
        """The arrays of each row, and where its positions start: [B or 1, ...]."""
        names = (*self.FIELDS, *self.DERIVED, "start")
        if self.place.size == 0:
            return [getattr(self, name) for name in names]
        place = self.place[where.owner]
        return [getattr(self, name)[place] for name in names]


@flax.struct.dataclass
class LowRank(ByOwner):
    """Adds a product of low rank (LoRA): ``y + x a b``.

    Attributes:
      a: [L, K, in, r].
      b: [L, K, r, out].
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("a", "b")
    a: Array
    b: Array
    place: Array
    start: Array

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Those of the input and of the output of the `Dense`."""
        layers = self.a.shape[0]
        return {INPUT: (layers, self.a.shape[2]), OUTPUT: (layers, self.b.shape[3])}

    def __call__(self, y: Array, where: Where, x: Array) -> Array:  # [B, T, out]
        """Adds to the output of a `Dense` what its input gives."""
        if self.place.size == 0:
            a, b = (array[0].astype(y.dtype) for array in (self.a, self.b))
            return y + jnp.einsum("btr,ro->bto", jnp.einsum("bti,ir->btr", x, a), b)
        if self._are_few:
            # Without the neutral one: who owns none has a product of zeros.
            a, b = (array[1:].astype(y.dtype) for array in (self.a, self.b))
            place = self.place[where.owner][:, None]
            owned = (place == jnp.arange(1, len(self.a))[None]).astype(y.dtype)
            low = jnp.einsum("bti,kir->btkr", x, a) * owned[:, None, :, None]
            return y + jnp.einsum("btkr,kro->bto", low, b)
        a, b = (own.astype(y.dtype) for own in self._own(where)[:2])
        return y + jnp.einsum("btr,bro->bto", jnp.einsum("bti,bir->btr", x, a), b)

    @property
    def _are_few(self) -> bool:
        """Whether all owners' products, masked, cost less than each row's own.

        One product of all rows runs near the machine's rate, one of each row with
        arrays of its own far below.
        """
        owners, size, rank = len(self.a) - 1, self.a.shape[1], self.a.shape[2]
        return owners * rank * FEW_SHARE <= min(size, self.b.shape[2])


@flax.struct.dataclass
class Scale(ByOwner):
    """Multiplies element by element (IA3).

    Attributes:
      by: [L, K, width].
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("by",)
    NEUTRAL = 1.0
    by: Array
    place: Array
    start: Array

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Those of the value that passes."""
        return {"": (self.by.shape[0], self.by.shape[2])}

    def __call__(self, y: Array, where: Where, x: Array) -> Array:  # [B, T, width]
        """Multiplies every position of a row."""
        del x
        by, _ = self._own(where)
        return y * by.astype(y.dtype)[:, None]


@flax.struct.dataclass
class Prefix(ByOwner):
    """Keys and values before those of the decoder's own positions (prefix tuning).

    Attributes:
      keys: [L, K, P, N D].
      values: [L, K, P, N D].
      is_there: 1 for those of an owner whose prefix is shorter than P too: [L, K, P].
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("keys", "values")
    DERIVED = ("is_there",)
    keys: Array
    values: Array
    is_there: Array
    place: Array
    start: Array

    @classmethod
    def of(cls, *arrays: Array) -> "Prefix":
        """That of one owner: keys and values, [L, P, N D] each."""
        return super().of(*arrays, jnp.ones(arrays[0].shape[:2]))

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Those of keys and values."""
        return {"": (self.keys.shape[0], self.keys.shape[3])}

    @property
    def length(self) -> int:
        """P."""
        return self.keys.shape[-2]

    @classmethod
    def _filled(cls, name: str, array: Array, shape: tuple[int, ...] | None) -> Array:
        """In front: a prefix ends where the text begins."""
        return array if shape is None else _padded(array, shape, axis=2)

    def __call__(self, y: Any, where: Where, x: Any) -> Any:
        """Keys and values [B, S, N, D] and the mask [B or 1, 1, Q, S], each with more."""
        del x
        key, value, mask = y
        own_keys, own_values, is_there, _ = self._own(where)
        longer = lambda own, y: jnp.concatenate(
            [
                jnp.broadcast_to(
                    own.reshape(*own.shape[:2], *y.shape[2:]).astype(y.dtype),
                    (len(y), own.shape[1], *y.shape[2:]),
                ),
                y,
            ],
            axis=1,
        )
        if mask is not None:
            rows = max(len(mask), len(is_there))
            more = (is_there > 0)[:, None, None, :]
            spread = lambda m: jnp.broadcast_to(m, (rows, 1, mask.shape[2], m.shape[3]))
            mask = jnp.concatenate([spread(more), spread(mask)], axis=3)
        return longer(own_keys, key), longer(own_values, value), mask


@flax.struct.dataclass
class Rows:
    """Puts rows of its own at the positions of prompts.

    Attributes:
      table: [L, R, width].
      owned: which of the bank's places have a row here: [L, R].
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("table",)
    table: Array
    owned: Array

    @classmethod
    def of(cls, table: Array) -> "Rows":
        """Those of one owner, whose prompt is the whole bank: [L, P, width]."""
        return cls(table, jnp.ones(table.shape[:2], bool))

    def arrays(self) -> dict[str, Array]:
        """What `of` was given."""
        return {"table": self.table}

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


def _make(kind: Callable[..., SlotType], *arrays: Array) -> SlotType:
    """A slot of all its fields, which the class that reads them does not know."""
    return kind(*arrays)


def _padded(array: Array, shape: Sequence[int], axis: int | None = None) -> Array:
    """With zeros behind, or in front on one axis."""
    more = [size - own for size, own in zip(shape, array.shape, strict=True)]
    return jnp.pad(array, [(n, 0) if i == axis else (0, n) for i, n in enumerate(more)])
