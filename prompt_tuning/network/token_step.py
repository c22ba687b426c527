# SPDX-License-Identifier: Apache-2.0
"""The decoder of a network, one token at a time.

What does not change from token to token is done before the first: keys and values of
the encoder's output, position biases, masks of inputs, and taking the layers' stacked
weights apart, which a scan would cut out of the stack, and so copy, at every token.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

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
from prompt_tuning.types import Array, Params, PyTree

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


class Memory(NamedTuple):
    """What decoding reads of the inputs of B rows.

    Attributes:
      keys_values: of each layer, [B, N, M, D]; layers are stacked where they are scanned.
      summand: of the attention logits, padding masked: [B, 1, 1, M].
    """

    keys_values: PyTree
    summand: Array


class TokenStep:
    """A function from the newest tokens of B rows to logits, K decodes a row.

    It is made and used while a program is traced. A cache holds the keys and values of
    each layer's prefix, P positions, and behind them those of the K decodes' tokens, step
    by step: [B, N, P + S K, D].
    """

    def __init__(
        self,
        network: Transformer,
        variables: Mapping[str, Any],
        where: Where | None,
        *,
        rows: int,
        decodes: int,
        max_decode_length: int,
    ):
        """Does what is to be done once.

        Args:
          network: the network.
          variables: its parameters, and what methods put into its layers; see `apart`.
          where: whose the rows are; needed where methods did.
          rows: B.
          decodes: K.
          max_decode_length: the most steps, S.
        """
        cfg = network.config
        self._network, self._variables = network, variables
        self._block, self._rows, self._decodes = _Block(cfg), rows, decodes
        self._where = where if adapters.COLLECTION in variables else None
        self._layers = _of_layers(variables, cfg.num_decoder_layers)

        prefixes = self._each("prefix", rows)
        room = max_decode_length * decodes
        if isinstance(prefixes, list):
            mask = prefixes[0][1]
            cache: PyTree = [_with_room(own, room) for own, _ in prefixes]
        else:
            mask = prefixes[1][0]
            cache = _with_room(prefixes[0], room)
        # Before the first token.
        self.cache = cache
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

    def memorize(self, encoded: Array, encoder_input_tokens: Array) -> Memory:
        """What is read of what the encoder gave, [B, M, H], of these tokens, [B, M]."""
        one = jnp.ones((self._rows, 1), jnp.int32)
        mask = layers.padding_mask(one, encoder_input_tokens)
        return Memory(
            self._each("memorize", encoded),
            layers.mask_to_bias(mask, self._network.config.dtype),
        )

    def __call__(
        self,
        ids: Array,  # [B, K]
        step: Array,  # [], tokens decoded so far
        ancestry: Array | None,  # [B, K, S]
        cache: PyTree,
        memory: Memory,
        starts: Array | None = None,  # [B]
    ) -> tuple[Array, PyTree]:  # [B K, V]
        """Logits of the next token, and the cache with the newest one's.

        ``ancestry`` says of each decode which of its row's K wrote its token of a step;
        None where each wrote its own. ``starts`` has the step of each row's first token,
        where that is not 0: what the cache holds of earlier ones is not this row's.
        """
        dtype = self._network.config.dtype
        x = _apply(
            self._network,
            self._variables,
            ids,
            method=lambda network, ids: network.token_embedder(ids, None, dtype),
        )
        past = self._past(step, ancestry, starts)

        def through(
            x: Array, each: tuple[Any, KeysValues, KeysValues]
        ) -> tuple[Array, KeysValues]:
            own, cache, keys_values = each
            return _apply(
                self._block,
                own,
                x,
                cache,
                keys_values,
                past,
                memory.summand,
                self._where,
            )

        each = (self._layers, cache, memory.keys_values)
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

    def _past(self, step: Array, ancestry: Array | None, starts: Array | None) -> Past:
        count, before = self._decodes, self._prefix_mask.shape[-1]
        bias = jax.lax.dynamic_index_in_dim(
            self._bias, step, axis=2
        )  # [1, N, 1, P + S]
        of_prefix, of_steps = bias[..., :before], bias[..., before:]
        if starts is not None and before:
            # Tokens lie as far apart wherever a row began, but a prefix lies before it.
            places = (step - starts)[:, None]
            of_prefix = layers.bias_at(self._bias[..., :before], places)
        bias = layers.bias_beside(of_prefix, jnp.repeat(of_steps, count, axis=3))
        steps, decodes = jnp.arange(self._bias.shape[2]), jnp.arange(count)
        itself = decodes[None, :, None]
        if ancestry is None:
            ancestry = jnp.broadcast_to(itself, (1, count, len(steps)))
        ancestry = jnp.where(steps[None, None] == step, itself, ancestry)
        said = ancestry[..., None] == decodes[None, None, None]  # [B or 1, K, S, K]
        said &= (steps <= step)[None, None, :, None]
        if starts is not None:
            said &= (steps[None] >= starts[:, None])[:, None, :, None]
        said = said.reshape(said.shape[0], 1, count, -1)
        if before:
            spread = lambda mask: jnp.broadcast_to(
                mask, (self._rows, 1, count, mask.shape[-1])
            )
            said = jnp.concatenate([spread(self._prefix_mask), spread(said)], axis=3)
        return Past(step, layers.mask_to_bias(said, self._bias.dtype) + bias, before)

    def _each(self, method: str, argument: Any) -> Any:
        """What a method of the block gives of each layer: a list, or stacked."""
        of = lambda own: _apply(self._block, own, argument, self._where, method=method)
        if isinstance(self._layers, list):
            return [of(own) for own in self._layers]
        return jax.lax.map(of, self._layers)


def _apply(module: nn.Module, variables: Mapping[str, Any], *args, **kwargs) -> Any:
    """Flax's ``apply`` where nothing is mutable, which then gives no pair."""
    return module.apply(variables, *args, **kwargs)


def apart(params: Params, config: T5Config) -> Params:
    """Parameters with the decoder's layers one by one, which calls then need not cut.

    They are as they are where a second copy of them may have no room.
    """
    decoder = params["decoder"]
    layers = _apart(decoder["layers"], config.num_decoder_layers)
    return {**params, "decoder": {**decoder, "layers": layers}}


def _of_layers(variables: Mapping[str, Any], count: int) -> list[PyTree] | PyTree:
    """The variables of the layers one by one, or all in one."""
    found = {
        collection: tree["decoder"]["layers"]
        for collection, tree in variables.items()
        if "layers" in tree.get("decoder", {})
    }
    if not isinstance(found["params"], list):
        return _apart(found, count)
    return [
        {
            collection: tree[number] if isinstance(tree, list) else _layer(tree, number)
            for collection, tree in found.items()
        }
        for number in range(count)
    ]


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
