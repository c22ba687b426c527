# SPDX-License-Identifier: Apache-2.0
"""From a labelled row to the text of inputs and targets."""

from collections.abc import Sequence

import tensorflow as tf

# T5's target of a row whose label is withheld (-1), as in GLUE's test splits.
WITHHELD = "<unk>"


def template(
    columns: Sequence[str], task_name: str = "", column_names: bool = False
) -> str:
    """The template (see `data.template`) of what `label_and_text` makes of a row."""
    parts = [task_name] if task_name else []
    for column in columns:
        parts += [f"{column}:"] * column_names + [f"{{{column}}}"]
    return " ".join(parts)


def label_and_text(
    ds: tf.data.Dataset,
    columns: Sequence[str],
    labels: Sequence[str],
    task_name: str = "",
    column_names: bool = False,
) -> tf.data.Dataset:
    """Joins columns into ``inputs`` and writes the label's name into ``targets``.

    Args:
      ds: rows with the columns and an integer ``label``.
      columns: what the inputs are made of, in this order.
      labels: name of label i.
      task_name: what the inputs begin with, if anything.
      column_names: whether each column's name and a colon stand before it, as in T5's
        multitask text format.
    """
    names = tf.constant([*labels, WITHHELD])

    def convert(row):
        parts = [task_name] if task_name else []
        for column in columns:
            parts += [f"{column}:", row[column]] if column_names else [row[column]]
        label = tf.cast(row["label"], tf.int32)
        return {
            "inputs": tf.strings.join(parts, separator=" "),
            "targets": names[tf.where(label < 0, len(labels), label)],
        }

    return ds.map(convert, tf.data.AUTOTUNE)
