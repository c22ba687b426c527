# SPDX-License-Identifier: Apache-2.0
"""What a run cost, for ``results.json``: measured, or counted by formula, never guessed."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from prompt_tuning.planning import flops
from prompt_tuning.planning.workload import Workload
from prompt_tuning.training.usage import Usage


def summary(
    usage: Usage, work: Workload, labels: tuple[int, int] | None
) -> dict[str, Any]:
    """The cost of a run, of all its members together.

    Args:
      usage: what training took.
      work: the step that was planned; batches say how large each one was.
      labels: of tasks with labels, how many there are and the tokens of the longest.

    Returns:
      ``wall_seconds``, ``processor_seconds``, ``device_seconds``, ``devices``, ``steps``,
      ``flops``, ``energy``: see docs/performance.md.
    """
    return {
        "wall_seconds": usage.wall_seconds,
        "processor_seconds": usage.processor_seconds,
        "device_seconds": usage.device_seconds,
        "devices": {"count": jax.device_count(), "kind": jax.devices()[0].device_kind},
        "first_step": usage.first_step,
        "steps": usage.steps,
        "flops": training_flops(usage.shapes, work, labels),
        "energy": dict(usage.energy),
    }


def training_flops(
    shapes: Mapping[tuple[int, int, int], int],
    work: Workload,
    labels: tuple[int, int] | None = None,
) -> int:
    """Floating point operations of the training steps (see `planning.flops`).

    Evaluations are left out.

    Args:
      shapes: how many steps had batches of each number of rows, encoder tokens (prompts
        included) and decoder tokens.
      work: model and method.
      labels: what decoders read in place of targets where ``work`` has a loss over
        labels: how many there are, and the tokens of the longest.
    """
    if work.label_loss is None:
        labels = None
    if labels is not None:
        work = dataclasses.replace(work, num_labels=labels[0])
    own = lambda targets: targets if labels is None else labels[1]
    return sum(
        steps
        * flops.count(
            dataclasses.replace(
                work,
                batch_size=rows,
                inputs=inputs,
                targets=own(targets),
                prompt_length=0,
            )
        )["total"]
        for (rows, inputs, targets), steps in shapes.items()
    )


def count_bytes(rows: Sequence[dict[str, Any]], folder: pathlib.Path) -> None:
    """Gives each record of a member the ``bytes`` of what is kept for its task."""
    for row in rows:
        if "file" in row:
            path = folder / row["file"]
            parts = path.rglob("*") if path.is_dir() else [path]
            row["bytes"] = sum(x.stat().st_size for x in parts if x.is_file())
