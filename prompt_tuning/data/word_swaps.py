# SPDX-License-Identifier: Apache-2.0
"""Words that are exchanged for others, to see whether an answer hangs on them."""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping

from prompt_tuning.data import rows
from prompt_tuning.errors import UserError

# The two words of a line.
_COLUMNS = ("word", "other")


@dataclasses.dataclass(frozen=True)
class Swaps:
    """Words and what stands in their place.

    Attributes:
      words: in small letters: word -> other word.
    """

    words: Mapping[str, str]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Swaps":
        """Reads a table of two columns without a header, the words of a pair.

        Each word of a line stands for the other. A word of several lines is exchanged as
        the first of them says, so that ``her`` may become ``him`` and ``his`` still
        become ``her``.

        Raises:
          UserError: it is no table, a line does not hold two different words, or it is
            empty.
        """
        if rows.kind_of(path) not in rows.TABLES:
            raise UserError(
                f"{path} is no table: write the pairs into a *.tsv or *.csv, two words a "
                "line"
            )
        words: dict[str, str] = {}
        for record in rows.read(path, _COLUMNS):
            pair = [record.values[column].strip() for column in _COLUMNS]
            one, other = (word.casefold() for word in pair)
            if not one or not other or one == other:
                raise UserError(
                    f"{path}, line {record.line}: {pair[0]!r} and {pair[1]!r} are no two "
                    "words to exchange"
                )
            words.setdefault(one, other)
            words.setdefault(other, one)
        if not words:
            raise UserError(f"{path} is empty: write two words a line")
        return cls(words)

    def apply(self, text: str) -> str:
        """The text with all words exchanged at once, each written as the one it was.

        >>> Swaps({"he": "she", "she": "he"}).apply("He said: SHE thinks, hence...")
        'She said: HE thinks, hence...'
        """
        return self._pattern.sub(self._other, text)

    def _other(self, match: re.Match[str]) -> str:
        # Patterns take a few letters for others than casefold does, such as a dotted I.
        word = self.words.get(match[0].casefold())
        return match[0] if word is None else _written_as(word, match[0])

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        # The longest first, for one may be the beginning of another.
        words = sorted(self.words, key=len, reverse=True)
        return re.compile(
            rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE
        )


def _written_as(word: str, model: str) -> str:
    """A word in the letters, small or capital, of another."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[0].upper() + word[1:] if model[0].isupper() else word
