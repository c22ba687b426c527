# SPDX-License-Identifier: Apache-2.0
"""What a run tells: progress bar, metrics.jsonl, TensorBoard events, messages."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Self

import numpy as np
import rich.console
import rich.progress

from prompt_tuning import processes, trees
from prompt_tuning.errors import printable
from prompt_tuning.types import Params

METRICS_FILE, RESULTS_FILE = "metrics.jsonl", "results.json"
# What a record holds and the progress line has no room for.
_NOT_SHOWN = ("grad_norm", "learning_rate")
console = rich.console.Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """Prints a line to standard error, above any progress bar; in process 0 alone."""
    if processes.is_first():
        console.print(printable(message), soft_wrap=True, markup=False)


def parameter_counts(tuned: Params, frozen: Params) -> None:
    """Prints how many parameters are tuned and frozen, and the tuned share."""
    num_tuned, num_frozen = trees.count(tuned), trees.count(frozen)
    share = num_tuned / (num_tuned + num_frozen)
    say(
        f"tuned {num_tuned:,} parameters, frozen {num_frozen:,}: "
        f"{100 * share:.5f} % of {num_tuned + num_frozen:,} are tuned"
    )


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    names = ("prompt-tuning", "jax", "flax", "optax")
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def read_metrics(model_dir: pathlib.Path) -> list[dict]:
    """The records of ``metrics.jsonl``, oldest first; a cut-off last line is left out."""
    path = pathlib.Path(model_dir) / METRICS_FILE
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


class Log:
    """Writes the records of a run; a context manager that owns the progress bar.

    A resumed run drops the records from beyond its first step, so that the file reads
    like that of an uninterrupted run. Of several processes the first alone reads and
    writes records and shows a bar.
    """

    def __init__(
        self,
        model_dir: pathlib.Path | None,
        steps: int,
        first: int,
        members: Sequence[str],
        *,
        quiet: bool,
    ):
        """Goes on from step ``first`` of ``steps``; ``members`` are those of the run."""
        self._several = len(members) > 1
        self._path = None
        self._events = None
        if not processes.is_first():
            model_dir, quiet = None, True
        if model_dir is not None:
            # Imported here: only runs that keep logs pay for it.
            import tensorboardX

            self._path = pathlib.Path(model_dir) / METRICS_FILE
            kept = [r for r in read_metrics(model_dir) if r["step"] <= first]
            text = "".join(json.dumps(record) + "\n" for record in kept)
            self._path.write_text(text)
            self._events = tensorboardX.SummaryWriter(
                str(self._path.parent / "tensorboard"), purge_step=first + 1
            )
        show = not quiet and (console.is_terminal or sys.stderr.isatty())
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=console,
            disable=not show,
        )
        self._plain = not show and not quiet
        self._task = self._bar.add_task("", total=steps, completed=first)
        self._shown: dict[str, dict[str, float]] = {}  # by member

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()
        if self._events is not None:
            self._events.close()

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def training(
        self,
        step: int,
        member: str,
        metrics: Sequence[Mapping[str, np.ndarray]],
        learning_rate: float | None = None,
    ) -> float:
        """Records the steps since the last call; returns the loss per target token.

        Args:
          step: the last of them.
          member: whose they are.
          metrics: of every step.
          learning_rate: of the last one.
        """
        weight = float(sum(m["weight"] for m in metrics))
        tokens = max(weight, 1.0)
        values = {
            "loss": float(sum(m["token_loss"] for m in metrics)) / tokens,
            "token_accuracy": float(sum(m["correct"] for m in metrics)) / tokens,
            "grad_norm": float(np.mean([m["grad_norm"] for m in metrics])),
        }
        if learning_rate is not None:
            values["learning_rate"] = learning_rate
        self._write("train", step, values, member)
        return values["loss"]

    def validation(self, step: int, member: str, metrics: Mapping[str, float]) -> None:
        """Records an evaluation of a member."""
        self._write("validation", step, metrics, member)
        if self._plain:
            values = self._shown[member].items()
            text = ", ".join(f"{name} {value:.4f}" for name, value in values)
            say(f"step {step}{f', {member}' if self._several else ''}: {text}")

    def pace(self, step: int, values: Mapping[str, float]) -> None:
        """Records `prefetch.Pace`, apart from what a repeated run gives again."""
        if values:
            self._write("pace", step, values)

    def _write(
        self, split: str, step: int, values: Mapping[str, float], member: str = ""
    ) -> None:
        """Writes a record of a member, or (without one) of the whole run."""
        whose = {"member": member} if member else {}
        record = {"split": split, "step": step, **whose, **values}
        shown = {k: float(v) for k, v in values.items() if k not in _NOT_SHOWN}
        self._shown.setdefault(member, {}).update(shown)
        self._bar.update(self._task, completed=step, description=self._description())
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            for name, value in values.items():
                tag = "/".join(filter(None, (split, name, member)))
                self._events.add_scalar(tag, value, step)

    def _description(self) -> str:
        """The newest values; of several members their means."""
        found: dict[str, list[float]] = {}
        for values in self._shown.values():
            for name, value in values.items():
                found.setdefault(name, []).append(value)
        return " ".join(f"{k} {np.mean(v):.3f}" for k, v in found.items())


@contextlib.contextmanager
def counting(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar over ``total`` equal pieces; yields what moves it by one."""
    bar = rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        console=console,
        disable=not (console.is_terminal and processes.is_first()),
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
