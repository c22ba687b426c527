# SPDX-License-Identifier: Apache-2.0
"""Memory and time of loss and prompt gradient by the most logits held at a time.

    python benchmarks/loss_chunk.py --output benchmarks/results/loss_chunk.json

T5 1.1 Small with a prompt of 100, rows of 28 inputs and as many targets as given. Memory
is what the compiler plans for temporaries; the programs run in turn for the time.
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

from prompt_tuning import trees
from prompt_tuning.methods import registry
from prompt_tuning.network.model import LOGIT_BYTES, Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer

V, P, INPUTS = 32128, 100, 28
MIB = 2**20
NETWORK = Transformer(
    T5Config(V, 512, 6, 8, 8, 64, 1024, remat="full"), (Prompt("task", P),)
)


def measure(batch: int, targets: int, limits: list[int], rounds: int) -> dict[str, Any]:
    """Temporaries and median seconds for every limit, in bytes of logits."""
    params = Model(NETWORK).init(jax.random.key(0))
    tuned, frozen = registry.split(params, registry.rules_of("prompt_tuning"))
    text = jax.random.randint(jax.random.key(1), (batch, INPUTS), 3, V)
    labels = jax.random.randint(jax.random.key(2), (batch, targets), 3, V)
    data = {
        "encoder_input_tokens": jnp.concatenate(
            [jnp.broadcast_to(V + jnp.arange(P), (batch, P)), text], axis=1
        ),
        "decoder_input_tokens": labels,
        "decoder_target_tokens": labels,
    }
    programs = {}
    for limit in limits:
        model = Model(NETWORK, max_logit_bytes=limit)
        # A function of its own for each limit, for a trace is kept by function.
        gradient = jax.value_and_grad(
            lambda tuned, frozen, model=model: model.loss(
                trees.merge(tuned, frozen), data
            )[0]
        )
        programs[limit] = jax.jit(gradient).lower(tuned, frozen).compile()
    calls = {
        limit: functools.partial(program, tuned, frozen)
        for limit, program in programs.items()
    }
    seconds = turns.seconds(calls, rounds)
    whole = max(limits)
    rows = []
    for limit, program in programs.items():
        rows.append(
            {
                "limit_mib": limit / MIB,
                "temporary_mib": program.memory_analysis().temp_size_in_bytes / MIB,
                "median_seconds": statistics.median(seconds[limit]),
                "time_ratio": turns.ratio(seconds[limit], seconds[whole]),
            }
        )
    logits = 4 * batch * targets * V
    return {
        "shape": {"batch": batch, "targets": targets, "rounds": rounds},
        "all_logits_mib": logits / MIB,
        "limits": rows,
    }


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    limits = [2**power for power in (32, 28, 27, 26, 25, 24, 22)]
    results = {
        "default_limit_mib": LOGIT_BYTES / MIB,
        "measured": [
            measure(batch, targets, limits, options.rounds)
            for batch, targets in ((8, 128), (8, 512))
        ],
    }
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
