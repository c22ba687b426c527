# SPDX-License-Identifier: Apache-2.0
"""How far apart the answers with two prompts are, on one batch and by one model.

It is the distillation of Hinton et al. 2015 (https://arxiv.org/abs/1503.02531) at
temperature 1, with that of the last states beside it, as Wang et al. 2023
(https://arxiv.org/abs/2303.02861) distil prompts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from prompt_tuning.network import losses
from prompt_tuning.network.model import Model, variables
from prompt_tuning.types import Array, Batch, Params

# From a member's name, and the rows [P, H] of a pupil and of its teacher.
CompareAs = Callable[[str, Array, Array], Array]


def comparer(
    model: Model,
    params: Params,
    batch: Batch,
    dropout_rng: Array | None = None,
    divisor: Array | float | None = None,
) -> CompareAs:
    """What compares two prompts in the place of a member's own, on its rows of a batch.

    Args:
      model: network, and how a sum over target tokens is divided.
      params: all parameters.
      batch: the examples.
      dropout_rng: turns dropout on for the pupil; the teacher has none.
      divisor: see `Model.loss`.

    Returns:
      A function of a member's name and of two prompts as long as its own. Of each target
      token it takes the divergence ``KL(teacher || pupil)`` in nats, plus the squared
      distance of what the output layer reads, averaged over the width H; and of these the
      sum, weighted and divided as the loss is. No gradient reaches the teacher.
    """
    weights, own_divisor = losses.weights_and_divisor(
        batch, model.loss_normalizing_factor, len(model.owners)
    )
    shares = jnp.asarray(own_divisor if divisor is None else divisor)  # [] or [E]

    def logits(hidden: Array) -> Array:  # [B, s, H] -> [B, s, V]
        return model.network.apply(variables(params), hidden, method="logits")  # pyright: ignore[reportReturnType]

    def apart(found: Array, wanted: Array) -> Array:  # [B, s, H] each -> [B, s]
        ours = jax.nn.log_softmax(logits(found).astype(jnp.float32))
        theirs = jax.nn.log_softmax(logits(wanted).astype(jnp.float32))
        divergence = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
        distance = found.astype(jnp.float32) - wanted.astype(jnp.float32)
        return divergence + jnp.mean(jnp.square(distance), axis=-1)

    def compare(name: str, pupil: Array, teacher: Array) -> Array:
        def read(rows: Array, rng: Array | None) -> Array:  # [B, S, H]
            prompts = {**params["prompts"], name: rows}
            return model.states({**params, "prompts": prompts}, batch, rng)[1]

        found = read(pupil, dropout_rng)
        wanted = jax.lax.stop_gradient(read(teacher, None))
        # Two sets of logits are there at a time.
        size = max(1, model.piece(found) // 2)
        values = weights * losses.by_chunks(apart, size, found, wanted)
        if "prompt_index" not in batch:
            return jnp.sum(values) / shares
        number = model.owners.index(name)
        own = batch["prompt_index"] == number
        share = shares[number] if shares.ndim else shares
        return jnp.sum(jnp.where(own[:, None], values, 0.0)) / share

    return compare
