# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning rate schedules under T5X's names.

Adafactor (Shazeer and Stern 2018) follows T5X: its statistics, update clipping and
parameter scale belong to one weight matrix. Our layers are stacked in one leaf, so
each layer's slice is treated as the matrix it is (`per_layer`).
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from prompt_tuning import trees
from prompt_tuning.types import Array, PyTree

Schedule = Callable[[Array], Array]

STACKED = r"(.*/)?layers/.*"
PROMPT = r"(.*/)?prompts/.*"


def learning_rate_schedule(
    factors: str = "constant",
    base_learning_rate: float = 0.3,
    warmup_steps: int = 1000,
    decay_steps: int | None = None,
) -> Schedule:
    """A product of factors, as T5X's ``create_learning_rate_scheduler`` has it.

    Args:
      factors: names joined by ``*``: constant (times the base rate), linear_warmup,
        rsqrt_decay (divided by the root of max(step, warmup)), rsqrt_normalized_decay
        (the same, starting from 1), linear_decay and cosine_decay (from 1 after the
        warm-up to 0 at ``decay_steps``).
      base_learning_rate: what ``constant`` multiplies by.
      warmup_steps: length of the warm-up, and offset of the decays.
      decay_steps: the step at which linear and cosine decay reach 0.

    Raises:
      ValueError: an unknown factor, or a decay without ``decay_steps``.
    """
    names = [name.strip() for name in factors.split("*")]
    known = {
        "constant": lambda step: base_learning_rate,
        "linear_warmup": lambda step: jnp.minimum(1.0, step / warmup_steps),
        "rsqrt_decay": lambda step: 1.0 / jnp.sqrt(jnp.maximum(step, warmup_steps)),
        "rsqrt_normalized_decay": lambda step: (
            jnp.sqrt(warmup_steps) / jnp.sqrt(jnp.maximum(step, warmup_steps))
        ),
        "linear_decay": lambda step: 1.0 - _progress(step, warmup_steps, decay_steps),
        "cosine_decay": lambda step: 0.5
        * (1 + jnp.cos(jnp.pi * _progress(step, warmup_steps, decay_steps))),
    }
    for name in names:
        if name not in known:
            raise ValueError(
                f"learning rate factor {name!r} is not one of {', '.join(known)}"
            )
        if name in ("linear_decay", "cosine_decay") and not decay_steps:
            raise ValueError(f"{name} needs decay_steps, the step where it reaches 0")

    def schedule(step: Array) -> Array:
        rate = jnp.ones((), jnp.float32)
        for name in names:
            rate = rate * known[name](jnp.asarray(step, jnp.float32))
        return rate

    return schedule


def _progress(step: Array, start: int, end: int | None) -> Array:
    return jnp.clip((step - start) / max(1, (end or 0) - start), 0.0, 1.0)


def adafactor(
    learning_rate: float | Schedule,
    *,
    decay_rate: float = 0.8,
    step_offset: int = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: float | None = 1.0,
    weight_decay_rate: float | None = None,
    min_dim_size_to_factor: int = 128,
) -> optax.GradientTransformation:
    """Adafactor with T5X's defaults and arithmetic.

    The second moments of a prompt are never factored, whatever its length, as in the
    original prompt tuning code.
    """

    def build(factored: bool) -> optax.GradientTransformation:
        return optax.adafactor(
            learning_rate=learning_rate,
            min_dim_size_to_factor=min_dim_size_to_factor,
            decay_rate=decay_rate,
            decay_offset=step_offset,
            multiply_by_parameter_scale=multiply_by_parameter_scale,
            clipping_threshold=clipping_threshold,
            weight_decay_rate=weight_decay_rate,
            factored=factored,
        )

    rules = ((STACKED, "stacked"), (PROMPT, "prompt"), (r".*", "matrix"))
    return optax.partition(
        {
            "stacked": per_layer(build(factored=True)),
            "prompt": build(factored=False),
            "matrix": build(factored=True),
        },
        lambda params: trees.labels(params, rules),
    )


def adamw(
    learning_rate: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay_rate: float = 0.0,
    max_grad_norm: float | None = None,
) -> optax.GradientTransformation:
    """AdamW, with clipping of the global gradient norm if ``max_grad_norm`` is given."""
    tx = optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay_rate)
    if max_grad_norm is None:
        return tx
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), tx)


def per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies ``tx`` to every slice along the leading axis of each leaf on its own."""

    def each(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        # A leaf may stack another number of layers than its neighbour (encoder and
        # decoder), so each leaf is mapped, with its own state, by itself.
        return lambda *leaves: jax.vmap(fn)(*leaves)

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(each(tx.init), params)

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None):
        treedef = jax.tree.structure(updates)
        results = [
            each(tx.update)(*args)
            for args in zip(
                jax.tree.leaves(updates),
                treedef.flatten_up_to(state),
                treedef.flatten_up_to(params),
                strict=True,
            )
        ]
        return (
            treedef.unflatten([update for update, _ in results]),
            treedef.unflatten([new for _, new in results]),
        )

    return optax.GradientTransformation(init, update)


def is_stacked(name: str) -> bool:
    """Whether a leaf of this name stacks the layers along its first axis."""
    return re.fullmatch(STACKED, name) is not None
