# SPDX-License-Identifier: Apache-2.0
"""The decoder of a network, one token at a time.

What does not change from token to token is done before the first: keys and values of
the encoder's output, position biases, masks of inputs, and taking the layers' stacked
weights apart, which a scan would cut out of the stack, and so copy, at every token.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from prompt_tuning.network import adapters, layers
from prompt_tuning.network.adapters import Where
from prompt_tuning.network.cached_attention import (
    KeysValues,
    MemoryAttention,
    Past,
    SelfAttention,
)
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.types import Array, PyTree

# Decoders above are scanned: two copies of their weights need not have room.
TAKEN_APART_BYTES = 2**31


class _Block(nn.Module):
    """A layer of the decoder; parameters and sites are those of `transformer.Block`."""

    config: T5Config

    def setup(self):
        cfg = self.config
        heads = (cfg.num_heads, cfg.head_dim, cfg.emb_dim, cfg.dtype, cfg.int8_products)
        self.pre_self_attention_layer_norm = layers.RMSNorm(cfg.dtype)
        self.self_attention = SelfAttention(*heads)
        self.pre_cross_attention_layer_norm = layers.RMSNorm(cfg.dtype)
        self.encoder_decoder_attention = MemoryAttention(*heads)
        self.pre_mlp_layer_norm = layers.RMSNorm(cfg.dtype)
        self.mlp = layers.MLP(
            cfg.mlp_dim, cfg.mlp_activations, 0.0, cfg.dtype, cfg.int8_products
        )

    def memorize(self, encoded: Array, where: Where | None) -> KeysValues:
        """See `MemoryAttention`."""
        return self.encoder_decoder_attention.memorize(encoded, where)

    def prefix(self, batch: int, where: Where | None) -> tuple[KeysValues, Array]:
        """See `SelfAttention`."""
        return self.self_attention.prefix(batch, where)

    def __call__(
        self,
        x: Array,  # [B, K, H]
        cache: KeysValues,
        memory: KeysValues,
        past: Past,
        memory_summand: Array,  # [B, 1, 1, M]
        where: Where | None,
    ) -> tuple[Array, KeysValues]:
        y = self.pre_self_attention_layer_norm(x)
        y, cache = self.self_attention(y, cache, past, where)
        x = x + y
        y = self.pre_cross_attention_layer_norm(x)
        x = x + self.encoder_decoder_attention(y, memory, memory_summand, where)
        y = self.pre_mlp_layer_norm(x)
        return x + self.mlp(y, where, deterministic=True), cache


class TokenStep:
    """A function from the newest tokens of B rows to logits, K decodes a row.

    It is made and used while a program is traced. Its cache holds the keys and values of
    each layer's prefix, P positions, and behind them those of the K decodes' tokens, step
    by step: [B, N, P + S K, D].
    """

    def __init__(
        self,
        network: Transformer,
        variables: Mapping[str, Any],
        encoded: Array,
        encoder_input_tokens: Array,
        where: Where | None,
        *,
        decodes: int,
        max_decode_length: int,
    ):
        """Does what is to be done once.

        Args:
          network: the network.
          variables: its parameters, and what methods put into its layers.
          encoded: what its encoder gave: [B, M, H].
          encoder_input_tokens: for the mask, and whose the rows are: [B, M].
          where: whose the rows are; one owner's by default.
          decodes: K.
          max_decode_length: the most steps, S.
        """
        cfg = network.config
        self._network, self._variables = network, variables
        self._block, self._decodes = _Block(cfg), decodes
        self._where = None
        if adapters.COLLECTION in variables:
            self._where = where or Where.of(encoder_input_tokens, cfg.vocab_size)
        stacked = {
            collection: tree["decoder"]["layers"]
            for collection, tree in variables.items()
            if "layers" in tree.get("decoder", {})
        }
        self._layers = _apart(stacked, cfg.num_decoder_layers)

        self._memory = self._of_layers("memorize", encoded)
        self._rows = encoded.shape[0]
        mask = layers.padding_mask(
            jnp.ones((self._rows, 1), jnp.int32), encoder_input_tokens
        )
        self._memory_summand = layers.mask_to_bias(mask, cfg.dtype)

        prefixes = self._of_layers("prefix", self._rows)
        room = max_decode_length * decodes
        if isinstance(prefixes, list):
            mask = prefixes[0][1]
            self.cache: PyTree = [_with_room(own, room) for own, _ in prefixes]
        else:
            mask = prefixes[1][0]
            self.cache = _with_room(prefixes[0], room)
        # Whoever has a prefix has it in all layers.
        self._prefix_mask, before = mask, mask.shape[-1]
        bias = _apply(
            layers.RelativePositionBias(
                cfg.num_heads,
                cfg.relpos_buckets,
                cfg.relpos_max_distance,
                bidirectional=False,
                dtype=cfg.dtype,
            ),
            {"params": variables["params"]["decoder"]["relpos_bias"]},
            before + max_decode_length,
        )
        self._bias = bias[:, :, before:]  # [1, N, S, P + S]

    def __call__(
        self,
        ids: Array,  # [B, K]
        step: Array,  # [], tokens decoded so far
        ancestry: Array | None,  # [B, K, S]
        cache: PyTree,
    ) -> tuple[Array, PyTree]:  # [B K, V]
        """Logits of the next token, and the cache with the newest one's.

        ``ancestry`` says of each decode which of its row's K wrote its token of a step;
        None where each wrote its own.
        """
        dtype = self._network.config.dtype
        x = _apply(
            self._network,
            self._variables,
            ids,
            method=lambda network, ids: network.token_embedder(ids, None, dtype),
        )
        past = self._past(step, ancestry)

        def through(
            x: Array, each: tuple[Any, KeysValues, KeysValues]
        ) -> tuple[Array, KeysValues]:
            own, cache, memory = each
            return _apply(
                self._block,
                own,
                x,
                cache,
                memory,
                past,
                self._memory_summand,
                self._where,
            )

        each = (self._layers, cache, self._memory)
        if isinstance(self._layers, list):
            cache = []
            for own in zip(*each, strict=True):
                x, written = through(x, own)
                cache.append(written)
        else:
            x, cache = jax.lax.scan(through, x, each)
        x = _apply(
            layers.RMSNorm(dtype),
            {"params": self._variables["params"]["decoder"]["decoder_norm"]},
            x,
        )
        logits = _apply(self._network, self._variables, x, method="logits")
        return logits.reshape(-1, logits.shape[-1]), cache

    def _past(self, step: Array, ancestry: Array | None) -> Past:
        count, before = self._decodes, self._prefix_mask.shape[-1]
        bias = jax.lax.dynamic_index_in_dim(
            self._bias, step, axis=2
        )  # [1, N, 1, P + S]
        bias = jnp.concatenate(
            [bias[..., :before], jnp.repeat(bias[..., before:], count, axis=3)], axis=3
        )
        steps, decodes = jnp.arange(self._bias.shape[2]), jnp.arange(count)
        itself = decodes[None, :, None]
        if ancestry is None:
            ancestry = jnp.broadcast_to(itself, (1, count, len(steps)))
        ancestry = jnp.where(steps[None, None] == step, itself, ancestry)
        said = ancestry[..., None] == decodes[None, None, None]  # [B or 1, K, S, K]
        said &= (steps <= step)[None, None, :, None]
        said = said.reshape(said.shape[0], 1, count, -1)
        if before:
            spread = lambda mask: jnp.broadcast_to(
                mask, (self._rows, 1, count, mask.shape[-1])
            )
            said = jnp.concatenate([spread(self._prefix_mask), spread(said)], axis=3)
        return Past(step, layers.mask_to_bias(said, self._bias.dtype) + bias, before)

    def _of_layers(self, method: str, argument: Any) -> Any:
        """What a method of the block gives of each layer: a list, or stacked."""
        of = lambda own: _apply(self._block, own, argument, self._where, method=method)
        if isinstance(self._layers, list):
            return [of(own) for own in self._layers]
        return jax.lax.map(of, self._layers)


def _apply(module: nn.Module, variables: Mapping[str, Any], *args, **kwargs) -> Any:
    """Flax's ``apply`` where nothing is mutable, which then gives no pair."""
    return module.apply(variables, *args, **kwargs)


def _apart(stacked: PyTree, count: int) -> list[PyTree] | PyTree:
    """The layers one by one, or as they are where a second copy may have no room."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stacked))
    if size > TAKEN_APART_BYTES:
        return stacked
    return [_layer(stacked, number) for number in range(count)]


def _with_room(prefix: KeysValues, room: int) -> KeysValues:
    """The prefix's positions and behind them so many more."""
    pad = lambda x: jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, room), (0, 0)])
    return jax.tree.map(pad, prefix)


def _layer(stacked: PyTree, number: int) -> PyTree:
    return jax.tree.map(lambda x: x[number], stacked)
