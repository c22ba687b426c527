# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190).

The keys and values of a prompt's positions are tuned, in every self-attention of the
encoder and in every attention of the decoder to it. The positions stand in the input as
those of any prompt do, so that keys have T5's relative positions there. They start as
what the base model's own projections make of the rows of the initialisation, which puts
them on the model's scale.

The decoder's self-attention has no positions of prompts and no prefix here. PEFT's prefix
tuning of encoder-decoders reaches that one alone, so the two share no weights.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from prompt_tuning import trees
from prompt_tuning.methods import kernels
from prompt_tuning.methods.method import Leaves, Method, Start, product
from prompt_tuning.network.adapters import KEYS, VALUES, Rows, Slot
from prompt_tuning.network.layers import RMSNorm
from prompt_tuning.types import Array, Params

# Attentions over the encoder's positions, and the norm that stands before each.
ATTENTIONS = {
    "encoder/layers/attention": "encoder/layers/pre_attention_layer_norm/scale",
    "decoder/layers/encoder_decoder_attention": "encoder/encoder_norm/scale",
}


@dataclasses.dataclass(frozen=True)
class PrefixTuning(Method, kind="prefix_tuning"):
    """Keys and values of P positions in all layers: ``2 P N D`` numbers for each."""

    def init(self, key: Array, start: Start) -> Leaves:
        """What the layers' own projections make of the rows."""
        del key
        base = trees.flatten(start.base)

        def normed(scale: Array) -> Array:  # [H] -> [P, H]
            return RMSNorm().apply({"params": {"scale": scale}}, start.rows)

        leaves = {}
        for path, norm in ATTENTIONS.items():
            # [L, H], or [1, H] where one norm serves all layers.
            scales = jnp.atleast_2d(jnp.asarray(base[norm], jnp.float32))
            inputs = jax.vmap(normed)(scales)
            for site, kernel in ((KEYS, "key"), (VALUES, "value")):
                projected = kernels.read(start.base, f"{path}/{kernel}")
                leaves[f"{path}/{site}"] = product(inputs, projected)
        return trees.unflatten(leaves)

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """Zeros: nobody reads the states of these positions."""
        length = next(iter(trees.flatten(leaves).values())).shape[1]
        width = base["token_embedder"]["embedding"].shape[1]
        return jnp.zeros((length, width))

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """The keys and values in their places."""
        del base
        return {site: Rows.of(table) for site, table in trees.flatten(leaves).items()}
