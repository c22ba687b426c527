# SPDX-License-Identifier: Apache-2.0
"""Where a run's records can go beside its folder: MLflow, Weights & Biases, clu's writers.

Two small interfaces: a `Tracker` opens runs, a `Session` is one that is open. An object
with the methods of ``clu.metric_writers`` is taken as it is.
"""

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from prompt_tuning.errors import UserError

# MLflow takes other characters in no name.
_NOT_MLFLOW = re.compile(r"[^\w\-. :/]")
# The longest value of a parameter that all versions of MLflow take.
_LONGEST_PARAMETER = 500


@runtime_checkable
class Writer(Protocol):
    """Takes scalars; the writers of ``clu.metric_writers`` do."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """What the run follows from, before its first record."""
        ...

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Values of a step, by names such as ``train/loss/prompt``."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class Session(Protocol):
    """A tracker's run that is open."""

    @property
    def run(self) -> str:
        """What the tracker calls it; `Tracker.open` takes it up again by that."""
        ...

    @property
    def where(self) -> str:
        """Where it is to be seen, in words."""
        ...

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes values of a step."""
        ...

    def end(self, *, whole: bool) -> None:
        """Closes it; ``whole`` says whether the run came to its end."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """Opens runs."""

    @property
    def kind(self) -> str:
        """What it is called; a run has at most one of a kind."""
        ...

    def check(self) -> None:
        """Refuses what cannot work, before anything is loaded.

        Raises:
          UserError: its package is not installed.
        """
        ...

    def open(self, name: str, run: str | None, hparams: Mapping[str, Any]) -> Session:
        """Begins a run, or goes on with one.

        Args:
          name: of a run that begins.
          run: what `Session.run` was, of one that goes on.
          hparams: what the run follows from.
        """
        ...


@dataclasses.dataclass(frozen=True)
class MLflow:
    """MLflow, by its own client.

    Attributes:
      uri: a server's address, ``sqlite:///...`` or a folder; None leaves it to
        MLFLOW_TRACKING_URI, and that to MLflow.
      experiment: None leaves it to MLFLOW_EXPERIMENT_NAME.
    """

    uri: str | None = None
    experiment: str | None = None
    kind = "mlflow"

    def check(self) -> None:
        """See `Tracker.check`."""
        _check_installed("mlflow")

    def open(self, name: str, run: str | None, hparams: Mapping[str, Any]) -> Session:
        """See `Tracker.open`."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.uri)
        if run is not None:
            client.update_run(run, status="RUNNING")
            return _MLflowRun(client, run)
        experiment = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        experiment = experiment or "Default"
        found = client.get_experiment_by_name(experiment)
        number = (
            client.create_experiment(experiment)
            if found is None
            else found.experiment_id
        )
        begun = client.create_run(number, run_name=name)
        session = _MLflowRun(client, begun.info.run_id)
        session.write_parameters(hparams)
        return session


class _MLflowRun:
    """See `Session`."""

    def __init__(self, client: Any, run: str):
        self._client, self.run = client, run
        self.where = f"run {run} in {client.tracking_uri}"

    def write_parameters(self, hparams: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        parameters = [
            Param(_NOT_MLFLOW.sub("_", key), str(value)[:_LONGEST_PARAMETER])
            for key, value in hparams.items()
        ]
        self._client.log_batch(self.run, params=parameters)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(_NOT_MLFLOW.sub("_", key), float(value), now, step)
            for key, value in scalars.items()
        ]
        self._client.log_batch(self.run, metrics=metrics)

    def end(self, *, whole: bool) -> None:
        self._client.set_terminated(self.run, "FINISHED" if whole else "KILLED")


@dataclasses.dataclass(frozen=True)
class WandB:
    """Weights & Biases, which reads WANDB_MODE, WANDB_DIR and others for itself.

    Attributes:
      project: None leaves it to WANDB_PROJECT.
      entity: None leaves it to WANDB_ENTITY.
    """

    project: str | None = None
    entity: str | None = None
    kind = "wandb"

    def check(self) -> None:
        """See `Tracker.check`."""
        _check_installed("wandb")

    def open(self, name: str, run: str | None, hparams: Mapping[str, Any]) -> Session:
        """See `Tracker.open`."""
        import wandb

        begun = wandb.init(
            project=self.project,
            entity=self.entity,
            name=name,
            id=run,
            resume="allow",
            config=dict(hparams),
            # It would else copy what the progress bar draws, and print lines into it.
            settings=wandb.Settings(console="off", silent=True),
        )
        return _WandBRun(begun)


class _WandBRun:
    """See `Session`."""

    def __init__(self, run: Any):
        self._run, self.run = run, run.id
        self.where = f"offline, {run.dir}" if run.offline else run.url

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def end(self, *, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


@dataclasses.dataclass(frozen=True)
class _Given:
    """A writer that the caller has opened."""

    writer: Writer

    @property
    def kind(self) -> str:
        return type(self.writer).__name__

    def check(self) -> None:
        """It is there."""

    def open(self, name: str, run: str | None, hparams: Mapping[str, Any]) -> Session:
        del name
        if run is None:
            self.writer.write_hparams(dict(hparams))
        return _GivenRun(self.writer)


class _GivenRun:
    """See `Session`."""

    run, where = "", "as it was given"

    def __init__(self, writer: Writer):
        self._writer = writer

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._writer.write_scalars(step, scalars)

    def end(self, *, whole: bool) -> None:
        del whole
        self._writer.close()


NAMES = {"mlflow": MLflow, "wandb": WandB}
Given = str | Tracker | Writer


def named(given: Sequence[Given]) -> tuple[Tracker, ...]:
    """Trackers by their names, and those that are given as objects.

    Raises:
      UserError: there is none of the name, two are of one kind, or its package is not
        installed.
    """
    choices = f"choose among {', '.join(map(repr, NAMES))}"
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UserError(f"trackers={given!r} must be a list; {choices}")
    found: list[Tracker] = []
    for each in given:
        if isinstance(each, str):
            if each not in NAMES:
                raise UserError(f"no tracker is called {each!r}: {choices}")
            found.append(NAMES[each]())
        elif isinstance(each, Tracker):
            found.append(each)
        elif isinstance(each, Writer):
            found.append(_Given(each))
        else:
            raise UserError(
                f"{each!r} is no tracker: {choices}, or give an object with the methods "
                "of clu.metric_writers"
            )
    kinds = [each.kind for each in found]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise UserError(f"trackers names {kind!r} twice: leave one out")
    for each in found:
        each.check()
    return tuple(found)


def _check_installed(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"no package {package!r} is installed: pip install {package}")
