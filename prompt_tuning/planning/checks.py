# SPDX-License-Identifier: Apache-2.0
"""What cannot be placed on the chips is refused, with the nearest choice that can.

Nothing is allocated or compiled for it: `plan` asks before it plans, and `train` before
it loads a model.
"""

import dataclasses
import functools
import math

from jax.sharding import AbstractMesh

from prompt_tuning import dtypes
from prompt_tuning.devices import sharding, topologies
from prompt_tuning.devices.topologies import GIB, Topology
from prompt_tuning.errors import UserError
from prompt_tuning.planning import memory_report
from prompt_tuning.planning.workload import (
    TRAIN,
    Workload,
    arguments_memory,
    param_shardings,
)


def check(work: Workload, topology: Topology) -> None:
    """Refuses what cannot be placed on the chips.

    Raises:
      UserError: chips, heads or rows do not divide, or the weights alone are more than
        a chip holds; the nearest choice that works is named.
    """
    chips, parts = topology.num_chips, work.num_partitions
    if parts < 1 or chips % parts:
        nearest = min(_partitions(work, chips), key=lambda n: abs(n - parts))
        raise UserError(
            f"{parts} model partitions do not divide {topology.described}; "
            f"set NUM_PARTITIONS to {nearest}"
        )
    mesh = AbstractMesh((chips // parts, parts), (sharding.DATA, sharding.MODEL))
    param_shardings(work, mesh)
    for name in ("num_microbatches", "num_labels"):
        if getattr(work, name) < 1:
            raise UserError(f"{name.upper()}={getattr(work, name)} must be 1 or more")
    grain = work.grain(chips)
    if work.batch_size < 1 or work.batch_size % grain:
        cut = f" of {work.num_microbatches} microbatches" if work.step == TRAIN else ""
        raise UserError(
            f"{work.batch_size} rows do not divide over {chips // parts} data shards"
            f"{cut}; set BATCH_SIZE to "
            f"{sharding.nearest_multiples(work.batch_size, grain)}"
        )
    check_room(work, topology)


def check_room(work: Workload, topology: Topology) -> None:
    """Refuses a model of which a chip's part is more than the chip holds.

    Raises:
      UserError: weights and state alone are; the nearest choice that fits is named.
    """
    chips = topology.num_chips
    needed = arguments_memory(with_batch(work, work.grain(chips)), chips).total
    if needed > topology.usable_bytes:
        raise UserError(
            f"the model cannot fit {topology.described}: weights and state take "
            f"{needed / GIB:.3g} GiB of a chip's {topology.usable_bytes / GIB:.3g}; "
            f"{nearest_that_fits(work, topology)}"
        )


def nearest_that_fits(work: Workload, topology: Topology) -> str:
    """Advice by the estimate: more partitions, or else int8 or a bigger slice."""
    choice = least_partitions(work, topology)
    if choice is not None:
        return f"set NUM_PARTITIONS to {choice.num_partitions}"
    ways = []
    smaller = dataclasses.replace(work, frozen_dtype=dtypes.INT8)
    if work.method.result != "model" and work.frozen_dtype != dtypes.INT8:
        choice = least_partitions(smaller, topology)
        if choice is not None:
            parts = choice.num_partitions
            also = f" and NUM_PARTITIONS to {parts}" if parts > 1 else ""
            ways.append(f"set FROZEN_DTYPE to 'int8'{also}")
    for place in topologies.bigger(topology):
        choice = least_partitions(work, place)
        if choice is not None:
            ways.append(
                f"take {place.name} with NUM_PARTITIONS={choice.num_partitions}"
            )
            break
    return ", or ".join(ways) or "no slice that is known holds it: take a smaller model"


def least_partitions(work: Workload, topology: Topology) -> Workload | None:
    """The step cut over as few chips as hold it with its smallest batch, if any do."""
    chips = topology.num_chips
    weights = _whole_weights(with_batch(dataclasses.replace(work, num_partitions=1), 1))
    for parts in _partitions(work, chips):
        # Tracing a step takes a second; most choices need none to be ruled out.
        shares = parts if work.parameter_partitioning_dims == 1 else chips
        if weights > shares * topology.usable_bytes:
            continue
        choice = dataclasses.replace(work, num_partitions=parts)
        choice = with_batch(choice, choice.grain(chips))
        if memory_report.estimate(choice, topology).total <= topology.usable_bytes:
            return choice
    return None


@functools.lru_cache(maxsize=16)
def _whole_weights(work: Workload) -> int:
    """Bytes of the frozen weights, and of those that are tuned where all are."""
    memory = arguments_memory(work, 1)
    return memory.weights or memory.state


def with_batch(work: Workload, batch_size: int) -> Workload:
    """The same step with another number of rows."""
    return dataclasses.replace(work, batch_size=batch_size)


def _partitions(work: Workload, chips: int) -> list[int]:
    """Numbers of partitions that divide the chips and the model."""
    config = work.config
    common = math.gcd(chips, config.num_heads, config.mlp_dim, config.vocab_size)
    return [parts for parts in range(1, common + 1) if common % parts == 0]
