# SPDX-License-Identifier: Apache-2.0
"""The layers of T5: attention, MLP, RMS norm, relative position bias.

Parameter names, shapes, initialisers and logical axes are those of T5X's minimal T5
(`t5x.examples.t5.layers`), so that its checkpoints and partitioning rules fit. Softmax
and norm statistics are computed in float32 whatever the activations' dtype.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import spmd

from prompt_tuning.errors import UserError
from prompt_tuning.network import adapters, quantization, saved_activations
from prompt_tuning.network.adapters import Where
from prompt_tuning.types import Array, DType, Initializer

# Added to the attention logits of masked pairs: finite, so that a row that may attend to
# nothing gives uniform weights rather than NaN.
MASKED = -1e10

attention_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
mlp_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def padding_mask(
    query_valid: Array, key_valid: Array
) -> Array:  # [B, Q], [B, K] -> [B, 1, Q, K]
    """True where both the query and the key position hold a token."""
    return (query_valid[:, None, :, None] > 0) & (key_valid[:, None, None, :] > 0)


def segment_mask(
    query_segments: Array, key_segments: Array
) -> Array:  # [B, Q], [B, K] -> [B, 1, Q, K]
    """True where query and key belong to the same packed example."""
    return query_segments[:, None, :, None] == key_segments[:, None, None, :]


def causal_mask(length: int) -> Array:  # [1, 1, S, S]
    """True where the key does not lie after the query."""
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


def mask_to_bias(mask: Array, dtype: DType) -> Array:
    """Turns a boolean mask into a summand of the attention logits."""
    return jnp.where(mask, 0.0, MASKED).astype(dtype)


class Dense(nn.Module):
    """A linear map without bias: ``[..., in] -> [..., features]``.

    A ``kernel_scale`` beside the kernel multiplies the outputs: the kernel is an int8
    one then (see `quantization`). Input and output are sites of `adapters`.

    Attributes:
      features: width of the output.
      axes: logical axes of the kernel ``[in, features]``.
      dtype: dtype of the computation.
      kernel_init: initialiser of the kernel.
      int8_products: whether inputs are rounded to int8, too, where the kernel is.
    """

    features: int
    axes: tuple[str, str]
    dtype: DType = jnp.float32
    kernel_init: Initializer = mlp_kernel_init
    int8_products: bool = False

    @nn.compact
    def __call__(self, x: Array, where: Where | None = None) -> Array:
        x = adapters.at(self, adapters.INPUT, x, where)
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            (x.shape[-1], self.features),
            jnp.float32,
        )
        # On rows of tokens rather than [B, T, in]: the CPU's weight gradient is three
        # times faster, and no other backend minds.
        rows = x.reshape(-1, x.shape[-1])
        # Weights of the inputs' dtype are multiplied as they are; otherwise both are made
        # the computation's, which holds the integers of an int8 kernel exactly.
        if kernel.dtype != x.dtype:
            rows = rows.astype(self.dtype)
        scale = None
        if self.has_variable("params", quantization.SCALE):
            scale = self.get_variable("params", quantization.SCALE)
        if scale is not None and self.int8_products:
            y = quantization.product(rows, kernel, scale)
        else:
            kernel = kernel.astype(rows.dtype)
            y = saved_activations.product("ri,io->ro", rows, kernel, self.dtype)
            if scale is not None:
                y = (y.astype(jnp.float32) * scale[None]).astype(self.dtype)
        y = y.reshape(*x.shape[:-1], self.features)
        return adapters.at(self, adapters.OUTPUT, y, where, x)


class RMSNorm(nn.Module):
    """T5's layer norm: no mean is subtracted and there is no bias."""

    dtype: DType = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., H] -> [..., H]
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
            (x.shape[-1],),
            jnp.float32,
        )

        @saved_activations.recomputed
        def normalize(x: Array, scale: Array) -> Array:
            x = x.astype(jnp.float32)
            mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
            y = (x * jax.lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)
            return y * jax.lax.broadcast_to_rank(scale.astype(self.dtype), y.ndim)

        return normalize(x, scale)


