# SPDX-License-Identifier: Apache-2.0
"""What each of the prompts that one run tunes has to itself, from its start to its end.

A run has one member, which owns all that is tuned, or several, each of which owns its
prompt: nothing of one member depends on another.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from prompt_tuning import trees
from prompt_tuning.training import optimizers
from prompt_tuning.training.best_evaluation import Selection
from prompt_tuning.types import Params

# From a batch's number to the batches from there on: what makes a run resumable.
Batches = Callable[[int], Iterator[Mapping[str, np.ndarray]]]
# From the tuned and frozen leaves to the validation metrics.
Evaluate = Callable[[Params, Params], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Member:
    """One prompt of a run, or all that it tunes.

    Attributes:
      name: of the prompt in the network's bank; '' for the only member of a run, which
        owns all tuned leaves.
      tx: the optimizer of its leaves.
      batches: called with the number of the first batch wanted. In the rows of a named
        member the ids from V on are positions of its prompt, as if it were the only one.
      evaluate: gives the validation metrics of (its own tuned, the frozen) leaves.
    """

    name: str
    tx: optax.GradientTransformation
    batches: Batches
    evaluate: Evaluate | None = None

    @property
    def pattern(self) -> str:
        """Matches the names of its leaves."""
        return rf"prompts/{re.escape(self.name)}" if self.name else r".*"

    def own(self, tree: Params) -> dict[str, Any]:
        """Those of a tree's leaves that are its own."""
        return trees.unflatten(
            {
                name: leaf
                for name, leaf in trees.flatten(tree).items()
                if re.fullmatch(self.pattern, name)
            }
        )


def alone(members: Sequence[Member]) -> bool:
    """Whether these are the one member that owns all its run tunes."""
    return [member.name for member in members] == [""]


def optimizer(members: Sequence[Member]) -> optax.GradientTransformation:
    """The optimizer of all members' leaves, each moved by its own."""
    if alone(members):
        return members[0].tx
    return optimizers.separate(
        {member.name: member.tx for member in members},
        [(member.pattern, member.name) for member in members],
    )


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
      tuned: the best tuned leaves where there was an evaluation, else the last.
      step: the step that ``outcomes`` comes from.
      last_step: the step that the run reached.
      metrics: the validation metrics of ``outcomes``.
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
