# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning rate schedules under T5X's names.

Adafactor (Shazeer and Stern 2018) follows T5X: its statistics, update clipping and
parameter scale belong to one weight matrix. Our layers are stacked in one leaf, so
each layer's slice is treated as the matrix it is (`per_layer`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prompt_tuning import trees
from prompt_tuning.errors import UserError
from prompt_tuning.network.prompts import PROMPT_LEAVES
from prompt_tuning.types import (
    Array,
    LearningRate,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PyTree,
    Rate,
    Share,
)

# From the number of a step to its rate.
LearningRateFn = Callable[[Array], Array]

STACKED = r"(.*/)?layers/.*"
DECAYED = "constant * linear_warmup * linear_to_zero"


class Optimizer(optax.GradientTransformation):
    """A transformation that says what it is.

    Attributes:
      learning_rate: from the number of a step to its rate, or the rate of all.
      values: the other values that it was made of, with its name; JSON.
    """

    learning_rate: float | LearningRateFn
    values: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        tx: optax.GradientTransformation,
        learning_rate: float | LearningRateFn,
        **values: Any,
    ) -> "Optimizer":
        """Says of ``tx`` what it was made of."""
        described = cls(tx.init, tx.update)
        described.learning_rate, described.values = learning_rate, values
        return described


def learning_rate_of(tx: optax.GradientTransformation, step: int) -> float | None:
    """The rate of a step's update, counted from 0; None where ``tx`` does not say."""
    rate = getattr(tx, "learning_rate", None)
    return float(_compiled(rate)(step)) if callable(rate) else rate


def rates_around(rate: float) -> tuple[float, ...]:
    """The rates that are tried where a method's usual one is known.

    >>> rates_around(0.3)
    (0.03, 0.1, 0.3, 1.0, 3.0)
    """
    factors = (0.1, 1 / 3, 1.0, 10 / 3, 10.0)
    return tuple(float(f"{rate * factor:.2g}") for factor in factors)


def decayed(
    learning_rate: LearningRate, steps: PositiveInt, factors: str = DECAYED
) -> optax.GradientTransformation:
    """Adafactor as the paper has it, its rate warmed up and falling to zero.

    What `recipes/short.gin` says, for runs that no gin file describes.

    Args:
      learning_rate: the highest rate.
      steps: of the run: its first tenth is the warm-up, its last one has a rate of zero.
      factors: see `learning_rate_schedule`; 'constant' is the paper's.
    """
    return adafactor(
        learning_rate_schedule(factors, learning_rate, None, steps),
        multiply_by_parameter_scale=False,
        weight_decay_rate=1e-5,
    )


# Schedules are asked once for each record: one small program in place of its parts.
_compiled = functools.lru_cache(maxsize=128)(jax.jit)


