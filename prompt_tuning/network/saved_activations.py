# SPDX-License-Identifier: Apache-2.0
"""Functions with backward passes of their own, which keep less and multiply faster.

What the forward pass keeps for the backward pass (its residuals) is most of the memory
of a training step without rematerialisation. Left to itself, JAX keeps every float32
intermediate of a softmax, a norm or a gelu.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from prompt_tuning.types import Array, DType

# The name of what `product` returns, for rematerialisation to keep.
PRODUCT = "product"

# The backward pass computes a cheap function again from its arguments instead of keeping
# what it computed on the way. Inside a scan nothing could merge the two.
recomputed: Callable[[Callable[..., Array]], Callable[..., Array]] = functools.partial(
    jax.checkpoint, prevent_cse=False
)


@jax.custom_vjp
def softmax(logits: Array) -> Array:  # [..., K] -> [..., K]
    """Softmax over the last axis: computed in float32, returned in the given dtype.

    The backward pass needs the result alone.
    """
    return jax.nn.softmax(logits.astype(jnp.float32)).astype(logits.dtype)


def _softmax_forward(logits: Array) -> tuple[Array, Array]:
    weights = softmax(logits)
    return weights, weights


def _softmax_backward(weights: Array, gradient: Array) -> tuple[Array]:
    weight, slope = weights.astype(jnp.float32), gradient.astype(jnp.float32)
    mean = jnp.sum(weight * slope, axis=-1, keepdims=True)
    return ((weight * (slope - mean)).astype(weights.dtype),)


softmax.defvjp(_softmax_forward, _softmax_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec: str, x: Array, y: Array, dtype: DType | None = None) -> Array:
    """`jnp.einsum` of two arrays of one dtype, summed in float32.

    Asked for a float32 result, XLA multiplies bfloat16 on a CPU as such; otherwise it
    first converts both factors, which takes twice as long. The derivative that JAX would
    make of that multiplies float32 by bfloat16; this one has products like the first, and
    keeps a factor only for the gradient of the other.

    Args:
      spec: as ``"ri,io->ro"``: two factors, no index that only one of the three has.
      x: the first factor.
      y: the second factor.
      dtype: of the result; by default that of the factors. The output layer's float32
        logits of bfloat16 factors take no float32 copy of its weights.
    """
    return _multiply(spec, x, y, dtype or x.dtype)


def _multiply(spec: str, x: Array, y: Array, dtype: DType) -> Array:
    wide = jnp.promote_types(x.dtype, y.dtype)
    x, y = x.astype(wide), y.astype(wide)
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(dtype)


def _product_forward(spec: str, x: Any, y: Any, dtype: DType | None):
    kept = x.value if y.perturbed else None, y.value if x.perturbed else None
    made = _multiply(spec, x.value, y.value, dtype or x.value.dtype)
    return checkpoint_name(made, PRODUCT), kept


def _product_backward(
    spec: str,
    dtype: DType | None,
    kept: tuple[Array | None, Array | None],
    slope: Any,
):
    del dtype
    if isinstance(slope, jax.custom_derivatives.SymbolicZero):
        slope = jnp.zeros(slope.shape, slope.dtype)  # pyright: ignore[reportArgumentType]
    x, y = kept
    factors, result = spec.split("->")
    first, second = factors.split(",")
    # A factor's gradient has its dtype, which is that of the other.
    return (
        None
        if y is None
        else _multiply(f"{result},{second}->{first}", slope, y, y.dtype),
        None
        if x is None
        else _multiply(f"{result},{first}->{second}", slope, x, x.dtype),
    )


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)
