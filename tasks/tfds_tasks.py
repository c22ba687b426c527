# SPDX-License-Identifier: Apache-2.0
"""Registers classification data sets of TFDS as T5 has them."""

import functools
from collections.abc import Sequence

import seqio

from prompt_tuning.data import metrics
from prompt_tuning.tasks import features, labels, preprocessors


def register(
    name: str,
    tfds_name: str,
    columns: Sequence[str],
    label_names: Sequence[str],
    task_text: str,
    splits: Sequence[str] = ("train", "validation", "test"),
) -> None:
    """Adds ``name`` and ``taskless_<name>`` for every vocabulary.

    Args:
      name: the task's name among T5 users; the T5 vocabulary's task bears it.
      tfds_name: data set, configuration and version.
      columns: text columns, in the order of T5's text format (alphabetical).
      label_names: name of label i.
      task_text: what T5's inputs begin with; ``taskless_`` inputs leave it out, since
        a soft prompt takes its place.
      splits: the data set's splits.
    """
    for vocabulary, output_features in features.variants(usual="t5"):
        for kind, text in (("", task_text), ("taskless_", "")):
            full_name = f"{vocabulary}{kind}{name}"
            seqio.TaskRegistry.add(
                full_name,
                source=seqio.TfdsDataSource(tfds_name=tfds_name, splits=splits),
                preprocessors=[
                    functools.partial(
                        preprocessors.label_and_text,
                        columns=columns,
                        labels=label_names,
                        task_name=text,
                        column_names=True,
                    ),
                    seqio.preprocessors.tokenize,
                    seqio.preprocessors.append_eos,
                ],
                postprocess_fn=metrics.strip,
                metric_fns=[metrics.accuracy],
                output_features=output_features,
            )
            labels.register(
                full_name,
                label_names,
                preprocessors.template(columns, text, column_names=True),
            )
