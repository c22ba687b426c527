# SPDX-License-Identifier: Apache-2.0
"""Which T5 fits which TPU: all sizes on one to sixteen v5e, v6e and v5p chips.

    python benchmarks/plan_table.py --output benchmarks/results/plan

Every cell is a file, written when it is done, and a cell that has its file is not done
again: stop and start it as you like, it takes hours. ``--estimate`` asks no compiler and
takes minutes; its cells are files of their own. The table itself is printed at the end.

The step is that of the paper's recipe with inputs of 512, a prompt of 100 and targets
of 32 tokens; the model is cut over as few chips as hold it, and the batch is the
largest that fits. libtpu is needed: pip install -e ".[plan]".
"""

import argparse
import dataclasses
import json
import pathlib

import environment
import jax

from prompt_tuning import optim, plan, report, topologies
from prompt_tuning.commands import common
from prompt_tuning.commands import plan as command
from prompt_tuning.network import T5Config

SIZES = {
    "small": (512, 6, 8, 64, 1024),
    "base": (768, 12, 12, 64, 2048),
    "large": (1024, 16, 24, 64, 2816),
    "xl": (2048, 32, 24, 64, 5120),
    "xxl": (4096, 64, 24, 64, 10240),
}
SLICES = {
    "v5e": ("1x1", "2x2", "2x4", "4x4"),
    "v6e": ("1x1", "2x2", "2x4", "4x4"),
    "v5p": ("1x1x1", "2x2x1", "2x2x2", "2x2x4"),
}


def workload(size: str, dtype: str, remat: str) -> plan.Workload:
    """The recipe's step at a size; batch and partitions are chosen later."""
    width, heads, layers, head_dim, mlp = SIZES[size]
    config = T5Config(32128, width, heads, layers, layers, head_dim, mlp)
    config = dataclasses.replace(config, dtype="bfloat16", remat=remat)
    optimizer = optim.adafactor(
        0.3, multiply_by_parameter_scale=False, weight_decay_rate=1e-5
    )
    return plan.Workload(config, 1, 512, 32, optimizer, frozen_dtype=dtype)


def cell(work: plan.Workload, topology: str, compile_step: bool) -> dict:
    """The figures of one cell; ``num_partitions`` 0 where the model does not fit."""
    place = topologies.parse(topology)
    choice = command.least_partitions(work, place)
    if choice is None:
        return {"topology": topology, "num_partitions": 0}
    largest = plan.largest_batch(
        lambda batch: (
            plan.estimate(dataclasses.replace(choice, batch_size=batch), place).total
            <= place.usable_bytes
        ),
        choice.grain(place.num_chips),
        choice.batch_size,
    )
    choice = dataclasses.replace(choice, batch_size=largest)
    return command.figures(choice, place, compile_step, find_largest=compile_step)


def markdown(results: dict[tuple[str, str], dict]) -> str:
    """Largest batch (and partitions, where there is more than one) by size and slice."""
    columns = [f"{kind}:{shape}" for kind, shapes in SLICES.items() for shape in shapes]
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for size in SIZES:
        shown = []
        for column in columns:
            found = results.get((size, column))
            if found is None:
                shown.append("?")
            elif not found["num_partitions"]:
                shown.append("-")
            else:
                batch = found.get("compiled", {}).get(
                    "largest_batch", found["batch_size"]
                )
                parts = found["num_partitions"]
                shown.append(f"{batch}" + (f" ({parts})" if parts > 1 else ""))
        lines.append(f"| {size} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Fills in the missing cells and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--chips", nargs="+", default=list(SLICES), choices=SLICES)
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen weights")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--estimate", action="store_true", help="do not compile")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    options.output.mkdir(parents=True, exist_ok=True)
    mode = "estimate" if options.estimate else "compiled"
    results = {}
    for size in options.sizes:
        work = workload(size, options.dtype, options.remat)
        for kind in options.chips:
            for shape in SLICES[kind]:
                name = f"{size}_{kind}_{shape}_{options.dtype}_{options.remat}_{mode}"
                path = options.output / f"{name}.json"
                if not path.exists():
                    report.say(name)
                    found = cell(work, f"{kind}:{shape}", not options.estimate)
                    common.write_json(path, {**found, **environment.describe()})
                results[size, f"{kind}:{shape}"] = json.loads(path.read_text())
    print(markdown(results))


if __name__ == "__main__":
    main()
