# SPDX-License-Identifier: Apache-2.0
"""How much longer the training step of XXL takes to compile than that of Small.

    python benchmarks/compile_time.py --output benchmarks/results/compile_time.json

Layers are scanned, so the program of a model holds one layer of each kind however many
it has; what is left is what a compiler does more for larger arrays. Both sizes take the
same rows and lengths, are compiled in turn, and nothing is cached or allocated. The
default is this machine's own compiler; ``--topology v6e:1x1`` asks the TPU's, which
needs libtpu: pip install -e ".[plan]". ``--step decode`` compiles the decoding, whose layers
are apart where the decoder is not too large.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time

import environment
import jax
import numpy as np
from plan_table import SIZES, workload

from prompt_tuning import files, report
from prompt_tuning.devices import topologies
from prompt_tuning.planning import memory_report
from prompt_tuning.planning.checks import with_batch
from prompt_tuning.planning.workload import STEPS, TRAIN


def seconds(
    size: str, place: topologies.Topology, rows: int, step: str
) -> dict[str, float]:
    """Tracing and lowering, compiling, and the length of the program between.

    Processor seconds, of all threads, do not depend on what else the machine does.
    """
    work = with_batch(workload(size, "bfloat16"), rows)
    work = dataclasses.replace(work, step=step)
    clocks = lambda: np.array([time.perf_counter(), time.process_time()])
    started = clocks()
    lowered = memory_report.lower(work, place)
    lowering = clocks() - started
    started = clocks()
    lowered.compile()
    compiling = clocks() - started
    return {
        "lower_seconds": lowering[0],
        "lower_cpu_seconds": lowering[1],
        "compile_seconds": compiling[0],
        "compile_cpu_seconds": compiling[1],
        "characters": len(lowered.as_text()),
    }


def main() -> None:
    """Compiles the sizes in turn and publishes the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, metavar="JSON")
    parser.add_argument("--topology", default=topologies.LOCAL)
    parser.add_argument("--sizes", nargs="+", default=["small", "xxl"], choices=SIZES)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--step", default=TRAIN, choices=STEPS)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    place = topologies.parse(options.topology)
    times: dict[str, list[dict[str, float]]] = {size: [] for size in options.sizes}
    for _ in range(options.repeats):
        for size in options.sizes:
            times[size].append(seconds(size, place, options.rows, options.step))
            report.say(f"{size}: {times[size][-1]}")
    median = lambda size, name: statistics.median(each[name] for each in times[size])
    first, last = options.sizes[0], options.sizes[-1]
    found = {
        "times": times,
        "ratio": {
            name: median(last, name) / median(first, name) for name in times[first][0]
        },
        "rows": options.rows,
        **environment.describe(),
    }
    kept = {}
    if options.output is not None and options.output.exists():
        kept = json.loads(options.output.read_text())
    # One file for all compilers and steps, each with its own figures.
    told = "" if options.step == TRAIN else f", {options.step}"
    kept[f"{options.topology}{told}"] = found
    print(json.dumps(found, indent=2))
    if options.output is not None:
        files.write_json(options.output, kept)


if __name__ == "__main__":
    main()
