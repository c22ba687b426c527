# SPDX-License-Identifier: Apache-2.0
"""Rows that were found sound: all that can be wrong with a row shows before it runs."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.data import reach
from prompt_tuning.data.label_sets import LabelSet
from prompt_tuning.decoding.label_trie import power_of_two
from prompt_tuning.errors import UserError
from prompt_tuning.inference import ensembles
from prompt_tuning.inference.ensembles import Answer
from prompt_tuning.inference.store import PromptStore, StoredPrompt

# Labels, and tokens of a label: the table of labels that a compiled program takes.
LabelShape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Item:
    """A row for one prompt.

    Attributes:
      prompt: the prompt.
      ids: ``[T]``; position i of the prompt is -(i + 1).
      labels: what is ranked, or None to decode free text.
      unknown: share of the text's pieces that the vocabulary does not know.
    """

    prompt: StoredPrompt
    ids: np.ndarray
    labels: LabelSet | None
    unknown: float = 0.0

    @property
    def label_shape(self) -> LabelShape | None:
        """The shape of the table that the labels fit in."""
        return None if self.labels is None else label_shape(self.labels)


@dataclasses.dataclass(frozen=True)
class Request:
    """A row that was found sound.

    Attributes:
      items: one for each prompt that the row names.
      combine: a rule of `ensembles.RULES`, or None where the row names one prompt.
      calibrate: whether label scores are calibrated.
    """

    items: tuple[Item, ...]
    combine: str | None = None
    calibrate: bool = False

    def result(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """What users are told, from the answer to each item.

        Returns:
          ``prompt`` as the row has it, ``answer`` and, with labels, ``scores``;
          ``warning`` where most of the text is unknown to the vocabulary. Of several
          prompts also ``combine`` and ``answers``, those of each prompt.
        """
        names = [item.prompt.name for item in self.items]
        if self.combine is None:
            return {"prompt": names[0], **answers[0].as_dict(), **self._warning}
        combined = ensembles.RULES[self.combine](answers, _metrics(self.items))
        each = [
            {"prompt": name, **answer.as_dict()}
            for name, answer in zip(names, answers, strict=True)
        ]
        return {
            "prompt": names,
            **combined.as_dict(),
            "combine": self.combine,
            "answers": each,
            **self._warning,
        }

    @property
    def _warning(self) -> dict[str, str]:
        share = max(item.unknown for item in self.items)
        if share < reach.MOSTLY:
            return {}
        return {
            "warning": f"{share:.0%} of the text's pieces are unknown to the vocabulary"
        }


def prepare(store: PromptStore, row: Mapping[str, Any], longest: int) -> Request:
    """Checks and encodes a row; see `engine.Engine.prepare`."""
    names = row.get("prompt")
    several = isinstance(names, Sequence) and not isinstance(names, str)
    given: Any = names if several else [names]
    listed = [name for name in given if isinstance(name, str)]
    if not listed or len(listed) < len(given):
        raise UserError("it names no prompt: give 'prompt' a name or a list of names")
    if len(set(listed)) < len(listed):
        raise UserError("it names a prompt twice")
    prompts = [store.get(name) for name in listed]
    _check_one_task(prompts)
    columns = {column for prompt in prompts for column in prompt.encoding.columns}
    options = {key: value for key, value in row.items() if key not in columns}
    items = tuple(
        _item(prompt, row, options.get("labels"), longest) for prompt in prompts
    )
    calibrate = options.get("calibrate", False)
    if not isinstance(calibrate, bool):
        raise UserError("'calibrate' must be true or false")
    if calibrate and any(item.labels is None for item in items):
        raise UserError("free text cannot be calibrated: give the row 'labels'")
    if not several:
        if "combine" in options:
            raise UserError("'combine' needs several prompts: give 'prompt' a list")
        return Request(items, None, calibrate)
    if len({item.labels and frozenset(item.labels.names) for item in items}) > 1:
        raise UserError(
            "the prompts do not have the same labels, so they answer different "
            "questions: give the row 'labels', or name prompts of one task"
        )
    rule = options.get("combine", "vote")
    if not isinstance(rule, str) or rule not in ensembles.RULES:
        raise UserError(f"'combine' must be one of {', '.join(ensembles.RULES)}")
    # Whatever a rule refuses depends on prompts and labels alone, so any answers show it.
    ensembles.RULES[rule]([_any_answer(item) for item in items], _metrics(items))
    return Request(items, rule, calibrate)


def _check_one_task(prompts: Sequence[StoredPrompt]) -> None:
    """Refuses an ensemble of prompts that were tuned for different questions."""
    tasks = {prompt.card.get("task"): prompt.name for prompt in prompts}
    tasks.pop(None, None)
    if len(tasks) > 1:
        found = ", ".join(f"{name} of {task}" for task, name in tasks.items())
        raise UserError(
            f"the prompts are of different tasks ({found}), so their answers cannot be "
            "combined: name prompts of one task"
        )


def label_shape(labels: LabelSet) -> LabelShape:
    """The numbers of labels and of tokens, each rounded up to a power of two."""
    count, tokens = labels.tokens.shape
    return power_of_two(count, 2), power_of_two(tokens, 2)


def _item(
    prompt: StoredPrompt, row: Mapping[str, Any], labels: Any, longest: int
) -> Item:
    encoding = prompt.encoding
    chosen = encoding.labels if labels is None else encoding.label_set(labels)
    ids = encoding.encode(row, longest)
    # Without the prompt's positions and EOS.
    text = ids[(ids >= 0) & (ids != encoding.vocabulary.eos_id)].tolist()
    unknown = reach.unknown_share(text, encoding.vocabulary)
    return Item(prompt, ids, chosen, unknown)


def _any_answer(item: Item) -> Answer:
    if item.labels is None:
        return Answer("")
    return ensembles.ranked(item.labels.names, np.zeros(len(item.labels.names)))


def _metrics(items: Iterable[Item]) -> list[float | None]:
    return [ensembles.validation_metric(item.prompt.card) for item in items]
