# SPDX-License-Identifier: Apache-2.0
"""Reads the tasks that a model is probed on; none of their rows is trained on.

Four are of kinds that the training mixture does not hold. Rotten Tomatoes is of a kind
that it does, and is here because the demo tunes a prompt for it.

  rotten_tomatoes  is a film praised                  2 classes
  offence          does a tweet offend                2 classes
  aggregation      what a question to a table counts  6 classes
  operation        what solves a problem in words     4 classes
  word_order       are two neighbouring words swapped 2 classes

Classes are made equally frequent, so chance is one of their number.
"""

import bz2
import collections
import csv
import json
import random
import re

from labelled import SEED, digest
from sources import read_asdiv, read_movie_reviews
from suites import read_zstd

TRAIN_ROWS, TEST_ROWS = 2000, 1000
TEST_PERCENT = 34
_AGGREGATES = {
    "": "value",
    "COUNT": "count",
    "MAX": "maximum",
    "MIN": "minimum",
    "SUM": "sum",
    "AVG": "average",
}
_OPERATIONS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
SHORTEST_SENTENCE, LONGEST_SENTENCE = 8, 40


def _rotten_tomatoes(data, packages):
    del data
    for text, label, source in read_movie_reviews(packages):
        if source == "rotten_tomatoes":
            yield text, label


def _offence(data, packages):
    del packages
    lines = read_zstd(data / "fairness" / "davidson_hate_offensive.csv.zst")
    for row in csv.DictReader(lines):
        # Names of other users tell nothing.
        text = " ".join(re.sub(r"@\w+:?|&\w+;|http\S+", " ", row["tweet"]).split())
        yield text, "harmless" if row["class"] == "2" else "offensive"


def _aggregation(data, packages):
    del packages
    with bz2.open(data / "text2sql" / "wikisql.json.bz2", "rt") as file:
        for item in json.load(file):
            query = item["sql-original"][0]
            aggregate = re.match(r"SELECT\s+([A-Z]*)", query)[1]
            yield item["sentences"][0]["original"].strip(), _AGGREGATES[aggregate]


def _operation(data, packages):
    del packages
    for part in ("train", "dev"):
        path = data / "math" / f"mawps-asdiv-a_svamp.{part}.csv.zst"
        for row in csv.DictReader(read_zstd(path)):
            operators = [item for item in row["Equation"].split() if item in "+-*/"]
            if len(operators) == 1:
                text = row["Question"]
                for number, value in enumerate(row["Numbers"].split()):
                    text = text.replace(f"number{number}", f"{float(value):g}")
                yield text, _OPERATIONS[operators[0]]


def _word_order(data, packages):
    """Yields sentences of MRPC's test part; every second has two words swapped."""
    del packages
    path = data / "glue" / "MRPC" / "msr_paraphrase_test.txt"
    for line in path.read_text("utf-8-sig").split("\n")[1:]:
        # One of each pair: two would be in both parts of the task, almost the same.
        parts = line.rstrip("\r").split("\t")
        if len(parts) != 5:
            continue
        words = parts[3].split()
        if not SHORTEST_SENTENCE <= len(words) <= LONGEST_SENTENCE:
            continue
        generator = random.Random(digest(parts[3]))
        if generator.random() < 0.5:
            yield " ".join(words), "sound"
            continue
        at = generator.randrange(1, len(words) - 2)
        words[at], words[at + 1] = words[at + 1], words[at]
        yield " ".join(words), "garbled"


READERS = {
    "rotten_tomatoes": _rotten_tomatoes,
    "offence": _offence,
    "aggregation": _aggregation,
    "operation": _operation,
    "word_order": _word_order,
}


def read_probe_tasks(data, packages):
    """Reads every task.

    Args:
      data: The folder of plain files.
      packages: The folder of archives.

    Returns:
      A dict from task to a list of dicts with text, label and split ('train' or
      'test'), in random order; and a dict from task to the texts of all its rows,
      also of those that the lists leave out. The problems of the demo's second task
      are there, too, though they are not probed.
    """
    tasks, everything = {}, {"asdiv": list(read_asdiv(packages))}
    for name, reader in READERS.items():
        rows = sorted(set(reader(data, packages)))
        everything[name] = [text for text, _ in rows]
        random.Random(SEED).shuffle(rows)
        parts = {"train": collections.defaultdict(list)}
        parts["test"] = collections.defaultdict(list)
        for text, label in rows:
            split = "test" if digest(text) % 100 < TEST_PERCENT else "train"
            parts[split][label].append(text)
        tasks[name] = [
            {"text": text, "label": label, "split": split}
            for split, limit in (("train", TRAIN_ROWS), ("test", TEST_ROWS))
            for text, label in _balanced(parts[split], limit)
        ]
    return tasks, everything


def _balanced(by_label, limit):
    count = min(min(map(len, by_label.values())), limit // len(by_label))
    rows = [
        (text, label) for label in sorted(by_label) for text in by_label[label][:count]
    ]
    random.Random(SEED).shuffle(rows)
    return rows


def write_probe_tasks(tasks, folder):
    """Writes one JSONL file for each task.

    Args:
      tasks: The first result of read_probe_tasks.
      folder: Where to; it is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
