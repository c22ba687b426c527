# SPDX-License-Identifier: Apache-2.0
"""The training loop: start here to read how a prompt is tuned.

`fit` moves the tuned leaves of a model, evaluates them on the way, keeps the best ones
and resumes from its last checkpoint as if it had never stopped. At its end it proves
that the frozen leaves are, byte for byte, what they were at the start. `fit_many` is
that loop for any number of prompts at once, each of which ends where it would alone.

Several processes run the same loop, each with its rows of a batch. Process 0 writes the
files and decides; checkpoints are written by all.
"""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from prompt_tuning import plots, processes, report, trees
from prompt_tuning.devices import sharding
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.methods import registry
from prompt_tuning.network.model import Model
from prompt_tuning.training import members, shared_batches
from prompt_tuning.training.members import Batches, Evaluate, Member, Result
from prompt_tuning.training.prefetch import Pace, Prefetch
from prompt_tuning.training.run_state import Progress, Schedule
from prompt_tuning.training.step import make_train_step
from prompt_tuning.types import Array, Batch, Params

# From a batch as drawn to one on the devices.
Place = Callable[[Mapping[str, Any]], Batch]


def fit(
    model: Model,
    params: Params,
    rules: trees.Rules,
    tx: optax.GradientTransformation,
    batches: Batches,
    schedule: Schedule,
    *,
    key: Array,
    model_dir: pathlib.Path | None = None,
    evaluate: Evaluate | None = None,
    num_microbatches: int = 1,
    partitioner: Partitioner | None = None,
    quiet: bool = False,
) -> Result:
    """Tunes the leaves that ``rules`` call tuned.

    Args:
      model: network and objective.
      params: all leaves; the frozen ones in the dtype they are to be kept in, already
        placed by ``partitioner`` if one is given.
      rules: ordered (pattern, 'tuned' | 'frozen') pairs.
      tx: the optimizer of the tuned leaves.
      batches: called with the number of the first batch wanted.
      schedule: lengths and periods.
      key: root of the run's randomness (dropout).
      model_dir: where checkpoints, logs and the plot go; None keeps nothing.
      evaluate: gives the validation metrics of (tuned, frozen) leaves.
      num_microbatches: see `make_train_step`.
      partitioner: how to spread over devices; must be given to several processes.
      quiet: no progress bar.

    Returns:
      The best tuned leaves and their metrics.

    Raises:
      UserError: a checkpoint of another run lies in ``model_dir``, the loss is not
        finite, or the metric asked for does not exist.
      RuntimeError: a frozen leaf changed, which would be a defect of this library.
    """
    results = fit_many(
        model,
        params,
        rules,
        [Member("", tx, batches, evaluate)],
        schedule,
        key=key,
        model_dir=model_dir,
        num_microbatches=num_microbatches,
        partitioner=partitioner,
        quiet=quiet,
    )
    return results[""]


def fit_many(
    model: Model,
    params: Params,
    rules: trees.Rules,
    everyone: Sequence[Member],
    schedule: Schedule,
    *,
    key: Array,
    model_dir: pathlib.Path | None = None,
    num_microbatches: int = 1,
    partitioner: Partitioner | None = None,
    quiet: bool = False,
) -> dict[str, Result]:
    """Tunes several prompts of a network side by side, on one copy of what is frozen.

    Every batch holds a batch of each prompt. A prompt whose patience is over, or whose
    loss is not finite, leaves: its rows drop out of the batches, and the others go on
    as if nothing had happened, with a step that is compiled anew.

    Args:
      model: network and objective; the network's prompts are those tuned.
      params: see `fit`.
      rules: see `fit`.
      everyone: the prompts.
      schedule: lengths and periods, the same for all.
      key: see `fit`.
      model_dir: see `fit`.
      num_microbatches: see `fit`.
      partitioner: see `fit`.
      quiet: see `fit`.

    Returns:
      What `fit` would return for each, by name; a prompt whose loss was not finite is
      left out.

    Raises:
      UserError: see `fit`; a loss that is not finite matters if all are.
      RuntimeError: see `fit`.
    """
    started = time.monotonic()
    mesh = None if partitioner is None else partitioner.mesh
    tuned, frozen = registry.split(params, rules)
    frozen_bytes = trees.fingerprint(frozen)
    progress = Progress(
        model.network.prompts,
        everyone,
        tuned,
        schedule,
        key=key,
        model_dir=model_dir,
        mesh=mesh,
    )
    report.parameter_counts(tuned, frozen)
    log = report.Log(model_dir, schedule.steps, progress.step, quiet=quiet)
    streams = {m.name: m.batches(progress.step) for m in progress.active}
    mixed = None
    if not members.alone(everyone):
        mixed = shared_batches.Mixed(
            streams,
            model.network.prompts,
            model.network.config.vocab_size,
            progress.step,
            _grain(mesh, num_microbatches),
        )
    ahead, late = _placing(mesh)
    pace = Pace()
    pending: list[dict[str, Array]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(log)
        if partitioner is not None:
            stack.enter_context(sharding.partitioned(mesh, partitioner.rules))
        # A turn ends when somebody leaves, the last one with the run.
        while progress.active and progress.step < schedule.steps:
            others = trees.merge(frozen, progress.part())
            tx = members.optimizer(progress.active)
            train_step = jax.jit(
                make_train_step(model, tx, num_microbatches),
                donate_argnums=0,
                out_shardings=(progress.places()[1], None),
            )
            if mixed is not None:
                mixed.go_on(progress.step, [m.name for m in progress.active])
            with Prefetch(mixed or streams[""], ahead) as feed:
                pace.follow(feed)
                for batch in feed:
                    progress.state, metrics = train_step(
                        progress.state, others, late(batch)
                    )
                    progress.step += 1
                    pace.step(metrics["loss"])
                    pending.append(metrics)
                    if schedule.due(progress.step, schedule.log_period):
                        progress.log_losses(log, jax.device_get(pending))
                        log.pace(progress.step, pace.lap())
                        pending = []
                    else:
                        log.advance(progress.step)
                    if schedule.due(progress.step, schedule.eval_period):
                        with pace.paused():
                            progress.evaluate(log, frozen)
                    someone_leaves = progress.settle()
                    if progress.is_to_be_saved:
                        with pace.paused():
                            progress.save()
                    if someone_leaves or progress.step == schedule.steps:
                        break
                else:
                    break
    if trees.fingerprint(frozen) != frozen_bytes:
        raise RuntimeError("a frozen parameter changed during training")
    report.say(f"frozen parameters unchanged (sha256 {frozen_bytes[:12]})")
    if model_dir is not None:
        processes.in_first(lambda: plots.learning_curve(model_dir))
    return progress.results(time.monotonic() - started, pace.run())


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
