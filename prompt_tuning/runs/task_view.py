# SPDX-License-Identifier: Apache-2.0
"""Registered tasks as people see them: listed, shown row by row, and checked."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from prompt_tuning.data import batching, examples, lint, reach
from prompt_tuning.data.feature_converter import cut
from prompt_tuning.data.lint import Finding, Row
from prompt_tuning.data.splits import TRAIN, VALIDATION
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.tasks import features, labels, registration

# Pieces of a name that make it a variant of another.
_BEFORE = (
    "t5_",
    "mini_",
    "mt5_",
    "byt5_",
    registration.TASKLESS,
    registration.TASK_INDEX,
)
_BEHIND = registration.EXAMPLES
# Where nobody says how long rows may be.
_ROOM = {"inputs": 512, "targets": 512}


@dataclasses.dataclass(frozen=True)
class Listed:
    """A line of the list.

    Attributes:
      name: of the task or mixture.
      vocabulary: what it is written in.
      splits: its splits.
      answers: the labels, or '' where answers are free text.
      metrics: names of its metrics' functions.
      parts: the tasks of a mixture.
    """

    name: str
    vocabulary: str
    splits: Sequence[str]
    answers: str
    metrics: Sequence[str]
    parts: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Shown:
    """An example as the model is given it.

    Attributes:
      split: its split.
      inputs: text with the prompt's pieces in their places, as ``[prompt 0:100]``.
      target: likewise.
      input_tokens: positions of the encoder, those of the prompt included.
      target_tokens: positions of the decoder.
    """

    split: str
    inputs: str
    target: str
    input_tokens: int
    target_tokens: int


def parted(name: str) -> tuple[str, str, str]:
    """What stands before a task's own name, that name, and what stands behind it.

    >>> parted("mini_taskless_glue_sst2_v200_examples")
    ('mini_taskless_', 'glue_sst2_v200', '_examples')
    """
    before, rest = "", name
    while found := next((x for x in _BEFORE if rest.startswith(x)), None):
        before, rest = before + found, rest.removeprefix(found)
    behind = _BEHIND if rest.endswith(_BEHIND) else ""
    return before, rest.removesuffix(behind), behind


def names(filters: Sequence[str]) -> list[str]:
    """Registered names that hold all of the texts ``filters``.

    A name alone is that task. Variants are left out unless a filter names their piece.

    Raises:
      UserError: there is none.
    """
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if len(filters) == 1 and filters[0] in known:
        return [filters[0]]
    found = [
        name
        for name in sorted(known)
        if all(text in name for text in filters) and _is_meant(name, filters)
    ]
    if not found:
        # Says which names are near, or that one is a variant's.
        hidden = [name for name in sorted(known) if all(x in name for x in filters)]
        if hidden:
            return hidden
        examples.find(" ".join(filters))
    return found


def _is_meant(name: str, filters: Sequence[str]) -> bool:
    before, _, behind = parted(name)
    pieces = [*(x for x in _BEFORE if x in before), *([behind] if behind else [])]
    return all(any(piece.strip("_") in text for text in filters) for piece in pieces)


def listed(name: str) -> Listed:
    """What is known of a task without reading its data."""
    provider = seqio.get_mixture_or_task(name)
    tasks = seqio.get_subtasks(provider)
    found = labels.label_set(name)
    metrics = [_name_of(metric) for task in tasks for metric in task.metric_fns]
    return Listed(
        name,
        features.name_of(provider.output_features["targets"].vocabulary),
        sorted({split for task in tasks for split in task.splits}, key=_place),
        "" if found is None else ", ".join(found),
        list(dict.fromkeys(metrics)),
        [task.name for task in tasks] if len(tasks) > 1 else [],
    )


def _place(split: str) -> tuple[int, str]:
    usual = (TRAIN, VALIDATION, "test")
    return (usual.index(split) if split in usual else len(usual), split)


def _name_of(metric: Any) -> str:
    function = getattr(metric, "func", metric)
    return str(getattr(function, "__name__", type(function).__name__))


def shown(
    name: str,
    split: str | None,
    count: int,
    prompt_length: int,
    placement: str,
    lengths: Mapping[str, int] | None,
) -> Iterator[Shown]:
    """The first examples of a split as the model is given them.

    Args:
      name: of a task or mixture.
      split: which split; None takes the first that there is.
      count: how many.
      prompt_length: positions of the prompt that stands in them.
      placement: where, unless the task says it.
      lengths: ``TASK_FEATURE_LENGTHS``; None cuts nothing.

    Raises:
      UserError: the data or the vocabulary cannot be read, or there is no such split.
    """
    provider = examples.find(name)
    room = lengths or {"inputs": 512, "targets": 512}
    vocabulary = provider.output_features["inputs"].vocabulary
    size = examples.vocab_size(vocabulary, name)
    prompts = (Prompt(name, prompt_length),) if prompt_length else ()
    converter = batching.make_converter(
        provider, room, prompts, size, placement, pack=False
    )
    chosen = split or _first(provider)
    for row in examples.examples(provider, chosen, room).take(count):
        inputs = row.get("inputs", np.zeros(0, np.int32))
        if lengths is not None:
            inputs = cut(inputs, lengths["inputs"], vocabulary.eos_id)  # pyright: ignore[reportArgumentType]
        ids = converter.insert(inputs, row).numpy().tolist()
        target = row["targets"].numpy().tolist()
        yield Shown(
            chosen,
            " ".join(_pieces(ids, vocabulary, size)),
            vocabulary.decode(target),
            len(ids),
            len(target),
        )


def _first(provider: examples.Provider) -> str:
    splits = list(provider.splits)
    return TRAIN if TRAIN in splits else str(splits[0])


def _pieces(ids: Sequence[int], vocabulary: Any, size: int) -> Iterator[str]:
    for virtual, run in itertools.groupby(ids, lambda i: i >= size):
        piece = list(run)
        if virtual:
            yield f"[prompt {piece[0] - size}:{piece[-1] - size + 1}]"
        elif text := vocabulary.decode(piece):  # EOS alone is no text.
            yield text


def checked(
    name: str, most: int, lengths: Mapping[str, int] | None
) -> tuple[dict[str, int], list[Finding]]:
    """The rows that were looked at by split, and what is wrong with a task.

    Args:
      name: of a task or mixture.
      most: rows that are looked at of each split.
      lengths: ``TASK_FEATURE_LENGTHS``, if they are known.

    Raises:
      UserError: the data or the vocabulary cannot be read.
    """
    provider = examples.find(name)
    vocabulary = provider.output_features["targets"].vocabulary
    examples.vocab_size(vocabulary, name)
    known = labels.label_set(name)
    found = [*of_variants(name), *lint.of_labels(known, vocabulary, lengths)]
    splits: dict[str, list[Row]] = {}
    for task in seqio.get_subtasks(provider):
        for split in task.splits:
            rows = examples.texts(task, split, lengths or _ROOM, most)
            splits.setdefault(split, []).extend(Row(*row) for row in rows)
    found += lint.of_rows(splits, known, lengths)
    for split, rows in splits.items():
        texts, targets = [[row.inputs] for row in rows], [row.target for row in rows]
        for message in reach.messages(texts, targets, vocabulary):
            found.append(Finding(lint.WARNING, f"{split}: {message}"))
    return {split: len(rows) for split, rows in splits.items()}, found


def of_variants(name: str) -> Iterator[Finding]:
    """Whether a task is what its name says, beside the others of its own name.

    Args:
      name: of a registered task or mixture; no row of it is read.
    """
    before, own, behind = parted(name)
    provider = seqio.get_mixture_or_task(name)
    for task in seqio.get_subtasks(provider):
        if task is not provider and parted(task.name)[0] != before:
            yield Finding(
                lint.FAULT, f"its part {task.name} is of another kind than the mixture"
            )
    plain = f"{before.removesuffix(registration.TASKLESS)}{own}{behind}"
    if before.endswith(registration.TASKLESS) and plain in seqio.TaskRegistry.names():
        other = seqio.TaskRegistry.get(plain)
        if isinstance(provider, seqio.Task):
            if labels.label_set(plain) != labels.label_set(name):
                yield Finding(lint.FAULT, f"its labels are not those of {plain}")
            if labels.template(name) == labels.template(plain) is not None:
                yield Finding(lint.FAULT, f"its texts are those of {plain}")
            if set(other.splits) != set(provider.splits):
                yield Finding(lint.FAULT, f"its splits are not those of {plain}")
    if not any(task.metric_fns for task in seqio.get_subtasks(provider)):
        yield Finding(lint.WARNING, "it has no metric: EVAL_SPLIT=None")
    for task in seqio.get_subtasks(provider):
        for function in (task.postprocess_fn, *task.metric_fns):
            if not callable(function):
                yield Finding(lint.FAULT, f"{task.name}: {function!r} is no function")
