# SPDX-License-Identifier: Apache-2.0
"""Metrics of SQL queries: by their text, and by what a SQLite database answers.

An answer comes from a model that anyone may have prompted, so it is run on a database that
is opened for reading only, may do nothing but select, and is stopped after a while.
"""

import functools
import hashlib
import os
import pathlib
import re
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.errors import UserError

EXECUTION = "sql_execution"
# Of one query.
SECONDS = 2.0
MOST_ROWS = 100_000
# Bytes of a value and columns of a row that a query may build.
LONGEST_VALUE = 1 << 18
MOST_COLUMNS = 200
_ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
_QUOTED = re.compile(r"""('(?:[^']|'')*'|"(?:[^"]|"")*")""")
_SPACES = re.compile(r"\s+")
_AROUND = re.compile(r"\s*([(),;=<>!*+/-]+)\s*")


def sql_exact_match(
    targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
    """Percentage of queries that are the target but for spaces, case and a semicolon.

    What stands in quotes is compared as it is.

    >>> sql_exact_match(["SELECT a FROM t WHERE b = 'X' ;"], ["select a from t where b='X'"])
    {'sql_exact_match': 100.0}
    """
    same = [
        normalised(target) == normalised(prediction)
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {"sql_exact_match": 100.0 * float(np.mean(same))}


def normalised(query: str) -> str:
    """A query as it is compared."""
    parts = _QUOTED.split(query)
    bare = [_SPACES.sub(" ", part).lower() for part in parts[::2]]
    parts[::2] = [_AROUND.sub(r"\1", part) for part in bare]
    return "".join(parts).strip().rstrip(";").strip()


def sql_execution(
    targets: Sequence[str], predictions: Sequence[str], *, database: str = ""
) -> dict[str, float]:
    """Percentage of queries that a database answers as it does the target.

    Rows are compared as a multiset, and in order where the target orders them. A target
    that the database does not answer counts as missed.

    Raises:
      UserError: there is no such database.
    """
    path = pathlib.Path(database)
    if not database or not path.is_file():
        raise UserError(
            f"the metric {EXECUTION} needs a SQLite file, {database or 'none'!r} is "
            f"none: write '{EXECUTION}:PATH'"
        )
    changed = os.stat(path).st_mtime_ns
    run = functools.partial(answer, str(path.resolve()), changed)
    right = [
        _same(run(target), run(prediction), "order by" in target.lower())
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {EXECUTION: 100.0 * float(np.mean(right))}


# Digests of the rows of an answer, in order.
Answer = tuple[bytes, ...]


def _same(wanted: Answer | None, given: Answer | None, ordered: bool) -> bool:
    if wanted is None or given is None:
        return False
    return wanted == given if ordered else sorted(wanted) == sorted(given)


@functools.lru_cache(1 << 12)
def answer(database: str, changed: int, query: str) -> Answer | None:
    """What a database answers to a query; None where it fails or takes too long.

    Args:
      database: path of a SQLite file.
      changed: when the file was; answers are kept until it changes.
      query: one statement that selects.

    Raises:
      UserError: the file is no database.
    """
    del changed
    place = f"{pathlib.Path(database).as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(place, uri=True)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.DatabaseError as error:
        connection.close()
        raise UserError(f"{database} is no SQLite database ({error})") from error
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
    connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MOST_COLUMNS)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.set_authorizer(_authorize)
    end = time.monotonic() + SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > end, 10_000)
    rows = []
    try:
        for row in connection.execute(query):
            rows.append(_digest(row))
            if len(rows) > MOST_ROWS:
                return None
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
        return None
    finally:
        connection.close()
    return tuple(rows)


def _digest(row: tuple) -> bytes:
    """Tells a row from others; 1 and 1.0 are one number."""
    values = [int(x) if isinstance(x, float) and x.is_integer() else x for x in row]
    return hashlib.sha256(repr(values).encode(errors="replace")).digest()[:16]


def _authorize(action: int, first: Any, second: Any, *_: Any) -> int:
    # load_extension runs code, though it is off unless it was switched on.
    if action == sqlite3.SQLITE_FUNCTION and second == "load_extension":
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


METRICS: Mapping[str, Callable[..., Mapping[str, float]]] = {
    "sql_exact_match": sql_exact_match,
    EXECUTION: sql_execution,
}