class MLP(nn.Module):
    """Feed-forward block; several activations multiply each other (gated units).

    One activation gives the leaves ``wi, wo`` (T5 1.0), two give ``wi_0, wi_1, wo``
    (T5 1.1).
    """

    mlp_dim: int
    activations: Sequence[str]
    dropout_rate: float
    dtype: DType
    int8_products: bool = False

    @nn.compact
    def __call__(
        self, x: Array, where: Where | None = None, *, deterministic: bool
    ) -> Array:  # [B, T, H] -> same
        width = x.shape[-1]
        dense = functools.partial(
            Dense, dtype=self.dtype, int8_products=self.int8_products
        )
        functions = [activation(name) for name in self.activations]
        units = []
        for index in range(len(functions)):
            leaf = "wi" if len(functions) == 1 else f"wi_{index}"
            units.append(dense(self.mlp_dim, ("embed", "mlp"), name=leaf)(x, where))

        @saved_activations.recomputed
        def gate(*units: Array) -> Array:
            parts = (f(y) for f, y in zip(functions, units, strict=True))
            return functools.reduce(operator.mul, parts)

        y = gate(*units)
        y = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
            y, deterministic=deterministic
        )
        y = spmd.with_logical_constraint(y, ("batch", "length", "mlp"))
        return dense(width, ("mlp", "embed"), name="wo")(y, where)


def activation(name: str) -> Callable[[Array], Array]:
    """An activation by the name that T5 configurations use.

    Raises:
      ValueError: `flax.linen` has no function of that name.
    """
    if name == "linear":
        return lambda x: x
    if not hasattr(nn, name):
        raise UserError(f"no activation is called {name!r}; try 'relu', 'gelu', 'silu'")
    return getattr(nn, name)


