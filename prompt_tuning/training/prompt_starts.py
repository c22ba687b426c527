# SPDX-License-Identifier: Apache-2.0
"""Initialisations by name, made concrete once a model and a vocabulary are known.

`initializers` takes arrays and ids; these take what a user writes down (labels, a text,
a path) and wait for the embedding table and the tokenizer.
"""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from prompt_tuning.checkpoints import prompt_formats
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.errors import UserError
from prompt_tuning.methods import initializers
from prompt_tuning.methods.initializers import PAPER_POPULATION
from prompt_tuning.types import Array, Initializer, PositiveFloat, PositiveInt

Encode = Callable[[str], Sequence[int]]  # text -> token ids, without EOS
# (embedding table [V, H], tokenizer, id of "unknown") -> initialiser
PromptInit = Callable[[Array, Encode, int], Initializer]


def named(text: str, labels: Sequence[str] | None) -> PromptInit:
    """An initialisation by a text, as lists of prompts name them.

    ``random``, ``sampled_vocab``, ``class_labels`` (with the task's own labels),
    ``text:TEXT`` or ``saved:PATH``.

    Raises:
      UserError: none is called so, or the task has no labels.
    """
    kind, _, argument = text.partition(":")
    if kind == "class_labels" and not labels:
        raise UserError("prompt_init 'class_labels' needs a task with a label set")
    known: dict[str, Callable[[], PromptInit]] = {
        "random": random_init,
        "sampled_vocab": sampled_vocab_init,
        "class_labels": lambda: _labels_init(labels or (), PAPER_POPULATION),
    }
    with_argument = {"text": text_init, "saved": saved_init}
    if argument and kind in with_argument:
        return with_argument[kind](argument)
    if text not in known:
        raise UserError(
            f"no prompt_init is called {text!r}: choose {', '.join(known)}, "
            "text:TEXT or saved:PATH"
        )
    return known[text]()


def random_init(scale: PositiveFloat = 0.5) -> PromptInit:
    """Uniform in ``[-scale, scale]``.

    Args:
      scale: the largest element; the paper's 0.5.
    """
    return lambda table, encode, unk_id: initializers.random_uniform(scale)


def sampled_vocab_init(population: PositiveInt = PAPER_POPULATION) -> PromptInit:
    """Rows of the ``population`` most common pieces.

    Args:
      population: how many pieces to draw from.
    """
    return lambda table, encode, unk_id: initializers.sampled_vocab(
        table, population=population
    )


def class_labels_init(
    labels: Sequence[str] | None = None, population: PositiveInt = PAPER_POPULATION
) -> PromptInit | str:
    """A row for each label, the rest sampled vocabulary.

    Without labels they are the task's own, so that it is made by its name later.

    Args:
      labels: class labels, the mean of its pieces each; None takes the task's.
      population: how many pieces to draw the rest from.
    """
    if labels is None:
        return "class_labels"
    if isinstance(labels, str):
        raise UserError(
            f"CLASS_LABELS must be a list of labels, e.g. ('{labels}', ...), not a text"
        )
    return _labels_init(labels, population)


def _labels_init(labels: Sequence[str], population: int) -> PromptInit:
    def make(table: Array, encode: Encode, unk_id: int) -> Initializer:
        ids = [_known_ids(label, encode, unk_id) for label in labels]
        fallback = initializers.sampled_vocab(table, population=population)
        return initializers.class_labels(table, ids, fallback)

    return make


def text_init(text: str, population: PositiveInt = PAPER_POPULATION) -> PromptInit:
    """The pieces of ``text``, the rest sampled vocabulary.

    Args:
      text: words that the prompt starts as.
      population: how many pieces to draw the rest from.
    """

    def make(table: Array, encode: Encode, unk_id: int) -> Initializer:
        fallback = initializers.sampled_vocab(table, population=population)
        ids = _known_ids(text, encode, unk_id)
        return initializers.from_text(table, ids, fallback)

    return make


def saved_init(path: str | pathlib.Path) -> PromptInit:
    """A saved prompt.

    Args:
      path: the prompt, in any format that `prompt_formats.load` reads.
    """

    return _Saved(path)


class _Saved:
    """The start at a saved prompt, which knows how long it is."""

    def __init__(self, path: str | pathlib.Path):
        self._path = path

    def __call__(self, table: Array, encode: Encode, unk_id: int) -> Initializer:
        return initializers.from_saved(self._rows())

    def __repr__(self) -> str:
        # As runs that stand on disk are known by (see `identity.describe_init`).
        return f"saved_init(path={self._path})"

    def __len__(self) -> int:
        return len(self._rows())

    def _rows(self) -> Array:  # [P, H]
        prompt, _ = prompt_formats.load(self._path)
        return prompt  # pyright: ignore[reportReturnType]


def length_of(init: PromptInit | str | None) -> int | None:
    """The length of a prompt that starts so, if that says it: a saved prompt's.

    Raises:
      UserError: the saved prompt cannot be read.
    """
    if isinstance(init, str) and init.startswith("saved:"):
        init = named(init, None)
    return len(init) if isinstance(init, _Saved) else None


def rows_of(path: str | pathlib.Path, base: BaseModel) -> np.ndarray:
    """The rows [P, H] of a saved prompt that a method mixes with its own.

    Rows of another model mean nothing to this one, whatever their width. A file without
    a card, as T5X writes them, cannot say which it is of, and is taken.

    Raises:
      UserError: there is no prompt, or its card names another model.
    """
    array, card = prompt_formats.load(path)
    of = card.get("base_model") or {}
    if of.get("fingerprint") not in (None, base.fingerprint):
        raise UserError(
            f"{path} was tuned on {of.get('name') or 'another model'} (fingerprint "
            f"{of['fingerprint'][:12]}), not on this model ({base.fingerprint[:12]}): "
            "give prompts of this one"
        )
    return array


def _known_ids(text: str, encode: Encode, unk_id: int) -> list[int]:
    ids = list(encode(text))
    if not ids or unk_id in ids:
        raise UserError(
            f"{text!r} has pieces that the model's vocabulary does not know; "
            "use other words"
        )
    return ids
