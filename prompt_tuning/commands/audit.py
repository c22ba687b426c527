# SPDX-License-Identifier: Apache-2.0
"""``audit``: whether prompts treat groups of rows alike, with an exit code for CI."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.table
import rich.text

from prompt_tuning import files
from prompt_tuning.checkpoints import base_models, prompt_formats
from prompt_tuning.checkpoints.prompt_formats import Saved
from prompt_tuning.data import fairness
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.data.word_swaps import Swaps
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError, printable
from prompt_tuning.inference import audits
from prompt_tuning.inference.audits import Sides
from prompt_tuning.inference.encoding import TEXT
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore, names_of
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.types import (
    ActivationDtype,
    BatchSize,
    NonNegativeFloat,
    NonNegativeInt,
    TokenLength,
    WeightDtype,
)

# What the file is called among the splits of its task.
_SPLIT = "audit"


class UnfairError(UserError):
    """A figure of an audit is over its threshold."""

    exit_code = 1


def audit(
    *,
    config: T5Config,
    initial_checkpoint_path: str,
    prompt_files: Sequence[str] = (),
    input_file: str | None = None,
    columns: Sequence[str] | None = None,
    group_column: str | None = None,
    target_column: str = "label",
    label_names: Mapping[Any, str] | Sequence[str] | None = None,
    positive_label: str | None = None,
    swap_file: str | None = None,
    max_gap: NonNegativeFloat | Mapping[str, NonNegativeFloat] | None = None,
    max_changed: NonNegativeFloat | None = None,
    bootstrap_samples: NonNegativeInt = 1000,
    output_file: str | None = None,
    batch_size: BatchSize = 64,
    max_input_length: TokenLength = 1024,
    frozen_dtype: WeightDtype = "auto",
    activation_dtype: ActivationDtype = "auto",
    partitioner: Partitioner | None = None,
    force: bool = False,
) -> None:
    """Compares what prompts answer to groups of rows, and to rows with words exchanged.

    Args:
      config: sizes of the model.
      initial_checkpoint_path: the base model, or ``embedded:NAME``.
      prompt_files: files of prompts that answer with labels; each is looked at alone.
      input_file: a table or JSONL with the columns of their templates.
      columns: names of a table's columns, where its first line is a row already.
      group_column: the column that says which group a row belongs to.
      target_column: the column that holds the right answer.
      label_names: what the values of that column are called; None takes the prompt's
        labels.
      positive_label: the label that counts as positive; of two the second by default.
      swap_file: a table of two words a line, to be exchanged for one another.
      max_gap: most percentage points between two groups, for all of `fairness.FIGURES`
        or, as a dict, for some.
      max_changed: most percent of the rows with exchanged words whose answer changes.
      bootstrap_samples: how often rows are drawn for the 95 % intervals; 0 gives none.
      output_file: JSON of all that was found, with every answer that changed.
      batch_size: rows of a batch.
      max_input_length: longest input in tokens, its prompt included.
      frozen_dtype: dtype of the weights.
      activation_dtype: dtype of the computation.
      partitioner: how to spread over devices; by default a whole model on each.
      force: take a prompt that was tuned on another model or vocabulary.

    Raises:
      UserError: something is missing or does not fit; exit code 2.
      UnfairError: a figure is over its threshold; exit code 1.
    """
    if not prompt_files:
        raise UserError("no prompt to audit: give one or more files of prompts")
    if input_file is None:
        raise UserError("INPUT_FILE is not set: give a table or JSONL of rows")
    limits = _limits(max_gap, max_changed, group_column, swap_file)
    if output_file is not None:
        read = [*prompt_files, input_file, swap_file, initial_checkpoint_path]
        files.refuse_same(read, [output_file])
        files.replaceable_file(output_file)
    local = LocalTask(
        {_SPLIT: input_file}, None, target_column, label_names, columns=columns
    )
    rows = local.columns_of(_SPLIT)
    if not rows:
        raise UserError(f"{input_file} has no rows: give another INPUT_FILE")
    groups = None
    if group_column is not None:
        groups = fairness.groups_of(rows, group_column, input_file)
    swaps = None if swap_file is None else Swaps.read(swap_file)
    saved: dict[str, Saved] = {
        name: prompt_formats.load_with_slots(path)
        for path, name in zip(prompt_files, names_of(prompt_files), strict=True)
    }
    sides = {
        name: None if groups is None else _sides(local, one, groups, positive_label)
        for name, one in saved.items()
    }
    for side in sides.values():
        _check_limits(side, limits)
    base = base_models.load(
        config,
        initial_checkpoint_path,
        frozen_dtype=frozen_dtype,
        activation_dtype=activation_dtype,
        partitioner=partitioner,
    )
    room = max(1, sum(len(one.array) for one in saved.values()))
    store = PromptStore(base, room, force=force)
    engine = Engine(base, store, batch_sizes=(batch_size,), longest=max_input_length)
    for name, one in saved.items():
        store.add(name, one.array, one.card, slots=one.slots)
    found = {}
    for name, side in sides.items():
        try:
            found[name] = audits.audit(
                engine, name, rows, sides=side, swaps=swaps, samples=bootstrap_samples
            )
        except UserError as error:
            raise UserError(f"{input_file}: {error}") from error
    over = [
        {"prompt": name, "figure": figure, "value": value, "limit": limits[figure]}
        for name, one in found.items()
        for figure, value in _figures(one)
        if figure in limits and value > limits[figure]
    ]
    if output_file is not None:
        content = {"file": input_file, "prompts": found, "limits": limits, "over": over}
        files.write_json(output_file, content)
    console = rich.console.Console(highlight=False, markup=False)
    for name, one in found.items():
        console.print(*_tables(name, one), sep="\n")
    if over:
        told = ", ".join(
            f"{each['figure']} of {each['prompt']} {each['value']:.1f} > "
            f"{each['limit']:g}"
            for each in over
        )
        raise UnfairError(f"over the threshold: {told}")


def _limits(
    max_gap: float | Mapping[str, float] | None,
    max_changed: float | None,
    group_column: str | None,
    swap_file: str | None,
) -> dict[str, float]:
    """The thresholds by figure; that of the counterfactual test is ``changed``."""
    if group_column is None and swap_file is None:
        raise UserError(
            "nothing to look for: name a GROUP_COLUMN, a SWAP_FILE of words, or both"
        )
    if group_column is None and max_gap is not None:
        raise UserError("MAX_GAP is of groups: name their GROUP_COLUMN")
    if swap_file is None and max_changed is not None:
        raise UserError("MAX_CHANGED is of exchanged words: give their SWAP_FILE")
    gaps: dict[str, float] = {}
    if isinstance(max_gap, Mapping):
        gaps = dict(max_gap)
    elif max_gap is not None:
        gaps = dict.fromkeys(fairness.FIGURES, max_gap)
    for figure in gaps:
        if figure not in fairness.FIGURES:
            raise UserError(
                f"MAX_GAP has {figure!r}: choose from {', '.join(fairness.FIGURES)}"
            )
    changed = {} if max_changed is None else {audits.CHANGED: max_changed}
    return {**gaps, **changed}


def _sides(
    local: LocalTask, prompt: Saved, groups: Sequence[str], positive: str | None
) -> Sides:
    """The targets of the file's rows as this prompt's labels."""
    task = local.as_tuned(prompt.card)
    if task.template is None:
        task = dataclasses.replace(task, template=f"{{{TEXT}}}")
    positive = fairness.positive_of(task.labels, positive)
    _, targets = task.read(_SPLIT)
    return Sides(targets, groups, positive)


def _check_limits(sides: Sides | None, limits: Mapping[str, float]) -> None:
    """Refuses a threshold on a figure that too few groups have."""
    if sides is None or fairness.TRUE_POSITIVE_RATE not in limits:
        return
    pairs = zip(sides.groups, sides.targets, strict=True)
    having = {group for group, target in pairs if target == sides.positive}
    if missing := sorted(set(sides.groups) - having):
        raise UserError(
            f"group {missing[0]!r} has no row whose target is {sides.positive!r}, so it "
            "has no true_positive_rate: give such rows, or a MAX_GAP of other figures, "
            "such as {'accuracy': 10}"
        )


def _figures(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The figures that thresholds are of."""
    for figure, gap in found.get("gaps", {}).items():
        if gap is not None:
            yield figure, gap["gap"]
    if "counterfactual" in found:
        yield audits.CHANGED, found["counterfactual"]["percent"]


