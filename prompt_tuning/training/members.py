# SPDX-License-Identifier: Apache-2.0
"""What each of those that one run tunes has to itself, from its start to its end.

A run has one member or several, each of which owns the leaves that it tunes: nothing of
one member depends on another.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from prompt_tuning import trees
from prompt_tuning.methods import method
from prompt_tuning.methods.method import Lesson, Materialize, Penalty, as_is
from prompt_tuning.network.comparison import CompareAs
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.training.best_evaluation import Selection
from prompt_tuning.training.usage import Usage
from prompt_tuning.types import Array, Params

# From a batch's number to the batches from there on: what makes a run resumable.
Batches = Callable[[int], Iterator[Mapping[str, np.ndarray]]]
# From the tuned and frozen leaves to the validation metrics.
Evaluate = Callable[[Params, Params], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Member:
    """One of those that a run tunes: a prompt, or a whole model.

    Attributes:
      name: of the prompt in the network's bank; of a model, any.
      tuned: the leaves that it owns and starts from, where they stand among the
        parameters.
      tx: the optimizer of these.
      batches: called with the number of the first batch wanted. In a prompt's rows the
        ids from V on are its positions, as if it were the only one.
      evaluate: gives the validation metrics of (its own tuned, the frozen) leaves.
      materialize: makes its part of the network's parameters of the same.
      penalty: what its loss has beside that of its examples, of the same.
      lesson: what its loss has for other prompts' answers to its examples.
    """

    name: str
    tuned: Params
    tx: optax.GradientTransformation
    batches: Batches
    evaluate: Evaluate | None = None
    materialize: Materialize = as_is
    penalty: Penalty | None = None
    lesson: Lesson | None = None


def assembler(
    everyone: Sequence[Member], bank: Sequence[Prompt]
) -> Callable[[Mapping[str, Params], Params], Params]:
    """What makes the network's parameters of the members' leaves and the frozen ones.

    Args:
      everyone: the members, in the order of their numbers.
      bank: the network's prompts.
    """
    make = {member.name: member.materialize for member in everyone}

    def assemble(tuned: Mapping[str, Params], frozen: Params) -> Params:
        parts = {name: make[name](leaves, frozen) for name, leaves in tuned.items()}
        return trees.merge(method.assemble(parts, list(make), bank), frozen)

    return assemble


def penalties(
    everyone: Sequence[Member],
) -> Callable[[Mapping[str, Params], Params], Array] | None:
    """What makes the sum of the penalties of those who take part; None without any."""
    own = {m.name: m.penalty for m in everyone if m.penalty is not None}
    if not own:
        return None

    def total(tuned: Mapping[str, Params], frozen: Params) -> Array:
        found = [own[name](tuned[name], frozen) for name in own if name in tuned]
        return sum(found, jnp.zeros(()))

    return total


def lessons(
    everyone: Sequence[Member],
) -> Callable[[Mapping[str, Params], Params, CompareAs], Array] | None:
    """What makes the sum of the lessons of those who take part; None without any."""
    own = {m.name: m.lesson for m in everyone if m.lesson is not None}
    if not own:
        return None

    def total(tuned: Mapping[str, Params], frozen: Params, compare: CompareAs) -> Array:
        found = [
            own[name](tuned[name], frozen, functools.partial(compare, name))
            for name in own
            if name in tuned
        ]
        return sum(found, jnp.zeros(()))

    return total


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
      tuned: the best tuned leaves where there was an evaluation, else the last.
      step: the step that ``tuned`` comes from.
      last_step: the step that the run reached.
      metrics: the validation metrics of ``tuned``.
      loss: mean training loss per target token of the steps up to ``step`` since the
        record before.
      usage: what this call took, for all members together.
      pace: ``steps_per_second`` and ``input_idle``, the share of the time that the
        devices waited for data (see `prefetch.Pace`); empty after a single step.
    """

    tuned: Params
    step: int
    last_step: int
    metrics: dict[str, float]
    loss: float
    usage: Usage
    pace: dict[str, float]


@dataclasses.dataclass
class Standing:
    """How far a member has come.

    Attributes:
      selection: its best evaluation.
      loss: mean loss per target token over the last log period.
      left: the step at which it left the run.
      diverged: whether its loss is not finite.
    """

    selection: Selection
    loss: float = math.nan
    left: int | None = None
    diverged: bool = False

    @property
    def value(self) -> float:
        """What members are compared by: their evaluation, or their loss, negated."""
        best = self.selection.best
        return -self.loss if best is None else best.value

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {
            "best": self.selection.record(),
            # JSON has no NaN.
            "loss": self.loss if math.isfinite(self.loss) else None,
            "left": self.left,
            "diverged": self.diverged,
        }

    def resume(self, record: Mapping[str, Any]) -> None:
        """Goes on from what `record` gave."""
        self.selection.resume(record["best"])
        self.loss = math.nan if record["loss"] is None else record["loss"]
        self.left, self.diverged = record["left"], record["diverged"]
