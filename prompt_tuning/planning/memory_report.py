# SPDX-License-Identifier: Apache-2.0
"""The two answers to how much memory a step takes, and the largest batch that fits.

`compiled` asks the compiler, which takes seconds to minutes; `estimate` follows the
lifetimes of arrays through the traced step, which takes a second or two.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import time
from collections.abc import Callable
from importlib import metadata

import jax

from prompt_tuning import files
from prompt_tuning.devices import sharding
from prompt_tuning.devices.topologies import Topology
from prompt_tuning.errors import UserError
from prompt_tuning.planning import collectives, lifetimes
from prompt_tuning.planning.workload import (
    Memory,
    Workload,
    abstract_arguments,
    arguments_memory,
    gathered_bytes,
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step.

    Attributes:
      memory: bytes on one chip.
      fits: False where the compiler refused the program for want of memory.
      collectives: kind -> times a step, and bytes of its results on one chip; None
        where the program's text cannot be read.
      seconds: that it took to compile.
    """

    memory: Memory
    fits: bool
    collectives: dict[str, dict[str, int]] | None
    seconds: float


def estimate(work: Workload, topology: Topology) -> Memory:
    """The memory of one chip, without compiling.

    The step that one chip takes is traced at the sizes of its share; an array that a
    fused kernel would not write to memory costs nothing (see `lifetimes.peak`).
    """
    chips = topology.num_chips
    peak = _traced_peak(work.share(chips), topology.vmem_bytes)
    peak += gathered_bytes(work, chips)
    return dataclasses.replace(arguments_memory(work, chips), activations=peak)


# Slices of any size give a chip the same shares.
@functools.lru_cache(maxsize=256)
def _traced_peak(own: Workload, vmem: int) -> int:
    traced = jax.make_jaxpr(own.program)(*abstract_arguments(own))
    return lifetimes.peak(traced.jaxpr, vmem)


def compiled(work: Workload, topology: Topology, cache: pathlib.Path) -> Compiled:
    """Compiles the step for a topology and reads what the compiler says of it.

    Args:
      work: the step.
      topology: its chips.
      cache: folder of earlier answers; the same program is not compiled twice.
    """
    lowered = lower(work, topology)
    version = "" if topology.platform != "tpu" else metadata.version("libtpu")
    told = f"{topology.name} {version} {jax.__version__} {lowered.as_text()}"
    path = cache / f"{hashlib.sha256(told.encode()).hexdigest()}.json"
    if not path.exists():
        before = arguments_memory(work, topology.num_chips)
        answer = _ask(lowered, before, topology.platform)
        cache.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(answer)))
    read = json.loads(path.read_text())
    memory = Memory(**read["memory"])
    fits = read["fits"] and memory.total <= topology.usable_bytes
    return Compiled(memory, fits, read["collectives"], read["seconds"])


def lower(work: Workload, topology: Topology) -> jax.stages.Lowered:
    """The program of a step for the devices of a topology, not yet compiled."""
    mesh = sharding.make_mesh(work.num_partitions, topology.devices())
    arguments = abstract_arguments(work, mesh)
    with sharding.partitioned(mesh, work.rules):
        step = jax.jit(work.program, donate_argnums=work.donated)
        return step.lower(*arguments)


def _ask(lowered: jax.stages.Lowered, before: Memory, platform: str) -> Compiled:
    started = time.monotonic()
    seconds = lambda: round(time.monotonic() - started, 1)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = _REFUSED.search(str(error))
        if refused is None:
            raise
        used = float(refused[1]) * 1024 ** (1 + "KMGT".index(refused[2]))
        memory = dataclasses.replace(before, activations=int(used) - before.total)
        return Compiled(memory, False, {}, seconds())
    sizes = program.memory_analysis()
    if sizes is None:
        raise UserError(f"the compiler for {platform} does not say what programs need")
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    total += sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
    if platform == "tpu":
        # What decides on a TPU: programs whose sizes add up to more than its memory
        # compile, those whose peak is more do not.
        total = sizes.peak_memory_in_bytes
    # The padding of arguments to the tiles of the hardware counts as activations.
    return Compiled(
        dataclasses.replace(before, activations=total - before.total),
        True,
        _read_collectives(program),
        seconds(),
    )


def _read_collectives(program: jax.stages.Compiled) -> dict[str, dict[str, int]] | None:
    try:
        text = program.as_text()
    except (jax.errors.JaxRuntimeError, ValueError):
        # Compilers print operations that this JAX's parser need not know.
        return None
    return None if text is None else collectives.read(text)


# How the TPU compiler says that a program does not fit.
_REFUSED = re.compile(
    r"(?:HLO temporaries \(|Used )([\d.]+)([KMGT])\)? (?:exceeds available HBM|of )"
)


def largest_batch(
    fits: Callable[[int], bool], grain: int, guess: int, limit: int = 2**16
) -> int:
    """The largest batch that fits, by bisection; 0 if none does.

    Above 16 grains the batches looked at lie a sixteenth apart or less.

    Args:
      fits: whether a batch does; taken to be monotone.
      grain: every batch is a multiple of it.
      guess: where to look first.
      limit: the largest batch to look at.

    >>> largest_batch(lambda batch: batch <= 50, grain=4, guess=8)
    48
    """
    # 1, 2, ... 15, 16, 17, ... 31, 32, 34, ... 62, 64, 68, ...
    batch = lambda i: grain * (i if i < 16 else (16 + i % 16) << (i // 16 - 1))
    low, high, step, i = 0, 1, 1, 1
    while batch(high) <= limit:
        high += 1
    while batch(i + 1) <= min(guess, limit):
        i += 1
    # From the guess in growing steps until both sides are known, then by halves.
    while high - low > 1:
        if fits(batch(i)):
            low = i
            i += step
        else:
            high = i
            i -= step
        step *= 2
        if not low < i < high:
            i = (low + high) // 2
    return batch(low) if low else 0
