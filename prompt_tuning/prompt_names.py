# SPDX-License-Identifier: Apache-2.0
"""What prompts may be called, by whoever names them: calls, lists, files and requests."""

from collections.abc import Container, Iterable

from prompt_tuning.errors import UserError

# Bytes; files are called by the name, with an ending that fits beside it.
LONGEST = 200


class NameTakenError(UserError):
    """Another prompt is called so."""


def check(name: object, called: str = "name") -> str:
    """A name that rows can say and files can be called by.

    >>> check("boolq v2")
    'boolq v2'

    Args:
      name: what was given.
      called: what messages call it.

    Raises:
      UserError: it is no text, blank, too long, begins or ends with a dot or a blank, or
        has a slash or a character that does not print.
    """
    if not isinstance(name, str) or not _is_sound(name):
        shown = repr(name)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise UserError(
            f"{called}={shown} must be a word that files can be called by: characters "
            f"that print, without slashes, {LONGEST} bytes at most, and no dot or blank "
            "at either end"
        )
    return name


def _is_sound(name: str) -> bool:
    # What does not print includes halves of characters, which UTF-8 cannot say.
    whole = bool(name) and name.isprintable() and name == name.strip(" .")
    return whole and not set(name) & set("/\\") and len(name.encode()) <= LONGEST


def check_free(name: str, taken: Container[str]) -> None:
    """Refuses a name that another prompt of a store has.

    Raises:
      NameTakenError: it is among ``taken``.
    """
    if name in taken:
        raise NameTakenError(
            f"there is a prompt {name!r} already: remove it, or use another name"
        )


def check_different(names: Iterable[str], of: str, cure: str) -> None:
    """Refuses names of which two are the same.

    Args:
      names: of prompts that are told apart by them.
      of: what messages call the prompts.
      cure: what messages tell to do.

    Raises:
      NameTakenError: two are the same.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise NameTakenError(f"two of {of} are called {name!r}: {cure}")
        seen.add(name)