class Attention(nn.Module):
    """Multi-head dot-product attention as T5 has it: logits are not rescaled.

    Decoding one token at a time keeps keys and values in the variable collections
    ``cache`` (self-attention: it grows by a position a call) and ``memory``
    (cross-attention: projected once from the encoder's output). A first call with
    ``decode=True`` on full-length inputs creates both, the following calls take one
    token.

    Attributes:
      num_heads: heads N.
      head_dim: width D of a head.
      dropout_rate: of the attention weights.
      dtype: dtype of the computation; the softmax is float32.
      over_encoder: whether its keys are encoder positions, where prompts may stand.
      fused: an implementation of `jax.nn.dot_product_attention` ('cudnn', 'xla') to
        use where there is no cache; None computes the products here.
      int8_products: of the projections; see `Dense`.
    """

    num_heads: int
    head_dim: int
    dropout_rate: float
    dtype: DType
    over_encoder: bool = True
    fused: Literal["cudnn", "xla"] | None = None
    int8_products: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,  # [B, Q, H]
        memory: Array | None = None,  # [..., K, H]; None attends to x itself
        where: Where | None = None,
        *,
        mask: Array | None = None,  # [B, 1, Q, K] or [1, 1, Q, K]
        # [1, N, Q, K], with a prefix its M keys too, or that of all S steps of a decode.
        bias: Array | None = None,  # [1, N, Q, K], [1, N, Q, M] or [1, N, S, S]
        deterministic: bool = True,
        decode: bool = False,
    ) -> Array:  # [B, Q, H]
        width = x.shape[-1]
        joined = self.num_heads * self.head_dim
        dense = functools.partial(
            Dense, dtype=self.dtype, int8_products=self.int8_products
        )
        # Keys of the decoder's own positions stand at no prompt.
        sites = {}
        if self.over_encoder:
            sites = {"key": adapters.KEYS, "value": adapters.VALUES}

        def project(name: str, inputs: Array, init: Initializer) -> Array:
            axes = ("embed", "joined_kv")
            y = dense(joined, axes, kernel_init=init, name=name)(inputs, where)
            if name in sites:
                y = adapters.at(self, sites[name], y, where)
            y = y.reshape(*y.shape[:-1], self.num_heads, self.head_dim)
            return spmd.with_logical_constraint(y, ("batch", "length", "heads", "kv"))

        # The factor 1/sqrt(D) that other Transformers apply to the logits is folded
        # into the initialiser of the queries.
        def query_init(*args):
            return attention_kernel_init(*args) / jnp.sqrt(self.head_dim)

        query = project("query", x, query_init)
        project_kv = lambda inputs: (
            project("key", inputs, attention_kernel_init),
            project("value", inputs, attention_kernel_init),
        )
        if not decode:
            key, value = project_kv(x if memory is None else memory)
        elif memory is None:
            key, value, mask, bias = self._append_to_cache(*project_kv(x), mask, bias)
        else:
            key, value = self._memorize(lambda: project_kv(memory))
        if not self.over_encoder:
            key, value, mask = adapters.at(
                self, adapters.PREFIX, (key, value, mask), where
            )

        summand = None
        if mask is not None:
            summand = mask_to_bias(mask, self.dtype)
        if bias is not None:
            summand = bias if summand is None else summand + bias
        if self.fused is not None and not decode:
            self._check_fused(query.shape[1], key.shape[1], deterministic)
            y = jax.nn.dot_product_attention(
                query, key, value, summand, scale=1.0, implementation=self.fused
            )
        else:
            # Heads in front: products of matrices that lie in one piece.
            query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
            logits = jnp.einsum("bnqd,bnkd->bnqk", query, key)
            if summand is not None:
                logits = logits + summand
            weights = saved_activations.softmax(logits)
            # T5 drops whole columns of attention: the mask is shared by all queries.
            weights = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
                weights, deterministic=deterministic
            )
            y = jnp.einsum("bnqk,bnkd->bnqd", weights, value)
            y = jnp.swapaxes(y, 1, 2)
        y = y.reshape(*y.shape[:-2], joined)
        out = dense(
            width,
            ("joined_kv", "embed"),
            kernel_init=attention_kernel_init,
            name="out",
        )
        return out(y, where)

    def _check_fused(self, queries: int, keys: int, deterministic: bool) -> None:
        """Refuses what the fused kernel cannot compute.

        Raises:
          UserError: one thing that is in its way, and what to set.
        """
        if self.dropout_rate > 0 and not deterministic:
            raise UserError(
                f"attention={self.fused!r} has no dropout of attention weights; set "
                "DROPOUT_RATE to 0.0 or T5Config.attention to 'einsum'"
            )
        if self.fused != "cudnn":
            return
        if jax.default_backend() != "gpu":
            raise UserError(
                "attention='cudnn' needs an NVIDIA GPU, and this is a "
                f"{jax.default_backend().upper()}; set T5Config.attention to 'einsum'"
            )
        if self.dtype not in ("bfloat16", "float16"):
            raise UserError(
                f"attention='cudnn' computes in 16 bits, not in {self.dtype}; set "
                "ACTIVATION_DTYPE to 'bfloat16' or T5Config.attention to 'einsum'"
            )
        if queries % 2 or keys % 2:
            raise UserError(
                f"attention='cudnn' needs an even number of tokens, not {queries}; "
                "change the length of inputs or of the prompt by one, or set "
                "T5Config.attention to 'einsum'"
            )

    def _memorize(self, project_kv: Callable[[], tuple[Array, Array]]):
        """Keys and values of the encoder's output, projected by the first call only."""
        if self.has_variable("memory", "key"):
            return self.get_variable("memory", "key"), self.get_variable(
                "memory", "value"
            )
        key, value = project_kv()
        self.put_variable("memory", "key", key)
        self.put_variable("memory", "value", value)
        return key, value

    def _append_to_cache(
        self, key: Array, value: Array, mask: Array | None, bias: Array | None
    ) -> tuple[Array, Array, Array | None, Array | None]:
        """Writes one position into the cache; narrows mask and bias to its row."""
        # T5X's names; `key` and `value` are taken by the projections.
        started = self.has_variable("cache", "cached_key")
        cached_key = self.variable("cache", "cached_key", jnp.zeros_like, key)
        cached_value = self.variable("cache", "cached_value", jnp.zeros_like, value)
        index = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
        if not started:
            return key, value, mask, bias
        position = index.value
        key = jax.lax.dynamic_update_slice_in_dim(cached_key.value, key, position, 1)
        value = jax.lax.dynamic_update_slice_in_dim(
            cached_value.value, value, position, 1
        )
        cached_key.value, cached_value.value = key, value
        index.value = position + 1
        seen = jnp.arange(key.shape[1]) <= position  # [K]
        mask = seen[None, None, None, :]
        if bias is not None:
            bias = jax.lax.dynamic_slice_in_dim(bias, position, 1, axis=-2)
        return key, value, mask, bias


