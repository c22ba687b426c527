# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a training step without each of the backward passes of our own.

    python benchmarks/residuals.py --output benchmarks/results/residuals.json

T5 1.1 Small, a prompt of 100, 16 rows of 128 inputs and 8 targets. ``all`` is the step as
it is; the others put JAX's own function in the place of one of `saved_activations`, or of every
one. Unrolling the loop over the layers is compared, too. The programs run in turn; memory
is what the compiler plans for temporaries.
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any

import environment
import jax
import jax.numpy as jnp
import turns

from prompt_tuning import trees
from prompt_tuning.methods import registry
from prompt_tuning.network import saved_activations
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.training import optimizers
from prompt_tuning.training.step import TrainState, make_train_step

V, P, ROWS, INPUTS, TARGETS = 32128, 100, 16, 128, 8
CONFIG = T5Config(V, 512, 6, 8, 8, 64, 1024)
PLAIN = {
    "softmax": lambda x: jax.nn.softmax(x.astype(jnp.float32)).astype(x.dtype),
    "recomputed": lambda function: function,
    "product": jnp.einsum,
}
# Name of a program: what is JAX's own in it, and layers to an iteration.
PROGRAMS = {
    "all": ((), 1),
    **{f"without {name}": ((name,), 1) for name in PLAIN},
    "none": (tuple(PLAIN), 1),
    "all, unrolled": ((), CONFIG.num_encoder_layers),
}


@contextlib.contextmanager
def replaced(names: tuple[str, ...]) -> Iterator[None]:
    """JAX's own functions in the place of ours."""
    ours = {name: getattr(saved_activations, name) for name in names}
    try:
        for name in names:
            setattr(saved_activations, name, PLAIN[name])
        yield
    finally:
        for name, function in ours.items():
            setattr(saved_activations, name, function)


def measure(dtype: str, rounds: int) -> dict[str, Any]:
    """Figures of all programs at a dtype."""
    tx = optimizers.adafactor(0.3, multiply_by_parameter_scale=False)
    network = Transformer(
        dataclasses.replace(CONFIG, dtype=dtype), (Prompt("task", P),)
    )
    params = jax.jit(Model(network).init)(jax.random.key(0))
    tuned, frozen = registry.split(params, registry.rules_of("prompt_tuning"))
    frozen = trees.map_with_path(lambda _, leaf: leaf.astype(dtype), frozen)
    state = TrainState.create({"task": tuned}, tx, jax.random.key(1))
    ids = lambda key, *shape: jax.random.randint(jax.random.key(key), shape, 3, V)
    prompt = jnp.broadcast_to(V + jnp.arange(P), (ROWS, P))
    targets = ids(1, ROWS, TARGETS)
    batch = {
        "encoder_input_tokens": jnp.concatenate([prompt, ids(0, ROWS, INPUTS)], axis=1),
        "decoder_input_tokens": jnp.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
    }
    programs, losses = {}, {}
    for name, (plain, unroll) in PROGRAMS.items():
        config = dataclasses.replace(network.config, unroll=unroll)
        with replaced(plain):
            model = Model(Transformer(config, network.prompts))
            step = jax.jit(make_train_step(model, tx))
            programs[name] = step.lower(state, frozen, batch).compile()
        losses[name] = float(programs[name](state, frozen, batch)[1]["loss"])
    calls = {
        name: functools.partial(program, state, frozen, batch)
        for name, program in programs.items()
    }
    seconds = turns.seconds(calls, rounds)
    found = {}
    for name, program in programs.items():
        found[name] = {
            "loss": losses[name],
            "median_seconds": statistics.median(seconds[name]),
            "time_ratio": turns.ratio(seconds[name], seconds["none"]),
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        }
    return found


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    found = {dtype: measure(dtype, options.rounds) for dtype in ("float32", "bfloat16")}
    environment.publish({"rounds": options.rounds, "dtypes": found}, options.output)


if __name__ == "__main__":
    main()
