# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190).

Keys and values of P positions are tuned, in every attention of the encoder and of the
decoder. Those over the encoder's positions stand in the input as any prompt does, so that
keys have T5's relative positions there. In the decoder's self-attention they stand before
its first position. All start as what the base model's own projections make of the rows of
the initialisation, which puts them on the model's scale; or a network of two layers makes
them of rows of its own, which is thrown away when they are saved (the paper's
reparameterisation).
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from prompt_tuning import trees
from prompt_tuning.methods import kernels
from prompt_tuning.methods.method import (
    Leaves,
    Method,
    Start,
    apply_linear,
    linear,
    product,
)
from prompt_tuning.network.adapters import KEYS, PREFIX, VALUES, Slot
from prompt_tuning.network.layers import RMSNorm
from prompt_tuning.network.slots import Prefix, Rows
from prompt_tuning.types import Array, Params, Size

# Every attention, and the norm that stands before its keys.
NORMS = {
    "encoder/layers/attention": "encoder/layers/pre_attention_layer_norm/scale",
    "decoder/layers/encoder_decoder_attention": "encoder/encoder_norm/scale",
    "decoder/layers/self_attention": "decoder/layers/pre_self_attention_layer_norm/scale",
}
OWN = "decoder/layers/self_attention"


@dataclasses.dataclass(frozen=True)
class PrefixTuning(Method, kind="prefix_tuning"):
    """Keys and values of P positions in all layers: ``2 P N D`` numbers for each.

    Attributes:
      decoder: whether the decoder's self-attention has a prefix, too.
      hidden: width of the networks that make keys and values, one for each kind of
        attention; None tunes these themselves.
    """

    decoder: bool = True
    hidden: Size | None = None
    learning_rate: ClassVar[float] = 0.01

    def __post_init__(self):
        super().__post_init__()
        # Networks start from random rows.
        object.__setattr__(self, "uses_rows", self.hidden is None)

    def init(self, key: Array, start: Start) -> Leaves:
        """What the layers' own projections make of the rows; or the networks."""
        if self.hidden is not None:
            length = start.rows.shape[0]
            keys = jax.random.split(key, len(self._paths))
            return trees.unflatten(
                {
                    path: network(own, start.base, path, length, self.hidden)
                    for path, own in zip(self._paths, keys, strict=True)
                }
            )
        return trees.unflatten(
            {
                f"{path}/{site}": table
                for path in self._paths
                for site, table in keys_and_values(start.base, path, start.rows).items()
            }
        )

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """Zeros: nobody reads the states of these positions."""
        flat = trees.flatten(self._tables(leaves, base))
        length = next(iter(flat.values())).shape[1]
        width = base["token_embedder"]["embedding"].shape[1]
        return jnp.zeros((length, width))

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """The keys and values in their places."""
        flat = trees.flatten(self._tables(leaves, base))
        own = {site: flat.pop(f"{OWN}/{site}", None) for site in (KEYS, VALUES)}
        slots: dict[str, Slot] = {site: Rows.of(table) for site, table in flat.items()}
        if self.decoder:
            slots[f"{OWN}/{PREFIX}"] = Prefix.of(own[KEYS], own[VALUES])
        return slots

    def _tables(self, leaves: Leaves, base: Params) -> Params:
        """Keys and values [L, P, N D] by their sites."""
        if self.hidden is None:
            return leaves
        found = {}
        for path in self._paths:
            own = functools.reduce(operator.getitem, path.split("/"), leaves)
            found[path] = made_by(own, shape_of(base, path)[0])
        return trees.unflatten(found)

    @property
    def _paths(self) -> list[str]:
        """The attentions that have keys and values here."""
        return [path for path in NORMS if self.decoder or path != OWN]


def keys_and_values(base: Params, path: str, rows: Array) -> dict[str, Array]:
    """What an attention's own projections make of states: [L, P, N D] each.

    Args:
      base: the base model's parameters.
      path: the attention, one of `NORMS`.
      rows: the states before the norm: [P, H], or those of each layer, [L, P, H].
    """
    # [L, H], or [1, H] where one norm serves all layers.
    scales = jnp.atleast_2d(jnp.asarray(trees.flatten(base)[NORMS[path]], jnp.float32))
    normed = lambda scale, own: RMSNorm().apply({"params": {"scale": scale}}, own)
    inputs = jax.vmap(normed, (0, 0 if rows.ndim > 2 else None))(scales, rows)
    return {
        site: product(inputs, kernels.read(base, f"{path}/{kernel}"))  # pyright: ignore[reportArgumentType]
        for site, kernel in ((KEYS, "key"), (VALUES, "value"))
    }


def network(
    key: Array, base: Params, path: str, length: int, hidden: int
) -> dict[str, Any]:
    """The leaves of a network that makes an attention's keys and values of rows.

    Args:
      key: of what is random: the rows, from a normal distribution, and the layers.
      base: the base model's parameters.
      path: the attention, one of `NORMS`.
      length: P.
      hidden: width of the layer between.
    """
    depth, width, out = shape_of(base, path)
    rows, down, up = jax.random.split(key, 3)
    return {
        "rows": jax.random.normal(rows, (length, width)),
        "down": linear(down, width, hidden),
        "up": linear(up, hidden, depth * 2 * out),
    }


def made_by(leaves: Params, depth: int) -> dict[str, Array]:
    """The keys and values [L, P, N D] that `network` makes for L layers."""
    states = jnp.tanh(apply_linear(leaves["down"], leaves["rows"]))
    states = apply_linear(leaves["up"], states)
    tables = states.reshape(len(states), depth, 2, -1).transpose(2, 1, 0, 3)
    return {KEYS: tables[0], VALUES: tables[1]}


def shape_of(base: Params, path: str) -> tuple[int, int, int]:
    """That of an attention's keys' kernels: layers, width of the input, N D."""
    return trees.flatten(base)[f"{path}/key/kernel"].shape
