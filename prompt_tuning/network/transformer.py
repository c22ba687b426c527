# SPDX-License-Identifier: Apache-2.0
"""The T5 encoder-decoder over scanned layers.

Call signature, masks and logical axes are those of T5X's minimal `Transformer`; its
``layers_N`` leaves are here one leaf ``layers`` with a leading axis of size L, so that
the time to compile does not grow with depth. Checkpoint readers map one to the other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import spmd

from prompt_tuning.errors import UserError
from prompt_tuning.network import adapters, layers, saved_activations
from prompt_tuning.network.adapters import Where
from prompt_tuning.network.prompts import Prompt, PromptBank
from prompt_tuning.types import Array, PositiveInt, Rate

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "dots": jax.checkpoint_policies.save_only_these_names(saved_activations.PRODUCT),
    "full": None,
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 under T5X's names.

    Attributes:
      vocab_size: rows of the embedding table (32128 for T5, also where the vocabulary
        has fewer pieces).
      emb_dim: hidden width H.
      num_heads: attention heads N.
      num_encoder_layers: layers of the encoder.
      num_decoder_layers: layers of the decoder.
      head_dim: width D of a head; N * D need not be H.
      mlp_dim: width F of the MLP.
      mlp_activations: ('relu',) for T5 1.0, ('gelu', 'linear') for T5 1.1 and mT5.
      dropout_rate: dropout in training; 0 by default, as in the T5 1.1 architecture.
      logits_via_embedding: reuse the embedding table as output layer (T5 1.0).
      relpos_buckets: buckets of the relative position bias.
      relpos_max_distance: distance from which positions share a bucket.
      dtype: dtype of activations.
      remat: what the backward pass recomputes: 'none', 'dots' (keep matrix products),
        'full' (keep layer boundaries only).
      unroll: layers that one iteration of the scan holds.
      attention: how the encoder attends: 'einsum', or 'cudnn' for the fused kernel of
        NVIDIA GPUs (16-bit activations, an even number of tokens, no dropout). The
        decoder, whose rows are short, always does by 'einsum'.
      int8_products: round what meets an int8 kernel to int8, too, row by row, where
        processors multiply int8 faster; it changes nothing where kernels are not int8.
    """

    vocab_size: PositiveInt
    emb_dim: PositiveInt
    num_heads: PositiveInt
    num_encoder_layers: PositiveInt
    num_decoder_layers: PositiveInt
    head_dim: PositiveInt
    mlp_dim: PositiveInt
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: Rate = 0.0
    logits_via_embedding: bool = False
    relpos_buckets: PositiveInt = 32
    relpos_max_distance: PositiveInt = 128
    dtype: str = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    unroll: PositiveInt = 1
    attention: str = "einsum"
    int8_products: bool = False

    def __post_init__(self):
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        if self.attention not in ("einsum", "cudnn"):
            raise UserError(f"attention={self.attention!r} is not 'einsum' or 'cudnn'")
        if self.remat != "none" and self.remat not in REMAT_POLICIES:
            raise UserError(
                f"remat={self.remat!r} is not one of 'none', 'dots', 'full'"
            )


class Block(nn.Module):
    """One layer: self-attention, cross-attention if ``has_memory``, MLP, residuals."""

    config: T5Config
    has_memory: bool
    deterministic: bool
    decode: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,  # [B, T, H]
        mask: Array | None,  # [B, 1, T, T]
        bias: Array,  # [1, N, T, T] or, for a decode of S steps, [1, N, S, S]
        memory: Array | None = None,  # [..., M, H], the encoder's output
        memory_mask: Array | None = None,  # [B, 1, T, M]
        where: Where | None = None,
    ) -> tuple[Array, None]:
        cfg = self.config
        if not self.has_memory:
            x = adapters.at(self, adapters.HIDDEN, x, where)
        norm = lambda name: layers.RMSNorm(cfg.dtype, name=name)
        attention = lambda name: layers.Attention(
            cfg.num_heads,
            cfg.head_dim,
            cfg.dropout_rate,
            cfg.dtype,
            name != "self_attention",
            "cudnn" if cfg.attention == "cudnn" and not self.has_memory else None,
            cfg.int8_products,
            name=name,
        )
        dropout = lambda y: nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(
            y, deterministic=self.deterministic
        )
        kwargs = {"deterministic": self.deterministic, "decode": self.decode}

        own = "self_attention" if self.has_memory else "attention"
        y = norm(f"pre_{own}_layer_norm")(x)
        x = x + dropout(attention(own)(y, None, where, mask=mask, bias=bias, **kwargs))
        if self.has_memory:
            y = norm("pre_cross_attention_layer_norm")(x)
            y = attention("encoder_decoder_attention")(
                y,
                memory,
                where,
                mask=memory_mask,
                **kwargs,  # pyright: ignore[reportArgumentType]
            )
            x = x + dropout(y)
        y = norm("pre_mlp_layer_norm")(x)
        y = layers.MLP(
            cfg.mlp_dim,
            cfg.mlp_activations,
            cfg.dropout_rate,
            cfg.dtype,
            cfg.int8_products,
            name="mlp",
        )(y, where, deterministic=self.deterministic)
        x = x + dropout(y)
        return spmd.with_logical_constraint(x, ("batch", "length", "embed")), None


