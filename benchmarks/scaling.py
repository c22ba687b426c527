# SPDX-License-Identifier: Apache-2.0
"""One training step over 1 to 8 simulated devices, and over two processes.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json

The devices are simulated by one host whose cores they share, and the layouts are measured
one after the other, so their times are no speed-ups: they are at the mercy of the cores
and of whatever else the machine does. What holds for real devices too is what each of
them keeps, and what they tell each other in a step.
"""

import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import environment
import jax
import numpy as np

from prompt_tuning import processes
from prompt_tuning.devices import sharding
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.methods import registry
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.planning import collectives
from prompt_tuning.training import optimizers
from prompt_tuning.training.step import TrainState, make_train_step

# About the embedded model, with heads that eight devices can share.
CONFIG = T5Config(
    vocab_size=8192,
    emb_dim=192,
    num_heads=8,
    num_encoder_layers=4,
    num_decoder_layers=4,
    head_dim=32,
    mlp_dim=512,
)
PROMPT_LENGTH = 20
# (processes, devices in all, num_partitions, parameter_partitioning_dims)
LAYOUTS = (
    (1, 1, 1, 1),
    (1, 2, 1, 1),
    (1, 2, 2, 1),
    (1, 4, 1, 1),
    (1, 4, 2, 1),
    (1, 4, 4, 1),
    (1, 8, 1, 1),
    (1, 8, 2, 1),
    (1, 8, 4, 1),
    (1, 8, 1, 2),
    (1, 8, 2, 2),
    (2, 8, 1, 1),
    (2, 8, 2, 1),
)


def batch_of(rows: int, inputs: int) -> dict[str, np.ndarray]:
    """The same rows in every process: a prompt, text, and targets."""
    rng = np.random.default_rng(0)
    ids = CONFIG.vocab_size + np.arange(PROMPT_LENGTH)
    text = rng.integers(3, 8000, (rows, inputs))
    targets = rng.integers(3, 8000, (rows, 4)).astype(np.int32)
    tokens = np.concatenate([np.tile(ids, (rows, 1)), text], axis=1)
    return {
        "encoder_input_tokens": tokens.astype(np.int32),
        "decoder_input_tokens": targets,
        "decoder_target_tokens": targets,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Takes steps with this process's devices, and the other's if there is one."""
    processes.join()
    partitioner = Partitioner(
        options.num_partitions,
        parameter_partitioning_dims=options.parameter_partitioning_dims,
    )
    mesh, rules = partitioner.mesh, partitioner.rules
    model = Model(Transformer(CONFIG, (Prompt("task", PROMPT_LENGTH),)))
    places = sharding.param_shardings(model.abstract_params(), mesh, rules)
    params = jax.jit(model.init, out_shardings=places)(jax.random.key(0))
    tuned, frozen = registry.split(params, registry.rules_of("prompt_tuning"))
    tx = optimizers.adafactor(0.3, multiply_by_parameter_scale=False)
    state = TrainState.create({"task": tuned}, tx, jax.random.key(1))
    state = sharding.replicate(state, mesh)
    whole = batch_of(options.batch, options.inputs)
    rows = options.batch // processes.count()
    own = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    batch = sharding.shard_batch({k: v[own] for k, v in whole.items()}, mesh)
    with sharding.partitioned(mesh, rules):
        step = jax.jit(
            make_train_step(model, tx),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
        )
        compiled = step.lower(state, frozen, batch).compile()
        times = []
        for _ in range(options.steps + 1):
            start = time.perf_counter()
            state, metrics = compiled(state, frozen, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    kept = lambda leaf: leaf.addressable_shards[0].data.nbytes
    return {
        "data": mesh.shape[sharding.DATA],
        "model": mesh.shape[sharding.MODEL],
        "rows_of_a_device": options.batch // mesh.shape[sharding.DATA],
        "weights_bytes": sum(map(kept, jax.tree.leaves(frozen))),
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": collectives.read(compiled.as_text()),
        "median_seconds": statistics.median(times[1:]),
        "loss": float(metrics["loss"]),
        "prompt_norm": float(
            np.linalg.norm(processes.whole(state.tuned["task"]["prompts"]["task"]))
        ),
    }


def spread(layout: tuple[int, int, int, int], options: list[str]) -> dict[str, Any]:
    """The figures of a layout, by process 0."""
    count, devices, partitions, dims = layout
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--worker", *options]
    command += [f"--num_partitions={partitions}"]
    command += [f"--parameter_partitioning_dims={dims}"]
    flag = f"--xla_force_host_platform_device_count={devices // count}"
    shared = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    shared |= {processes.COUNT: str(count), processes.ADDRESS: address}
    running = [
        subprocess.Popen(
            command,
            env={**shared, processes.INDEX: str(index)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    printed = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{layout} failed")
    name = {"processes": count, "devices": devices, "parameter_partitioning_dims": dims}
    return {**name, **json.loads(printed[0].splitlines()[-1])}


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path)
    worker = parser.add_argument_group("what a process of a layout is started with")
    worker.add_argument("--worker", action="store_true")
    worker.add_argument("--num_partitions", type=int, default=1)
    worker.add_argument("--parameter_partitioning_dims", type=int, default=1)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options)))
        return
    names = ("batch", "inputs", "steps")
    passed = [f"--{name}={getattr(options, name)}" for name in names]
    layouts = []
    for layout in LAYOUTS:
        layouts.append(spread(layout, passed))
        print(layouts[-1], file=sys.stderr)
    for found in layouts:
        found["time_ratio"] = found["median_seconds"] / layouts[0]["median_seconds"]
        found["loss_difference"] = found["loss"] / layouts[0]["loss"] - 1
        found["prompt_difference"] = (
            found["prompt_norm"] / layouts[0]["prompt_norm"] - 1
        )
    shape = {name: getattr(options, name) for name in names}
    environment.publish({"shape": shape, "layouts": layouts}, options.output)


if __name__ == "__main__":
    main()
