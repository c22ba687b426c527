# SPDX-License-Identifier: Apache-2.0
"""How a run spreads over its devices, in T5X's terms: one object for mesh and rules.

Whatever places arrays of a run, or traces a program of it, takes both from here, so that
loading, training and evaluation cannot disagree.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from prompt_tuning import processes, report
from prompt_tuning.devices import sharding
from prompt_tuning.errors import UserError
from prompt_tuning.types import PositiveInt

Submesh = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """The mesh of a run and the rules from logical to mesh axes.

    Attributes:
      num_partitions: devices that one copy of the model is cut over.
      model_parallel_submesh: the block of neighbouring TPU chips that holds one copy,
        as (x, y, z, cores of a chip); says ``num_partitions``, too. None leaves the
        choice to JAX.
      activation_partitioning_dims: 2 also cuts the hidden width of activations over
        ``model``.
      parameter_partitioning_dims: 2 also cuts the hidden width of parameters over
        ``batching``: less memory for weights against gathering them in every layer.
      devices: by default all devices of all processes.
    """

    num_partitions: PositiveInt = 1
    model_parallel_submesh: Submesh | None = None
    activation_partitioning_dims: Literal[1, 2] = 1
    parameter_partitioning_dims: Literal[1, 2] = 1
    devices: tuple[jax.Device, ...] | None = None

    def __post_init__(self):
        """Refuses numbers of dimensions that there are no rules for, at once."""
        _ = self.rules

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices, as ``batching`` and ``model``.

        Raises:
          UserError: the partitions or the submesh do not fit the devices.
        """
        devices = jax.devices() if self.devices is None else self.devices
        if self.model_parallel_submesh is None:
            return sharding.make_mesh(self.num_partitions, devices)
        block = tuple(self.model_parallel_submesh)
        size = math.prod(block)
        if len(block) != 4 or min(block) < 1:
            raise UserError(
                f"MODEL_PARALLEL_SUBMESH={block} is not (x, y, z, cores); give four "
                "numbers of 1 or more, such as (2, 2, 1, 1)"
            )
        if self.num_partitions not in (1, size):
            raise UserError(
                f"MODEL_PARALLEL_SUBMESH={block} has {size} devices, NUM_PARTITIONS is "
                f"{self.num_partitions}; set one of the two alone"
            )
        rows = [_tiles(part, block) for part in sharding.by_slice(devices)]
        return sharding.mesh_of(np.concatenate(rows))

    @functools.cached_property
    def rules(self) -> sharding.Rules:
        """See `sharding.logical_axis_rules`."""
        return sharding.logical_axis_rules(
            self.activation_partitioning_dims, self.parameter_partitioning_dims
        )

    @property
    def is_single(self) -> bool:
        """Whether there is one device only, and so nothing to spread."""
        return self.mesh.size == 1

    def check_batch(self, rows: int, num_microbatches: int = 1) -> None:
        """Refuses a training batch that the devices cannot share equally.

        Args:
          rows: of a batch over all processes.
          num_microbatches: parts that it is cut into.

        Raises:
          UserError: the rows do not divide; names the nearest numbers that do.
        """
        if num_microbatches < 1:
            raise UserError(f"NUM_MICROBATCHES={num_microbatches} must be 1 or more")
        shards = self.mesh.shape[sharding.DATA]
        grain = math.lcm(shards * num_microbatches, processes.count())
        if rows < 1 or rows % grain:
            raise UserError(
                f"BATCH_SIZE={rows} does not divide over {shards} data shards of "
                f"{num_microbatches} microbatches in {processes.count()} processes; set "
                f"BATCH_SIZE to {sharding.nearest_multiples(rows, grain)}"
            )

    def check_eval_batch(self, rows: int) -> None:
        """Says it where rows of an evaluation's batches are padding on every device.

        Raises:
          UserError: there are no rows.
        """
        if rows < 1:
            raise UserError(f"EVAL_BATCH_SIZE={rows} must be 1 or more")
        shards = self.mesh.shape[sharding.DATA]
        if missing := -rows % shards:
            report.say(
                f"EVAL_BATCH_SIZE={rows} does not divide over {shards} data shards: "
                f"batches get {missing} empty rows; set it to "
                f"{sharding.nearest_multiples(rows, shards)} to waste none"
            )


def _tiles(
    devices: Sequence[jax.Device], block: tuple[int, int, int, int]
) -> np.ndarray:
    """The devices of a TPU slice as blocks of neighbours: ``[blocks, devices]``.

    Raises:
      UserError: they have no coordinates, or the blocks do not fill them.
    """
    if not hasattr(devices[0], "coords"):
        raise UserError(
            f"MODEL_PARALLEL_SUBMESH is for TPUs and these devices are "
            f"{devices[0].platform.upper()}s; set NUM_PARTITIONS to {math.prod(block)} "
            "instead"
        )
    places = np.array([(*d.coords, d.core_on_chip) for d in devices])
    places -= places.min(axis=0)
    sides = places.max(axis=0) + 1
    if np.prod(sides) != len(devices) or np.any(sides % block):
        raise UserError(
            f"blocks of MODEL_PARALLEL_SUBMESH={block} do not fill the "
            f"{'x'.join(map(str, sides))} devices of a slice; choose numbers that "
            "divide these, or set NUM_PARTITIONS alone"
        )
    grid = np.empty(sides, object)
    for place, device in zip(places, devices, strict=True):
        grid[tuple(place)] = device
    counts = sides // block
    split = [number for pair in zip(counts, block, strict=True) for number in pair]
    grid = grid.reshape(split).transpose(0, 2, 4, 6, 1, 3, 5, 7)
    return grid.reshape(-1, math.prod(block))
