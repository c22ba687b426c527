# SPDX-License-Identifier: Apache-2.0
"""What the training of a run takes of the machine: time, work, energy, all measured."""

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

from prompt_tuning.training import energy
from prompt_tuning.training.prefetch import Pace
from prompt_tuning.types import Batch

# Rows, encoder tokens and decoder tokens of a batch.
Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a run took: this call of `loop.fit`, and those before it that it resumed.

    What a call did after the checkpoint that the next one resumed from is in no sum.

    Attributes:
      wall_seconds: from the first step's compilation to the last evaluation.
      processor_seconds: of all threads of this process in that time.
      device_seconds: in which the devices, all of them at once, computed training
        steps; without the first step after each compilation, and without evaluations.
      first_step: the step that this is measured from; 0 but for checkpoints of versions
        that measured nothing.
      shapes: how many steps had a batch of each shape, padding and prompts included.
      energy: see `energy.EnergyMeter.read`.
    """

    wall_seconds: float
    processor_seconds: float
    device_seconds: float
    first_step: int
    shapes: Mapping[Shape, int]
    energy: Mapping[str, Any]

    @property
    def steps(self) -> int:
        """Steps that were taken."""
        return sum(self.shapes.values())

    def __add__(self, later: "Usage") -> "Usage":
        """With what a call took that went on from there."""
        return Usage(
            wall_seconds=self.wall_seconds + later.wall_seconds,
            processor_seconds=self.processor_seconds + later.processor_seconds,
            device_seconds=self.device_seconds + later.device_seconds,
            first_step=self.first_step,
            shapes=dict(Counter(self.shapes) + Counter(later.shapes)),
            energy=energy.total(self.energy, later.energy),
        )

    def record(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        shapes = [[*shape, count] for shape, count in self.shapes.items()]
        return {**dataclasses.asdict(self), "shapes": shapes}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Usage":
        """What `record` gave."""
        shapes = {tuple(shape): count for *shape, count in record["shapes"]}
        return cls(**{**record, "shapes": shapes})


class Meter:
    """Measures the `Usage` of a run; a context manager."""

    def __init__(self, first_step: int, before: Usage | None = None):
        """Goes on from ``first_step``, up to which the run took ``before``."""
        self._first_step, self._before = first_step, before
        self._shapes: Counter[Shape] = Counter()
        self._energy = energy.EnergyMeter()
        self._wall = self._processor = 0.0

    def __enter__(self) -> Self:
        self._wall, self._processor = time.monotonic(), time.process_time()
        self._energy.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._energy.__exit__(*exception)

    def step(self, batch: Batch) -> None:
        """Counts a step on a batch of all processes."""
        rows, inputs = batch["encoder_input_tokens"].shape
        self._shapes[rows, inputs, batch["decoder_input_tokens"].shape[-1]] += 1

    def usage(self, pace: Pace) -> Usage:
        """What was taken so far."""
        own = Usage(
            wall_seconds=time.monotonic() - self._wall,
            processor_seconds=time.process_time() - self._processor,
            device_seconds=pace.busy(),
            first_step=self._first_step,
            shapes=dict(self._shapes),
            energy=self._energy.read(),
        )
        return own if self._before is None else self._before + own
