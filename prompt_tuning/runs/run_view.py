# SPDX-License-Identifier: Apache-2.0
"""What the files of a run, and of a task, say of themselves, as texts by name.

Everything is read as data. A ``config.gin`` is a program to gin, so it is shown and never
run.
"""

import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from prompt_tuning import files, report
from prompt_tuning.data import rows
from prompt_tuning.errors import UserError

_MACRO = re.compile(r"^([A-Z][A-Z0-9_]*)\s*=\s*(.*)$", re.MULTILINE)
_EVENTS = "events.out.tfevents."
# Bytes of an event that are taken for a damaged length.
_LONGEST_EVENT = 1 << 26
Facts = dict[str, Any]


def describe(path: pathlib.Path) -> dict[str, Facts]:
    """Tables of facts by their title, for a file or a folder; none if it is no such.

    Raises:
      UserError: a file is damaged.
    """
    if path.is_dir():
        found: dict[str, Facts] = {}
        for name in (report.RESULTS_FILE, report.METRICS_FILE, report.CONFIG_FILE):
            if (path / name).is_file():
                found |= describe(path / name)
        for folder in (path, path / report.TENSORBOARD):
            if events := sorted(folder.glob(f"{_EVENTS}*")):
                found[f"TensorBoard events {folder}"] = _events(events)
        return found
    if path.name.startswith(_EVENTS):
        return {f"TensorBoard events {path}": _events([path])}
    if path.suffix == ".json":
        return {f"JSON {path}": files.read_json(path)}
    if path.suffix == ".gin":
        return {f"gin file {path}, which was not run": _macros(path)}
    if path.name == report.METRICS_FILE:
        return {f"records {path}": _records(path)}
    if path.suffix.lower() in (".jsonl", ".tsv", ".csv", ".txt"):
        return {f"rows {path}": _rows(path)}
    return {}


def _macros(path: pathlib.Path) -> Facts:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {files.first_line(error)}") from error
    return {"lines": len(text.splitlines()), **dict(_MACRO.findall(text))}


def _records(path: pathlib.Path) -> Facts:
    """The newest values of every split, and what cannot be read."""
    newest: dict[str, Facts] = {}
    counts: Counter[str] = Counter()
    damaged = []
    for record in rows.scan(path):
        values = dict(record.values)
        if record.error is not None or "split" not in values or "step" not in values:
            damaged.append(record.line)
            continue
        whose = [str(values.pop("split")), str(values.pop("member", ""))]
        name = " of ".join(filter(None, whose))
        counts[name] += 1
        newest[name] = values
    facts: Facts = {}
    for name, values in newest.items():
        said = ", ".join(f"{k} {v:g}" for k, v in values.items() if _is_number(v))
        facts[name] = f"{counts[name]} records, the last: {said}"
    if damaged:
        facts["cannot be read"] = f"{len(damaged)} lines, the first is {damaged[0]}"
    return facts


def _rows(path: pathlib.Path) -> Facts:
    columns: Counter[str] = Counter()
    count, errors = 0, []
    for record in rows.scan(path):
        count += 1
        columns.update(list(record.values))
        if record.error is not None:
            errors.append(f"line {record.line}: {record.error}")
    facts: Facts = {"rows": f"{count:,}"}
    if columns:
        facts["columns"] = ", ".join(
            name if number == count else f"{name} (in {number})"
            for name, number in columns.items()
        )
    if errors:
        facts["cannot be read"] = f"{len(errors)} rows, the first in {errors[0]}"
    return facts


def _events(paths: list[pathlib.Path]) -> Facts:
    """The newest value of every tag."""
    # Imported here: only runs that keep logs, and who looks at them, pay for it.
    from tensorboardX.proto import event_pb2

    newest: dict[str, tuple[int, float]] = {}
    counts: Counter[str] = Counter()
    for path in paths:
        for data in _event_records(path):
            event = event_pb2.Event()
            try:
                event.ParseFromString(data)
            # protobuf raises a class of its own.
            except Exception as error:
                raise UserError(f"{path} is damaged; copy it again") from error
            for value in event.summary.value:
                counts[value.tag] += 1
                if value.WhichOneof("value") == "simple_value":
                    newest[value.tag] = event.step, value.simple_value
    facts: Facts = {"files": len(paths)}
    for tag, count in counts.items():
        facts[tag] = f"{count} values"
        if tag in newest:
            step, value = newest[tag]
            facts[tag] += f", {value:g} at step {step}"
    return facts


def _event_records(path: pathlib.Path) -> Iterator[bytes]:
    """The records of a TFRecord file; one that is still being written ends it."""
    with open(path, "rb") as file:
        while len(header := file.read(12)) == 12:
            size = int.from_bytes(header[:8], "little")
            if size > _LONGEST_EVENT:
                raise UserError(f"{path} is damaged; copy it again")
            data = file.read(size + 4)
            if len(data) < size + 4:
                return
            yield data[:size]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
