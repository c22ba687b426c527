# SPDX-License-Identifier: Apache-2.0
"""How much one request may ask for, so that none keeps the others waiting."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from prompt_tuning.data.label_sets import LabelSet
from prompt_tuning.inference.prepared_rows import Item, Request, label_shape
from prompt_tuning.inference.store import StoredPrompt

# Inputs without content that a calibrated row is answered for besides its own.
SILENT = 3


class RefusedError(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str, **headers: str):
        """``headers`` go with the answer."""
        super().__init__(message)
        self.status = status
        self.headers = headers


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
      body: bytes of a request's body.
      prompt: bytes of a prompt file.
      bodies: bytes of all bodies that are being received or looked at.
      stored: bytes of the numbers of all prompts together.
      rows: rows of a request, each counted once for every prompt that it names.
      prompts: prompts that a row names.
      label_tokens: numbers of the table of a row's labels (see `label_shape`).
      tokens: tokens of a request's rows, of their prompts and their tables of labels.
      body_seconds: until a body is received.
      seconds: from a request to its answer.
    """

    body: int = 1 << 20
    prompt: int = 64 << 20
    bodies: int = 256 << 20
    stored: int = 1 << 30
    rows: int = 256
    prompts: int = 32
    label_tokens: int = 1024
    tokens: int = 1 << 16
    body_seconds: float = 20.0
    seconds: float = 30.0


def check_rows(rows: Sequence[Any], limits: Limits) -> None:
    """Refuses what names too many prompts or has too many rows, before it is looked at.

    Raises:
      RefusedError: status 400.
    """
    total = 0
    for row in rows:
        names = row.get("prompt") if isinstance(row, dict) else None
        count = len(names) if isinstance(names, list) else 1
        if count > limits.prompts:
            raise RefusedError(400, f"a row may name at most {limits.prompts} prompts")
        total += count
    if total > limits.rows:
        raise RefusedError(
            400,
            f"'rows' must be at most {limits.rows} rows, each counted for every prompt "
            "that it names: send fewer at a time",
        )


def check_work(requests: Iterable[Request], limits: Limits) -> None:
    """Refuses more than one request may have computed.

    Raises:
      RefusedError: status 400 or 413.
    """
    total = 0
    for request in requests:
        for item in request.items:
            total += _work(item) * (1 + SILENT * request.calibrate)
            if item.labels is not None:
                check_labels(item.labels, limits)
    if total > limits.tokens:
        raise RefusedError(
            413,
            f"the rows have {total} tokens, those of prompts and labels included, more "
            f"than {limits.tokens}: send fewer at a time",
        )


def check_labels(labels: LabelSet, limits: Limits) -> None:
    """Refuses a label set that would take too long to rank.

    Raises:
      RefusedError: status 400.
    """
    count, tokens = label_shape(labels)
    if count * tokens > limits.label_tokens:
        raise RefusedError(
            400,
            f"{len(labels.names)} labels of up to {labels.tokens.shape[1]} tokens are "
            f"more than {limits.label_tokens} tokens, both rounded up to powers of "
            "two: give fewer or shorter ones",
        )


def check_room(
    array: np.ndarray, prompts: Iterable[StoredPrompt], limits: Limits
) -> None:
    """Refuses a prompt ``[P, H]`` for which the server has no memory.

    Raises:
      RefusedError: status 413.
    """
    # A card is bounded, too, and counts as if it were a position more.
    width = array.shape[1]
    positions = sum(1 + len(prompt.array) for prompt in prompts) + 1 + len(array)
    if positions * width * 4 > limits.stored:
        raise RefusedError(
            413,
            f"the prompts would take more than {limits.stored} bytes: remove some first",
        )


def _work(item: Item) -> int:
    count, tokens = item.label_shape or (0, 0)
    return len(item.ids) + count * tokens
