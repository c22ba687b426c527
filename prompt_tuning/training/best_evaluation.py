# SPDX-License-Identifier: Apache-2.0
"""Which evaluation of a run is the best, and when there is no hope of a better one.

The best tuned leaves lie in a file of their own beside the checkpoints, which say which
one it is; a resumed run therefore ends with the same leaves as one that never stopped.
"""

import dataclasses
import math
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from prompt_tuning import files, processes, trees
from prompt_tuning.errors import UserError
from prompt_tuning.types import Params


@dataclasses.dataclass
class Best:
    """An evaluation, and what gave it.

    Attributes:
      step: when it was.
      value: what it is compared with others by.
      metrics: all that was measured.
      loss: mean training loss per target token of the steps before it.
      tuned: the leaves, on the host.
    """

    step: int
    value: float
    metrics: dict[str, float]
    loss: float
    tuned: Params


class Selection:
    """Keeps the best of a run's evaluations.

    Attributes:
      best: the best so far, or None before the first.
      stale: evaluations since then.
    """

    def __init__(
        self,
        model_dir: pathlib.Path | None,
        name: str,
        metric: str | None = None,
        patience: int = 0,
        keep_last: bool = False,
    ):
        """Knows of no evaluation yet; see `schedule.Schedule` for the arguments.

        The best leaves of the member ``name`` have a folder of its own.
        """
        self.best: Best | None = None
        self.stale = 0
        self._model_dir = model_dir
        self._name = name
        self._metric = metric
        self._patience = patience
        self._keep_last = keep_last

    @property
    def is_over(self) -> bool:
        """Whether so many evaluations brought nothing that the run should stop."""
        return bool(self._patience) and self.stale >= self._patience

    def consider(
        self, step: int, metrics: Mapping[str, float], tuned: Params, loss: float
    ) -> None:
        """Takes note of an evaluation, and keeps it if it is the best (see `Best`).

        Raises:
          UserError: there is no metric of the name that is to decide.
        """
        value = selection_value(metrics, self._metric)
        if self.best is None or value > self.best.value or self._keep_last:
            self.best = Best(step, value, dict(metrics), loss, host_copy(tuned))
            self.stale = 0
            self._write(self.best)
        else:
            self.stale += 1

    def record(self) -> dict[str, Any] | None:
        """What a checkpoint says of the best evaluation; its leaves lie in a file."""
        if self.best is None:
            return None
        fields = ("step", "value", "metrics")
        best = {name: getattr(self.best, name) for name in fields}
        # JSON has no NaN.
        loss = self.best.loss if math.isfinite(self.best.loss) else None
        return {**best, "loss": loss, "stale": self.stale}

    def resume(self, record: Mapping[str, Any] | None) -> None:
        """Goes on from what `record` gave."""
        if record is None or self._model_dir is None:
            return
        path = _file(self._model_dir, self._name, record["step"])
        with files.reading(path, "the best parameters of a run") as file:
            tuned = trees.unflatten({n: file.get_tensor(n) for n in file.keys()})  # noqa: SIM118
        best = dict(record)
        self.stale = best.pop("stale")
        loss = best.pop("loss", None)
        self.best = Best(**best, loss=math.nan if loss is None else loss, tuned=tuned)

    def keep(self, steps: Collection[int]) -> None:
        """Deletes the files but for those of ``steps``, which checkpoints name."""
        if steps and self._model_dir is not None and processes.is_first():
            keep = {_file(self._model_dir, self._name, step) for step in steps}
            for path in next(iter(keep)).parent.glob("*.safetensors"):
                if path not in keep:
                    path.unlink()

    def _write(self, best: Best) -> None:
        if self._model_dir is not None:
            path = _file(self._model_dir, self._name, best.step)
            tensors = trees.flatten(best.tuned)
            processes.in_first(lambda: files.write(path, tensors, {}))


def _file(model_dir: files.Path, name: str, step: int) -> pathlib.Path:
    return pathlib.Path(model_dir) / "best" / name / f"{step}.safetensors"


def host_copy(tree: Params) -> Params:
    """The leaves as arrays of this process, which later steps do not change."""
    return jax.tree.map(lambda leaf: np.array(processes.whole(leaf)), tree)


def selection_value(metrics: Mapping[str, float], name: str | None) -> float:
    """What evaluations are compared by: a metric, or the mean of all.

    Raises:
      UserError: there is no such metric.
    """
    if name is None:
        return float(np.mean(list(metrics.values())))
    if name not in metrics:
        raise UserError(
            f"no metric is called {name!r}; the task reports {', '.join(metrics)}"
        )
    return float(metrics[name])
