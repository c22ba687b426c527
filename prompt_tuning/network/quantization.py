# SPDX-License-Identifier: Apache-2.0
"""Frozen kernels as int8: a quarter of float32's memory, half of bfloat16's.

Symmetric, with one float32 scale for each output channel: a kernel ``[..., in, out]``
becomes ``round(kernel / scale)``, and since the scale is the same for all inputs of a
channel it is multiplied with the product instead of the weights (see `layers.Dense`).
What is multiplied with them stays as it is, or is rounded to int8, too, where the
configuration asks for it (`product`). Embedding table, norms and position bias stay
floating: they are looked up or added, and small beside the kernels, the table of small
models apart.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from prompt_tuning import trees
from prompt_tuning.network import saved_activations
from prompt_tuning.types import Array, Params

KERNEL, SCALE = "kernel", "kernel_scale"
# The largest quantised weight: -128 has no counterpart and is left out.
LARGEST = 127


def quantize(kernel: np.ndarray | Array) -> tuple[Any, Any]:
    """Rounds a kernel to int8.

    Args:
      kernel: ``[..., in, out]`` of any floating dtype, of NumPy or JAX.

    Returns:
      The int8 weights ``[..., in, out]`` and their scales ``[..., out]``, float32, of
      the kernel's library; ``weights * scale[..., None, :]`` is within half a scale of
      the kernel.
    """
    xp: Any = jnp if isinstance(kernel, jax.Array) else np
    kernel = kernel.astype(np.float32, copy=False)
    largest = xp.max(xp.abs(kernel), axis=-2)
    # A channel of zeros would be divided by zero.
    scale = (largest / LARGEST).astype(np.float32)
    scale = xp.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
    return xp.rint(kernel / scale[..., None, :]).astype(np.int8), scale


@jax.custom_vjp
def product(rows: Array, kernel: Array, scale: Array) -> Array:
    """Multiplies rows by an int8 kernel as integers, which they are rounded to.

    Each row has a scale of its own, found from its largest value (dynamic quantisation
    for each token, as of LLM.int8(), https://arxiv.org/abs/2208.07339, section 2).
    Products are summed in int32, so that the rounding of the rows is the only error. The
    gradient is that of the product with the rows as they were.

    Args:
      rows: ``[R, in]`` of any floating dtype.
      kernel: ``[in, out]`` int8.
      scale: of its channels, ``[out]`` float32.

    Returns:
      ``[R, out]`` of the rows' dtype.
    """
    largest = jnp.max(jnp.abs(rows), axis=-1, keepdims=True).astype(jnp.float32)
    own = jnp.maximum(largest / LARGEST, jnp.finfo(jnp.float32).tiny)
    whole = jnp.rint(rows.astype(jnp.float32) / own).astype(jnp.int8)
    summed = jnp.einsum("ri,io->ro", whole, kernel, preferred_element_type=jnp.int32)
    result = summed.astype(jnp.float32) * own * scale[None]
    return checkpoint_name(result.astype(rows.dtype), saved_activations.PRODUCT)


def _product_forward(
    rows: Array, kernel: Array, scale: Array
) -> tuple[Array, tuple[Array, Array]]:
    return product(rows, kernel, scale), (kernel, scale)


def _product_backward(
    kept: tuple[Array, Array], slope: Array
) -> tuple[Array, None, None]:
    kernel, scale = kept
    slope = (slope.astype(jnp.float32) * scale[None]).astype(slope.dtype)
    kernel = kernel.astype(slope.dtype)
    return saved_activations.product("ro,io->ri", slope, kernel), None, None


product.defvjp(_product_forward, _product_backward)


def quantize_abstract(boxed_params: Params) -> dict[str, Any]:
    """What `Model.abstract_params` becomes with quantised kernels.

    Args:
      boxed_params: shapes in boxes that carry their logical axes.

    Returns:
      The same tree, with every ``kernel`` int8 and beside it a float32 ``kernel_scale``
      without the axis of inputs.
    """
    flat = {}
    for name, box in trees.flatten(boxed_params).items():
        flat[name] = box
        if name.rpartition("/")[2] == KERNEL:
            shape, axes = box.value.shape, box.names
            flat[name] = box.replace_boxed(jax.ShapeDtypeStruct(shape, np.int8))
            flat[scale_name(name)] = box.replace(
                value=jax.ShapeDtypeStruct((*shape[:-2], shape[-1]), np.float32),
                names=(*axes[:-2], axes[-1]),
            )
    return trees.unflatten(flat)


def scale_name(kernel_name: str) -> str:
    """The name of the scales of a kernel.

    >>> scale_name("decoder/logits_dense/kernel")
    'decoder/logits_dense/kernel_scale'
    """
    return f"{kernel_name.removesuffix(KERNEL)}{SCALE}"
