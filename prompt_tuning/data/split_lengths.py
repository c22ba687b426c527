# SPDX-License-Identifier: Apache-2.0
"""Measures the examples of a split before anything is trained on them."""

import hashlib
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from prompt_tuning.data import examples
from prompt_tuning.data.feature_converter import PromptFeatureConverter
from prompt_tuning.data.length_report import LengthReport
from prompt_tuning.errors import UserError


def length_report(
    provider: examples.Provider,
    split: str,
    task_feature_lengths: Mapping[str, int],
    converter: PromptFeatureConverter,
    max_examples: int = 10_000,
) -> LengthReport:
    """Looks at a split's first examples before anything is trained on them.

    Raises:
      UserError: the split is empty, targets do not fit, or inputs name positions that
        their prompt does not have.
    """

    def measure(example):
        inputs = example["inputs"]
        text = tf.reduce_sum(tf.cast(inputs >= 0, tf.int32))
        # Inserting checks the positions that the inputs name.
        row = tf.size(converter.insert(inputs, example))
        ids = tf.concat(
            [tf.cast(inputs, tf.int64), tf.cast(example["targets"], tf.int64)], axis=0
        )
        # A sum that the order of the ids changes tells examples apart well enough.
        places = tf.range(1, tf.size(ids) + 1, dtype=tf.int64)
        check = tf.math.floormod(tf.reduce_sum(ids * places), 2**31 - 1)
        return tf.stack(
            [text, tf.size(example["targets"]), row, tf.cast(check, tf.int32)]
        )

    # One more than wanted tells whether these are all.
    ds = examples.examples(provider, split, task_feature_lengths).take(max_examples + 1)
    rows = iter(
        ds.map(measure, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(512)
        .as_numpy_iterator()
    )
    batches = []
    while (batch := examples.following(rows, provider.name, None)) is not None:
        batches.append(batch)
    if not batches:
        raise UserError(
            f"split {split!r} of {provider.name} is empty: choose another or check "
            "the task's data"
        )
    seen = np.concatenate(batches)
    text, targets, row, _ = seen[:max_examples].T
    room = converter.text_length(task_feature_lengths["inputs"])
    limit = task_feature_lengths["targets"]
    report = LengthReport(
        examples=len(text),
        complete=len(seen) <= max_examples,
        inputs_cut=int(np.sum(text > room)),
        longest_inputs=int(text.max()),
        longest_targets=int(targets.max()),
        inputs_length=room,
        room=(converter.row_length(task_feature_lengths["inputs"]), limit),
        tokens=np.stack([row - np.maximum(text - room, 0), targets], axis=1),
        digest=hashlib.sha256(np.ascontiguousarray(seen)).hexdigest(),  # pyright: ignore[reportArgumentType]
    )
    if report.longest_targets > limit:
        wanted = {**task_feature_lengths, "targets": report.longest_targets}
        raise UserError(
            f"{int(np.sum(targets > limit))} of {len(targets)} targets of "
            f"{provider.name} are longer than {limit} tokens (the longest has "
            f"{report.longest_targets}): set TASK_FEATURE_LENGTHS={wanted}"
        )
    return report