class Stack(nn.Module):
    """Embedded tokens through all layers of the encoder or of the decoder."""

    config: T5Config
    is_decoder: bool

    def setup(self):
        cfg = self.config
        if self.is_decoder and not cfg.logits_via_embedding:
            self.logits_dense = layers.Dense(
                cfg.vocab_size,
                ("embed", "vocab"),
                jnp.float32,
                int8_products=cfg.int8_products,
            )

    @nn.compact
    def __call__(
        self,
        x: Array,  # [B, T, H]
        mask: Array | None,
        memory: Array | None = None,
        memory_mask: Array | None = None,
        where: Where | None = None,
        segments: Array | None = None,  # [B or 1, T], where a decoder's rows are packed
        *,
        deterministic: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Array:  # [B, T, H]
        cfg = self.config
        # Positions before the first, which a prefix of keys takes.
        before = 0
        if self.is_decoder:
            before = adapters.prefix_length(self, where)
        else:
            x = adapters.at(self, adapters.EMBEDDED, x, where)
            mask = adapters.at(self, adapters.VISIBLE, mask, where)
        length = max_decode_length if decode and max_decode_length else x.shape[1]
        bias = layers.RelativePositionBias(
            cfg.num_heads,
            cfg.relpos_buckets,
            cfg.relpos_max_distance,
            bidirectional=not self.is_decoder,
            dtype=cfg.dtype,
            name="relpos_bias",
        )(before + length)[:, :, before:]
        if before and segments is not None:
            # What lies before a packed row lies before each of its examples.
            far = layers.bias_at(bias[..., :before], layers.places_of(segments))
            bias = layers.bias_beside(far, bias[..., before:])
        x = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(
            x, deterministic=deterministic
        ).astype(cfg.dtype)

        block = Block
        if cfg.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False)
        depth = cfg.num_decoder_layers if self.is_decoder else cfg.num_encoder_layers
        x, _ = nn.scan(
            block,
            variable_axes={
                "params": 0,
                "cache": 0,
                "memory": 0,
                adapters.COLLECTION: 0,
            },
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=depth,
            unroll=min(cfg.unroll, depth),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(
            cfg, self.is_decoder, deterministic, decode, name="layers"
        )(x, mask, bias, memory, memory_mask, where)
        if self.is_decoder:
            y = layers.RMSNorm(cfg.dtype, name="decoder_norm")(x)
            return nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(
                y, deterministic=deterministic
            )
        y = layers.RMSNorm(cfg.dtype, name="encoder_norm")(x)
        return nn.Dropout(cfg.dropout_rate)(y, deterministic=deterministic)


class TokenEmbedder(nn.Module):
    """The frozen table ``[V, H]`` and the look-up of tokens, real and virtual."""

    vocab_size: int
    emb_dim: int

    def setup(self):
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(
                nn.initializers.normal(stddev=1.0), ("vocab", "embed")
            ),
            (self.vocab_size, self.emb_dim),
            jnp.float32,
        )

    def __call__(self, ids: Array, virtual: Array | None, dtype: str) -> Array:
        """Embeds ``[B, T]`` ids; those from V on are rows of ``virtual`` ``[P, H]``."""
        rows = jnp.take(
            self.embedding.astype(dtype), jnp.minimum(ids, self.vocab_size - 1), axis=0
        )
        if virtual is not None:
            position = jnp.clip(ids - self.vocab_size, 0, virtual.shape[0] - 1)
            prompt = jnp.take(virtual.astype(dtype), position, axis=0)
            rows = jnp.where((ids >= self.vocab_size)[..., None], prompt, rows)
        return spmd.with_logical_constraint(rows, ("batch", "length", "embed"))

    def attend(self, x: Array) -> Array:  # [B, S, H] -> [B, S, V]
        """Logits against the table, rescaled as T5 1.0 does."""
        rows, table = x.reshape(-1, x.shape[-1]), self.embedding
        if table.dtype != x.dtype:
            rows, table = rows.astype(jnp.float32), table.astype(jnp.float32)
        logits = saved_activations.product("ri,oi->ro", rows, table, jnp.float32)
        return logits.reshape(*x.shape[:-1], -1) / jnp.sqrt(self.emb_dim)


