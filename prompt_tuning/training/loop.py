# SPDX-License-Identifier: Apache-2.0
"""The training loop: start here to read how a prompt is tuned.

`fit` moves the tuned leaves of a run's members, evaluates them on the way, keeps the
best ones and resumes from its last checkpoint as if it had never stopped. At its end it
proves that the frozen leaves are, byte for byte, what they were at the start. A run of
one prompt has one member; of many prompts each ends where it would alone.

Several processes run the same loop, each with its rows of a batch. Process 0 writes the
files and decides; checkpoints are written by all.
"""

import contextlib
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from prompt_tuning import processes, report, trees
from prompt_tuning.devices import sharding
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.network.model import Model
from prompt_tuning.training import shared_batches
from prompt_tuning.training.interruption import Interrupted, Interruption
from prompt_tuning.training.members import (
    Member,
    Result,
    assembler,
    lessons,
    penalties,
)
from prompt_tuning.training.prefetch import Pace, Prefetch
from prompt_tuning.training.run_state import Progress, optimizer
from prompt_tuning.training.schedule import Schedule
from prompt_tuning.training.step import make_train_step
from prompt_tuning.training.tracked_records import Records
from prompt_tuning.training.usage import Meter
from prompt_tuning.types import Array, Batch, Params

# From a batch as drawn to one on the devices.
Place = Callable[[Mapping[str, Any]], Batch]


def fit(
    model: Model,
    frozen: Params,
    everyone: Sequence[Member],
    schedule: Schedule,
    *,
    key: Array,
    model_dir: pathlib.Path | None = None,
    num_microbatches: int = 1,
    partitioner: Partitioner | None = None,
    trackers: Records | None = None,
    quiet: bool = False,
) -> dict[str, Result]:
    """Tunes the leaves of all members side by side, on one copy of what is frozen.

    Every batch holds a batch of each prompt. A member whose patience is over, or whose
    loss is not finite, leaves: its rows drop out of the batches, and the others go on
    as if nothing had happened, with a step that is compiled anew.

    Args:
      model: network and objective; prompts that are tuned are the network's, in the
        order of the members.
      frozen: the leaves that no member owns, in the dtype they are to be kept in,
        already placed by ``partitioner`` if one is given.
      everyone: the members.
      schedule: lengths and periods, the same for all.
      key: root of the run's randomness (dropout).
      model_dir: where checkpoints, logs and the plot go; None keeps nothing.
      num_microbatches: see `make_train_step`.
      partitioner: how to spread over devices; must be given to several processes.
      trackers: take the records, too.
      quiet: no progress bar.

    Returns:
      The best tuned leaves of each member and their metrics, by its name; one whose
      loss was not finite is left out.

    Raises:
      UserError: a checkpoint of another run lies in ``model_dir``, no loss is finite
        any more, a tracker cannot be opened, or the metric asked for does not exist.
      Interrupted: SIGTERM or Ctrl-C came, and ``model_dir`` has what was reached.
      RuntimeError: a frozen leaf changed, which would be a defect of this library.
      ValueError: several members are not the model's.
    """
    bank = model.network.prompts
    names = [member.name for member in everyone]
    if len(names) > 1 and tuple(names) != model.owners:
        raise ValueError(f"the members {names} are not the model's {model.owners}")
    mesh = None if partitioner is None else partitioner.mesh
    frozen_bytes = trees.fingerprint(frozen)
    progress = Progress(everyone, schedule, key=key, model_dir=model_dir, mesh=mesh)
    report.parameter_counts({m.name: m.tuned for m in everyone}, frozen)
    batches = shared_batches.Mixed(
        {m.name: m.batches(progress.step) for m in progress.active},
        bank,
        model.network.config.vocab_size,
        model.owners,
        progress.step,
        _grain(mesh, num_microbatches),
    )
    ahead, late = _placing(mesh)
    assemble, penalize = assembler(everyone, bank), penalties(everyone)
    teach = lessons(everyone)
    pace = Pace()
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption(can_save=model_dir is not None))
        meter = stack.enter_context(Meter(progress.step, progress.before))
        if trackers is not None:
            stack.enter_context(trackers).begin(progress.step)
        also = None if trackers is None else trackers.send
        log = report.Log(
            model_dir, schedule.steps, progress.step, names, quiet=quiet, also=also
        )
        stack.enter_context(log)
        if partitioner is not None:
            stack.enter_context(
                sharding.partitioned(partitioner.mesh, partitioner.rules)
            )
        # A turn ends when somebody leaves, the last one with the run.
        while progress.active and progress.step < schedule.steps:
            log.doing("compiling the training step")
            others = trees.merge(frozen, progress.part(frozen))
            tx = optimizer(progress.active)
            train_step = jax.jit(
                make_train_step(model, tx, num_microbatches, assemble, penalize, teach),
                donate_argnums=0,
                out_shardings=(progress.places()[1], None),
            )
            batches.go_on(progress.step, [m.name for m in progress.active])
            with Prefetch(batches, ahead) as feed:
                pace.follow(feed)
                for drawn in feed:
                    batch = late(drawn)
                    meter.step(batch)
                    progress.state, metrics = train_step(progress.state, others, batch)
                    progress.count(metrics)
                    pace.step(metrics["loss"])
                    if schedule.due(progress.step, schedule.log_period):
                        progress.log_losses(log)
                        log.pace(progress.step, pace.lap())
                    else:
                        log.advance(progress.step)
                    if schedule.due(progress.step, schedule.eval_period):
                        with pace.paused():
                            progress.evaluate(log, frozen)
                    someone_leaves = progress.settle()
                    number = interruption.number() if progress.may_agree() else 0
                    if progress.is_to_be_saved() or number:
                        with pace.paused():
                            progress.save(meter.usage(pace))
                    if number and progress.active and progress.step < schedule.steps:
                        raise Interrupted(number, progress.step, model_dir)
                    if someone_leaves or progress.step >= schedule.steps:
                        break
                else:
                    break
        usage = meter.usage(pace)
    if trees.fingerprint(frozen) != frozen_bytes:
        raise RuntimeError("a frozen parameter changed during training")
    if frozen:
        report.say(f"frozen parameters unchanged (sha256 {frozen_bytes[:12]})")
    return progress.results(usage, pace.run())


def _grain(mesh: jax.sharding.Mesh | None, num_microbatches: int) -> int:
    """What the rows that a process draws for several prompts are filled up to.

    When prompts leave, the rows of the others need not divide any more over devices
    that the rows of all did divide over.
    """
    if mesh is None:
        return num_microbatches
    shards = mesh.shape[sharding.DATA]
    return shards // math.gcd(shards, processes.count()) * num_microbatches


def _placing(mesh: jax.sharding.Mesh | None) -> tuple[Place, Place]:
    """What puts a batch on the devices: ahead of the step in a thread, or just before.

    Where processes share rows it is a collective operation, which has to come in the
    same place among those of the step in all of them.
    """
    leave = lambda batch: batch
    if mesh is None:
        return jax.device_put, leave
    place = lambda batch: sharding.shard_batch(batch, mesh)
    return (leave, place) if sharding.shares_rows(mesh) else (place, leave)
