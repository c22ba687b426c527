# SPDX-License-Identifier: Apache-2.0
"""One training step of prompt tuning against one of model tuning, on the same batch.

    python benchmarks/step_cost.py --output benchmarks/results/step_cost.json

The steps run in turn, so that whatever else the machine does meets both alike; the
figure is the ratio of their median times. Memory is what the compiler plans for the
step: arguments, results and temporaries, those that share a buffer counted once.
"""

import argparse
import pathlib
import statistics
import time

import environment
import jax

from prompt_tuning import trees
from prompt_tuning.commands import demo
from prompt_tuning.methods import registry
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import Transformer
from prompt_tuning.training import optimizers
from prompt_tuning.training.step import TrainState, make_train_step


def compiled_step(method: str, batch: int, inputs: int, prompt_length: int):
    """A compiled step, its state and its frozen parameters, and a batch."""
    prompts = (Prompt("task", prompt_length),) if method == "prompt_tuning" else ()
    model = Model(Transformer(demo.CONFIG, prompts))
    params = model.init(jax.random.key(0))
    tuned, frozen = registry.split(params, registry.rules_of(method))
    tx = optimizers.adafactor(
        0.03, multiply_by_parameter_scale=method == "model_tuning"
    )
    state = TrainState.create({"task": tuned}, tx, jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(2), (batch, inputs), 3, 8000)
    if prompts:
        ids = jax.numpy.arange(prompt_length) + demo.CONFIG.vocab_size
        ids = jax.numpy.broadcast_to(ids, (batch, prompt_length))
        tokens = jax.numpy.concatenate([ids, tokens], axis=1)
    targets = jax.random.randint(jax.random.key(3), (batch, 4), 3, 8000)
    data = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": targets,
        "decoder_target_tokens": targets,
    }
    step = jax.jit(make_train_step(model, tx), donate_argnums=0)
    compiled = step.lower(state, frozen, data).compile()
    return compiled, state, frozen, data


def planned_bytes(compiled) -> int:
    """Peak memory of the program by the compiler's own account."""
    plan = compiled.memory_analysis()
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--prompt_length", type=int, default=demo.PROMPT_LENGTH)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    names = ("prompt_tuning", "model_tuning")
    programs = {
        name: compiled_step(name, options.batch, options.inputs, options.prompt_length)
        for name in names
    }
    states = {name: programs[name][1] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            compiled, _, frozen, data = programs[name]
            start = time.perf_counter()
            states[name], metrics = compiled(states[name], frozen, data)
            jax.block_until_ready((states[name], metrics))
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(times[name]) for name in names}
    memory = {name: planned_bytes(programs[name][0]) for name in names}
    slots = {name: trees.num_bytes(programs[name][1].opt_state) for name in names}
    results = {
        "shape": vars(options) | {"output": None},
        "median_seconds": seconds,
        "time_ratio": seconds["prompt_tuning"] / seconds["model_tuning"],
        "planned_bytes": memory,
        "memory_ratio": memory["prompt_tuning"] / memory["model_tuning"],
        "optimizer_bytes": slots,
        "backend": jax.default_backend(),
    }
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
