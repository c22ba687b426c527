# SPDX-License-Identifier: Apache-2.0
"""A task made of local TSV, CSV or JSONL files, described without Python."""

import csv
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from prompt_tuning.data.template import Template
from prompt_tuning.errors import UserError

_SUFFIXES = (".tsv", ".csv", ".jsonl")
# A row and the line of the file that it ends on.
NumberedRow = tuple[int, Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class LocalTask:
    """Files, and how their rows become inputs and targets.

    Attributes:
      files: path of each split. TSV and CSV files begin with a line of column names;
        TSV knows no quotes.
      template: the inputs (see `template`).
      target_column: the column that holds the answer.
      label_names: what the answers are called: a mapping from the file's values, or a
        list, value i (or the name itself) standing for name i; None takes the values
        as texts.
      metrics: names among `metrics.METRICS`.
      vocabulary: a name or path that `tasks.features.vocabulary` knows; None is the
        model's own.
    """

    files: Mapping[str, str]
    template: str
    target_column: str = "label"
    label_names: Mapping[str | int, str] | Sequence[str] | None = None
    metrics: Sequence[str] = ("accuracy",)
    vocabulary: str | None = None

    @functools.cached_property
    def parsed(self) -> Template:
        """The template's parts."""
        return Template.parse(self.template)

    @functools.cached_property
    def names_of_values(self) -> dict[str, str] | None:
        """The label that each value of the target column stands for."""
        if self.label_names is None:
            return None
        if isinstance(self.label_names, Mapping):
            return {str(value): name for value, name in self.label_names.items()}
        if isinstance(self.label_names, str):
            raise UserError(
                f"LABEL_NAMES={self.label_names!r} is one text: give a list of names"
            )
        names = {name: name for name in self.label_names}
        return {str(i): name for i, name in enumerate(self.label_names)} | names

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The label set, in the order of ``label_names``."""
        names = self.names_of_values
        return None if names is None else tuple(dict.fromkeys(names.values()))

    def read(self, split: str) -> tuple[list[list[str]], list[str]]:
        """Texts of the inputs' parts, and targets, of every row of a split.

        Raises:
          UserError: the file is missing, malformed or empty, lacks a column, or has a
            label that is not among ``label_names``.
        """
        path = pathlib.Path(self.files[split])
        wanted = (*self.parsed.columns, self.target_column)
        texts, targets = [], []
        for line, row in read_rows(path):
            missing = [column for column in wanted if column not in row]
            if missing:
                raise UserError(
                    f"{path}, line {line}: there is no column {missing[0]!r}; it has "
                    f"{', '.join(row)}"
                )
            texts.append(self.parsed.render(row))
            targets.append(self._target(row[self.target_column], path, line))
        if not targets:
            raise UserError(
                f"{path} has no rows: give another file for split {split!r}"
            )
        return texts, targets

    def _target(self, value: str, path: pathlib.Path, line: int) -> str:
        names = self.names_of_values
        if names is None:
            return value
        if value not in names:
            raise UserError(
                f"{path}, line {line}: label {value!r} is none of "
                f"{', '.join(map(repr, names))}; add it to LABEL_NAMES"
            )
        return names[value]


def read_rows(path: pathlib.Path) -> Iterator[NumberedRow]:
    """The rows of a file, by its suffix; empty lines are no rows.

    Raises:
      UserError: the file is missing, not UTF-8, of another kind, or malformed.
    """
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path} is not one of {', '.join(_SUFFIXES)} by its name")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield from (
                _read_json(path, file)
                if path.suffix == ".jsonl"
                else _read_table(path, file)
            )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: convert it first") from error


def _read_table(path: pathlib.Path, file) -> Iterator[NumberedRow]:
    if path.suffix == ".tsv":
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(file, strict=True)
    try:
        columns = next(reader, [])
        if len(set(columns)) < len(columns):
            raise UserError(f"{path} has two columns of one name: {', '.join(columns)}")
        for values in reader:
            if values and len(values) != len(columns):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(values)} fields instead of "
                    f"the {len(columns)} that its first line names"
                )
            if values:
                yield reader.line_num, dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error


def _read_json(path: pathlib.Path, file) -> Iterator[NumberedRow]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {line} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line} is not a JSON object")
        # A null is a value that the row does not have.
        yield (
            line,
            {
                column: value if isinstance(value, str) else json.dumps(value)
                for column, value in row.items()
                if value is not None
            },
        )
