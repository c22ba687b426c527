# SPDX-License-Identifier: Apache-2.0
"""P-tuning (Liu et al. 2021, https://arxiv.org/abs/2103.10385): a prompt encoder.

What is tuned passes through an MLP, or through a bidirectional LSTM and an MLP, before
the network sees it, so that the rows depend on one another. Layers, their widths and
their starts are those of PEFT's `PromptEncoder`. The encoder is left out of what is saved.
"""

import dataclasses
import itertools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from prompt_tuning.methods.method import (
    Leaves,
    Method,
    Start,
    apply_linear,
    linear,
    product,
    torch_uniform,
)
from prompt_tuning.types import Array, Params, Size


@dataclasses.dataclass(frozen=True)
class PTuning(Method, kind="p_tuning"):
    """A prompt behind an encoder.

    Attributes:
      encoder: 'mlp': three linear maps with ReLU between them; 'lstm': a bidirectional
        LSTM and two linear maps.
      hidden: width of the encoder; None is that of the model.
      num_layers: of the LSTM.
    """

    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: Size | None = None
    num_layers: Size = 2
    learning_rate: ClassVar[float] = 0.01

    def init(self, key: Array, start: Start) -> Leaves:
        """The rows, and the encoder as PyTorch starts it."""
        width = start.rows.shape[1]
        hidden = self.hidden or width
        keys = iter(jax.random.split(key, 3 + 2 * self.num_layers))
        leaves: dict[str, Any] = {"rows": start.rows}
        if self.encoder == "lstm":
            for layer in range(self.num_layers):
                inputs = 2 * hidden if layer else width
                for way in ("forward", "backward"):
                    leaves[f"lstm_{layer}_{way}"] = _cell(next(keys), inputs, hidden)
            widths = [2 * hidden, 2 * hidden, width]
        else:
            widths = [width, hidden, hidden, width]
        for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            leaves[f"mlp_{index}"] = linear(next(keys), inputs, outputs)
        return leaves

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """What the encoder makes of the rows: [P, H]."""
        del base
        x = leaves["rows"]
        if self.encoder == "lstm":
            for layer in range(self.num_layers):
                forward = _scan(leaves[f"lstm_{layer}_forward"], x)
                backward = _scan(leaves[f"lstm_{layer}_backward"], x[::-1])[::-1]
                x = jnp.concatenate([forward, backward], axis=-1)
        layers = sorted(name for name in leaves if name.startswith("mlp_"))
        for name in layers[:-1]:
            x = jax.nn.relu(apply_linear(leaves[name], x))
        return apply_linear(leaves[layers[-1]], x)


def _cell(key: Array, inputs: int, hidden: int) -> dict[str, Array]:
    """The leaves of an LSTM cell; gates in PyTorch's order: input, forget, cell, output."""
    keys = jax.random.split(key, 3)
    biases = [
        torch_uniform(k, (4 * hidden,), hidden) for k in jax.random.split(keys[2])
    ]
    return {
        "input": torch_uniform(keys[0], (inputs, 4 * hidden), hidden),
        "recurrent": torch_uniform(keys[1], (hidden, 4 * hidden), hidden),
        # PyTorch has two biases, of which only the sum matters.
        "bias": biases[0] + biases[1],
    }


def _scan(leaves: Params, x: Array) -> Array:  # [P, inputs] -> [P, hidden]
    hidden = leaves["recurrent"].shape[0]

    def step(carry, inputs):
        state, cell = carry
        gates = inputs + product(state, leaves["recurrent"])
        enter, keep, new, leave = jnp.split(gates, 4)
        cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
        state = jax.nn.sigmoid(leave) * jnp.tanh(cell)
        return (state, cell), state

    zeros = jnp.zeros(hidden)
    return jax.lax.scan(
        step, (zeros, zeros), product(x, leaves["input"]) + leaves["bias"][None]
    )[1]
