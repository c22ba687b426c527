# SPDX-License-Identifier: Apache-2.0
"""Examples as people have them in Python become rows of texts and answers.

Pairs, dicts, a pandas frame, a split of Hugging Face's datasets: told apart by what they
can do, so that none of these packages is needed. What is wrong is said with its row.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prompt_tuning.data import label_sets, reach
from prompt_tuning.data.label_sets import LabelNames
from prompt_tuning.data.rows import is_text
from prompt_tuning.data.template import Template
from prompt_tuning.errors import UserError

# The column of a text that has no other name.
TEXT = "text"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples that were found sound.

    Attributes:
      columns: of every example, the values that the template names.
      answers: of every example, as text.
    """

    columns: Sequence[Mapping[str, str]]
    answers: Sequence[str]

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """What tells one example's inputs from another's."""
        return [tuple(row.values()) for row in self.columns]


def read(
    given: Any,
    what: str,
    *,
    template: str | None = None,
    target_column: str = "label",
    labels: LabelNames | None = None,
) -> Rows:
    """Reads examples.

    Args:
      given: see `tune`.
      what: what they are called, for messages: 'train' or 'validation'.
      template: the inputs, in which ``{column}`` names a value; a pair's only column,
        and that of dicts without a template, is ``text``.
      target_column: of dicts and frames, the column that holds the answer.
      labels: names of the answers; value i stands for name i of a list.

    Raises:
      UserError: they are of another kind, empty, or a row is not sound.
    """
    template = template or f"{{{TEXT}}}"
    wanted = Template.parse(template).columns
    label_sets.refuse_answers_in_inputs(wanted, target_column, labels)
    pairs = _pairs(given, what, wanted, target_column)
    names = label_sets.names_of_values(labels, "labels")
    columns, answers = [], []
    for number, (values, answer) in enumerate(pairs, start=1):
        where = f"{what}, row {number}"
        columns.append({key: _text(values[key], key, where) for key in wanted})
        if not any(text.strip() for text in columns[-1].values()):
            raise UserError(f"{where}: the text is empty; leave the row out")
        answers.append(_answer(answer, names, labels is not None, where))
    if not answers:
        raise UserError(f"{what} is empty: give one example or more")
    return Rows(columns, answers)


def found_labels(given: Any, target_column: str, labels: Any) -> Any:
    """``labels``, or what a split of Hugging Face's datasets calls its classes."""
    if labels is not None:
        return labels
    features = getattr(given, "features", None)
    column = features.get(target_column) if isinstance(features, Mapping) else None
    names = getattr(column, "names", None)
    return None if names is None else list(names)


def label_names(labels: Any) -> list[str] | None:
    """The label set, checked as far as can be without a vocabulary.

    Raises:
      UserError: it is not two or more different texts.
    """
    if labels is None:
        return None
    if isinstance(labels, Mapping):
        labels = list(dict.fromkeys(labels.values()))
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise UserError(
            f"labels={labels!r} must be a list of texts, e.g. ['negative', 'positive']"
        )
    names = list(labels)
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise UserError(f"labels={names!r}: {wrong[0]!r} is no text that could be said")
    if len(names) < 2:
        raise UserError(
            f"labels={names!r} leaves nothing to choose from: give two or more, or "
            "leave labels out where answers are free text"
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"labels={names!r} has {twice[0]!r} twice: leave one out")
    return names


def check_labels(rows: Rows, names: Sequence[str] | None, what: str) -> None:
    """Refuses labels that no row of ``what`` has: they cannot be learned.

    Raises:
      UserError: there is one.
    """
    missing = [name for name in names or () if name not in set(rows.answers)]
    if missing:
        raise UserError(
            f"no row of {what} has the label {missing[0]!r}: add rows that do, or leave "
            "it out of labels"
        )


def warn_of_shared(train: Rows, validation: Rows) -> None:
    """Warns of validation examples that are trained on, too."""
    if message := reach.shared_rows(train.texts, validation.texts):
        warnings.warn(f"validation: {message}", stacklevel=3)


