# SPDX-License-Identifier: Apache-2.0
"""When a run evaluates, saves, logs and ends."""

import dataclasses

from prompt_tuning.errors import UserError

# A period that nobody gives is a tenth of the run, and at most so many steps.
LONGEST_PERIOD = 1000


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When things happen, in steps; a period of 0 means never.

    Attributes:
      steps: the step at which training ends.
      eval_period: steps between evaluations; the last step is always evaluated. None
        is a tenth of ``steps``, `LONGEST_PERIOD` at most.
      checkpoint_period: steps between checkpoints, likewise; the last step is always
        saved.
      log_period: steps between records of the loss.
      patience: evaluations without a better metric after which training stops; 0
        trains to the end.
      metric: the metric that chooses the best parameters (higher is better); None
        takes the mean of all metrics, as the paper does where a task has several.
      keep_last: take the last evaluation for the best, whatever its metrics.
      checkpoint_seconds: the age at which a checkpoint is followed by another one,
        whatever the step; 0 goes by steps alone.
    """

    steps: int
    eval_period: int | None = None
    checkpoint_period: int | None = None
    log_period: int = 10
    patience: int = 0
    metric: str | None = None
    keep_last: bool = False
    checkpoint_seconds: float = 300.0

    def __post_init__(self):
        """Refuses what is no number of steps.

        Raises:
          UserError: a length or a period is none.
        """
        for name, macro, least in (
            ("steps", "TRAIN_STEPS", 1),
            ("eval_period", "EVAL_PERIOD", 0),
            ("checkpoint_period", "CHECKPOINT_PERIOD", 0),
            ("log_period", "log_period", 0),
            ("patience", "EARLY_STOPPING_PATIENCE", 0),
        ):
            value = getattr(self, name)
            if value is None and name in ("eval_period", "checkpoint_period"):
                continue
            if type(value) is not int or value < least:
                raise UserError(
                    f"{macro}={value!r} must be a whole number, {least} or more"
                )

    def due(self, step: int, period: int | None) -> bool:
        """Whether ``step`` ends a period or the run."""
        if period is None:
            period = max(1, min(LONGEST_PERIOD, self.steps // 10))
        return step >= self.steps or bool(period) and step % period == 0
