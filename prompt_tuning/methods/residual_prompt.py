# SPDX-License-Identifier: Apache-2.0
"""Residual prompt tuning (Razdaibiedina et al. 2023, https://arxiv.org/abs/2305.03937).

``P' = P + LN(W2 relu(W1 P + b1) + b2)``: a shallow network with a residual connection,
shared by all rows, stands between what is tuned and what the network sees. It is left
out of what is saved.
"""

import dataclasses

import jax
import jax.numpy as jnp

from prompt_tuning.methods.method import (
    Leaves,
    Method,
    Start,
    apply_linear,
    linear,
)
from prompt_tuning.types import Array, Params, Size

EPSILON = 1e-5  # that of PyTorch's LayerNorm


@dataclasses.dataclass(frozen=True)
class ResidualPrompt(Method, kind="residual_prompt"):
    """A prompt behind a residual network.

    Attributes:
      bottleneck: width of the network's hidden layer.
    """

    bottleneck: Size = 800

    def init(self, key: Array, start: Start) -> Leaves:
        """The rows, and the network as PyTorch starts it."""
        width = start.rows.shape[1]
        down, up = jax.random.split(key)
        return {
            "rows": start.rows,
            "down": linear(down, width, self.bottleneck),
            "up": linear(up, self.bottleneck, width),
            "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        }

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """The rows and what the network adds to them: [P, H]."""
        del base
        hidden = jax.nn.relu(apply_linear(leaves["down"], leaves["rows"]))
        y = apply_linear(leaves["up"], hidden)
        y = jax.nn.standardize(y, epsilon=EPSILON)
        scale, bias = leaves["norm"]["scale"][None], leaves["norm"]["bias"][None]
        return leaves["rows"] + y * scale + bias
