# SPDX-License-Identifier: Apache-2.0
"""One training step: differentiate, accumulate and update the tuned leaves only."""

import dataclasses
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax

from prompt_tuning import trees
from prompt_tuning.network import losses
from prompt_tuning.network.comparison import CompareAs, comparer
from prompt_tuning.network.model import Model
from prompt_tuning.types import Array, Batch, Params, PyTree


@flax.struct.dataclass
class TrainState:
    """Everything that training changes; the frozen leaves are not part of it.

    Attributes:
      step: steps taken, int32.
      tuned: of each member of the run its leaves, float32, where they stand among the
        parameters: ``{'NAME': {'prompts': {'NAME': [P, H]}}}`` for a prompt (or what
        its method makes one of, in place of the array), all parameters for a model
        that is tuned.
      opt_state: the optimizer's statistics of the tuned leaves.
      key: the root of all randomness of the run; step i folds i into it.
    """

    step: Array
    tuned: Mapping[str, Params]
    opt_state: PyTree
    key: Array

    @classmethod
    def create(
        cls, tuned: Mapping[str, Params], tx: optax.GradientTransformation, key: Array
    ) -> "TrainState":
        """A state at step 0."""
        return cls(jnp.zeros((), jnp.int32), tuned, tx.init(tuned), key)


# From each member's tuned leaves and the frozen ones to the parameters of the network.
Assemble = Callable[[Mapping[str, Params], Params], Params]
# From the same to what the loss has beside that of the examples.
Penalize = Callable[[Mapping[str, Params], Params], Array]
# From the same, and what compares prompts' answers to the batch, to what they cost.
Teach = Callable[[Mapping[str, Params], Params, CompareAs], Array]
TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, Array]]]


def merged(tuned: Mapping[str, Params], frozen: Params) -> Params:
    """The `Assemble` of leaves that are the network's own."""
    return trees.merge(*tuned.values(), frozen)


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    num_microbatches: int = 1,
    assemble: Assemble = merged,
    penalize: Penalize | None = None,
    teach: Teach | None = None,
) -> TrainStep:
    """Builds the pure function of one step.

    The gradient is taken with respect to ``state.tuned`` alone: the program holds no
    gradient, accumulator or optimizer slot of a frozen leaf.

    Args:
      model: network and objective.
      tx: the optimizer of ``{member: leaves}`` (see `optimizers.by_member`).
      num_microbatches: parts that the batch is cut into, along its rows; their
        gradients are added up, which saves activations.
      assemble: makes parameters of the members' leaves and the frozen ones.
      penalize: gives what is added to the loss of a step, however many examples there
        are.
      teach: gives what is added for other prompts' answers to the batch.

    Returns:
      ``(state, frozen, batch) -> (state, metrics)``; the metrics are those of
      `Model.loss`, without penalties and lessons, and ``grad_norm``, which has their shape.
    """

    def gradient(
        state: TrainState,
        frozen: Params,
        batch: Batch,
        index: Array | int,
        divisor: Array | float | None,
    ):
        rng = None
        if model.network.config.dropout_rate > 0:
            rng = jax.random.fold_in(jax.random.fold_in(state.key, state.step), index)

        def loss_fn(tuned: Mapping[str, Params]):
            params = assemble(tuned, frozen)
            loss, metrics = model.loss(params, batch, rng, divisor)
            if penalize is not None:
                loss += penalize(tuned, frozen) / num_microbatches
            if teach is not None:
                compare = comparer(model, params, batch, rng, divisor)
                loss += teach(tuned, frozen, compare)
            return loss, metrics

        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.tuned)
        return grads, metrics

    def accumulated(state: TrainState, frozen: Params, batch: Batch):
        rows = next(iter(batch.values())).shape[0]
        if rows % num_microbatches:
            raise ValueError(
                f"a batch of {rows} rows does not divide into {num_microbatches} "
                "microbatches"
            )
        parts = jax.tree.map(
            lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), batch
        )
        # The total must not depend on how the rows are cut, so every part is divided
        # by what the whole batch holds.
        _, divisor = losses.weights_and_divisor(
            batch, model.loss_normalizing_factor, len(model.owners)
        )
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(
                gradient, state, frozen, jax.tree.map(lambda x: x[0], parts), 0, divisor
            ),
        )

        def body(total, part):
            index, rows = part
            grads = gradient(state, frozen, rows, index, divisor)
            return jax.tree.map(jnp.add, total, grads), None

        indices = jnp.arange(num_microbatches)
        return jax.lax.scan(body, zeros, (indices, parts))[0]

    def norms(grads: Mapping[str, Params], batch: Batch) -> Array:  # [] or [E]
        if "prompt_index" not in batch:
            return optax.global_norm(grads)
        # Prompts that are not tuned any more have no gradient.
        own = [grads.get(name) for name in model.owners]
        return jnp.stack([optax.global_norm(grad) for grad in own])

    def train_step(state: TrainState, frozen: Params, batch: Batch):
        if num_microbatches == 1:
            grads, metrics = gradient(state, frozen, batch, 0, None)
        else:
            grads, metrics = accumulated(state, frozen, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.tuned)
        tuned = optax.apply_updates(state.tuned, updates)
        metrics["grad_norm"] = norms(grads, batch)
        after = dataclasses.replace(
            state, step=state.step + 1, tuned=tuned, opt_state=opt_state
        )
        return after, metrics

    return train_step
