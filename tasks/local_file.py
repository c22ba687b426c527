# SPDX-License-Identifier: Apache-2.0
"""Registers a local TSV, CSV or JSONL file as a task."""

import functools
from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf

from prompt_tuning import report
from prompt_tuning.data import examples, reach
from prompt_tuning.data import metrics as task_metrics
from prompt_tuning.data.feature_converter import GROUP_INDEX
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.data.splits import TRAIN
from prompt_tuning.data.template import Positions
from prompt_tuning.errors import UserError
from prompt_tuning.tasks import features, labels, sources

_CELL = "cell"
_REGISTERED: set[str] = set()


def register(
    name: str,
    files: Mapping[str, str],
    template: str,
    target_column: str = "label",
    label_names: Mapping[str | int, str] | Sequence[str] | None = None,
    metrics: Sequence[str] = ("accuracy",),
    vocabulary: str = "mini",
    columns: Sequence[str] | None = None,
    balance: Sequence[str] | None = None,
) -> seqio.Task:
    """Registers a task of local files; see `LocalTask` for the arguments.

    >>> task = register(
    ...     "reviews", {"train": "reviews.tsv"}, "{sentence}",
    ...     label_names=["negative", "positive"],
    ... )  # doctest: +SKIP

    Raises:
      UserError: see `register_task`.
    """
    task = LocalTask(
        files,
        template,
        target_column,
        label_names,
        metrics,
        vocabulary,
        columns,
        balance,
    )
    return register_task(name, task)


def register_task(
    name: str, local: LocalTask, group_column: str | None = None
) -> seqio.Task:
    """Reads the files and registers them as ``name``, in place of an earlier one.

    Args:
      name: of the task.
      local: the files.
      group_column: the column whose values are the groups of the rows of `TRAIN`; they
        get the feature `GROUP_INDEX`.

    Raises:
      UserError: nothing names a vocabulary, another task has the name, a file or the template is wrong (see
        `LocalTask.read`), or the vocabulary cannot write a label.
    """
    if not local.files:
        raise UserError(f"{name} has no files: give the path of each split")
    if local.vocabulary is None:
        raise UserError(
            f"nothing says in which vocabulary {name} is to be written: name the model's "
            "in VOCABULARY, or put its spiece.model (T5's sentencepiece.model) beside its "
            "weights"
        )
    metric_fns = task_metrics.by_name(local.metrics, local.labels)
    output_features = features.output_features(local.vocabulary)
    for label in local.labels or ():
        _check_reach(name, label, output_features["targets"].vocabulary)
    splits = {split: _columns(local, split, group_column) for split in local.files}
    for split, columns in splits.items():
        task_metrics.check_targets(
            local.metrics, columns["targets"], local.files[split]
        )
        for message in reach.messages(
            columns["texts"], columns["targets"], output_features["targets"].vocabulary
        ):
            report.say(f"{local.files[split]}: {message}")
        if split != TRAIN and TRAIN in splits:
            texts = [list(map(tuple, splits[each]["texts"])) for each in (TRAIN, split)]
            if message := reach.shared_rows(*texts):
                report.say(f"{local.files[split]}: {message}")
    if name in _REGISTERED:
        seqio.TaskRegistry.remove(name)
    elif name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        raise UserError(f"a task is called {name!r} already: choose another name")
    try:
        task = seqio.TaskRegistry.add(
            name,
            source=sources.Rows(splits.__getitem__, tuple(splits), _CELL),
            preprocessors=[
                functools.partial(_tokenize, parts=local.parsed.parts),
                seqio.preprocessors.append_eos,
            ],
            postprocess_fn=task_metrics.raw_target,
            metric_fns=metric_fns,
            output_features=output_features,
        )
    except ValueError as error:
        raise UserError(f"{name!r} cannot name a task: {error}") from error
    _REGISTERED.add(name)
    labels.register(name, local.labels, local.template)
    return task


def _check_reach(name: str, label: str, vocabulary: seqio.Vocabulary) -> None:
    examples.vocab_size(vocabulary, name)
    ids = vocabulary.encode(label)
    if not ids or vocabulary.unk_id in ids:
        raise UserError(
            f"{name}: the vocabulary has no pieces for all of label {label!r}; use "
            "another word for it in LABEL_NAMES"
        )
    reach.check_label(label, vocabulary)


def _columns(local: LocalTask, split: str, group_column: str | None) -> sources.Columns:
    texts, targets = local.read(split)
    cells = local.cells(split)
    columns = {"texts": texts, "targets": targets}
    if cells is not None:
        columns[_CELL] = cells
    if group_column is not None and split == TRAIN:
        columns[GROUP_INDEX] = local.group_indices(split, group_column)
    return columns


def _tokenize(
    ds: tf.data.Dataset,
    output_features: Mapping[str, seqio.Feature],
    parts: Sequence,
) -> tf.data.Dataset:
    """Tokenises the texts between the pieces of the prompt one by one."""
    vocabulary = output_features["inputs"].vocabulary

    def convert(row):
        texts = tf.unstack(
            row["texts"], sum(not isinstance(part, Positions) for part in parts)
        )
        waiting = iter(texts)
        inputs = [
            tf.constant(part.ids, tf.int32)
            if isinstance(part, Positions)
            else tf.cast(vocabulary.encode_tf(next(waiting)), tf.int32)
            for part in parts
        ]
        targets = output_features["targets"].vocabulary.encode_tf(row["targets"])
        group = {GROUP_INDEX: row[GROUP_INDEX]} if GROUP_INDEX in row else {}
        return {
            **group,
            "inputs_pretokenized": tf.strings.join(texts, separator=" "),
            "inputs": tf.concat(inputs, axis=0),
            "targets_pretokenized": row["targets"],
            "targets": tf.cast(targets, tf.int32),
        }

    # Autograph would rewrite the iterator, which is plain Python.
    convert = tf.autograph.experimental.do_not_convert(convert)
    return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)
