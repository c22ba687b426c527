# SPDX-License-Identifier: Apache-2.0
"""Registers a task under all its names: of each vocabulary, with and without its name.

T5X users know a task as ``glue_sst2_v002``; ``taskless_`` before it leaves the task's name
out of the inputs, since a soft prompt takes its place; ``task_index_`` puts a sentinel there
that stands for the task. Names that end with ``_examples`` are the same tasks: what they
log, ``eval`` keeps in any case.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import seqio
import tensorflow as tf

from prompt_tuning.data import metrics as task_metrics
from prompt_tuning.data.metrics import Metric
from prompt_tuning.tasks import features, labels

# From raw rows to ``inputs`` and ``targets``; the task's name is put before the inputs.
Text = Callable[..., tf.data.Dataset]
TASKLESS, TASK_INDEX, EXAMPLES = "taskless_", "task_index_", "_examples"
KINDS = ("", TASKLESS, TASK_INDEX)
NAMED = ("",)


def register(
    name: str,
    source: seqio.DataSource,
    text: Text,
    *,
    task_text: str = "",
    index: int = 0,
    template: Callable[[str], str] | None = None,
    label_names: Sequence[str] | None = None,
    metrics: Sequence[str | Metric] = (),
    postprocess: Callable = task_metrics.strip,
    kinds: Sequence[str] = KINDS,
    usual: str = "t5",
) -> None:
    """Adds a task for every vocabulary, of each kind, and again as ``_examples``.

    Args:
      name: the task's name among T5 users; the usual vocabulary's task bears it.
      source: of the rows.
      text: makes ``inputs`` and ``targets`` of them; takes ``task_name``.
      task_text: what T5's inputs begin with.
      index: of the sentinel of ``task_index_``.
      template: what the inputs are made of (see `data.template`), from the text that
        they begin with; None where they are more than columns within a text.
      label_names: the answers, if they are few.
      metrics: names among `data.metrics.METRICS`, or functions.
      postprocess: see `seqio.Task`.
      kinds: prefixes among `KINDS`.
      usual: the vocabulary whose task has no prefix.
    """
    functions = task_metrics.by_name(metrics, label_names)
    for full_name, kind, output_features in names_of(name, kinds, usual):
        said = task_text if kind == "" else ""
        first = [functools.partial(put_index_first, index=index)]
        seqio.TaskRegistry.add(
            full_name,
            source=source,  # pyright: ignore[reportArgumentType]
            preprocessors=[
                functools.partial(text, task_name=said),
                seqio.preprocessors.tokenize,
                *(first if kind == TASK_INDEX else []),
                seqio.preprocessors.append_eos,
            ],
            postprocess_fn=postprocess,
            metric_fns=functions,
            output_features=output_features,
        )
        # A prompt's template would leave the sentinel out.
        shown = None if template is None or kind == TASK_INDEX else template(said)
        labels.register(full_name, label_names, shown)


def register_mixture(
    name: str, tasks: Sequence[str], kinds: Sequence[str] = KINDS
) -> None:
    """Adds a mixture of tasks of one vocabulary and kind under all their names.

    Each task has the weight 1; those without a train split are there to be evaluated.
    """
    for full_name, *_ in names_of(name, kinds):
        before, _, after = full_name.partition(name)
        seqio.MixtureRegistry.add(
            full_name, [f"{before}{task}{after}" for task in tasks], default_rate=1.0
        )


def names_of(
    name: str, kinds: Sequence[str] = KINDS, usual: str = "t5"
) -> Iterator[tuple[str, str, Mapping[str, seqio.Feature]]]:
    """All names of a task, the kind and the vocabulary's features of each."""
    for vocabulary, output_features in features.variants(usual):
        for kind in kinds:
            for end in ("", EXAMPLES):
                yield f"{vocabulary}{kind}{name}{end}", kind, output_features


def put_index_first(
    ds: tf.data.Dataset, output_features: Mapping[str, seqio.Feature], index: int
) -> tf.data.Dataset:
    """Puts the sentinel of a task, ``<extra_id_INDEX>``, before the inputs' tokens."""
    # Sentinels go down from the last id.
    sentinel = output_features["inputs"].vocabulary.vocab_size - 1 - index

    def convert(row):
        inputs = row["inputs"]
        first = tf.constant([sentinel], inputs.dtype)
        return {**row, "inputs": tf.concat([first, inputs], axis=0)}

    return ds.map(convert, tf.data.AUTOTUNE)