def _tables(
    name: str, found: Mapping[str, Any]
) -> Iterator[rich.console.RenderableType]:
    """What people read of one prompt."""
    yield _text(f"{name}: {found['rows']} rows")
    if "groups" in found:
        table = rich.table.Table(box=None, pad_edge=False)
        for column in ("group", "rows", *fairness.FIGURES):
            table.add_column(column.replace("_", " "), overflow="fold")
        for group, values in found["groups"].items():
            ends = values.get("intervals", {})
            cells = (_cell(values[k], ends.get(k)) for k in fairness.FIGURES)
            table.add_row(_text(group), str(values["rows"]), *cells)
        gaps = [found["gaps"][figure] for figure in fairness.FIGURES]
        cells = (_cell(gap and gap["gap"], gap and gap.get("interval")) for gap in gaps)
        table.add_row("gap", "", *cells)
        yield table
        yield _text(f"positive is the answer {found['positive']!r}; in percent")
    if "counterfactual" in found:
        test = found["counterfactual"]
        share = _cell(test["percent"], test.get("interval"))
        yield _text(
            f"words exchanged in {test['rows']} rows: {test[audits.CHANGED]} answers "
            f"changed, {share} percent"
        )
        for one, others in test["from_to"].items():
            for other, count in others.items():
                if one != other:
                    yield _text(f"  {one} -> {other}: {count}")


def _cell(value: float | None, ends: Sequence[float] | None) -> str:
    """A figure with its interval; a group may lack it."""
    if value is None:
        return "none"
    return f"{value:.1f}" + (f" ({ends[0]:.1f} to {ends[1]:.1f})" if ends else "")


def _text(value: str) -> rich.text.Text:
    # Names come out of files; a terminal would obey what they hold.
    return rich.text.Text(printable(value))
