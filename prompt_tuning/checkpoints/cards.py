# SPDX-License-Identifier: Apache-2.0
"""The card of a prompt: what it may say, and how it travels in a file's metadata.

A card comes from anywhere, with the file that it is in, so the whole of it is checked
before any of it is used: types, numbers that are numbers, texts that are texts, and
bounds on what would cost time or memory. Two checksums go with it, one of the prompt's
numbers and one of the card's own text.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from prompt_tuning import files
from prompt_tuning.data import template as templates
from prompt_tuning.data.rows import is_text
from prompt_tuning.errors import UserError

# Names of the texts in the metadata of a safetensors file.
CARD, CARD_CHECKSUM = "card", "card_sha256"
# Not part of the card that users see: it is made on writing and used up on reading.
CHECKSUM = "sha256"
# Bounds of what a card may be: characters of it, values within one another, labels and
# their characters, and positions or width of a prompt.
LONGEST, DEEPEST = 1 << 20, 16
MOST_LABELS, LONGEST_LABEL = 1_000, 500
LARGEST = 1 << 16

NO_CHECKSUM = "the prompt is from a format without checksums: damage to its numbers goes unnoticed"

_Text = Annotated[str, pydantic.Field(max_length=4096)]
_Label = Annotated[str, pydantic.Field(min_length=1, max_length=LONGEST_LABEL)]
_Size = Annotated[int, pydantic.Field(ge=0, le=LARGEST)]


class _Record(pydantic.BaseModel):
    """Types are taken as they are; what a card says beside is its writer's business."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow")


class _BaseModel(_Record):
    name: _Text | None = None
    fingerprint: _Text | None = None


class _Card(_Record):
    method: _Text | None = None
    length: _Size | None = None
    width: _Size | None = None
    placement: _Text | None = None
    template: str | None = None
    task: _Text | None = None
    labels: (
        Annotated[list[_Label], pydantic.Field(min_length=2, max_length=MOST_LABELS)]
        | None
    ) = None
    verbalizers: list[_Label] | None = None
    label_scores: Literal["sum", "mean"] | None = None
    vocabulary: _Text | None = None
    vocabulary_fingerprint: _Text | None = None
    task_feature_lengths: dict[_Text, int] | None = None
    base_model: _BaseModel | None = None
    recipe: dict[_Text, Any] | None = None
    metric: dict[_Text, float | None] | None = None
    versions: dict[_Text, _Text] | None = None
    notes: list[_Text] | None = None
    source: dict[_Text, Any] | None = None
    peft: dict[_Text, Any] | None = None


def check(card: Any, path: files.Path) -> dict[str, Any]:
    """A card that is sound, as it was given.

    Args:
      card: anything that JSON can say.
      path: the file it is of, for the message.

    Raises:
      UserError: something in it is not what it should be.
    """
    try:
        if not isinstance(card, Mapping):
            raise UserError("it is no JSON object")
        _check_values(card, 0)
        _Card.model_validate(dict(card))
        if (labels := card.get("labels")) and len(set(labels)) < len(labels):
            raise UserError("labels: two are the same")
        words, labels = (card.get(key) or () for key in ("verbalizers", "labels"))
        if words and len(set(words)) != len(labels):
            raise UserError("verbalizers: there is not one word for each label")
        if (template := card.get("template")) is not None:
            templates.Template.parse(template)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _damaged(path, f"{where}: {first['msg']}") from error
    except UserError as error:
        raise _damaged(path, str(error)) from error
    return dict(card)


def encode(card: Mapping[str, Any], array: np.ndarray) -> dict[str, str]:
    """The metadata of a file: the card, the checksum of the numbers, and its own.

    Args:
      card: what `check` takes.
      array: the prompt, ``[P, H]`` float32.
    """
    own = {key: value for key, value in card.items() if key != CHECKSUM}
    text = json.dumps({**own, CHECKSUM: checksum(array)})
    return {CARD: text, CARD_CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}


def decode(metadata: Mapping[str, str], path: files.Path) -> dict[str, Any] | None:
    """The checked card in a file's metadata, with its checksum; None if there is none.

    Raises:
      UserError: it is damaged, or not what a card is.
    """
    text = metadata.get(CARD)
    if text is None:
        if CARD_CHECKSUM in metadata:
            raise _damaged(path, "it is gone, its checksum is there")
        return None
    # Files of earlier versions have no checksum of the card.
    found = metadata.get(CARD_CHECKSUM)
    if found not in (None, hashlib.sha256(text.encode()).hexdigest()):
        raise _damaged(path, "it is not the one that was written")
    if len(text) > LONGEST:
        raise _damaged(path, f"it has more than {LONGEST} characters")
    return check(files.parse_json(text, path, "has a damaged card"), path)


def verified(
    card: Mapping[str, Any], array: np.ndarray, path: files.Path
) -> dict[str, Any]:
    """The card as users see it, once the checksum of the numbers was compared.

    Raises:
      UserError: the array is not the one that the card was written with.
    """
    # Files of earlier versions have no checksum.
    if card.get(CHECKSUM) not in (None, checksum(array)):
        raise UserError(
            f"{path} is damaged: its numbers are not those that were written; copy or "
            "write it again"
        )
    return {key: value for key, value in card.items() if key != CHECKSUM}


def checksum(array: np.ndarray) -> str:
    """SHA-256 of the numbers, as hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def finite_metrics(metrics: Mapping[str, float] | None) -> dict[str, float | None]:
    """Metrics as a card can say them: what is no number is None."""
    pairs = (metrics or {}).items()
    return {k: float(v) if math.isfinite(v) else None for k, v in pairs}


def _damaged(path: files.Path, reason: str) -> UserError:
    return UserError(f"{path} has a damaged card: {reason}; copy or write it again")


def _check_values(value: Any, depth: int) -> None:
    """Refuses what JSON can spell and nothing can use."""
    if depth > DEEPEST:
        raise UserError(f"more than {DEEPEST} values lie within one another")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_values(key, depth)
            _check_values(inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_values(inner, depth + 1)
    elif isinstance(value, str):
        if not is_text(value):
            raise UserError(f"{value!a:.80} holds half a character (a surrogate)")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"the number {value} is not finite")
