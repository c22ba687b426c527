# SPDX-License-Identifier: Apache-2.0
"""What a caller of `tune` may give: each value checked, or refused in one line."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.methods.method import Method

# What each of several prompts may set for itself.
OWN_VALUES = (
    "name",
    "seed",
    "learning_rate",
    "batch_size",
    "method",
    "prompt_length",
    "prompt_init",
    "placement",
)

# Arguments of `tune` by what the command line calls them.
_ARGUMENTS = {
    "ALLOW_CHANGES": "allow_changes",
    "CLASS_LABELS": "labels",
    "EARLY_STOPPING_PATIENCE": "patience",
    "LABEL_LOSS": "label_loss",
    "LABEL_NAMES": "labels",
    "LEARNING_RATE": "learning_rate",
    "MODEL_DIR": "folder",
    "PROMPTS": "prompts",
    "PROMPT_INIT": "init",
    "PROMPT_LENGTH": "length",
}


@contextlib.contextmanager
def in_argument_names() -> Iterator[None]:
    """Has errors of the run, which knows the command line's names, name arguments.

    >>> with in_argument_names():
    ...     raise UserError("choose another MODEL_DIR")
    Traceback (most recent call last):
        ...
    prompt_tuning.errors.UserError: choose another folder
    """
    try:
        yield
    except UserError as error:
        named = re.compile(rf"\b({'|'.join(_ARGUMENTS)})\b")
        error.args = (named.sub(lambda found: _ARGUMENTS[found[0]], str(error)),)
        raise


def rates(given: Any, usual: tuple[float, ...]) -> tuple[float, ...]:
    """The learning rates to choose from."""
    if given is None:
        return usual
    values = given if isinstance(given, Sequence) else [given]
    for value in values:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise UserError(
                f"learning_rate={given!r} must be a number above 0, a list of such "
                "numbers to choose from, or None"
            )
    if not values or len(set(values)) < len(values):
        raise UserError(f"learning_rate={given!r} must list different rates")
    return tuple(values)


def method(given: Any) -> Method:
    """A method by its kind or as it is.

    Raises:
      UserError: it is none, or one whose result is a whole model.
    """
    if not isinstance(given, Method | str):
        raise UserError(
            f"method={given!r} must be the kind of a method, e.g. 'lora', or a method "
            "with its options, e.g. LoRA(rank=4)"
        )
    found = registry.named(given)
    if found.result == "model":
        raise UserError(
            f"method={given!r} tunes the model itself, which is no prompt: `prompt-tuning "
            "train --gin_file=methods/model_tuning.gin` does that, and pt.load takes "
            "what it writes"
        )
    return found


def methods(common: Method, prompts: Any) -> list[Method]:
    """All that take part: the common one, and those that prompts set for themselves."""
    found = [common]
    for each in prompts or ():
        given = each.get("method", ())
        listed = given if isinstance(given, list | tuple) else [given]
        found += map(method, listed)
    return found


def own_values(prompts: Any) -> Any:
    """What several prompts set for themselves."""
    for each in prompts or ():
        if not isinstance(each, Mapping):
            raise UserError(
                f"prompts={prompts!r} must be a list of dicts, e.g. [{{'seed': [0, 1]}}]"
            )
        unknown = [key for key in each if key not in OWN_VALUES]
        if unknown:
            raise UserError(
                f"prompts cannot set {unknown[0]!r}; a prompt's own values are "
                f"{', '.join(OWN_VALUES)}"
            )
    return prompts


def whole(value: Any, name: str, least: int = 1, most: int = 2**31 - 1) -> int:
    """A whole number within its range."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value!r} must be a whole number, {least} or more")
    if value > most:
        raise UserError(f"{name}={value!r} must be {most} or less")
    return value
