# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190).

Keys and values of P positions are tuned, in every attention of the encoder and of the
decoder. Those over the encoder's positions stand in the input as any prompt does, so that
keys have T5's relative positions there. In the decoder's self-attention they stand before
its first position. All start as what the base model's own projections make of the rows of
the initialisation, which puts them on the model's scale.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from prompt_tuning import trees
from prompt_tuning.methods import kernels
from prompt_tuning.methods.method import Leaves, Method, Start, product
from prompt_tuning.network.adapters import KEYS, PREFIX, VALUES, Slot
from prompt_tuning.network.layers import RMSNorm
from prompt_tuning.network.slots import Prefix, Rows
from prompt_tuning.types import Array, Params

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
    """

    decoder: bool = True

    def init(self, key: Array, start: Start) -> Leaves:
        """What the layers' own projections make of the rows."""
        del key
        paths = [path for path in NORMS if self.decoder or path != OWN]
        return trees.unflatten(
            {
                f"{path}/{site}": table
                for path in paths
                for site, table in keys_and_values(start.base, path, start.rows).items()
            }
        )

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """Zeros: nobody reads the states of these positions."""
        length = next(iter(trees.flatten(leaves).values())).shape[1]
        width = base["token_embedder"]["embedding"].shape[1]
        return jnp.zeros((length, width))

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """The keys and values in their places."""
        del base
        flat = trees.flatten(leaves)
        own = {site: flat.pop(f"{OWN}/{site}", None) for site in (KEYS, VALUES)}
        slots: dict[str, Slot] = {site: Rows.of(table) for site, table in flat.items()}
        if self.decoder:
            slots[f"{OWN}/{PREFIX}"] = Prefix.of(own[KEYS], own[VALUES])
        return slots


def keys_and_values(base: Params, path: str, rows: Array) -> dict[str, Array]:
    """What an attention's own projections make of rows [P, H]: [L, P, N D] each.

    Args:
      base: the base model's parameters.
      path: the attention, one of `NORMS`.
      rows: states before the norm.
    """
    # [L, H], or [1, H] where one norm serves all layers.
    scales = jnp.atleast_2d(jnp.asarray(trees.flatten(base)[NORMS[path]], jnp.float32))
    normed = lambda scale: RMSNorm().apply({"params": {"scale": scale}}, rows)
    inputs = jax.vmap(normed)(scales)
    return {
        site: product(inputs, kernels.read(base, f"{path}/{kernel}"))
        for site, kernel in ((KEYS, "key"), (VALUES, "value"))
    }
