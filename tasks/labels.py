# SPDX-License-Identifier: Apache-2.0
"""The answers that a classification task allows, for rank classification.

A task's labels are the texts of its possible targets. They are kept beside seqio's
registry, which has no room for them.
"""

from collections.abc import Sequence

import seqio

from prompt_tuning.errors import UserError

_LABELS: dict[str, tuple[str, ...]] = {}


def register(task_name: str, labels: Sequence[str] | None) -> None:
    """Says which targets a task allows; None allows any, as if it was never said.

    Raises:
      UserError: fewer than two labels, or one twice.
    """
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
    if name not in seqio.MixtureRegistry.names():
        return _LABELS.get(name)
    tasks = seqio.get_subtasks(seqio.MixtureRegistry.get(name))
    found = {_LABELS.get(task.name) for task in tasks}
    return found.pop() if len(found) == 1 else None
