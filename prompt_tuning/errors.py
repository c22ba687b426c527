# SPDX-License-Identifier: Apache-2.0
"""The one exception that a user, rather than a programmer, is meant to read."""

import unicodedata

# Control characters, halves of characters, and those that turn the order of letters.
_UNPRINTABLE = ("Cc", "Cf", "Cs")


class UserError(ValueError):
    """A mistake that the user can cure; the message is one line and names the cure.

    The command line prints the message without a stack trace and exits with code 2.
    """


def printable(text: str) -> str:
    """A text in which nothing but line ends moves a terminal's cursor or its colours.

    Names and labels come out of files, and would be obeyed as they are.

    >>> printable("red: " + chr(27) + "[31m")
    'red: \\\\x1b[31m'
    """
    return "".join(
        each
        if each == "\n" or unicodedata.category(each) not in _UNPRINTABLE
        else each.encode("unicode_escape").decode()
        for each in text
    )