class Transformer(nn.Module):
    """T5 with virtual tokens; `encode`, `decode` and `__call__` as T5X calls them.

    Attributes:
      config: the sizes.
      prompts: the soft prompts whose ids may occur in the tokens.
    """

    config: T5Config
    prompts: tuple[Prompt, ...] = ()

    def setup(self):
        cfg = self.config
        self.token_embedder = TokenEmbedder(cfg.vocab_size, cfg.emb_dim)
        self.encoder = Stack(cfg, is_decoder=False)
        self.decoder = Stack(cfg, is_decoder=True)
        if self.prompts:
            self.prompt_bank = PromptBank(self.prompts, cfg.emb_dim, name="prompts")

    def _embed(self, ids: Array) -> Array:
        virtual = self.prompt_bank() if self.prompts else None
        return self.token_embedder(ids.astype(jnp.int32), virtual, self.config.dtype)

    def _where(self, ids: Array, where: Where | None) -> Where | None:
        """Where prompts stand; None where no layer holds anything of a method."""
        if adapters.COLLECTION not in self.variables:
            return None
        return Where.of(ids, self.config.vocab_size) if where is None else where

    def encode(
        self,
        encoder_input_tokens: Array,  # [B, T]
        encoder_segment_ids: Array | None = None,  # [B, T]
        enable_dropout: bool = True,
        where: Where | None = None,
    ) -> Array:  # [B, T, H]
        """Runs the encoder; id 0 is padding. Without ``where`` its rows have one owner."""
        mask = layers.padding_mask(encoder_input_tokens, encoder_input_tokens)
        if encoder_segment_ids is not None:
            mask &= layers.segment_mask(encoder_segment_ids, encoder_segment_ids)
        return self.encoder(
            self._embed(encoder_input_tokens),
            mask,
            where=self._where(encoder_input_tokens, where),
            deterministic=not enable_dropout,
        )

    def decode(
        self,
        encoded: Array,  # [..., T, H]: [B, T, H] unless a cache holds what it gives
        encoder_input_tokens: Array,  # [B, T], for the masks
        decoder_input_tokens: Array,  # [B, S]
        decoder_target_tokens: Array,  # [B, S], for the masks
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        decoder_positions: Array | None = None,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
        logits: bool = True,
        where: Where | None = None,
    ) -> Array:  # [B, S, V] float32
        """Runs the decoder; with ``decode`` one token at a time (see `Attention`).

        Without ``logits`` it ends at the hidden states [B, S, H] that `logits` takes.
        """
        del decoder_positions  # Relative positions need none.
        if decode:
            if encoder_segment_ids is not None:
                raise ValueError("decoding takes one example a row, not packed rows")
            mask = None
            memory_mask = layers.padding_mask(
                jnp.ones_like(decoder_target_tokens), encoder_input_tokens
            )
        else:
            length = decoder_target_tokens.shape[1]
            mask = layers.causal_mask(length) & layers.padding_mask(
                decoder_target_tokens, decoder_target_tokens
            )
            memory_mask = layers.padding_mask(
                decoder_target_tokens, encoder_input_tokens
            )
            if decoder_segment_ids is not None:
                mask &= layers.segment_mask(decoder_segment_ids, decoder_segment_ids)
            if encoder_segment_ids is not None:
                memory_mask &= layers.segment_mask(
                    decoder_segment_ids,  # pyright: ignore[reportArgumentType]
                    encoder_segment_ids,
                )
        hidden = self.decoder(
            self._embed(decoder_input_tokens),
            mask,
            encoded,
            memory_mask,
            self._where(encoder_input_tokens, where),
            decoder_segment_ids,
            deterministic=not enable_dropout,
            decode=decode,
            max_decode_length=max_decode_length,
        )
        return self.logits(hidden) if logits else hidden

    def logits(self, hidden: Array) -> Array:  # [B, S, H] -> [B, S, V] float32
        """The output layer: what `decode` does last."""
        if self.config.logits_via_embedding:
            return self.token_embedder.attend(hidden)
        return self.decoder.logits_dense(hidden)

    def __call__(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        encoder_positions: Array | None = None,
        decoder_positions: Array | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
        logits: bool = True,
        where: Where | None = None,
    ) -> Array:  # [B, S, V] float32
        """Teacher-forced logits, or the hidden states before them (see `decode`)."""
        del encoder_positions
        encoded = self.encode(
            encoder_input_tokens,
            encoder_segment_ids,
            enable_dropout=enable_dropout,
            where=where,
        )
        return self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            decoder_positions,
            enable_dropout=enable_dropout,
            decode=decode,
            logits=logits,
            where=where,
        )
