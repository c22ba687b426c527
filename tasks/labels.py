# SPDX-License-Identifier: Apache-2.0
"""What a task's answers may be, and how its rows become texts.

A task's labels are the texts of its possible targets, for rank classification; its
template (see `data.template`) lets a prompt be given rows by their columns, as the task
was. They are kept beside seqio's registry, which has no room for them.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import seqio

from prompt_tuning.errors import UserError

Found = TypeVar("Found")
_LABELS: dict[str, tuple[str, ...]] = {}
_TEMPLATES: dict[str, str] = {}


def register(
    task_name: str, labels: Sequence[str] | None, template: str | None = None
) -> None:
    """Says which targets a task allows; None allows any, as if it was never said.

    Args:
      task_name: of a seqio task.
      labels: its targets.
      template: what its inputs are made of, if they are columns within a text.

    Raises:
      UserError: fewer than two labels, or one twice.
    """
    _TEMPLATES.pop(task_name, None)
    if template is not None:
        _TEMPLATES[task_name] = template
    if labels is None:
        _LABELS.pop(task_name, None)
        return
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise UserError(
            f"{task_name}: the labels {list(labels)} must be two or more different ones"
        )
    _LABELS[task_name] = tuple(labels)


def label_set(name: str) -> tuple[str, ...] | None:
    """The labels of a task, or of a mixture whose tasks share them; else None."""
    return _shared(_LABELS, name)


def template(name: str) -> str | None:
    """The template of a task, or of a mixture whose tasks share it; else None."""
    return _shared(_TEMPLATES, name)


def _shared(known: Mapping[str, Found], name: str) -> Found | None:
    if name not in seqio.MixtureRegistry.names():
        return known.get(name)
    tasks = seqio.get_subtasks(seqio.MixtureRegistry.get(name))
    found = {known.get(task.name) for task in tasks}
    return found.pop() if len(found) == 1 else None
