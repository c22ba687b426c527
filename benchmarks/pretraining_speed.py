# SPDX-License-Identifier: Apache-2.0
"""Positions a second of pre-training: one value changed at a time, all in turn.

    python benchmarks/pretraining_speed.py \
        --output benchmarks/results/pretraining_speed.json

The base is a step of `scripts/mini/long_run.sh`: 32 rows of 192 encoder and 48 decoder
tokens in float32. Each candidate is a process that compiles its step once and takes
``--steps`` of them whenever its turn comes; ratios are medians over the rounds, by the
clock and by processor time. The share of the machine's rate is that of the step's
products (as XLA counts them) to a product of two square matrices in float32, which
takes turns with the others. --other names the Python of an environment with another
version of jax, which then runs the base, too.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import sides

MATRIX = 2048
# The recipe's sizes; what a candidate names replaces them.
BASE: dict[str, Any] = {
    "rows": 32,
    "inputs": 192,
    "targets": 48,
    "dtype": "float32",
    "vocab_size": 8192,
    "emb_dim": 256,
    "num_heads": 8,
    "head_dim": 32,
    "mlp_dim": 512,
    "num_encoder_layers": 4,
    "num_decoder_layers": 2,
    "logits_via_embedding": False,
    "unroll": 4,
}
CANDIDATES: dict[str, dict[str, Any]] = {
    "base": {},
    "embedded model's sizes and rows": {
        "rows": 64,
        "inputs": 128,
        "targets": 32,
        "emb_dim": 192,
        "num_heads": 6,
        "num_decoder_layers": 4,
    },
    "bfloat16": {"dtype": "bfloat16"},
    "huge pages": {},
    "memory kept": {},
    "memory kept, huge pages": {},
    "table as output layer": {"logits_via_embedding": True},
    "vocabulary of 4,096": {"vocab_size": 4096},
    "64 rows of 96 + 24": {"rows": 64, "inputs": 96, "targets": 24},
    "16 rows of 384 + 96": {"rows": 16, "inputs": 384, "targets": 96},
    "64 rows of 192 + 48": {"rows": 64},
    "layers in a loop": {"unroll": 1},
}
ENVIRONMENTS = {
    "huge pages": sides.HUGE_PAGES,
    "memory kept": sides.KEPT_MEMORY,
    "memory kept, huge pages": sides.KEPT_MEMORY | sides.HUGE_PAGES,
}
OTHER = "other jax"


def run_side(sizes: dict[str, Any], steps: int) -> None:
    """Answers each line of the input by the seconds of so many steps."""
    import jax
    import numpy as np

    from prompt_tuning.network.model import Model
    from prompt_tuning.network.transformer import T5Config, Transformer
    from prompt_tuning.training import optimizers, pretraining
    from prompt_tuning.training.step import TrainState, make_train_step

    fields = {field.name for field in dataclasses.fields(T5Config)}
    config = T5Config(
        **{name: value for name, value in sizes.items() if name in fields},
        mlp_activations=("gelu", "linear"),
    )
    model = Model(Transformer(config), loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    tx = optimizers.adafactor(0.01)
    state = TrainState.create(
        {"model": model.init(jax.random.key(0))}, tx, jax.random.key(1)
    )
    # What ids a batch holds changes nothing about its time.
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(2, config.vocab_size, length).astype(np.int32)
    rows = [
        [(draw(sizes["inputs"]), draw(sizes["targets"]))] for _ in range(sizes["rows"])
    ]
    batch = pretraining.pack(rows, sizes["inputs"], sizes["targets"])
    step = (
        jax.jit(make_train_step(model, tx), donate_argnums=0)
        .lower(state, {}, batch)
        .compile()
    )
    square = jax.numpy.ones((MATRIX, MATRIX))
    product = jax.jit(lambda x: x @ x)
    say = lambda **values: print(json.dumps(values), flush=True)
    say(flops=step.cost_analysis()["flops"], version=jax.__version__)
    for line in sys.stdin:
        if line.strip() == "matrix":
            jax.block_until_ready(product(square))
            start = time.perf_counter()
            for _ in range(steps):
                jax.block_until_ready(product(square))
            say(rate=2 * MATRIX**3 * steps / (time.perf_counter() - start))
            continue
        start, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            state, metrics = step(state, {}, batch)
        jax.block_until_ready(metrics)
        say(
            seconds=time.perf_counter() - start,
            cpu_seconds=time.process_time() - used,
        )


class Candidate(sides.Side):
    """A candidate's process."""

    def __init__(self, name: str, python: str, steps: int):
        self.sizes = BASE | CANDIDATES.get(name, {})
        words = ["--side", json.dumps(self.sizes), "--steps", str(steps)]
        super().__init__([python, __file__, *words], ENVIRONMENTS.get(name, {}))


def summarize(
    candidates: dict[str, Candidate], turns: dict[str, list[dict[str, Any]]], steps: int
) -> dict[str, Any]:
    """Figures of every candidate; its ratios are those of speeds to the base's."""
    found = {}
    for name, side in candidates.items():
        size = side.sizes
        positions = size["rows"] * (size["inputs"] + size["targets"]) * steps
        base = BASE["rows"] * (BASE["inputs"] + BASE["targets"]) * steps
        ratio = lambda key: statistics.median(
            (positions / mine[key]) / (base / first[key])  # noqa: B023
            for mine, first in zip(turns[name], turns["base"], strict=True)  # noqa: B023
        )
        seconds = statistics.median(turn["seconds"] for turn in turns[name])
        found[name] = {
            "jax": side.started["version"],
            "positions_per_second": positions / seconds,
            "flops_per_position": side.started["flops"] * steps / positions,
            "flops_per_second": side.started["flops"] * steps / seconds,
            "speed": ratio("seconds"),
            "speed_by_processor_time": ratio("cpu_seconds"),
        }
    return found


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--only", nargs="*", choices=CANDIDATES, default=list(CANDIDATES)
    )
    parser.add_argument("--other", help="Python of an environment with another jax")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--side", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options.side, options.steps)
        return
    import environment

    pythons = dict.fromkeys(["base", *options.only], sys.executable)
    if options.other:
        pythons[OTHER] = options.other
    candidates = {
        name: Candidate(name, at, options.steps) for name, at in pythons.items()
    }
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in candidates}
    rates = []
    for side in candidates.values():
        side.ask("steps")
    for _ in range(options.rounds):
        rates.append(candidates["base"].ask("matrix")["rate"])
        for name, side in candidates.items():
            turns[name].append(side.ask("steps"))
    found = summarize(candidates, turns, options.steps)
    for side in candidates.values():
        side.stop()
    rate = statistics.median(rates)
    for figures in found.values():
        figures["share_of_matrix_rate"] = figures["flops_per_second"] / rate
    results = {"matrix_flops_per_second": rate, "base": BASE, "candidates": found}
    environment.publish(results, options.output)


if __name__ == "__main__":
    main()
