# SPDX-License-Identifier: Apache-2.0
"""How far a run has come: its state, who still takes part, and what is saved of both."""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from prompt_tuning import processes, report, trees
from prompt_tuning.devices import sharding
from prompt_tuning.errors import UserError
from prompt_tuning.training import optimizers
from prompt_tuning.training.best_evaluation import Best, Selection, host_copy
from prompt_tuning.training.members import Member, Result, Standing
from prompt_tuning.training.run_checkpoints import Checkpoints, Damaged
from prompt_tuning.training.schedule import Schedule
from prompt_tuning.training.step import TrainState
from prompt_tuning.training.usage import Usage
from prompt_tuning.types import Array, Params, PyTree


class Progress:
    """What the loop moves on.

    Attributes:
      step: steps taken.
      state: what training changes of those who take part.
      standings: how far each member has come, by name.
      before: what the run took up to the checkpoint that it was resumed from.
    """

    def __init__(
        self,
        everyone: Sequence[Member],
        schedule: Schedule,
        *,
        key: Array,
        model_dir: pathlib.Path | None,
        mesh: jax.sharding.Mesh | None,
    ):
        """Starts at step 0, or where the newest checkpoint in ``model_dir`` stands.

        Where that one is damaged the one before it is taken.

        Args:
          everyone: the members of the run; several are the prompts of the network's
            bank, in its order.
          schedule: lengths and periods.
          key: see `TrainState`.
          model_dir: folder of the run; None keeps nothing.
          mesh: where the state lies; must be given to several processes.

        Raises:
          UserError: the checkpoint is of another run, or none can be read.
        """
        self._everyone = everyone
        self._mesh = mesh
        self._schedule = schedule
        self._folder = model_dir
        self._key = key
        self._checkpoints = None if model_dir is None else Checkpoints(model_dir)
        self._unlogged: list[Mapping[str, Any]] = []
        # Of the checkpoints that are kept, by their steps.
        self._records: dict[int, dict[str, Any]] = {}
        self.before: Usage | None = None
        self._saved_at = time.monotonic()
        steps = [] if self._checkpoints is None else self._checkpoints.steps()
        for step in reversed(steps):
            try:
                self._resume(step)
                break
            except Damaged as error:
                if step == steps[0]:
                    raise UserError(
                        f"{error}; there is no other: delete {self._kept.folder} "
                        "to begin again from step 0"
                    ) from error
                report.say(f"{error}; it is deleted, and the one before it taken")
                self._kept.remove(step)
        else:
            self._begin(list(everyone))
        self.step = int(self.state.step)
        self.settle()

    @property
    def _kept(self) -> Checkpoints:
        """The checkpoints, of a run that keeps any."""
        if self._checkpoints is None:
            raise ValueError("a run without a folder keeps no checkpoints")
        return self._checkpoints

    def _begin(self, here: list[Member]) -> None:
        """The state of these members at step 0, and the standings of all."""
        schedule = self._schedule
        self.standings = {
            member.name: Standing(
                Selection(
                    self._folder,
                    member.name,
                    schedule.metric,
                    schedule.patience,
                    schedule.keep_last,
                )
            )
            for member in self._everyone
        }
        self._here = here
        # A step donates its state's buffers, and the caller's arrays must survive it.
        own = jax.tree.map(
            lambda x: jax.numpy.array(x, jax.numpy.float32),
            {member.name: member.tuned for member in here},
        )
        self.state = TrainState.create(
            own, optimizer(here), jax.random.clone(self._key)
        )
        if self._mesh is not None:
            # Where a step leaves it: on one device the first step would be compiled for
            # itself alone, and could neither be saved by nor meet other processes.
            self.state = sharding.replicate(self.state, self._mesh)

    def _resume(self, step: int) -> None:
        """The state and the standings of a checkpoint.

        Raises:
          Damaged: it, or the best leaves that it names, cannot be read.
          UserError: it is of another run.
        """
        record = self._kept.read_record(step)
        standings = record["members"]
        if list(standings) != [member.name for member in self._everyone]:
            raise UserError(
                f"{self._folder} holds a run of other prompts ({', '.join(standings)}); "
                "choose another MODEL_DIR or the same PROMPTS"
            )
        # Those who left before it are no part of the checkpoint.
        self._begin(
            [m for m in self._everyone if standings[m.name]["left"] in (None, step)]
        )
        for name, standing in self.standings.items():
            try:
                standing.resume(standings[name])
            except UserError as error:
                raise Damaged(str(error)) from error
        self.state, _, _ = self._kept.restore(self.places()[0], step)
        self._unlogged = [
            {name: _as_computed(value) for name, value in step.items()}
            for step in record["unlogged"]
        ]
        # Checkpoints of earlier versions know nothing of it.
        self.before = Usage.of(record["usage"]) if "usage" in record else None
        for earlier in self._kept.steps():
            # One that cannot be read has no say in what is kept: it helps nobody.
            with contextlib.suppress(Damaged):
                if earlier < step:
                    self._records[earlier] = self._kept.read_record(earlier)
        self._records[step] = record
        report.say(f"resuming from step {step} in {self._folder}")

    def places(self) -> tuple[TrainState, PyTree | None]:
        """The state as shapes, and where it stays.

        Without a mesh there is one place.
        """
        if self._mesh is None:
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

    def part(self, frozen: Params) -> Params:
        """Takes those who do not go on out of the state; gives them as parameters.

        They are what is best of them, or what they started from. No row uses them, but
        the network has a place for their prompts.

        Args:
          frozen: the leaves that nobody moves.
        """
        if len(self.active) < len(self._here):
            self._here = self.active
            tuned, opt_state = (
                {member.name: tree[member.name] for member in self._here}
                for tree in (self.state.tuned, self.state.opt_state)
            )
            self.state = dataclasses.replace(
                self.state, tuned=tuned, opt_state=opt_state
            )
        absent = []
        for member in self._everyone:
            if member not in self._here:
                best = self.standings[member.name].selection.best
                tuned = member.tuned if best is None else best.tuned
                part = member.materialize(tuned, frozen)
                absent.append({"prompts": part.get("prompts", {})})
        leaves = trees.merge(*absent)
        return leaves if self._mesh is None else sharding.replicate(leaves, self._mesh)

    def count(self, metrics: Mapping[str, Array]) -> None:
        """Takes note of a step that was taken.

        Args:
          metrics: every value a number, or one for each member: [E].
        """
        self.step += 1
        self._unlogged.append(metrics)

    def log_losses(self, log: report.Log) -> None:
        """Records the steps since the last call, and notes losses that are not finite.

        Raises:
          UserError: nothing is left to go on with.
        """
        metrics = jax.device_get(self._unlogged)
        self._unlogged = []
        for member in self._everyone:
            standing = self.standings[member.name]
            if member in self.active:
                own = self._own(member, metrics)
                standing.loss = log.training(
                    self.step,
                    member.name,
                    own,
                    optimizers.learning_rate_of(member.tx, self.step - 1),
                )
                standing.diverged = not math.isfinite(standing.loss)
        if all(standing.diverged for standing in self.standings.values()):
            loss = self.standings[self.active[0].name].loss
            raise UserError(
                f"the loss is {loss} at step {self.step}: lower the learning rate"
            )

    def _own(
        self, member: Member, metrics: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """A member's values among those of all, step by step."""
        place = [each.name for each in self._everyone].index(member.name)
        return [
            {name: np.atleast_1d(value)[place] for name, value in step.items()}
            for step in metrics
        ]

    def evaluate(self, log: report.Log, frozen: Params) -> None:
        """Evaluates those who take part and keeps what is better than before.

        Raises:
          UserError: there is no metric of the name that the schedule gives.
        """
        unlogged = jax.device_get(self._unlogged)
        for member in self.active:
            standing = self.standings[member.name]
            if member.evaluate is None or standing.diverged:
                continue
            tuned = self.state.tuned[member.name]
            metrics = processes.agreed(dict(member.evaluate(tuned, frozen)))
            loss = standing.loss
            if unlogged:
                loss = report.mean_per_token(self._own(member, unlogged), "token_loss")
            standing.selection.consider(self.step, metrics, tuned, loss)
            log.validation(self.step, member.name, metrics)

    def settle(self) -> bool:
        """Lets those leave whose patience is over or whose loss is not finite.

        At a halving of the schedule the worse half leaves, too.

        Returns:
          Whether anybody leaves.
        """
        worse = self._worse_half() if self.step in self._schedule.halvings else ()
        for member in self._here:
            standing = self.standings[member.name]
            selection = standing.selection
            gone = standing.diverged or selection.is_over or member.name in worse
            standing.left = self.step if gone else None
            if standing.diverged:
                report.say(
                    f"{member.name} left at step {self.step}: its loss is "
                    f"{standing.loss}; lower its learning rate"
                )
            elif member.name in worse:
                report.say(f"{member.name} left at step {self.step}: others are better")
            elif gone and (best := selection.best):
                report.say(
                    f"{member.name} stopped at step {self.step}: {selection.stale} "
                    "evaluations without a better metric than "
                    f"{best.value:.4f} of step {best.step}"
                )
        return len(self.active) < len(self._here)

    def _worse_half(self) -> set[str]:
        """Those of whom a halving takes leave; of equals the last ones."""
        here = [m.name for m in self._here if not self.standings[m.name].diverged]
        here.sort(key=lambda name: -self.standings[name].value)
        return set(here[-(len(here) // 2) :]) if len(here) > 1 else set()

    def is_to_be_saved(self) -> bool:
        """Whether it is time for a checkpoint, or nobody goes on.

        All processes must call it together.
        """
        schedule = self._schedule
        if self._checkpoints is None:
            return False
        if not self.active or schedule.due(self.step, schedule.checkpoint_period):
            return True
        # Clocks differ: of several processes the first one decides, and asking it after
        # each step would cost more than it is worth.
        if not schedule.checkpoint_seconds or not self.may_agree():
            return False
        age = time.monotonic() - self._saved_at
        return processes.agreed(age > schedule.checkpoint_seconds)

    def may_agree(self) -> bool:
        """Whether several processes exchange a word after this step; one always may."""
        log_period = self._schedule.log_period
        return processes.count() == 1 or self._schedule.due(self.step, log_period)

    def save(self, usage: Usage) -> None:
        """Writes a checkpoint, which says what the run took so far."""
        record = {
            "members": {name: each.record() for name, each in self.standings.items()},
            # A resumed run records these steps, as one does that was not interrupted.
            "unlogged": jax.tree.map(
                lambda value: np.asarray(value).tolist(),
                jax.device_get(self._unlogged),
            ),
            "usage": usage.record(),
        }
        self._kept.save(self.step, self.state, {"batch": self.step}, record)
        self._saved_at = time.monotonic()
        self._records[self.step] = record
        kept = self._kept.steps()
        self._records = {at: self._records[at] for at in kept if at in self._records}
        for name, standing in self.standings.items():
            standings = [each["members"][name] for each in self._records.values()]
            best = [each["best"] for each in standings if each["best"]]
            standing.selection.keep({each["step"] for each in best})

    def results(self, usage: Usage, pace: dict[str, float]) -> dict[str, Result]:
        """What each member ends with; one whose loss was not finite has nothing."""
        results = {}
        for member in self._everyone:
            standing = self.standings[member.name]
            best = standing.selection.best
            if standing.diverged:
                continue
            if best is None:
                tuned = host_copy(self.state.tuned[member.name])
                best = Best(self.step, math.nan, {}, standing.loss, tuned)
            results[member.name] = Result(
                tuned=best.tuned,
                step=best.step,
                last_step=self.step if standing.left is None else standing.left,
                metrics=best.metrics,
                loss=best.loss,
                usage=usage,
                pace=pace,
            )
        return results


def _as_computed(value: Any) -> np.ndarray:
    """A number, or a list, of JSON in the dtype that a step gives it."""
    array = np.asarray(value)
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int32)


def optimizer(members: Sequence[Member]) -> optax.GradientTransformation:
    """The optimizer of the members' leaves, each moved by its own."""
    return optimizers.by_member({member.name: member.tx for member in members})
