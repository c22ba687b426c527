# SPDX-License-Identifier: Apache-2.0
"""The kernels of a base model's layers, as methods look for them."""

from collections.abc import Sequence

import jax.numpy as jnp

from prompt_tuning import trees
from prompt_tuning.errors import UserError
from prompt_tuning.network import quantization
from prompt_tuning.types import Array, Params, Shape

KERNEL = "/kernel"


def find(base: Params, targets: Sequence[str]) -> dict[str, Shape]:
    """The shape [L, in, out] of every layer's kernels of these names, by module path.

    Raises:
      UserError: a name that no layer has.
    """
    found = {
        name.removesuffix(KERNEL): leaf.shape
        for name, leaf in trees.flatten(base).items()
        if "/layers/" in name and name.endswith(KERNEL)
    }
    known = sorted({path.rpartition("/")[2] for path in found})
    unknown = sorted(set(targets) - set(known))
    if unknown or not targets:
        raise UserError(
            f"targets={list(targets)}: {', '.join(unknown) or 'none'} is no kernel of "
            f"the model's layers; choose among {', '.join(known)}"
        )
    return {p: shape for p, shape in found.items() if p.rpartition("/")[2] in targets}


def read(base: Params, path: str) -> Array:  # [L, in, out] float32
    """The kernels of a module in all layers, whatever they are kept in."""
    own = base
    for part in path.split("/"):
        own = own[part]
    kernel = jnp.asarray(own["kernel"], jnp.float32)
    if quantization.SCALE in own:
        kernel = kernel * own[quantization.SCALE][:, None, :]
    return kernel
