# SPDX-License-Identifier: Apache-2.0
"""What tuning methods put into the layers of a frozen network, and where.

A *site* is a place in a layer that lets something be put there: the input and the output
of a `Dense`, the embedded text, the hidden state before a layer of the encoder, the mask of
its attention, the keys and the values of encoder positions, those before the decoder's own.
A *slot* is what lies
at a site: arrays with a rule by which they change the value that passes (see `slots`).
Slots are variables of the collection `COLLECTION`, at the
path of their module, so that scans over layers and remat treat them as parameters; a site
without one is the identity. The network knows sites, never methods.

Rows of several owners share a batch: a slot of several owners holds one array for each,
behind a neutral one for the rows of owners that have none at this site.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from prompt_tuning import trees
from prompt_tuning.types import Array, Params

COLLECTION = "adapters"
# The sites of a `Dense`; of the encoder's input, of its layers and of what they attend to;
# of an attention over encoder positions; of the decoder's self-attention.
INPUT, OUTPUT = "input", "output"
EMBEDDED, HIDDEN, VISIBLE = "embedded", "hidden", "visible"
KEYS, VALUES = "key_rows", "value_rows"
PREFIX = "prefix"


class Where(NamedTuple):
    """Whose the rows of a batch are, and where prompts stand in them.

    Attributes:
      positions: the place in the bank of prompts of each encoder position; below 0 for
        text: [B, T].
      owner: of each row the member it belongs to; None where there is but one: [B].
      segments: of each encoder position the number of the packed example that it
        belongs to; 0 for padding: [B, T].
    """

    positions: Array
    owner: Array | None
    segments: Array

    @classmethod
    def of(
        cls,
        ids: Array,
        vocab_size: int,
        owner: Array | None = None,
        segments: Array | None = None,
    ) -> "Where":
        """Of ids [B, T] where those of prompts follow the vocabulary, 0 being padding."""
        if segments is None:
            segments = (ids != 0).astype(jnp.int32)
        return cls(ids.astype(jnp.int32) - vocab_size, owner, segments)


class Slot(Protocol):
    """Something at a site. Every array has the layers' axis L in front.

    Attributes:
      FIELDS: the arrays that files keep, in the order in which its class's ``of`` makes
        that of one owner of them.
    """

    FIELDS: ClassVar[tuple[str, ...]]

    def arrays(self) -> dict[str, Array]:
        """What `of` was given."""
        ...

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Layers and widths that it needs at its site, or beside it."""
        ...

    def __call__(self, y: Any, where: Where, x: Any) -> Any:
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
    if site == f"encoder/{EMBEDDED}":
        return 1, flat["token_embedder/embedding"].shape[1]
    if site == f"encoder/{VISIBLE}":
        return 1, 2  # Text and prompts.
    if site == f"encoder/layers/{HIDDEN}":
        return of("encoder/layers/pre_mlp_layer_norm/scale", 1)
    own = path.endswith("self_attention")
    if place in (KEYS, VALUES) and not own or place == PREFIX and own:
        return of(f"{path}/key/kernel", 2)
    return None


def at(module: nn.Module, site: str, y: Any, where: Where | None, x: Any = None) -> Any:
    """The value that leaves a site of a module."""
    if where is None or not module.has_variable(COLLECTION, site):
        return y
    for slot in module.get_variable(COLLECTION, site):
        if site in (EMBEDDED, VISIBLE):
            # No scan over layers takes their axis away here.
            slot = jax.tree.map(lambda array: array[0], slot)
        y = slot(y, where, y if x is None else x)
    return y


def prefix_length(stack: nn.Module, where: Where | None) -> int:
    """Keys before those of a decoder's own positions."""
    if where is None:
        return 0
    slots = trees.flatten(stack.variables.get(COLLECTION, {}))
    prefixes = slots.get(f"layers/self_attention/{PREFIX}", ())
    return sum(slot.length for slot in prefixes)


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
