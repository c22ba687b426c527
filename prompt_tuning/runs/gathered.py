# SPDX-License-Identifier: Apache-2.0
"""The runs, evaluations and experiments of folders, for those who set them side by side.

Everything is read as data, and may come from anywhere: what is not of the kind that it
ought to be counts as not there.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning import files, report
from prompt_tuning.data import rows
from prompt_tuning.errors import UserError
from prompt_tuning.runs import seed_summary

PREDICTIONS_FILE = "predictions.jsonl"
# Folders below one that is named, which are looked into for runs.
DEEPEST = 4
# Folders of a run that hold none.
_NO_RUNS = ("checkpoints", "best", "prompts", "model", report.TENSORBOARD)

Facts = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """A folder that says something.

    Attributes:
      name: by which people know it: its path.
      folder: its path.
      results: its ``results.json`` or ``experiment.json``.
    """

    name: str
    folder: pathlib.Path
    results: Facts


@dataclasses.dataclass(frozen=True)
class Run(Found):
    """A MODEL_DIR of ``train``.

    Attributes:
      records: its ``metrics.jsonl``; a damaged line ends them.
      config: its ``config.gin``, or None.
    """

    records: Sequence[Facts]
    config: str | None

    @property
    def members(self) -> list[Facts]:
        """What it says of each of its prompts or models."""
        return mappings(self.results.get("members"))


@dataclasses.dataclass(frozen=True)
class Evaluation(Found):
    """What ``eval`` left.

    Attributes:
      predictions: its rows.
    """

    predictions: Sequence[Facts]


@dataclasses.dataclass(frozen=True)
class Experiment(Found):
    """What ``experiment`` left; its runs are found as runs."""

    @property
    def rows(self) -> list[Facts]:
        """What it says of each of its cells."""
        return mappings(self.results.get("rows"))


def gather(folders: Sequence[files.Path]) -> list[Found]:
    """What is in folders and below them, in the order of the folders and their paths.

    Raises:
      UserError: a folder is none or holds nothing of the kind, or a file is damaged.
    """
    found: dict[str, Found] = {}
    for given in folders:
        folder = pathlib.Path(given)
        if not folder.is_dir():
            raise UserError(f"{given} is no folder: give a MODEL_DIR or one above it")
        inside = list(_below(folder, DEEPEST))
        if not inside:
            raise UserError(
                f"{given} holds no run, evaluation or experiment: give a MODEL_DIR of "
                "train, an EVAL_OUTPUT_DIR, the folder of an experiment, or one above"
            )
        for each in inside:
            # One that lies in two of the folders is shown once.
            found.setdefault(os.path.realpath(each.folder), each)
    return list(found.values())


def _below(folder: pathlib.Path, depth: int) -> Iterator[Found]:
    if (found := _of(folder)) is not None:
        yield found
    if not depth:
        return
    try:
        inside = sorted(each for each in folder.iterdir() if each.is_dir())
    except OSError as error:
        raise UserError(f"cannot read {folder}: {files.first_line(error)}") from error
    for each in inside:
        # A link may lead anywhere, and in a circle.
        if each.name not in _NO_RUNS and not each.is_symlink():
            yield from _below(each, depth - 1)


def _of(folder: pathlib.Path) -> Found | None:
    name = str(folder)
    if (folder / seed_summary.FILE).is_file():
        return Experiment(name, folder, files.read_json(folder / seed_summary.FILE))
    if not (folder / report.RESULTS_FILE).is_file():
        return None
    results = files.read_json(folder / report.RESULTS_FILE)
    if "members" in results:
        records = [x for x in report.read_metrics(folder) if isinstance(x, dict)]
        return Run(name, folder, results, records, _text(folder / report.CONFIG_FILE))
    if isinstance(results.get("metrics"), dict) and "split" in results:
        path = folder / PREDICTIONS_FILE
        lines = rows.read(path) if path.is_file() else ()
        return Evaluation(name, folder, results, [line.values for line in lines])
    return None


def _text(path: pathlib.Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {files.first_line(error)}") from error


def mapping(value: Any) -> Facts:
    """A value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[Facts]:
    """The objects of a JSON list."""
    return [x for x in value if isinstance(x, dict)] if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """A value if it is a number of JSON's, else None."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known else None
