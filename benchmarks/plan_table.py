# SPDX-License-Identifier: Apache-2.0
"""Which T5 fits which TPU: all sizes on one to sixteen v5e, v6e and v5p chips.

    python benchmarks/plan_table.py --output benchmarks/results/plan

Every cell is a file. First all of them are estimated, which takes minutes; then the
compiler is asked about one after the other, which takes hours, and their files are
written again. Stop and start it as you like: what is done is not done again.
``--estimate`` leaves the compiler out. The tables are printed at the end.

The step is that of the paper's recipe with inputs of 512, a prompt of 100 and targets
of 32 tokens; the model is cut over as few chips as hold it. The batch is the largest
that the estimate says fits; where the compiler refuses that, the largest for which the
compiler's figure has room. libtpu is needed: pip install -e ".[plan]".
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import environment
import jax

from prompt_tuning import files, report
from prompt_tuning.commands import plan as command
from prompt_tuning.devices import topologies
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.planning import checks, memory_report
from prompt_tuning.planning.checks import with_batch
from prompt_tuning.planning.workload import Workload
from prompt_tuning.training import optimizers

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
DTYPES = ("bfloat16", "int8")
OPTIMIZER = optimizers.adafactor(
    0.3, multiply_by_parameter_scale=False, weight_decay_rate=1e-5
)
# What the compiler is asked first: whether XXL fits a single chip.
FIRST = (
    ("xxl", "v6e:1x1", "bfloat16"),
    ("xxl", "v5p:1x1x1", "bfloat16"),
    ("xxl", "v5e:1x1", "int8"),
)
TRIES = 3

Cell = tuple[str, str, str]  # size, topology, dtype of the weights


def workload(size: str, dtype: str) -> Workload:
    """The recipe's step at a size; batch and partitions are chosen later."""
    width, heads, layers, head_dim, mlp = SIZES[size]
    config = T5Config(32128, width, heads, layers, layers, head_dim, mlp)
    config = dataclasses.replace(config, dtype="bfloat16", remat="full")
    return Workload(
        config=config,
        batch_size=1,
        inputs=512,
        targets=32,
        optimizer=OPTIMIZER,
        frozen_dtype=dtype,
    )


def cells(dtypes: list[str]) -> Iterator[Cell]:
    """All cells, in the order in which the compiler is asked about them."""
    yield from (cell for cell in FIRST if cell[2] in dtypes)
    for index, dtype in itertools.product(range(4), dtypes):
        for size, kind in itertools.product(reversed(SIZES), SLICES):
            cell = size, f"{kind}:{SLICES[kind][index]}", dtype
            if cell not in FIRST:
                yield cell


def estimated(cell: Cell) -> dict[str, Any]:
    """The largest batch by the estimate; no partitions where the model has no room."""
    size, topology, dtype = cell
    place = topologies.parse(topology)
    choice = checks.least_partitions(workload(size, dtype), place)
    if choice is None:
        return {"topology": topology, "frozen_dtype": dtype, "num_partitions": 0}
    largest = memory_report.largest_batch(
        lambda batch: (
            memory_report.estimate(with_batch(choice, batch), place).total
            <= place.usable_bytes
        ),
        choice.grain(place.num_chips),
        choice.batch_size,
    )
    choice = with_batch(choice, largest)
    return command.figures(choice, place, compile_step=False, find_largest=False)


def confirmed(cell: Cell, guess: Mapping[str, Any]) -> dict[str, Any]:
    """The compiler's figures of an estimated cell, for a batch that it lets pass."""
    size, topology, dtype = cell
    place = topologies.parse(topology)
    work = dataclasses.replace(
        workload(size, dtype), num_partitions=guess["num_partitions"]
    )
    batch, found, refused = guess["batch_size"], dict(guess), []
    for _ in range(TRIES):
        found = command.figures(
            with_batch(work, batch), place, compile_step=True, find_largest=False
        )
        if found["compiled"]["fits"] or batch == work.grain(place.num_chips):
            break
        refused.append({"batch_size": batch, **found["compiled"]})
        needs = found["compiled"]
        room = place.usable_bytes - needs["weights"] - needs["state"]
        rows = batch * room // needs["activations"]
        batch = memory_report.largest_batch(
            lambda other, rows=rows: other <= rows, work.grain(place.num_chips), batch
        )
    return {**found, "refused": refused}


def markdown(results: Mapping[Cell, Mapping[str, Any]], dtype: str) -> str:
    """Largest batch (and partitions, where there is more than one) by size and slice."""
    columns = [f"{kind}:{shape}" for kind, shapes in SLICES.items() for shape in shapes]
    lines = [f"| {dtype} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for size in SIZES:
        shown = [_shown(results[size, column, dtype]) for column in columns]
        lines.append(f"| {size} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _shown(found: Mapping[str, Any]) -> str:
    if not found["num_partitions"]:
        return "-"
    text = f"{found['batch_size']}"
    if "compiled" not in found:
        text = f"*{text}*"
    elif not found["compiled"]["fits"]:
        text = "refused"
    parts = found["num_partitions"]
    return text if parts == 1 else f"{text} /{parts}"


def main() -> None:
    """Fills in the missing cells and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--estimate", action="store_true", help="do not compile")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    options.output.mkdir(parents=True, exist_ok=True)

    def path(cell: Cell) -> pathlib.Path:
        return options.output / f"{'_'.join(cell).replace(':', '_')}.json"

    def write(cell: Cell, found: Mapping[str, Any]) -> None:
        files.write_json(path(cell), {**found, **environment.describe()})

    order = list(cells(options.dtypes))
    for cell in order:
        if not path(cell).exists():
            report.say(f"estimating {' '.join(cell)}")
            write(cell, estimated(cell))
    results = {cell: json.loads(path(cell).read_text()) for cell in order}
    for cell, found in results.items():
        done = "compiled" in found or not found["num_partitions"]
        if not done and not options.estimate:
            report.say(f"compiling {' '.join(cell)}")
            write(cell, confirmed(cell, found))
            results[cell] = json.loads(path(cell).read_text())
    for dtype in options.dtypes:
        print(markdown(results, dtype), end="\n\n")


if __name__ == "__main__":
    main()
