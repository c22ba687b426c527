# SPDX-License-Identifier: Apache-2.0
"""``tasks``: the registered tasks, what a model is given of them, and what is wrong."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import rich.console
import rich.padding
import rich.table
import rich.text

from prompt_tuning.checkpoints import base_models, formats
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.errors import UserError, printable
from prompt_tuning.types import (
    FeatureLengths,
    NonNegativeInt,
    PositiveInt,
    PromptLength,
)

if TYPE_CHECKING:  # It loads TensorFlow.
    from prompt_tuning.runs.task_view import Listed

# Characters of an example that are shown.
LONGEST = 2_000
# Tasks whose rows are shown or looked at in one command, lest a filter be forgotten.
MOST_TASKS = 20


def show_tasks(
    *,
    filters: Sequence[str] = (),
    mixture_or_task_name: str | None = None,
    mixture_or_task_module: str | None = None,
    local_task: LocalTask | None = None,
    initial_checkpoint_path: str | None = None,
    task_feature_lengths: FeatureLengths | None = None,
    preview: NonNegativeInt = 0,
    lint: bool = False,
    split: str | None = None,
    most_rows: PositiveInt = 10_000,
    prompt_length: PromptLength = 100,
    placement: str = "prepend",
) -> None:
    """Lists tasks, shows their first rows as the model is given them, and checks them.

    Args:
      filters: texts that a task's name holds, or the whole name of one.
      mixture_or_task_name: what the local files are called, or one task.
      mixture_or_task_module: imported to register tasks.
      local_task: files to register as a task.
      initial_checkpoint_path: a model, or ``embedded:NAME``, in whose vocabulary the
        files are written unless they name one.
      task_feature_lengths: text tokens of ``inputs`` and ``targets``, to cut and check.
      preview: how many rows to show of each task.
      lint: check the tasks; a fault ends the command with code 2.
      split: which split to show; None is the first.
      most_rows: rows of each split that are checked.
      prompt_length: positions of the prompt that is shown.
      placement: where it stands, unless the task says it.

    Raises:
      UserError: no task has such a name, its data cannot be read, or it has faults.
    """
    # They load TensorFlow.
    from prompt_tuning.data import examples
    from prompt_tuning.runs import task_view
    from prompt_tuning.tasks import local_file

    if local_task is not None:
        if mixture_or_task_name is None:
            raise UserError("MIXTURE_OR_TASK_NAME is not set: call the files' task so")
        if local_task.vocabulary is None and initial_checkpoint_path is not None:
            source = base_models.open_checkpoint(initial_checkpoint_path)
            if (found := formats.vocabulary(source.path)) is not None:
                local_task = dataclasses.replace(local_task, vocabulary=found.name)
        local_file.register_task(mixture_or_task_name, local_task)
    else:
        examples.load_module(mixture_or_task_module)
    if mixture_or_task_name is not None:
        filters = [*filters, mixture_or_task_name]
    names = task_view.names(filters)
    if (preview or lint) and len(names) > MOST_TASKS:
        raise UserError(
            f"{len(names)} tasks are meant: name fewer than {MOST_TASKS + 1} to look at "
            "their rows"
        )
    console = rich.console.Console(highlight=False, markup=False)
    _print_list(console, [task_view.listed(name) for name in names])
    faults = 0
    for name in names if preview or lint else ():
        console.print(rich.text.Text(f"\n{name}", style="bold"))
        if preview:
            rows = task_view.shown(
                name, split, preview, prompt_length, placement, task_feature_lengths
            )
            for row in rows:
                console.print(_example(row), soft_wrap=True)
        if lint:
            counts, found = task_view.checked(name, most_rows, task_feature_lengths)
            seen = ", ".join(f"{count} of {one}" for one, count in counts.items())
            console.print(f"looked at {seen}" if seen else "it has no splits")
            for finding in found:
                line = _text(f"{finding.level}: {finding.text}")
                console.print(line, soft_wrap=True)
            faults += sum(finding.level == "fault" for finding in found)
            if not found:
                console.print("nothing is wrong with it")
    if faults:
        were = "fault was" if faults == 1 else "faults were"
        raise UserError(f"{faults} {were} found: see above")


def _print_list(console: rich.console.Console, found: Sequence["Listed"]) -> None:
    """Prints a table, or, where that would cut words, two lines for each task."""
    lines = []
    for one in found:
        answers = one.answers or "text"
        line = [
            one.name,
            one.vocabulary,
            ", ".join(one.splits),
            f"{answers} ({len(one.parts)} tasks)" if one.parts else answers,
            ", ".join(one.metrics) or "none",
        ]
        lines.append([_text(cell) for cell in line])
    head = ("task", "vocabulary", "splits", "answers", "metrics")
    table = rich.table.Table(box=None, pad_edge=False)
    narrowest = 0
    for name, column in zip(head, zip(*lines, strict=True), strict=True):
        words = [word for cell in column for word in cell.plain.split(" ")]
        longest = max(map(len, [name, *words]))
        # A name is there to be copied.
        table.add_column(name, no_wrap=name == head[0], min_width=longest)
        narrowest += longest + 1
    if narrowest <= console.width:
        for line in lines:
            table.add_row(*line)
        console.print(table)
        return
    for line in lines:
        console.print(line[0], soft_wrap=True)
        pairs = zip(head[1:], line[1:], strict=True)
        said = "; ".join(f"{name}: {cell.plain}" for name, cell in pairs)
        console.print(rich.padding.Padding(said, (0, 0, 0, 2)))


def _example(row) -> rich.text.Text:
    inputs = row.inputs if len(row.inputs) <= LONGEST else f"{row.inputs[:LONGEST]}..."
    return _text(
        f"{row.split}: {inputs}\n  -> {row.target}\n"
        f"  {row.input_tokens} tokens with the prompt -> {row.target_tokens}"
    )


def _text(value: str) -> rich.text.Text:
    # Names and rows come from anywhere; a terminal would obey what they hold.
    return rich.text.Text("\n".join(printable(line) for line in value.split("\n")))
