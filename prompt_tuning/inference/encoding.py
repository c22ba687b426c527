# SPDX-License-Identifier: Apache-2.0
"""Rows as users write them become encoder inputs, as the prompt's card describes it.

A row is a mapping such as ``{"text": "a fine film"}`` or ``{"premise": ...,
"hypothesis": ...}``. What becomes of it is what `PromptFeatureConverter` does in
training, less the cutting: position i of the prompt is -(i + 1) in what is returned,
since where a prompt lies in the network's table is decided later and may change.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.checkpoints import cards, prompt_file
from prompt_tuning.data import vocabularies
from prompt_tuning.data.label_sets import SUM, LabelSet, label_tokens
from prompt_tuning.data.rows import is_text, text_of
from prompt_tuning.data.template import WHOLE_PROMPT, Placement, Positions, Template
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.errors import UserError

# The name that a text has where the template has only one column, or there is none.
TEXT = "text"
# No piece of a vocabulary stands for more characters than this.
LONGEST_PIECE = 32


class Encoding:
    """How the rows of one prompt become token ids.

    Attributes:
      vocabulary: of inputs and answers.
      labels: the label set that the card names, or None where answers are free text.
      columns: names of what a row must have.
    """

    def __init__(
        self,
        card: Mapping[str, Any],
        length: int,
        vocab_size: int,
        vocabulary: Vocabulary | None = None,
    ):
        """Reads a prompt's card.

        Args:
          card: vocabulary, labels, the words that stand for them (``verbalizers``), how
            they are compared (``label_scores``), template and placement, all of them
            optional.
          length: positions of the prompt; 0 for a prompt that is all words.
          vocab_size: rows of the model's embedding table, V.
          vocabulary: of its rows; by default that of the card (see `vocabulary_of`).

        Raises:
          UserError: the vocabulary is not to be had, has changed or is too large for
            the model; the template or the placement is none; the template names
            positions that the prompt does not have; or a label is not in the
            vocabulary.
        """
        self.vocabulary = vocabulary or vocabulary_of(card, None)
        size = self.vocabulary.vocab_size
        if size > vocab_size:
            raise UserError(
                f"its vocabulary {self.vocabulary.name} has {size} ids, the model has "
                f"{vocab_size}; use the model that the prompt was tuned on"
            )
        template = card.get("template")
        self._template = Template.parse(template or f"{{{TEXT}}}")
        self._placement = Placement(card.get("placement") or "prepend")
        self._length = length
        self.columns = self._template.columns
        beyond = [i for i in _positions(self._template) if i >= length]
        if beyond:
            raise UserError(
                f"its template {template!r} names position {beyond[0]}, the prompt has "
                f"{length}; tune it again with the template it is used with"
            )
        self._label_scores = card.get("label_scores") or SUM
        labels = card.get("labels")
        words = card.get("verbalizers") or labels
        self.labels = None
        if labels is not None:
            # The words are ranked, and the labels that they stand for are the answers.
            ranked = self.label_set(words)
            self.labels = dataclasses.replace(ranked, names=tuple(labels))

    def label_set(self, labels: Any) -> LabelSet:
        """A label set in this vocabulary, compared as the card says.

        Raises:
          UserError: it is not a list of two or more different texts, holds more or
            longer ones than a card may, or one of them is not in the vocabulary.
        """
        texts = isinstance(labels, Sequence) and not isinstance(labels, str)
        if not texts or len(labels) < 2 or not all(is_text(x) for x in labels):
            raise UserError("labels must be a list of two or more texts")
        if len(labels) > cards.MOST_LABELS:
            raise UserError(f"{len(labels)} labels are more than {cards.MOST_LABELS}")
        if max(map(len, labels)) > cards.LONGEST_LABEL:
            raise UserError(
                f"a label has more than {cards.LONGEST_LABEL} characters: shorten it"
            )
        return _label_set(tuple(labels), self.vocabulary, self._label_scores)

    def encode(
        self, row: Mapping[str, Any], longest: int | None = None
    ) -> np.ndarray:  # [T]
        """Token ids of a row, EOS included; position i of the prompt is -(i + 1).

        Args:
          row: has a value for each column of the template; the only column of a
            template may also be called ``text``. Values that are no texts are written
            in JSON.
          longest: positions, those of the prompt included, that a row may have.

        Raises:
          UserError: a column is missing, all are empty, a value is no text of whole
            characters, or there are too many tokens.
        """
        values = {column: self._value(row, column) for column in self.columns}
        if not any(value.strip() for value in values.values()):
            raise UserError("the text is empty")
        size = self._template.size(values)
        if longest is not None and size > LONGEST_PIECE * longest:
            raise UserError(
                f"the text is {size} characters long; the model is given {longest} "
                "tokens at most, those of the prompt included: shorten it"
            )
        return self._encode(values, longest)

    def encode_same(self, value: str) -> np.ndarray:  # [T]
        """A row whose columns all hold ``value``, which may be empty."""
        return self._encode(dict.fromkeys(self.columns, value), None)

    def place(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:  # [N] -> [T]
        """Puts the prompt where neither template nor task did, and spells it out.

        Args:
          ids: text tokens, among which -(i + 1) is position i of the prompt and
            `WHOLE_PROMPT` is all of it.
        """
        marked = np.asarray(ids, np.int32)
        if not (marked < 0).any():
            at = {
                Placement.PREPEND: 0,
                Placement.AFTER_BOS: min(1, len(marked)),
                Placement.APPEND: len(marked),
            }[self._placement]
            marked = np.insert(marked, at, WHOLE_PROMPT)
        whole = np.flatnonzero(marked == WHOLE_PROMPT)
        if not len(whole):
            return marked
        before, after = marked[: whole[0]], marked[whole[0] + 1 :]
        every = -1 - np.arange(self._length, dtype=np.int32)
        return np.concatenate([before, every, after])

    def _encode(self, values: Mapping[str, str], longest: int | None) -> np.ndarray:
        ids = self._template.encode(values, self.vocabulary.encode)
        placed = self.place([*ids, self.vocabulary.eos_id])
        if longest is not None and len(placed) > longest:
            raise UserError(
                f"the text has {len(placed) - self._length} tokens and its prompt "
                f"{self._length}, together more than {longest}: shorten the text"
            )
        return placed

    def _value(self, row: Mapping[str, Any], column: str) -> str:
        value = row.get(column)
        if value is None and len(self.columns) == 1:
            value = row.get(TEXT)
        if value is None:
            raise UserError(
                f"there is no column {column!r}: the prompt's rows have "
                f"{', '.join(self.columns)}"
            )
        return text_of(value, column)


def _positions(template: Template) -> list[int]:
    """The positions of the prompt that a template names one by one."""
    pieces = [part.ids for part in template.parts if isinstance(part, Positions)]
    return [-i - 1 for ids in pieces for i in ids if i != WHOLE_PROMPT]


@functools.lru_cache(maxsize=1024)
def _label_set(
    labels: tuple[str, ...], vocabulary: Vocabulary, scores: str
) -> LabelSet:
    return LabelSet(labels, label_tokens(labels, vocabulary), scores)


def vocabulary_of(
    card: Mapping[str, Any],
    models: Vocabulary | None,
    *,
    force: bool = False,
    load: Callable[[str], Vocabulary] = vocabularies.load,
) -> Vocabulary:
    """The vocabulary that a prompt's rows are written in.

    It is the model's, where its checkpoint says which that is. A prompt's card may name
    another file with the same pieces, such as one that holds T5's sentinels.

    Args:
      card: the prompt's; ``vocabulary`` and ``vocabulary_fingerprint`` are optional.
      models: the model's, or None where its checkpoint does not say.
      force: take the model's vocabulary, or that of the card as it is now.
      load: gives a vocabulary by the name that the card has for it.

    Raises:
      UserError: what the card names is not to be had, has changed since, or is not the
        model's.
    """
    name, tuned_with = card.get("vocabulary"), card.get("vocabulary_fingerprint")
    if models is not None and (
        force or name is None or tuned_with == models.fingerprint
    ):
        return models
    own = load(name or vocabularies.USUAL)
    prompt_file.check_vocabulary(dict(card), own.fingerprint, force)
    if models is not None and own.pieces != models.pieces:
        raise UserError(
            f"the prompt was tuned with the vocabulary {own.name}, the model's is "
            f"{models.name}: use the model that it was tuned on, or use the prompt all "
            "the same with --force"
        )
    return own
