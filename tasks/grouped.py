# SPDX-License-Identifier: Apache-2.0
"""What a task's metrics compare, where that is more than two texts.

Postprocess functions (see `seqio.Task`) and metrics of rows that belong together.
"""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prompt_tuning.data.metrics import Metric

_DETERMINERS = re.compile(
    r"(?:an?|few|her|his|each|every|many|much|my|our|some|that|the|their|these|this|"
    r"those|which|whose|your)"
)


class Member(NamedTuple):
    """A target and the group of rows that it belongs to."""

    value: Any
    group: Any


def texts(values: np.ndarray) -> list[str]:
    """A row's bytes as texts."""
    return [value.decode(errors="replace").strip() for value in values.tolist()]


def all_answers(
    text: str, example: Mapping | None = None, is_target: bool = False, **_: Any
) -> str | list[str]:
    """A decoded answer; of a target, all answers that are right."""
    if is_target and example is not None:
        return texts(example["answers"])
    return text.strip()


def answers_in_group(
    text: str, example: Mapping | None = None, is_target: bool = False, **_: Any
) -> str | Member:
    """As `all_answers`, with the group of a target."""
    if is_target and example is not None:
        group = tuple(np.ravel(example["group"]).tolist())
        return Member(texts(example["answers"]), group)
    return text.strip()


def label_in_group(
    text: str, example: Mapping | None = None, is_target: bool = False, **_: Any
) -> str | Member:
    """A label, with the group of a target."""
    if is_target and example is not None:
        return Member(text.strip(), int(example["group"]))
    return text.strip()


def is_referent(
    text: str, example: Mapping | None = None, is_target: bool = False, **_: Any
) -> int:
    """WSC: the label of a target; whether an answer is the row's referent, 1 or 0.

    As T5 judges it: without case and determiners, one side's words are all among the
    other's. No answer is -1, which is never right.
    """
    if example is None or is_target:
        return int(example["label"]) if example is not None else -1
    given = _bare(text)
    wanted = _bare(np.asarray(example["targets_pretokenized"]).item().decode())
    if not given:
        return -1
    # "Bob" is not "Bob's hat".
    if ("'" in given) != ("'" in wanted):
        return 0
    given_words, wanted_words = set(given.split(" ")), set(wanted.split(" "))
    return int(given_words <= wanted_words or wanted_words <= given_words)


def _bare(text: str) -> str:
    words = text.strip().lower().split(" ")
    return " ".join(word for word in words if not _DETERMINERS.fullmatch(word))


def values(metric: Metric) -> Metric:
    """A metric over all rows of all groups."""

    def of_values(targets: Sequence[Member], predictions: Sequence) -> Mapping:
        return metric([target.value for target in targets], predictions)

    return of_values


def first_of_group(metric: Metric) -> Metric:
    """A metric over the first row of each group."""

    def of_first(targets: Sequence[Member], predictions: Sequence) -> Mapping:
        first: dict[Any, tuple] = {}
        for target, prediction in zip(targets, predictions, strict=True):
            first.setdefault(target.group, (target.value, prediction))
        return metric(*map(list, zip(*first.values(), strict=True)))

    return of_first


def whole_groups(targets: Sequence[Member], predictions: Sequence) -> dict[str, float]:
    """Percentage of groups whose rows are all right (MultiRC's exact match)."""
    groups: dict[Any, bool] = collections.defaultdict(lambda: True)
    for target, prediction in zip(targets, predictions, strict=True):
        groups[target.group] &= target.value == prediction
    return {"exact_match": 100.0 * float(np.mean(list(groups.values())))}
