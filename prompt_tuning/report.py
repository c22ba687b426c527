# SPDX-License-Identifier: Apache-2.0
"""What a run tells: progress bar, metrics.jsonl, TensorBoard events, messages."""

import contextlib
import json
import pathlib
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, Self

import numpy as np
import rich.console
import rich.progress
import rich.table

from prompt_tuning import processes, trees
from prompt_tuning.errors import printable
from prompt_tuning.types import Params

METRICS_FILE, RESULTS_FILE = "metrics.jsonl", "results.json"
CONFIG_FILE, TENSORBOARD = "config.gin", "tensorboard"
# What is done for longer is said where no terminal shows it, and again as often.
SAY_AFTER, SAY_EVERY = 5, 30  # seconds
# The progress line shows the loss and as much as fits of these records, in this order.
_FIRST, _SPLITS = "loss", ("validation", "train", "pace")
_NOT_SHOWN = ("grad_norm", "learning_rate")
# What it needs beside these values: steps, a bar, the time left.
_LEAST_BAR, _OTHER_COLUMNS = 10, 40  # characters
console = rich.console.Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """Prints a line to standard error, above any progress bar; in process 0 alone."""
    if processes.is_first():
        console.print(printable(message), soft_wrap=True, markup=False)


@contextlib.contextmanager
def doing(what: str, after: float = SAY_AFTER) -> Iterator[None]:
    """Says what takes so long, for how long it has been, and how long it took.

    A terminal shows it at once; elsewhere there is a line for what takes longer than
    ``after`` seconds, and one every `SAY_EVERY`.
    """
    started, done = time.monotonic(), threading.Event()
    seconds = lambda: time.monotonic() - started

    def remind() -> None:
        wait = after
        while not done.wait(wait):
            say(f"{what}: {seconds():.0f} s")
            wait = SAY_EVERY

    try:
        if console.is_terminal and processes.is_first():
            with console.status(f"{what} ..."):
                yield
        else:
            threading.Thread(target=remind, daemon=True).start()
            yield
    finally:
        done.set()
    if seconds() >= after:
        say(f"{what}: done after {seconds():.0f} s")


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


def mean_per_token(metrics: Sequence[Mapping[str, np.ndarray]], name: str) -> float:
    """What steps summed up over their target tokens, for each of these."""
    tokens = max(float(sum(m["weight"] for m in metrics)), 1.0)
    return float(sum(m[name] for m in metrics)) / tokens


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's values by the names that they have in TensorBoard and other trackers."""
    whose = record.get("member", "")
    return {
        "/".join(filter(None, (record["split"], name, whose))): value
        for name, value in record.items()
        if name not in ("split", "step", "member")
    }


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
        also: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        """Goes on from step ``first`` of ``steps``; ``members`` are those of the run.

        ``also`` is called with each record once it is written.
        """
        self._also = also
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
                str(self._path.parent / TENSORBOARD), purge_step=first + 1
            )
            config = self._path.with_name(CONFIG_FILE)
            if config.exists():
                # As a block of Markdown's, which keeps the lines.
                text = config.read_text(encoding="utf-8")
                self._events.add_text("config", textwrap.indent(text, "    "), first)
        show = not quiet and (console.is_terminal or sys.stderr.isatty())
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(
                None, table_column=rich.table.Column(ratio=1, min_width=_LEAST_BAR)
            ),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            rich.progress.TextColumn("left"),
            console=console,
            disable=not show,
            expand=True,
        )
        self._says, self._shows = not quiet, show
        self._task = self._bar.add_task("", total=steps, completed=first)
        self._shown: dict[tuple[str, str], dict[str, float]] = {}  # by split, member

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()
        if self._events is not None:
            self._events.close()

    def doing(self, what: str) -> None:
        """Says what the next steps wait for."""
        self._bar.update(self._task, description=what)
        if self._says and not self._shows:
            say(f"{what} ...")

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
        values = {
            "loss": mean_per_token(metrics, "token_loss"),
            "token_accuracy": mean_per_token(metrics, "correct"),
            "grad_norm": float(np.mean([m["grad_norm"] for m in metrics])),
        }
        if learning_rate is not None:
            values["learning_rate"] = learning_rate
        self._write("train", step, values, member)
        return values["loss"]

    def validation(self, step: int, member: str, metrics: Mapping[str, float]) -> None:
        """Records an evaluation of a member."""
        self._write("validation", step, metrics, member)
        if self._says:
            losses = self._shown.get(("train", member), {})
            shown = {**metrics, **{k: losses[k] for k in (_FIRST,) if k in losses}}
            text = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
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
        self._shown.setdefault((split, member), {}).update(shown)
        self._bar.update(self._task, completed=step, description=self._description())
        if self._path is not None and self._events is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            for name, value in scalars(record).items():
                self._events.add_scalar(name, value, step)
        if self._also is not None:
            self._also(record)

    def _description(self) -> str:
        """The newest values that fit; of several members their means."""
        found: dict[tuple[int, str], list[float]] = {}
        for (split, _), values in self._shown.items():
            for name, value in values.items():
                place = 0 if name == _FIRST else 1 + _SPLITS.index(split)
                found.setdefault((place, name), []).append(value)
        text = ""
        for key in sorted(found, key=lambda key: key[0]):
            more = f"{text} {key[1]} {np.mean(found[key]):.3f}".strip()
            if len(more) <= console.width - _OTHER_COLUMNS:
                text = more
        return text


def hyperparameters(
    model_dir: pathlib.Path,
    member: str,
    values: Mapping[str, Any],
    found: Mapping[str, float],
    step: int,
) -> None:
    """Tells TensorBoard what a member was tuned with, and what it gave.

    Args:
      model_dir: folder of the run.
      member: its name.
      values: by name; what is no number is shown as a text.
      found: metrics and the loss, by name.
      step: the step that they are of.
    """
    import tensorboardX

    shown = {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in values.items()
    }
    folder = str(pathlib.Path(model_dir) / TENSORBOARD)
    with tensorboardX.SummaryWriter(folder) as events:
        events.add_hparams(shown, dict(found), name=member, global_step=step)


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
