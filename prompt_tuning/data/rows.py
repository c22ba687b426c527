# SPDX-License-Identifier: Apache-2.0
"""The one reader of people's files: rows of TSV, CSV and JSONL, lines of text.

What a file's suffix means, and what a row may hold, is decided here for every command.
Lines end at a newline and nowhere else: texts have other characters in them that
Python, too, takes for ends of lines.
"""

import csv
import dataclasses
import enum
import json
import math
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from prompt_tuning.errors import UserError

# Bytes of a line, and characters of a table's field.
LONGEST = 1 << 24
BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# Lists and objects within one another.
DEEPEST = 64


class Kind(enum.Enum):
    """What a file holds, by its suffix in small letters."""

    TSV = ".tsv"
    CSV = ".csv"
    JSONL = ".jsonl"
    TEXT = ".txt"


TABLES = (Kind.TSV, Kind.CSV)


@dataclasses.dataclass(frozen=True)
class Record:
    """A row of a file, or what is wrong with it.

    Attributes:
      line: the line that it begins on, from 1.
      raw: as it stands in the file.
      values: by column: texts in a table, anything of JSON's in JSONL, the column
        ``text`` alone in a file of texts.
      error: why it cannot be read, or None.
    """

    line: int
    raw: bytes
    values: Mapping[Any, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """What a file holds, by its name.

    Raises:
      UserError: nothing that is read here.
    """
    if not os.fspath(path):
        raise UserError("the path of a file of rows is empty: name one")
    suffix = pathlib.Path(path).suffix.lower()
    if suffix == ".json":
        raise UserError(
            f"{path}: JSON is read one object a line, from a file called *.jsonl; "
            "rewrite it, e.g. with jq -c '.[]'"
        )
    try:
        return Kind(suffix)
    except ValueError:
        raise UserError(
            f"{path} says by its name not what it holds: call it *.tsv or *.csv (a "
            "table), *.jsonl (an object of JSON a line) or *.txt (a text a line)"
        ) from None


def scan(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> Iterator[Record]:
    """The rows of a file in order, sound or not; empty lines are no rows.

    A table's first line names its columns. TSV has no quotes, but for a field in which
    all inner quotes are doubled (``"a ""b"" c"``), as spreadsheets write it. CSV is
    that of RFC 4180, in which a quoted field may hold line ends.

    Args:
      path: the file; its name decides how it is read (see `kind_of`).
      columns: the names of a table's columns, where its first line is a row already.

    Raises:
      UserError: the file is missing, of another kind or no UTF-8 from the start, or a
        table's columns are not clear.
    """
    kind = kind_of(path)
    if columns is not None and kind not in TABLES:
        raise UserError(
            f"names of columns are for tables, {path} is none: leave them out"
        )
    try:
        # Files are read more than once; a pipe has no second time, and may never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path} is no regular file: write its rows to one first")
        with open(path, "rb") as file:
            lines = _lines(file, path)
            if kind in TABLES:
                yield from _table(lines, kind, path, columns)
                return
            for line, raw in lines:
                if raw.strip():
                    yield _single(kind, line, raw)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> Iterator[Record]:
    """The rows of a file, all of which have to be sound.

    Raises:
      UserError: see `scan`; or a row is not sound, with its line.
    """
    for record in scan(path, columns):
        if record.error is not None:
            raise UserError(f"{path}, line {record.line}: {record.error}")
        yield record


def parse_object(text: str, what: str = "the line") -> dict[str, Any]:
    """The JSON object that a text holds.

    Args:
      text: JSON.
      what: what holds it, for messages.

    Raises:
      UserError: it is not JSON (NaN is not), no object, too large to be read, or names
        a value twice.
    """
    try:
        found = json.loads(
            text,
            parse_constant=_no_number,
            parse_float=_finite,
            object_pairs_hook=_once,
        )
    except json.JSONDecodeError as error:
        raise UserError(
            f"{what} is not JSON: {error.msg} (character {error.pos})"
        ) from error
    except UserError:
        raise
    # Numbers and nested brackets without end are refused in their own ways.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON that can be read") from error
    if not isinstance(found, dict):
        raise UserError(f'{what} is no JSON object: write {{"text": "..."}}')
    if _depth(found) > DEEPEST:
        raise UserError(f"{what} has more than {DEEPEST} values within one another")
    return found


def text_of(value: Any, column: str) -> str:
    """A row's value as text; what is none is written in JSON.

    Raises:
      UserError: the text holds half a character, which JSON can spell, or values lie
        within one another without end.
    """
    try:
        text = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        )
    except RecursionError as error:
        raise UserError(
            f"column {column!r} holds too many values within one another"
        ) from error
    if not is_text(text):
        raise UserError(f"column {column!r} holds half a character (a surrogate)")
    return text


def is_text(value: Any) -> bool:
    """Whether it is a text that UTF-8 can say; JSON may spell half a character."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def _lines(file: BinaryIO, path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; one that is too long is cut behind its limit."""
    number = 0
    while raw := file.readline(LONGEST + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(BOM)
            if raw.startswith(_UTF16) or b"\0" in raw:
                raise UserError(
                    f"{path} is not UTF-8 text: convert it first, e.g. with iconv -f "
                    "UTF-16 -t UTF-8"
                )
        yield number, raw
        while len(raw) > LONGEST and not raw.endswith(b"\n"):
            # What is left of it, which its record does not hold.
            raw = file.readline(LONGEST + 1)


def _wrong_bytes(raw: bytes) -> str | None:
    """Why a row's bytes cannot be read, if so."""
    if len(raw) > LONGEST:
        return f"it is longer than {LONGEST} bytes"
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return (
            f"it is not UTF-8 (byte {error.start}); convert the file first, e.g. with "
            "iconv -f LATIN1 -t UTF-8"
        )
    return "it holds a zero byte" if b"\0" in raw else None


def _single(kind: Kind, line: int, raw: bytes) -> Record:
    """A row that is a line."""
    if wrong := _wrong_bytes(raw):
        return Record(line, raw, error=wrong)
    text = raw.decode()
    if kind is Kind.TEXT:
        return Record(line, raw, {"text": text.rstrip("\r\n")})
    try:
        return Record(line, raw, parse_object(text))
    except UserError as error:
        return Record(line, raw, error=str(error))


def _table(
    lines: Iterator[tuple[int, bytes]],
    kind: Kind,
    path: str | os.PathLike[str],
    columns: Sequence[str] | None,
) -> Iterator[Record]:
    found = (_tsv if kind is Kind.TSV else _csv)(lines)
    if columns is None:
        for first in found:
            if b"\r" in first.raw.strip(b"\r\n"):
                raise UserError(
                    f"{path} ends its lines with a carriage return alone: convert it "
                    "first, e.g. with tr '\\r' '\\n'"
                )
            if first.error is not None:
                raise UserError(f"{path}, line {first.line}: {first.error}")
            columns = list(first.values.values())
            break
        else:
            return
    if len(set(columns)) < len(columns):
        raise UserError(
            f"{path} has two columns of one name: {', '.join(columns)}; rename one"
        )
    for record in found:
        fields = list(record.values.values())
        error, values = record.error, {}
        if error is None and len(fields) != len(columns):
            error = (
                f"{len(fields)} fields instead of the {len(columns)} columns "
                f"{', '.join(columns)}"
            )
            if kind is Kind.TSV and any(field.startswith('"') for field in fields):
                error += "; TSV has no quoted tabs or line ends: save it as CSV"
        if error is None:
            values = dict(zip(columns, fields, strict=True))
        yield dataclasses.replace(record, values=values, error=error)


def _tsv(lines: Iterator[tuple[int, bytes]]) -> Iterator[Record]:
    """Rows whose columns are called by their numbers."""
    for line, raw in lines:
        if not raw.strip(b"\r\n"):
            continue
        if wrong := _wrong_bytes(raw):
            yield Record(line, raw, error=wrong)
            continue
        text = raw.decode().removesuffix("\n").removesuffix("\r")
        fields = map(_unquoted, text.split("\t"))
        yield Record(line, raw, dict(enumerate(fields)))


def _unquoted(field: str) -> str:
    """A TSV field; one that a spreadsheet quoted says so by its doubled quotes."""
    inner = field[1:-1]
    if len(field) < 4 or field[0] != '"' or field[-1] != '"' or '""' not in inner:
        return field
    rest = inner.replace('""', "")
    return field if '"' in rest else inner.replace('""', '"')


def _csv(lines: Iterator[tuple[int, bytes]]) -> Iterator[Record]:
    """Rows whose columns are called by their numbers."""
    taken: list[tuple[int, bytes]] = []

    def texts() -> Iterator[str]:
        for line, raw in lines:
            taken.append((line, raw))
            # What is wrong with the bytes is said of the whole row.
            yield raw[:LONGEST].decode(errors="replace")

    csv.field_size_limit(LONGEST)
    reader = csv.reader(texts(), strict=True)
    while True:
        taken.clear()
        fields, error = [], None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            error = f"it is not CSV: {problem}"
        raw = b"".join(raw for _, raw in taken)
        error = _wrong_bytes(raw) or error
        if fields or error is not None:
            yield Record(taken[0][0], raw, dict(enumerate(fields)), error)


def _no_number(text: str) -> Any:
    raise UserError(f"{text} is no value of JSON: leave it out or write null")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise UserError(f"the number {text[:20]} is too large")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"it has two values called {twice!r}")
    return found


def _depth(value: Any) -> int:
    """How many lists and objects lie within one another, this among them."""
    level, depth = [value], 0
    while level:
        inner = [v for v in level if isinstance(v, dict | list)]
        level = [x for v in inner for x in (v.values() if isinstance(v, dict) else v)]
        depth += bool(inner)
    return depth