def relative_position_bucket(
    relative_position: np.ndarray,
    *,
    bidirectional: bool,
    num_buckets: int,
    max_distance: int,
) -> np.ndarray:
    """Maps key position minus query position to a bucket (Raffel et al. 2020, 2.1).

    Half of the buckets hold one distance each, the others grow logarithmically up to
    ``max_distance``; all greater distances share the last one. When ``bidirectional``,
    the upper half of the buckets is for keys after the query; otherwise these share
    bucket 0.
    """
    distance = -relative_position
    offset = np.zeros_like(relative_position)
    if bidirectional:
        num_buckets //= 2
        offset = (distance < 0).astype(np.int32) * num_buckets
        distance = np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    exact = num_buckets // 2
    ratio = np.log(
        distance.astype(np.float32) / exact + np.finfo(np.float32).eps
    ) / np.log(max_distance / exact)
    logarithmic = exact + (ratio * (num_buckets - exact)).astype(np.int32)
    logarithmic = np.minimum(logarithmic, num_buckets - 1)
    return offset + np.where(distance < exact, distance, logarithmic)


def places_of(segments: Array) -> Array:  # [B, S] -> [B, S]
    """Where each token stands in its packed example, whose tokens are neighbours."""
    index = jnp.arange(segments.shape[1])[None]
    begins = jnp.diff(segments, axis=1, prepend=-1) != 0
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def bias_at(bias: Array, places: Array) -> Array:
    """A bias of queries that stand elsewhere: [1, N, S, K], [B, Q] -> [B, N, Q, K]."""
    return jnp.moveaxis(jnp.take(bias[0], places, axis=1), 1, 0)


def bias_beside(before: Array, own: Array) -> Array:
    """The bias of keys before the first token, and of those of tokens behind it.

    Args:
      before: [B or 1, N, Q, P].
      own: the same for all rows: [1, N, Q, K].

    Returns:
      [B or 1, N, Q, P + K].
    """
    own = jnp.broadcast_to(own, (len(before), *own.shape[1:]))
    return jnp.concatenate([before, own], axis=3)


class RelativePositionBias(nn.Module):
    """A learnt summand of the attention logits for each head and distance bucket."""

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool
    dtype: DType

    @nn.compact
    def __call__(self, length: int) -> Array:  # [1, N, length, length]
        table = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(
                nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
                ("heads", "relpos_buckets"),
            ),
            (self.num_heads, self.num_buckets),
            jnp.float32,
        )
        position = np.arange(length, dtype=np.int32)
        bucket = relative_position_bucket(
            position[None, :] - position[:, None],
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return jnp.take(table.astype(self.dtype), bucket, axis=1)[None]
