# SPDX-License-Identifier: Apache-2.0
"""The training loop: start here to read how a prompt is tuned.

`fit` moves the tuned leaves of a model, evaluates them on the way, keeps the best ones
and resumes from its last checkpoint as if it had never stopped. At its end it proves
that the frozen leaves are, byte for byte, what they were at the start.

Several processes run the same loop, each with its rows of a batch. Process 0 writes the
files and decides; checkpoints are written by all.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax

from prompt_tuning import methods, plots, processes, report, sharding, trees
from prompt_tuning.checkpoints.state import Checkpoints
from prompt_tuning.errors import UserError
from prompt_tuning.model import Model
from prompt_tuning.partitioning import Partitioner
from prompt_tuning.prefetch import Pace, Prefetch
from prompt_tuning.selection import Best, Selection, host_copy
from prompt_tuning.step import TrainState, make_train_step
from prompt_tuning.types import Array, Batch, Params, PyTree

# From a batch's number to the batches from there on: what makes a run resumable.
Batches = Callable[[int], Iterator[Mapping[str, np.ndarray]]]
# From the tuned and frozen leaves to the validation metrics.
Evaluate = Callable[[Params, Params], Mapping[str, float]]
# From a batch as drawn to one on the devices.
Place = Callable[[Mapping[str, Any]], Batch]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When things happen, in steps; a period of 0 means never.

    Attributes:
      steps: the step at which training ends.
      eval_period: steps between evaluations; the last step is always evaluated.
      checkpoint_period: steps between checkpoints; the last step is always saved.
      log_period: steps between records of the loss.
      patience: evaluations without a better metric after which training stops; 0
        trains to the end.
      metric: the metric that chooses the best parameters (higher is better); None
        takes the mean of all metrics, as the paper does where a task has several.
      keep_last: take the last evaluation for the best, whatever its metrics.
    """

    steps: int
    eval_period: int = 0
    checkpoint_period: int = 0
    log_period: int = 10
    patience: int = 0
    metric: str | None = None
    keep_last: bool = False

    def due(self, step: int, period: int) -> bool:
        """Whether ``step`` ends a period or the run."""
        return step == self.steps or bool(period) and step % period == 0


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
      tuned: the best tuned leaves where there was an evaluation, else the last.
      step: the step that ``tuned`` comes from.
      last_step: the step that the run reached.
      metrics: the validation metrics of ``tuned``.
      loss: mean loss per target token over the last log period.
      seconds: wall time of this call.
      pace: ``steps_per_second`` and ``input_idle``, the share of the time that the
        devices waited for data (see `prefetch.Pace`); empty after a single step.
    """

    tuned: Params
    step: int
    last_step: int
    metrics: dict[str, float]
    loss: float
    seconds: float
    pace: dict[str, float]


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
    started = time.monotonic()
    mesh = None if partitioner is None else partitioner.mesh
    tuned, frozen = methods.split(params, rules)
    frozen_bytes = trees.fingerprint(frozen)
    # A step donates its state's buffers, and the caller's arrays must survive it.
    tuned = jax.tree.map(lambda x: jax.numpy.array(x, jax.numpy.float32), tuned)
    state = TrainState.create(tuned, tx, key)
    if processes.count() > 1:
        # An array on one process's device can neither be saved nor meet the others'.
        state = sharding.replicate(state, mesh)
    abstract, places = _places(state)
    selection = Selection(
        model_dir, schedule.metric, schedule.patience, schedule.keep_last
    )
    checkpoints = record = None
    if model_dir is not None:
        checkpoints = Checkpoints(model_dir)
        if checkpoints.latest_step() is not None:
            state, position, record = checkpoints.restore(abstract)
            report.say(f"resuming from step {position['batch']} in {model_dir}")
    report.parameter_counts(tuned, frozen)

    train_step = jax.jit(
        make_train_step(model, tx, num_microbatches),
        donate_argnums=0,
        out_shardings=(places, None),
    )
    first = int(state.step)
    log = report.Log(model_dir, schedule.steps, first, quiet=quiet)
    selection.resume(record, log.evaluated_steps())
    last = first if selection.is_over else schedule.steps
    pending: list[dict[str, Array]] = []
    loss, step = math.nan, first
    with contextlib.ExitStack() as stack:
        stack.enter_context(log)
        if partitioner is not None:
            stack.enter_context(sharding.partitioned(mesh, partitioner.rules))
        ahead, late = _placing(mesh)
        feed = stack.enter_context(Prefetch(batches(first), ahead))
        pace = Pace(feed)
        for step, batch in zip(range(first + 1, last + 1), feed, strict=False):
            state, metrics = train_step(state, frozen, late(batch))
            pace.step(metrics["loss"])
            pending.append(metrics)
            if schedule.due(step, schedule.log_period):
                loss = log.training(step, jax.device_get(pending))
                log.pace(step, pace.lap())
                pending = []
                if not math.isfinite(loss):
                    raise UserError(
                        f"the loss is {loss} at step {step}: lower the learning rate"
                    )
            else:
                log.advance(step)
            if evaluate is not None and schedule.due(step, schedule.eval_period):
                with pace.paused():
                    values = processes.agreed(dict(evaluate(state.tuned, frozen)))
                    selection.consider(step, values, state.tuned)
                    log.validation(step, values)
            if checkpoints and (
                selection.is_over or schedule.due(step, schedule.checkpoint_period)
            ):
                with pace.paused():
                    record = selection.record()
                    checkpoints.save(step, state, {"batch": step}, record)
                    selection.drop_others()
            if selection.is_over:
                report.say(
                    f"stopped at step {step}: {schedule.patience} evaluations without a "
                    f"better metric than {selection.best.value:.4f} of step "
                    f"{selection.best.step}"
                )
                break
    if trees.fingerprint(frozen) != frozen_bytes:
        raise RuntimeError("a frozen parameter changed during training")
    report.say(f"frozen parameters unchanged (sha256 {frozen_bytes[:12]})")
    if model_dir is not None:
        processes.in_first(lambda: plots.learning_curve(model_dir))
    chosen = selection.best or Best(step, math.nan, {}, host_copy(state.tuned))
    return Result(
        tuned=chosen.tuned,
        step=chosen.step,
        last_step=step,
        metrics=chosen.metrics,
        loss=loss,
        seconds=time.monotonic() - started,
        pace=pace.run(),
    )


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


def _places(state: TrainState) -> tuple[TrainState, PyTree | None]:
    """A state as shapes, and where it stays; one process leaves that to the compiler."""
    if processes.count() == 1:
        return jax.eval_shape(lambda: state), None
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    return abstract, jax.tree.map(lambda x: x.sharding, state)
