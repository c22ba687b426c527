# SPDX-License-Identifier: Apache-2.0
"""Objectives on C4's texts: span corruption, prefix language modelling, BART's.

Each example is a random chunk of one text, as long as TASK_FEATURE_LENGTHS allow; T5 cuts
its chunks out of texts laid end to end. They have no metric, so tune on them with
EVAL_SPLIT=None.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from prompt_tuning.data import span_corruption
from prompt_tuning.tasks import features, labels

NOISE_DENSITY, MEAN_SPAN = 0.15, 3.0
# Of ids, a random generator, room for inputs and targets (EOS included) and V: inputs
# and targets with EOS.
Objective = Callable[
    [np.ndarray, np.random.Generator, int, int, int], tuple[np.ndarray, np.ndarray]
]
# A text of fewer tokens has nothing to hide.
SHORTEST = 2


def corrupted(ids, rng, inputs_length, targets_length, vocab_size):
    """T5's span corruption (Raffel et al. 2020, https://arxiv.org/abs/1910.10683)."""
    most = span_corruption.span_corruption_length(
        inputs_length, targets_length, NOISE_DENSITY, MEAN_SPAN
    )
    return span_corruption.corrupt_spans(
        _chunk(ids, rng, most), rng, vocab_size, NOISE_DENSITY, MEAN_SPAN
    )


def continued(ids, rng, inputs_length, targets_length, vocab_size):
    """A prefix and what follows, parted anywhere."""
    del vocab_size
    chunk = _chunk(ids, rng, inputs_length + targets_length - 2)
    first = max(1, len(chunk) - targets_length + 1)
    place = int(rng.integers(first, min(inputs_length - 1, len(chunk) - 1) + 1))
    return _ended(chunk[:place]), _ended(chunk[place:])


def infilled(ids, rng, inputs_length, targets_length, vocab_size):
    """Spans hidden by sentinels, and the whole text (after BART, Lewis et al. 2020)."""
    chunk = _chunk(ids, rng, min(inputs_length, targets_length) - 1)
    inputs, _ = span_corruption.corrupt_spans(
        chunk, rng, vocab_size, NOISE_DENSITY, MEAN_SPAN
    )
    return inputs, _ended(chunk)


def restored(ids, rng, inputs_length, targets_length, vocab_size):
    """Tokens left out, and the whole text (after BART)."""
    del vocab_size
    chunk = _chunk(ids, rng, min(inputs_length, targets_length) - 1)
    return _ended(chunk[rng.random(len(chunk)) >= NOISE_DENSITY]), _ended(chunk)


def _chunk(ids: np.ndarray, rng: np.random.Generator, most: int) -> np.ndarray:
    start = int(rng.integers(0, max(1, len(ids) - most + 1)))
    return ids[start : start + most]


def _ended(ids: np.ndarray) -> np.ndarray:
    return np.append(ids, span_corruption.EOS_ID)


def apply(
    ds: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.Feature],
    objective: Objective,
) -> tf.data.Dataset:
    """Makes inputs and targets of tokenised ``targets``, by seqio's seeds."""
    room = sequence_length["inputs"], sequence_length["targets"]
    vocab_size = output_features["targets"].vocabulary.vocab_size

    def make(ids, seed):
        rng = np.random.default_rng(np.asarray(seed).astype(np.uint32))
        inputs, targets = objective(ids, rng, *room, vocab_size)
        return inputs.astype(np.int32), targets.astype(np.int32)

    @seqio.map_over_dataset(num_seeds=1)
    def convert(row, seed):
        inputs, targets = tf.numpy_function(
            make, [row["targets"], seed], (tf.int32, tf.int32)
        )
        return {
            "inputs": tf.ensure_shape(inputs, (None,)),
            "targets": tf.ensure_shape(targets, (None,)),
        }

    mapped: Any = convert  # seqio gives the seed.
    return mapped(ds.filter(lambda row: tf.size(row["targets"]) >= SHORTEST))


OBJECTIVES: Mapping[str, Objective] = {
    "span_corruption": corrupted,
    "prefix_lm": continued,
    "bart_text_infilling": infilled,
    "bart_token_deletion": restored,
}

for _vocabulary, _features in features.variants("t5"):
    for _name, _objective in OBJECTIVES.items():
        seqio.TaskRegistry.add(
            f"{_vocabulary}c4_v220_{_name}",
            source=seqio.TfdsDataSource(  # pyright: ignore[reportArgumentType]
                tfds_name="c4/en:2.2.0", splits=("train", "validation")
            ),
            preprocessors=[
                functools.partial(
                    seqio.preprocessors.rekey, key_map={"targets": "text"}
                ),
                seqio.preprocessors.tokenize,
                functools.partial(apply, objective=_objective),
            ],
            output_features=_features,
            metric_fns=[],
        )
        labels.register(f"{_vocabulary}c4_v220_{_name}", None)
