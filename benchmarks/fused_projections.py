# SPDX-License-Identifier: Apache-2.0
"""What one product for query, key and value, and one for the MLP's gates, would bring.

    python benchmarks/fused_projections.py \
        --output benchmarks/results/fused_projections.json

Encoder layers of T5 1.1 Small on 16 rows of 228 tokens, forward and the gradient of the
layers' input, with three and two products as the network has them or with one each, on
weights that were joined before: the most that joining could bring. The programs run in
turn.
"""

import argparse
import functools
import pathlib
import statistics
from typing import Any

import environment
import jax
import jax.numpy as jnp
import turns

B, T, H, N, D, F, L = 16, 228, 512, 6, 64, 1024, 8
SHAPES = {
    "query": (H, N * D),
    "key": (H, N * D),
    "value": (H, N * D),
    "out": (N * D, H),
    "wi_0": (H, F),
    "wi_1": (H, F),
    "wo": (F, H),
}
JOINED = {"qkv": ("query", "key", "value"), "wi": ("wi_0", "wi_1")}


def weights(dtype: str) -> dict[str, jax.Array]:
    """Small random kernels, the layers in front."""
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {
        name: (jax.random.normal(key, (L, *shape)) / shape[0] ** 0.5).astype(dtype)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def joined(kernels: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The same with one kernel in the place of several."""
    parts = {name for names in JOINED.values() for name in names}
    kept = {name: kernel for name, kernel in kernels.items() if name not in parts}
    return kept | {
        name: jnp.concatenate([kernels[part] for part in parts], axis=-1)
        for name, parts in JOINED.items()
    }


def project(
    x: jax.Array, kernels: dict[str, jax.Array], name: str
) -> tuple[jax.Array, ...]:
    """Outputs of the kernels that `JOINED` names, by one product if there is one."""
    rows = x.reshape(-1, H)
    if name in kernels:
        outputs = jnp.split(rows @ kernels[name], len(JOINED[name]), axis=-1)
    else:
        outputs = [rows @ kernels[part] for part in JOINED[name]]
    return tuple(y.reshape(*x.shape[:-1], -1) for y in outputs)


def norm(x: jax.Array) -> jax.Array:
    """The RMS norm, without a scale."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype)


def layer(x: jax.Array, kernels: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    """One layer of the encoder, without masks and position bias."""
    heads = [y.reshape(B, T, N, D) for y in project(norm(x), kernels, "qkv")]
    query, key, value = heads
    logits = jnp.einsum("bqnd,bknd->bnqk", query, key).astype(jnp.float32)
    attended = jax.nn.softmax(logits).astype(x.dtype)
    y = jnp.einsum("bnqk,bknd->bqnd", attended, value).reshape(B, T, N * D)
    x = x + y @ kernels["out"]
    gate, linear = project(norm(x), kernels, "wi")
    return x + (jax.nn.gelu(gate) * linear) @ kernels["wo"], None


def layers(x: jax.Array, kernels: dict[str, jax.Array]) -> jax.Array:
    """All layers."""
    return jnp.sum(jax.lax.scan(layer, x, kernels)[0].astype(jnp.float32) ** 2)


def projections(x: jax.Array, kernels: dict[str, jax.Array]) -> jax.Array:
    """The products alone that would be joined."""

    def body(total, kernels):
        outputs = project(x, kernels, "qkv") + project(x, kernels, "wi")
        return total + sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in outputs), None

    return jax.lax.scan(body, 0.0, kernels)[0]


def measure(function, dtype: str, rounds: int) -> dict[str, Any]:
    """Median seconds of both, and the median of the ratios of neighbours."""
    x = jax.random.normal(jax.random.key(1), (B, T, H)).astype(dtype)
    apart = weights(dtype)
    inputs = {"apart": apart, "joined": joined(apart)}
    gradient = jax.jit(jax.value_and_grad(function))
    programs = {name: gradient.lower(x, w).compile() for name, w in inputs.items()}
    calls = {n: functools.partial(p, x, inputs[n]) for n, p in programs.items()}
    seconds = turns.seconds(calls, rounds)
    return {
        "median_seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "least_seconds": {name: min(s) for name, s in seconds.items()},
        "time_ratio": turns.ratio(seconds["joined"], seconds["apart"]),
    }


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    results = {
        "shape": {"batch": B, "tokens": T, "layers": L, "rounds": options.rounds},
        **{
            dtype: {
                "projections": measure(projections, dtype, options.rounds),
                "encoder layers": measure(layers, dtype, options.rounds),
            }
            for dtype in ("float32", "bfloat16")
        },
    }
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