def learning_rate_schedule(
    factors: str = "constant",
    base_learning_rate: LearningRate = 0.3,
    warmup_steps: PositiveInt | None = 1000,
    decay_steps: PositiveInt | None = None,
    *,
    decay_factor: PositiveFloat = 0.5,
    steps_per_decay: PositiveInt = 20_000,
    steps_per_cycle: PositiveInt = 100_000,
    cooldown_steps: NonNegativeInt = 0,
    min_learning_rate: NonNegativeFloat = 1e-8,
) -> LearningRateFn:
    """A product of factors, as T5X's ``create_learning_rate_scheduler`` has it.

    T5X's factors keep their arithmetic: constant (times the base rate), linear_warmup,
    rsqrt_decay (divided by the root of max(step, warmup)), rsqrt_normalized_decay (the
    same, starting from 1), decay_every (times ``decay_factor`` every
    ``steps_per_decay``), cosine_decay (cycles of ``steps_per_cycle``) and linear_decay
    (the base rate, warmed up, then less ``decay_factor`` of it with every step, so that
    0.5 takes two steps; it includes constant and linear_warmup). Three factors are
    ours, because a run's last step is what one knows: linear_to_zero and cosine_to_zero
    go from 1 at the start (after the warm-up, if linear_warmup is a factor, too) to 0
    at ``decay_steps``; linear_cooldown is 1 but for the last ``cooldown_steps`` before
    it (Hägele et al. 2024), so that a run of unknown length can be ended at any step.

    Args:
      factors: what the rate is the product of at each step, names joined by ``*``.
      base_learning_rate: the learning rate, where ``constant`` is a factor; ``train`` takes
        'auto' or a list, too, and tries several before the run.
      warmup_steps: length of the warm-up, and offset of the decays; None is a tenth of
        ``decay_steps``, which is none at all below ten.
      decay_steps: the step at which the factors that are ours reach 0.
      decay_factor: see linear_decay and decay_every.
      steps_per_decay: see decay_every.
      steps_per_cycle: see cosine_decay.
      cooldown_steps: see linear_cooldown.
      min_learning_rate: the rate never falls below it (T5X's 1e-8).

    Raises:
      UserError: an unknown factor, one of ours without its steps, a warm-up of None
        without ``decay_steps``, or a ``..._to_zero`` factor that ends within the
        warm-up.
    """
    if warmup_steps is None:
        if not decay_steps:
            raise UserError(
                "warmup_steps=None is a tenth of decay_steps: set that, too"
            )
        warmup_steps = decay_steps // 10
    # What is divided by; a warm-up of nothing is over at once.
    warmup = max(1, warmup_steps)
    names = [name.strip() for name in factors.split("*")]
    # T5X's warm-up of 10,000 steps is a default, not a wish: without its factor a decay
    # begins at once.
    begin = warmup_steps if "linear_warmup" in names else 0

    def to_zero(step: Array) -> Array:
        return jnp.clip((step - begin) / ((decay_steps or 0) - begin), 0.0, 1.0)

    def cycle(step: Array) -> Array:
        return jnp.maximum(step - warmup_steps, 0.0) / steps_per_cycle % 1.0

    def rsqrt(step: Array) -> Array:
        return jax.lax.rsqrt(jnp.maximum(step, float(warmup)))

    def cosine(progress: Array) -> Array:
        return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    known: dict[str, Callable[[Array], Array | float]] = {
        "constant": lambda step: base_learning_rate,
        "linear_warmup": lambda step: (
            jnp.minimum(1.0, step / warmup) if warmup_steps else 1.0
        ),
        "rsqrt_decay": rsqrt,
        "rsqrt_normalized_decay": lambda step: warmup**0.5 * rsqrt(step),
        "decay_every": lambda step: decay_factor ** (step // steps_per_decay),
        "linear_decay": lambda step: (
            base_learning_rate
            * jnp.minimum(step / warmup, 1.0 - decay_factor * (step - warmup))
        ),
        "cosine_decay": lambda step: cosine(cycle(step)),
        "linear_to_zero": lambda step: 1.0 - to_zero(step),
        "cosine_to_zero": lambda step: cosine(to_zero(step)),
        "linear_cooldown": lambda step: jnp.clip(
            ((decay_steps or 0) - step) / cooldown_steps, 0.0, 1.0
        ),
    }
    for name in names:
        if name not in known:
            raise UserError(
                f"learning rate factor {name!r} is not one of {', '.join(known)}"
            )
        if name == "linear_cooldown" and cooldown_steps < 1:
            raise UserError("linear_cooldown needs cooldown_steps, 1 or more")
        if name not in ("linear_to_zero", "cosine_to_zero", "linear_cooldown"):
            continue
        if not decay_steps:
            raise UserError(f"{name} needs decay_steps, the step where it reaches 0")
        if name.endswith("_to_zero") and decay_steps <= begin:
            raise UserError(
                f"decay_steps={decay_steps} must lie after the warm-up of {begin} steps"
            )

    def schedule(step: Array) -> Array:
        rate = jnp.ones((), jnp.float32)
        for name in names:
            rate = rate * known[name](jnp.asarray(step, jnp.float32))
        return jnp.maximum(rate, min_learning_rate)

    return schedule


def adafactor(
    learning_rate: LearningRate | LearningRateFn,
    *,
    decay_rate: PositiveFloat = 0.8,
    step_offset: NonNegativeInt = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: PositiveFloat | None = 1.0,
    weight_decay_rate: Share | None = None,
    min_dim_size_to_factor: NonNegativeInt = 128,
) -> optax.GradientTransformation:
    """Adafactor with T5X's defaults and arithmetic.

    The second moments of a prompt are never factored, whatever its length. The original
    prompt tuning code asks for the same, but T5X factors a prompt of 128 positions or
    more all the same, by its heuristic for matrices.

    Args:
      learning_rate: a rate, or one for each step (see `learning_rate_schedule`).
      decay_rate: power of the step by which the second moments forget.
      step_offset: steps to leave out of that count, for a run that goes on.
      multiply_by_parameter_scale: make the steps relative to the size of a matrix.
      clipping_threshold: longest update, as root mean square; None never clips.
      weight_decay_rate: share of the weights taken off in every step; None is 0.
      min_dim_size_to_factor: a matrix with a side below this is not factored.
    """

    def build(factored: bool) -> optax.GradientTransformation:
        return optax.adafactor(
            learning_rate=learning_rate,  # pyright: ignore[reportArgumentType]
            min_dim_size_to_factor=min_dim_size_to_factor,
            decay_rate=decay_rate,
            decay_offset=step_offset,
            multiply_by_parameter_scale=multiply_by_parameter_scale,
            clipping_threshold=clipping_threshold,
            weight_decay_rate=weight_decay_rate,
            factored=factored,
        )

    rules = ((STACKED, "stacked"), (PROMPT_LEAVES, "prompt"), (r".*", "matrix"))
    tx = optax.partition(
        {
            "stacked": per_layer(build(factored=True)),
            "prompt": build(factored=False),
            "matrix": build(factored=True),
        },
        lambda params: trees.labels(params, rules),
    )
    return Optimizer.of(
        tx,
        learning_rate,
        name="adafactor",
        decay_rate=decay_rate,
        step_offset=step_offset,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        clipping_threshold=clipping_threshold,
        weight_decay_rate=weight_decay_rate,
        min_dim_size_to_factor=min_dim_size_to_factor,
    )


def adamw(
    learning_rate: LearningRate | LearningRateFn,
    *,
    b1: Rate = 0.9,
    b2: Rate = 0.999,
    weight_decay_rate: NonNegativeFloat = 0.0,
    max_grad_norm: PositiveFloat | None = None,
) -> optax.GradientTransformation:
    """AdamW, with clipping of the global gradient norm if ``max_grad_norm`` is given.

    Args:
      learning_rate: a rate, or one for each step (see `learning_rate_schedule`).
      b1: how much of the mean of gradients a step keeps.
      b2: how much of the mean of their squares a step keeps.
      weight_decay_rate: share of the weights taken off in every step, times the rate.
      max_grad_norm: longest gradient over all leaves; None never clips.
    """
    tx = optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay_rate)  # pyright: ignore[reportArgumentType]
    if max_grad_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(max_grad_norm), tx)
    return Optimizer.of(
        tx,
        learning_rate,
        name="adamw",
        b1=b1,
        b2=b2,
        weight_decay_rate=weight_decay_rate,
        max_grad_norm=max_grad_norm,
    )


def by_member(
    members: Mapping[str, optax.GradientTransformation],
) -> optax.GradientTransformation:
    """An optimizer of ``{member: leaves}`` that moves each member by its own.

    Each sees its member's leaves alone, so that its state, also of what clips the norm
    of a tree, is that of a run without the others.
    """

    def init(params: PyTree) -> dict[str, PyTree]:
        return {name: tx.init(params[name]) for name, tx in members.items()}

    def update(updates: PyTree, state: PyTree, params: PyTree):
        results = {
            name: tx.update(updates[name], state[name], params[name])
            for name, tx in members.items()
        }
        moved = {name: update for name, (update, _) in results.items()}
        return moved, {name: new for name, (_, new) in results.items()}

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


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
