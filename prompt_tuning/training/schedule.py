# SPDX-License-Identifier: Apache-2.0
"""When a run evaluates, saves, logs and ends."""

import dataclasses

from prompt_tuning import values
from prompt_tuning.types import NonNegativeFloat, NonNegativeInt, PositiveInt

# A period that nobody gives is a tenth of the run, and at most so many steps.
LONGEST_PERIOD = 1000


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When things happen, in steps; a period of 0 means never.

    Attributes:
      steps: the step at which training ends.
      eval_period: steps between evaluations; the last step is always evaluated. None
        is a tenth of the run, 1,000 at most.
      checkpoint_period: steps between checkpoints; the last step is always saved. None
        is a tenth of the run, 1,000 at most.
      log_period: steps between records of the loss.
      patience: evaluations without a better metric after which training stops; 0
        trains to the end.
      metric: the metric that chooses the best parameters (higher is better); None
        takes the mean of all metrics, as the paper does where a task has several.
      keep_last: take the last evaluation for the best, whatever its metrics.
      checkpoint_seconds: the age at which a checkpoint is followed by another one,
        whatever the step; 0 goes by steps alone.
      halvings: the steps after which only the better half of those who take part goes
        on, by their last evaluation or, without one, their loss.
    """

    steps: PositiveInt
    eval_period: NonNegativeInt | None = None
    checkpoint_period: NonNegativeInt | None = None
    log_period: NonNegativeInt = 10
    patience: NonNegativeInt = 0
    metric: str | None = None
    keep_last: bool = False
    checkpoint_seconds: NonNegativeFloat = 300.0
    halvings: tuple[int, ...] = ()

    def __post_init__(self):
        """Refuses what is no number of steps.

        Raises:
          UserError: a length or a period is none.
        """
        values.check(Schedule, vars(self))

    def due(self, step: int, period: int | None) -> bool:
        """Whether ``step`` ends a period or the run, or comes before a halving."""
        if step in self.halvings:
            return True
        if period is None:
            period = max(1, min(LONGEST_PERIOD, self.steps // 10))
        return step >= self.steps or bool(period) and step % period == 0
