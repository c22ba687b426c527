# SPDX-License-Identifier: Apache-2.0
"""How far a run has come: its state, who still takes part, and what is saved of both."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prompt_tuning import processes, report, trees
from prompt_tuning.devices import sharding
from prompt_tuning.errors import UserError
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.training import members
from prompt_tuning.training.best_evaluation import Best, Selection, host_copy
from prompt_tuning.training.members import Member, Result, Standing
from prompt_tuning.training.run_checkpoints import Checkpoints
from prompt_tuning.training.step import TrainState
from prompt_tuning.types import Array, Params, PyTree


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


class Progress:
    """What the loop moves on.

    Attributes:
      step: steps taken.
      state: what training changes of those who take part.
      standings: how far each member has come, by name.
    """

    def __init__(
        self,
        bank: Sequence[Prompt],
        everyone: Sequence[Member],
        tuned: Params,
        schedule: Schedule,
        *,
        key: Array,
        model_dir: pathlib.Path | None,
        mesh: jax.sharding.Mesh | None,
    ):
        """Starts at step 0, or where the newest checkpoint in ``model_dir`` stands.

        Args:
          bank: the prompts of the network.
          everyone: the members of the run.
          tuned: what they start from.
          schedule: lengths and periods.
          key: see `TrainState`.
          model_dir: folder of the run; None keeps nothing.
          mesh: where the state lies; must be given to several processes.

        Raises:
          UserError: the checkpoint is of another run.
        """
        self._places = {prompt.name: i for i, prompt in enumerate(bank)}
        self._everyone = everyone
        self._start = tuned
        self._mesh = mesh
        self._schedule = schedule
        self._folder = model_dir
        self._checkpoints = None if model_dir is None else Checkpoints(model_dir)
        self.standings = {
            member.name: Standing(
                Selection(
                    model_dir,
                    schedule.metric,
                    schedule.patience,
                    schedule.keep_last,
                    member.name,
                )
            )
            for member in everyone
        }
        latest = self._checkpoints and self._checkpoints.latest_step()
        here = list(everyone)
        if latest is not None:
            self._resume(self._checkpoints.read_best(latest) or {})
            # Those who left before it are no part of the checkpoint.
            here = [m for m in here if self.standings[m.name].left in (None, latest)]
        # A step donates its state's buffers, and the caller's arrays must survive it.
        own = trees.merge(*(member.own(tuned) for member in here))
        own = jax.tree.map(lambda x: jax.numpy.array(x, jax.numpy.float32), own)
        self.state = TrainState.create(
            own, members.optimizer(here), jax.random.clone(key)
        )
        if processes.count() > 1:
            # An array on one process's device can neither be saved nor meet the others'.
            self.state = sharding.replicate(self.state, mesh)
        if latest is not None:
            self.state, _, _ = self._checkpoints.restore(self.places()[0], latest)
            report.say(f"resuming from step {latest} in {model_dir}")
        self.step = int(self.state.step)
        self._here = here
        self.settle()

    def _resume(self, found: Mapping[str, Any]) -> None:
        """Takes the standings from a checkpoint's record (see `save`)."""
        records = {"": found} if members.alone(self._everyone) else found
        if records.keys() != self.standings.keys() or any(
            "left" not in record for record in records.values()
        ):
            raise UserError(
                f"{self._folder} holds a run of other prompts; choose another MODEL_DIR "
                "or the same PROMPTS"
            )
        for name, standing in self.standings.items():
            standing.resume(records[name])

    def places(self) -> tuple[TrainState, PyTree | None]:
        """The state as shapes, and where it stays.

        One process leaves the latter to the compiler.
        """
        if processes.count() == 1:
            return jax.eval_shape(lambda: self.state), None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            self.state,
        )
        return abstract, jax.tree.map(lambda x: x.sharding, self.state)

    @property
    def active(self) -> list[Member]:
        """Those who go on."""
        return [m for m in self._here if self.standings[m.name].left is None]

    def part(self) -> Params:
        """Takes those who do not go on out of the state, and returns their leaves.

        These are their best ones, or what they started from. No row uses them, but the
        network has a place for them.
        """
        if len(self.active) < len(self._here):
            self._here = self.active
            own = [member.own(self.state.tuned) for member in self._here]
            opt_state = {m.name: self.state.opt_state[m.name] for m in self._here}
            self.state = self.state.replace(
                tuned=trees.merge(*own), opt_state=opt_state
            )
        absent = {}
        for member in self._everyone:
            if member not in self._here:
                best = self.standings[member.name].selection.best
                own = member.own(self._start) if best is None else best.tuned
                absent |= trees.flatten(own)
        leaves = trees.unflatten(absent)
        return leaves if self._mesh is None else sharding.replicate(leaves, self._mesh)

    def log_losses(
        self, log: report.Log, metrics: Sequence[Mapping[str, np.ndarray]]
    ) -> None:
        """Records the losses of some steps, and notes those that are not finite.

        Raises:
          UserError: nothing is left to go on with.
        """
        for member in self.active:
            own = metrics
            if member.name:
                place = self._places[member.name]
                own = [{k: v[place] for k, v in each.items()} for each in metrics]
            standing = self.standings[member.name]
            standing.loss = log.training(self.step, own, member.name)
            standing.diverged = not math.isfinite(standing.loss)
        if all(standing.diverged for standing in self.standings.values()):
            loss = self.standings[self.active[0].name].loss
            raise UserError(
                f"the loss is {loss} at step {self.step}: lower the learning rate"
            )

    def evaluate(self, log: report.Log, frozen: Params) -> None:
        """Evaluates those who take part and keeps what is better than before.

        Raises:
          UserError: there is no metric of the name that the schedule gives.
        """
        for member in self.active:
            standing = self.standings[member.name]
            if member.evaluate is None or standing.diverged:
                continue
            tuned = member.own(self.state.tuned)
            metrics = processes.agreed(dict(member.evaluate(tuned, frozen)))
            standing.selection.consider(self.step, metrics, tuned)
            log.validation(self.step, metrics, member.name)

    def settle(self) -> bool:
        """Lets those leave whose patience is over or whose loss is not finite.

        Returns:
          Whether anybody leaves.
        """
        for member in self._here:
            standing = self.standings[member.name]
            selection = standing.selection
            gone = standing.diverged or selection.is_over
            standing.left = self.step if gone else None
            whose = member.name and f"{member.name} "
            if standing.diverged:
                report.say(
                    f"{whose}left at step {self.step}: its loss is {standing.loss}; "
                    "lower its learning rate"
                )
            elif gone:
                report.say(
                    f"{whose}stopped at step {self.step}: {selection.stale} evaluations "
                    f"without a better metric than {selection.best.value:.4f} of step "
                    f"{selection.best.step}"
                )
        return len(self.active) < len(self._here)

    @property
    def is_to_be_saved(self) -> bool:
        """Whether it is time for a checkpoint, or nobody goes on."""
        due = self._schedule.due(self.step, self._schedule.checkpoint_period)
        return self._checkpoints is not None and (due or not self.active)

    def save(self) -> None:
        """Writes a checkpoint."""
        records = {name: each.record() for name, each in self.standings.items()}
        record = records.get("", records)
        self._checkpoints.save(self.step, self.state, {"batch": self.step}, record)
        for standing in self.standings.values():
            standing.selection.drop_others()

    def results(self, seconds: float, pace: dict[str, float]) -> dict[str, Result]:
        """What each member ends with; one whose loss was not finite has nothing."""
        results = {}
        for member in self._everyone:
            standing = self.standings[member.name]
            best = standing.selection.best
            if standing.diverged:
                continue
            if best is None:
                tuned = host_copy(member.own(self.state.tuned))
                best = Best(self.step, math.nan, {}, tuned)
            results[member.name] = Result(
                tuned=best.tuned,
                step=best.step,
                last_step=self.step if standing.left is None else standing.left,
                metrics=best.metrics,
                loss=standing.loss,
                seconds=seconds,
                pace=pace,
            )
        return results
