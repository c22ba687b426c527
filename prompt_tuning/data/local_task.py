# SPDX-License-Identifier: Apache-2.0
"""A task made of local TSV, CSV or JSONL files, described without Python."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning.data import fairness, label_sets, rows, splits
from prompt_tuning.data.splits import TRAIN
from prompt_tuning.data.template import Template
from prompt_tuning.errors import UserError


@dataclasses.dataclass(frozen=True)
class LocalTask:
    """Files, and how their rows become inputs and targets.

    Attributes:
      files: path of each split (see `rows.scan`).
      template: the inputs (see `template`); None is for `as_tuned` alone.
      target_column: the column that holds the answer.
      label_names: what the answers are called: a mapping from the file's values, or a
        list, value i (or the name itself) standing for name i; None takes the values
        as texts.
      metrics: names among `metrics.METRICS`.
      vocabulary: a name or path that `vocabularies.load` knows; None is the
        model's own.
      columns: names of the columns of tables whose first line is a row already.
      balance: columns, such as a group and the label: rows of each combination of their
        values are drawn equally often from the split `TRAIN`.
    """

    files: Mapping[str, str]
    template: str | None
    target_column: str = "label"
    label_names: label_sets.LabelNames | None = None
    metrics: Sequence[str] = ("accuracy",)
    vocabulary: str | None = None
    columns: Sequence[str] | None = None
    balance: Sequence[str] | None = None

    def __post_init__(self):
        if self.balance is not None and (
            isinstance(self.balance, str) or not self.balance
        ):
            raise UserError(
                f"BALANCE={self.balance!r} must be a list of columns, such as ['label']"
            )
        if self.balance and TRAIN not in self.files:
            raise UserError(
                f"BALANCE={list(self.balance)!r} is of the split {TRAIN!r}, which is none of "
                f"{', '.join(self.files)}: leave it out"
            )

    def as_tuned(self, card: Mapping[str, Any]) -> "LocalTask":
        """The task as a prompt was tuned for it: with its template and labels.

        Args:
          card: the prompt's; what it does not say stays as it is here.

        Raises:
          UserError: this task says something else than the card.
        """
        found: dict[str, Any] = {}
        if (template := card.get("template")) is not None:
            if self.template not in (None, template):
                raise UserError(
                    f"TEMPLATE={self.template!r} is not the prompt's own, which is "
                    f"{template!r}: leave it out"
                )
            found["template"] = template
        if (labels := card.get("labels")) is not None:
            if self.labels is not None and set(self.labels) != set(labels):
                raise UserError(
                    f"LABEL_NAMES are {', '.join(self.labels)}, the prompt's labels "
                    f"{', '.join(labels)}: leave them out, or map the file's values to "
                    "the prompt's labels"
                )
            if self.labels is None:
                found["label_names"] = tuple(labels)
        return dataclasses.replace(self, **found)

    @functools.cached_property
    def parsed(self) -> Template:
        """The template's parts.

        Raises:
          UserError: it is none, or is not given.
        """
        if self.template is None:
            raise UserError("TEMPLATE is not set: give --gin.TEMPLATE='{COLUMN}'")
        return Template.parse(self.template)

    @functools.cached_property
    def names_of_values(self) -> dict[str, str] | None:
        """The label that each value of the target column stands for.

        Raises:
          UserError: see `label_sets.names_of_values`.
        """
        return label_sets.names_of_values(self.label_names)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The label set, in the order of ``label_names``."""
        names = self.names_of_values
        return None if names is None else tuple(dict.fromkeys(names.values()))

    def read(self, split: str) -> tuple[list[list[str]], list[str]]:
        """Texts of the inputs' parts, and targets, of every row of a split.

        Raises:
          UserError: the file is missing, malformed or empty, lacks a column, has a row
            without a text or a target, or a label that is not among ``label_names``.
        """
        path = self.files[split]
        if rows.kind_of(path) is rows.Kind.TEXT:
            raise UserError(
                f"{path} holds texts without targets: give a table or JSONL"
            )
        label_sets.refuse_answers_in_inputs(
            self.parsed.columns, self.target_column, self.label_names
        )
        texts, targets = [], []
        for record in rows.read(path, self.columns):
            try:
                row = self._row(record.values)
                texts.append(self.parsed.render(row))
                targets.append(self._target(row[self.target_column]))
            except UserError as error:
                raise UserError(f"{path}, line {record.line}: {error}") from error
        if not targets:
            raise UserError(
                f"{path} has no rows: give another file for split {split!r}"
            )
        return texts, targets

    def cells(self, split: str) -> list[str] | None:
        """Of each row what it is balanced by, or None where rows are drawn as they are.

        Raises:
          UserError: see `fairness.cells`.
        """
        if split != TRAIN or not self.balance:
            return None
        rows = self.columns_of(split)
        return fairness.cells(rows, self.balance, self.files[split])

    def group_indices(self, split: str, column: str) -> list[int]:
        """Of each row the number of its group, in the order in which groups appear.

        Raises:
          UserError: see `fairness.groups_of`.
        """
        found = fairness.groups_of(self.columns_of(split), column, self.files[split])
        numbers = {group: number for number, group in enumerate(dict.fromkeys(found))}
        return [numbers[group] for group in found]

    def path(self, split: str) -> str:
        """The file of a split, or of a slice of it."""
        return self.files[splits.name_of(split)]

    def columns_of(self, split: str) -> list[dict[str, Any]]:
        """All that each row of a split, or of a slice of it, has: column -> value.

        Raises:
          UserError: the file cannot be read, or the slice has no rows.
        """
        records = rows.read(self.path(split), self.columns)
        found = [dict(record.values) for record in records]
        return found[splits.rows_of(split, len(found))]

    def _row(self, values: Mapping[str, Any]) -> dict[str, str]:
        """What the task needs of a row, as texts; a null is a value it does not have."""
        row = {}
        for column in (*self.parsed.columns, self.target_column):
            if values.get(column) is None:
                there = ", ".join(k for k, v in values.items() if v is not None)
                raise UserError(
                    f"there is no column {column!r}; it has {there}{self._headerless}"
                )
            row[column] = rows.text_of(values[column], column)
        if not any(row[column].strip() for column in self.parsed.columns):
            raise UserError("the text is empty: leave the row out")
        return row

    @property
    def _headerless(self) -> str:
        tables = any(rows.kind_of(path) in rows.TABLES for path in self.files.values())
        if self.columns is not None or not tables:
            return ""
        return " (name a table's columns in COLUMNS if its first line does not)"

    def _target(self, value: str) -> str:
        names = self.names_of_values
        if names is None:
            if not value.strip():
                raise UserError("the target is empty: leave the row out")
            return value
        if value not in names:
            raise UserError(
                f"label {value!r} is none of {', '.join(map(repr, names))}; add it to "
                "LABEL_NAMES"
            )
        return names[value]