def _pairs(
    given: Any, what: str, wanted: Sequence[str], target_column: str
) -> Iterable[tuple[Mapping[str, Any], Any]]:
    """The values and the answer of each row."""
    records = _records(given, what)
    for number, row in enumerate(records, start=1):
        where = f"{what}, row {number}"
        if isinstance(row, Mapping):
            missing = [key for key in (*wanted, target_column) if key not in row]
            if missing:
                raise UserError(
                    f"{where} has no {missing[0]!r}, only {', '.join(map(str, row))}: "
                    "name its columns in template='... {column} ...' and its answer in "
                    "target_column"
                )
            yield row, row[target_column]
        elif isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 2:
            if len(wanted) > 1:
                raise UserError(
                    f"{where} is a pair, the template has the columns "
                    f"{', '.join(wanted)}: give dicts"
                )
            yield {wanted[0]: row[0]}, row[1]
        else:
            raise UserError(
                f"{where} is {short(row)}: give a pair (text, answer) or a dict"
            )


def _records(given: Any, what: str) -> Iterable[Any]:
    """The rows of whatever holds them."""
    if hasattr(given, "to_dict") and hasattr(given, "columns"):
        names = list(given.columns)
        if len(set(names)) < len(names):
            raise UserError(f"{what} has two columns of one name: {', '.join(names)}")
        return given.to_dict("records")
    if isinstance(given, str | bytes | Mapping) or given is None:
        raise UserError(
            f"{what} is {short(given)}: give a list of (text, answer) pairs or of "
            "dicts, a pandas frame, or one split of a dataset"
        )
    if hasattr(given, "__next__"):
        raise UserError(
            f"{what} can be read only once, as it is a generator: give list(...) of it"
        )
    if not hasattr(given, "__len__") or not hasattr(given, "__iter__"):
        raise UserError(
            f"{what} is {short(given)}, which has no length: give a list of its rows"
        )
    return given


def _text(value: Any, column: str, where: str) -> str:
    if is_missing(value):
        raise UserError(f"{where}: {column!r} is {value}: leave the row out or fill it")
    if isinstance(value, str):
        return _whole(value, f"{where}: {column!r}")
    if isinstance(value, int | float | bool) or hasattr(value, "item"):
        return str(_plain(value))
    raise UserError(f"{where}: {column!r} is {short(value)}, not a text")


def _answer(
    value: Any, names: Mapping[str, str] | None, has_labels: bool, where: str
) -> str:
    if is_missing(value):
        raise UserError(f"{where}: the answer is {value}: leave the row out")
    value = _plain(value)
    if names is None or (isinstance(value, str) and value not in names):
        if not isinstance(value, str):
            raise UserError(
                f"{where}: the answer is {short(value)}, not a text: give labels=[...] "
                "that such values stand for"
            )
        if has_labels:
            allowed = ", ".join(dict.fromkeys((names or {}).values()))
            raise UserError(
                f"{where}: the answer {value!r} is none of the labels {allowed}: add it "
                "to labels, or leave the row out"
            )
        if not value.strip():
            raise UserError(f"{where}: the answer is empty; leave the row out")
        return _whole(value, f"{where}: the answer")
    if str(value) not in names:
        raise UserError(
            f"{where}: the answer {short(value)} stands for none of the labels "
            f"{', '.join(dict.fromkeys(names.values()))}"
        )
    return names[str(value)]


def _whole(text: str, what: str) -> str:
    """A text that can be written down."""
    if not is_text(text):
        raise UserError(f"{what} holds half a character (a surrogate): repair it")
    return text


def _plain(value: Any) -> Any:
    """A NumPy scalar as Python's."""
    return value.item() if hasattr(value, "item") else value


def is_missing(value: Any) -> bool:
    """Whether it is None, NaN or what pandas has in their place."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and math.isnan(value)


def short(value: Any) -> str:
    """A value within a message."""
    text = repr(value).splitlines()[0] if repr(value) else ""
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    return f"{shown} ({type(value).__name__})" if value is not None else "None"
