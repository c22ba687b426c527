# SPDX-License-Identifier: Apache-2.0
"""Text templates that name columns of a row and pieces of a soft prompt.

``{prompt:0:10} premise: {premise} {prompt:10:20}`` puts the first ten positions of the
prompt in front, then text, then the next ten; ``{prompt}`` is all of it. Position i of
a prompt whose ids are not known yet is written -(i + 1).
"""

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping, Sequence

from prompt_tuning.errors import UserError

WHOLE_PROMPT = -(2**31)
# What a template may be: its characters, and the last position that it may name.
LONGEST = 1 << 16
LAST_POSITION = 1 << 16

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SPAN = re.compile(r"(\d{1,12}):(\d{1,12})")


class Placement(enum.StrEnum):
    """Where a prompt goes in inputs that do not say it.

    ``APPEND`` is behind the last text token, EOS included; ``AFTER_BOS`` is behind the
    first text token.
    """

    PREPEND = "prepend"
    APPEND = "append"
    AFTER_BOS = "after_bos"

    @classmethod
    def _missing_(cls, value):
        names = ", ".join(repr(member.value) for member in cls)
        raise UserError(f"no placement is called {value!r}: choose one of {names}")


@dataclasses.dataclass(frozen=True)
class Column:
    """Stands for a row's value."""

    name: str


Text = tuple[str | Column, ...]


@dataclasses.dataclass(frozen=True)
class Positions:
    """A piece of the prompt: negative ids."""

    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Template:
    """Texts and pieces of a prompt, in order."""

    parts: tuple[Text | Positions, ...]

    @classmethod
    def parse(cls, template: str) -> "Template":
        """Reads a template; ``{{`` and ``}}`` are braces that mean themselves.

        Raises:
          UserError: it is no text or too long, a brace stands alone, no column is
            named, or a position of the prompt is named twice or beyond any prompt.
        """
        if not isinstance(template, str) or len(template) > LONGEST:
            raise UserError(
                f"the template must be a text of at most {LONGEST} characters"
            )
        parts: list[Text | Positions] = []
        text: list[str | Column] = []
        end = 0
        for match in _BRACES.finditer(template):
            text.append(template[end : match.start()])
            end = match.end()
            if match[0] in ("{{", "}}"):
                text.append(match[0][0])
            elif match[1] is None:
                raise UserError(
                    f"template {_shortened(template)!r} has a lone {match[0]!r}: write it twice to "
                    "mean the brace itself"
                )
            elif match[1] == "prompt" or match[1].startswith("prompt:"):
                parts += [tuple(text), _positions(match[1], template)]
                text = []
            else:
                text.append(Column(match[1]))
        parts.append((*text, template[end:]))
        found = cls(tuple(part for part in parts if _says_something(part)))
        found._check(template)
        return found

    def _check(self, template: str) -> None:
        if not self.columns:
            raise UserError(
                f"template {_shortened(template)!r} names no column: write one as {{column}} "
                "({prompt} is the soft prompt; give a column of that name another)"
            )
        ids = [
            i for part in self.parts if isinstance(part, Positions) for i in part.ids
        ]
        if len(set(ids)) < len(ids) or (WHOLE_PROMPT in ids and len(ids) > 1):
            raise UserError(
                f"template {_shortened(template)!r} names a position of the prompt twice"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        texts = [part for part in self.parts if not isinstance(part, Positions)]
        pieces = [piece for text in texts for piece in text]
        names = [piece.name for piece in pieces if isinstance(piece, Column)]
        return tuple(dict.fromkeys(names))

    def size(self, row: Mapping[str, str]) -> int:
        """Characters of a row's texts, each column counted as often as it is named."""
        texts = [part for part in self.parts if not isinstance(part, Positions)]
        pieces = [piece for text in texts for piece in text]
        return sum(
            len(row[piece.name] if isinstance(piece, Column) else piece)
            for piece in pieces
        )

    def render(self, row: Mapping[str, str]) -> list[str]:
        """A row's texts, one for each text part, without spaces around them."""
        return [
            "".join(
                row[piece.name] if isinstance(piece, Column) else piece
                for piece in part
            ).strip()
            for part in self.parts
            if not isinstance(part, Positions)
        ]

    def encode(
        self, row: Mapping[str, str], encode: Callable[[str], Sequence[int]]
    ) -> list[int]:
        """A row's token ids, without EOS; negative ones stand for the prompt."""
        texts = iter(self.render(row))
        ids: list[int] = []
        for part in self.parts:
            ids += part.ids if isinstance(part, Positions) else encode(next(texts))
        return ids


def _positions(field: str, template: str) -> Positions:
    if field == "prompt":
        return Positions((WHOLE_PROMPT,))
    span = _SPAN.fullmatch(field.removeprefix("prompt:"))
    if span is not None and int(span[2]) > LAST_POSITION:
        raise UserError(
            f"template {_shortened(template)!r}: {{{field}}} goes beyond position "
            f"{LAST_POSITION}, and so beyond any prompt"
        )
    if span is None or int(span[1]) >= int(span[2]):
        raise UserError(
            f"template {_shortened(template)!r}: {{{field}}} is no piece of a prompt: write "
            "{prompt} or {prompt:FIRST:END}, END excluded"
        )
    return Positions(tuple(-(i + 1) for i in range(int(span[1]), int(span[2]))))


def _shortened(template: str) -> str:
    return template if len(template) < 200 else f"{template[:200]}..."


def _says_something(part: Text | Positions) -> bool:
    if isinstance(part, Positions):
        return True
    return any(isinstance(piece, Column) or piece.strip() for piece in part)
