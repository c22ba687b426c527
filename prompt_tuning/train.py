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
from prompt_tuning.checkpoints import files
from prompt_tuning.checkpoints.state import Checkpoints
from prompt_tuning.errors import UserError
from prompt_tuning.model import Model
from prompt_tuning.step import TrainState, make_train_step
from prompt_tuning.types import Array, Params, PyTree

# From a batch's number to the batches from there on: what makes a run resumable.
Batches = Callable[[int], Iterator[Mapping[str, np.ndarray]]]
# From the tuned and frozen leaves to the validation metrics.
Evaluate = Callable[[Params, Params], Mapping[str, float]]


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


@dataclasses.dataclass
class Best:
    """The best evaluation so far and the tuned leaves that gave it."""

    step: int
    value: float
    metrics: dict[str, float]
    tuned: Params


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
    """

    tuned: Params
    step: int
    last_step: int
    metrics: dict[str, float]
    loss: float
    seconds: float


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
    mesh: jax.sharding.Mesh | None = None,
    quiet: bool = False,
) -> Result:
    """Tunes the leaves that ``rules`` call tuned.

    Args:
      model: network and objective.
      params: all leaves; the frozen ones in the dtype they are to be kept in, already
        placed on ``mesh`` if one is given.
      rules: ordered (pattern, 'tuned' | 'frozen') pairs.
      tx: the optimizer of the tuned leaves.
      batches: called with the number of the first batch wanted.
      schedule: lengths and periods.
      key: root of the run's randomness (dropout).
      model_dir: where checkpoints, logs and the plot go; None keeps nothing.
      evaluate: gives the validation metrics of (tuned, frozen) leaves.
      num_microbatches: see `make_train_step`.
      mesh: devices to spread batches over; must be given to several processes.
      quiet: no progress bar.

    Returns:
      The best tuned leaves and their metrics.

    Raises:
      UserError: a checkpoint of another run lies in ``model_dir``, the loss is not
        finite, or the metric asked for does not exist.
      RuntimeError: a frozen leaf changed, which would be a defect of this library.
    """
    started = time.monotonic()
    tuned, frozen = methods.split(params, rules)
    frozen_bytes = trees.fingerprint(frozen)
    # A step donates its state's buffers, and the caller's arrays must survive it.
    tuned = jax.tree.map(lambda x: jax.numpy.array(x, jax.numpy.float32), tuned)
    state = TrainState.create(tuned, tx, key)
    if processes.count() > 1:
        # An array on one process's device can neither be saved nor meet the others'.
        state = sharding.replicate(state, mesh)
    abstract, places = _places(state)
    checkpoints, best = None, None
    if model_dir is not None:
        checkpoints = Checkpoints(model_dir)
        if checkpoints.latest_step() is not None:
            state, position, record = checkpoints.restore(abstract)
            best = _read_best(model_dir, record)
            report.say(f"resuming from step {position['batch']} in {model_dir}")
    report.parameter_counts(tuned, frozen)

    train_step = jax.jit(
        make_train_step(model, tx, num_microbatches),
        donate_argnums=0,
        out_shardings=(places, None),
    )
    first = int(state.step)
    log = report.Log(model_dir, schedule.steps, first, quiet=quiet)
    pending: list[dict[str, Array]] = []
    loss, stale, step = math.nan, 0, first
    if best is not None:
        stale = sum(step > best.step for step in log.evaluated_steps())
        stale = processes.agreed(stale)
    stopped = bool(schedule.patience) and stale >= schedule.patience
    last = first if stopped else schedule.steps
    placed = contextlib.nullcontext()
    if mesh is not None:
        placed = sharding.partitioned(mesh, sharding.logical_axis_rules())
    with log, placed:
        for step, batch in zip(
            range(first + 1, last + 1), batches(first), strict=False
        ):
            if mesh is not None:
                batch = sharding.shard_batch(batch, mesh)
            state, metrics = train_step(state, frozen, batch)
            pending.append(metrics)
            if schedule.due(step, schedule.log_period):
                loss = log.training(step, jax.device_get(pending))
                pending = []
                if not math.isfinite(loss):
                    raise UserError(
                        f"the loss is {loss} at step {step}: lower the learning rate"
                    )
            else:
                log.advance(step)
            if evaluate is not None and schedule.due(step, schedule.eval_period):
                values = processes.agreed(dict(evaluate(state.tuned, frozen)))
                value = _selection_value(values, schedule.metric)
                log.validation(step, values)
                if best is None or value > best.value or schedule.keep_last:
                    best = Best(step, value, values, _copy(state.tuned))
                    _write_best(model_dir, best)
                    stale = 0
                else:
                    stale += 1
                stopped = bool(schedule.patience) and stale >= schedule.patience
            if checkpoints and (
                stopped or schedule.due(step, schedule.checkpoint_period)
            ):
                checkpoints.save(step, state, {"batch": step}, _record(best))
                _drop_other_bests(model_dir, best)
            if stopped:
                report.say(
                    f"stopped at step {step}: {schedule.patience} evaluations without "
                    f"a better metric than {best.value:.4f} of step {best.step}"
                )
                break
    if trees.fingerprint(frozen) != frozen_bytes:
        raise RuntimeError("a frozen parameter changed during training")
    report.say(f"frozen parameters unchanged (sha256 {frozen_bytes[:12]})")
    if model_dir is not None:
        processes.in_first(lambda: plots.learning_curve(model_dir))
    chosen = best or Best(step, math.nan, {}, _copy(state.tuned))
    return Result(
        tuned=chosen.tuned,
        step=chosen.step,
        last_step=step,
        metrics=chosen.metrics,
        loss=loss,
        seconds=time.monotonic() - started,
    )


def _copy(tree: Params) -> Params:
    return jax.tree.map(lambda leaf: np.array(processes.whole(leaf)), tree)


def _places(state: TrainState) -> tuple[TrainState, PyTree | None]:
    """A state as shapes, and where it stays; one process leaves that to the compiler."""
    if processes.count() == 1:
        return jax.eval_shape(lambda: state), None
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    return abstract, jax.tree.map(lambda x: x.sharding, state)


def _selection_value(metrics: Mapping[str, float], name: str | None) -> float:
    if name is None:
        return float(np.mean(list(metrics.values())))
    if name not in metrics:
        raise UserError(
            f"no metric is called {name!r}; the task reports {', '.join(metrics)}"
        )
    return float(metrics[name])


def _record(best: Best | None) -> dict[str, Any] | None:
    """What a checkpoint says of the best evaluation; its leaves lie in a file."""
    if best is None:
        return None
    return {"step": best.step, "value": best.value, "metrics": best.metrics}


def _best_file(model_dir: pathlib.Path, step: int) -> pathlib.Path:
    return pathlib.Path(model_dir) / "best" / f"{step}.safetensors"


def _write_best(model_dir: pathlib.Path | None, best: Best) -> None:
    if model_dir is not None:
        tensors = {n: np.asarray(x) for n, x in trees.flatten(best.tuned).items()}
        path = _best_file(model_dir, best.step)
        processes.in_first(lambda: files.write(path, tensors, {}))


def _read_best(model_dir: pathlib.Path, record: Mapping[str, Any] | None):
    if record is None:
        return None
    with files.reading(
        _best_file(model_dir, record["step"]), "the best parameters of a run"
    ) as file:
        tuned = trees.unflatten({n: file.get_tensor(n) for n in file.keys()})  # noqa: SIM118
    return Best(**record, tuned=tuned)


def _drop_other_bests(model_dir: pathlib.Path, best: Best | None) -> None:
    """Deletes the files that no checkpoint can ask for any more."""
    if best is not None and processes.is_first():
        keep = _best_file(model_dir, best.step)
        for path in keep.parent.glob("*.safetensors"):
            if path != keep:
                path.unlink()
