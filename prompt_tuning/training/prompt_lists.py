# SPDX-License-Identifier: Apache-2.0
"""The prompts that one run tunes, as people write them down.

A prompt is a mapping of the values in which it differs from the run's own; a list of
alternatives stands for as many prompts. So ``[{"seed": [0, 1, 2]}]`` are three.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning import prompt_names
from prompt_tuning.errors import UserError

NAME = "name"
# Its values say enough without its name.
_PLAIN = "mixture_or_task_name"
# Right in a list of prompts and in a grid, which has no seeds.
_EXAMPLE = "[{'prompt_length': [5, 20]}]"
_UNFIT = re.compile(r"[^\w.+=-]+", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One prompt: its name, and the values that are its own."""

    name: str
    values: Mapping[str, Any]


def expand(
    prompts: Sequence[Mapping[str, Any]],
    allowed: Sequence[str],
    called: str = "PROMPTS",
) -> tuple[Variant, ...]:
    """Makes a `Variant` of every combination of alternatives, and names it.

    A name is made of the values that differ between the prompts, behind the ``name``
    that a mapping gives.

    >>> " ".join(each.name for each in expand([{"seed": [0, 1]}], ["seed"]))
    'seed_0 seed_1'

    Args:
      prompts: values by their names; a list is a choice of alternatives.
      allowed: the names that values may have, beside ``name``, in the order that
        prompts' names follow.
      called: what messages call the list.

    Raises:
      UserError: there is no prompt, a value has an unknown name or no alternative, or two prompts are
        called the same.
    """
    if isinstance(prompts, Mapping) or not all(isinstance(p, Mapping) for p in prompts):
        raise UserError(
            f"{called}={prompts!r} must be a list of dicts, e.g. {_EXAMPLE}"
        )
    rows = [
        (entry, row)
        for entry in prompts
        for row in _combinations(entry, allowed, called)
    ]
    if not rows:
        raise UserError(
            f"{called} names no prompt: give a dict for each, e.g. {_EXAMPLE}"
        )
    differing = _differing([row for _, row in rows], allowed)
    variants = []
    for entry, row in rows:
        # A mapping that names its one prompt has said all.
        alone = NAME in entry and not any(isinstance(v, list) for v in entry.values())
        parts = [str(row[NAME])] if NAME in row else []
        parts += [_word(key, row[key]) for key in differing if key in row and not alone]
        name = _UNFIT.sub("_", "-".join(parts)).strip("._") or "prompt"
        values = {key: value for key, value in row.items() if key != NAME}
        prompt_names.check(name, f"{called}: name")
        variants.append(Variant(name, values))
    prompt_names.check_different(
        (each.name for each in variants), called, "give each dict its own 'name'"
    )
    return tuple(variants)


def _combinations(
    entry: Mapping[str, Any], allowed: Sequence[str], called: str
) -> Iterator[dict[str, Any]]:
    for key in entry:
        if key != NAME and key not in allowed:
            raise UserError(
                f"{called} cannot set {key!r}; a prompt's own values are "
                f"{', '.join((NAME, *allowed))}"
            )
        if isinstance(entry[key], list) and not entry[key]:
            raise UserError(
                f"{called}: {key!r} is a choice of nothing: give it a value, or leave it "
                "out"
            )
    keys = [key for key in (NAME, *allowed) if key in entry]
    values = [entry[key] for key in keys]
    choices = [value if isinstance(value, list) else [value] for value in values]
    for row in itertools.product(*choices):
        yield dict(zip(keys, row, strict=True))


def _differing(rows: Sequence[Mapping[str, Any]], allowed: Sequence[str]) -> list[str]:
    """The names of values that are not the same in all prompts."""
    absent = object()
    return [
        key
        for key in allowed
        if any(row.get(key, absent) != rows[0].get(key, absent) for row in rows)
    ]


def _word(key: str, value: Any) -> str:
    """How a name says a value."""
    if key == _PLAIN:
        return str(value)
    if isinstance(value, Mapping):
        value = "_".join(str(each) for each in value.values())
    value = getattr(value, "kind", value)
    return f"{key}_{getattr(value, '__name__', value)}"
