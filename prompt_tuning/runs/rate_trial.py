# SPDX-License-Identifier: Apache-2.0
"""Learning rates tried side by side before a run, by successive halving.

One trial tunes a prompt (or adapter) at each rate on one copy of the model; all see the
same batches. After some steps the worse half leaves, after twice as many the half of the
rest, until two are left to compare (Jamieson and Talwalkar 2016). It ends within a
quarter of the run, and all rates together read no more rows than the run does.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from prompt_tuning import files, processes, report
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.errors import UserError
from prompt_tuning.inference.likelihood import LOG_LIKELIHOOD
from prompt_tuning.methods import registry
from prompt_tuning.runs import identity, tune
from prompt_tuning.runs.member_tasks import MemberTasks
from prompt_tuning.runs.settings import Settings
from prompt_tuning.training.members import Result
from prompt_tuning.training.run_checkpoints import Checkpoints
from prompt_tuning.training.schedule import Schedule

# Within the folder of the run.
FOLDER = "learning_rates"
RATE = "learning_rate"
# The trial ends within this share of the run.
_QUARTER = 4


def rungs(steps: int, count: int) -> tuple[int, ...]:
    """The steps after which rates are compared; all leave but one after the last.

    >>> rungs(1000, 5), rungs(1000, 2), rungs(4, 4)
    ((62, 124, 248), (250,), (2, 4))

    Args:
      steps: of the run.
      count: rates.
    """
    rounds = math.ceil(math.log2(count))
    left = [math.ceil(count / 2**i) for i in range(rounds)]
    # In units of the first comparison's step, which is doubled each time.
    ends = [2**i for i in range(rounds)]
    cost = sum(n * (end - end // 2) for n, end in zip(left, ends, strict=True))
    # A loss is that before the step, so that the first one tells nothing of a rate.
    unit = max(2, steps // max(cost, _QUARTER * ends[-1]))
    return tuple(min(unit * end, steps) for end in ends)


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a trial found.

    Attributes:
      record: for ``results.json``: ``chosen``, the rate; ``tried``, by the rate its
        ``steps`` and what it was compared by; ``share_of_run``, the rows that all read
        in units of the run's; ``seconds``.
      base: the model, where it had to be loaded.
      tasks: the data, likewise.
    """

    record: Mapping[str, Any]
    base: BaseModel | None = None
    tasks: MemberTasks | None = None

    def settled(self, settings: Settings) -> Settings:
        """The run at the rate that was chosen."""
        optimizer = _maker(settings)(self.record["chosen"])
        tuning = dataclasses.replace(settings.tuning, optimizer=optimizer)
        return dataclasses.replace(
            settings, tuning=tuning, rates=None, rate_trial=self.record
        )


def run(
    settings: Settings,
    folder: pathlib.Path | None,
    base: BaseModel | None = None,
    *,
    allow_changes: bool = False,
    on_start: files.OnStart | None = None,
    quiet: bool = False,
) -> Trial:
    """Tries the rates of a run, unless its folder knows what came of it.

    Compared is the likelihood of the right answers of the evaluation split or, without
    one, the loss of the last training batches.

    Args:
      settings: the run, with `Settings.rates`.
      folder: of the run; None keeps nothing.
      base: the model, if it has been loaded.
      allow_changes: take what the folder knows even of a run that differs.
      on_start: called with the folder before anything else is written to it.
      quiet: no progress bar.

    Raises:
      UserError: the method moves the model, or the folder holds a run without a trial or
        the trial of another one; see `tune.run`.
    """
    rates = settings.rates or ()
    if settings.prompts and all(RATE in each for each in settings.prompts):
        raise UserError(
            f"PROMPTS give each prompt its learning_rate, so there is nothing to choose "
            f"among {list(rates)}: give one LEARNING_RATE"
        )
    method = registry.named(settings.tuning.method)
    if method.result == "model":
        raise UserError(
            f"LEARNING_RATE={list(rates)} is tried side by side on one frozen model, and "
            f"{method.kind} moves the model: give one rate"
        )
    place = known = None
    if folder is not None:
        place = folder / FOLDER
        known = place / report.RESULTS_FILE
        begun = Checkpoints(folder).latest_step() is not None
        if begun and not known.is_file():
            raise UserError(
                f"{folder} holds a run whose learning rate was given: give the same one, "
                "or choose another MODEL_DIR"
            )
        if begun or (allow_changes and known.is_file()):
            return Trial(files.read_json(known))
    ends = rungs(settings.schedule.steps, len(rates))
    trial = dataclasses.replace(
        settings,
        schedule=Schedule(
            ends[-1], 0, 0, keep_last=True, halvings=tuple(sorted({*ends[:-1]}))
        ),
        prompts=[{RATE: list(rates)}],
        trackers=(),
        by_likelihood=True,
        rates=None,
    )
    loaded = tune.load(tune.plan(trial), base)
    if place is not None and known is not None:
        start = on_start and (lambda _: on_start(place.parent))
        identity.open_folder(str(place), loaded.identity, on_start=start)
        if known.is_file():
            return Trial(files.read_json(known), loaded.base, loaded.tasks)
    report.say(
        f"trying the learning rates {', '.join(f'{rate:g}' for rate in rates)} side by "
        f"side, the better half of them longer, for {ends[-1]} of "
        f"{settings.schedule.steps} steps; one LEARNING_RATE leaves this out"
    )
    started = time.monotonic()
    found = tune.run(loaded, place, quiet=quiet)
    record = _record(
        {spec.own[RATE]: found.get(spec.name) for spec in loaded.plan.members},
        settings.schedule.steps,
        time.monotonic() - started,
    )
    if known is not None:
        processes.in_first(lambda: files.write_json(known, record))
    return Trial(record, loaded.base, loaded.tasks)


def _maker(settings: Settings) -> Any:
    """What makes the optimizer at a rate.

    Raises:
      ValueError: the settings lack it.
    """
    if settings.optimizer_at is None:
        raise ValueError("rates are tried by settings with optimizer_at")
    return settings.optimizer_at


def _record(
    found: Mapping[float, Result | None], steps: int, seconds: float
) -> dict[str, Any]:
    """Says what a trial found, and what it cost; see `Trial`."""
    tried = {rate: _measured(result) for rate, result in found.items() if result}
    chosen = max(tried, key=lambda rate: tuple(tried[rate].values()))
    (name,) = list(tried[chosen])[1:]
    share = sum(each["steps"] for each in tried.values()) / steps
    told = ", ".join(
        f"{rate:g} ({each[name]:.4f} at step {each['steps']})"
        for rate, each in tried.items()
    )
    report.say(
        f"{name.replace('_', ' ')} by learning rate: {told}; taking {chosen:g}. The trial "
        f"read {share:.2f} times the rows of the run, in {seconds:.0f} s"
    )
    return {
        "chosen": chosen,
        "tried": {f"{rate:g}": each for rate, each in tried.items()},
        "diverged": [rate for rate, result in found.items() if result is None],
        "share_of_run": round(share, 4),
        "seconds": round(seconds, 1),
    }


def _measured(result: Result) -> dict[str, Any]:
    """How far a rate came, and what it was compared by: the higher the better."""
    measured = {"steps": result.last_step}
    if LOG_LIKELIHOOD in result.metrics:
        return measured | {LOG_LIKELIHOOD: result.metrics[LOG_LIKELIHOOD]}
    return measured | {"negative_loss": -result.loss}
