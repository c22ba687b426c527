# SPDX-License-Identifier: Apache-2.0
"""From a seqio task or mixture to batches of numpy arrays.

The stream of global batches depends on the task, the seed and the batch size alone:
every process draws the same stream and takes its rows of each batch, so neither the
number of processes nor an interruption changes what is trained on.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from prompt_tuning.data import buckets, examples
from prompt_tuning.data.feature_converter import GROUP_INDEX, PromptFeatureConverter
from prompt_tuning.data.length_report import LengthReport
from prompt_tuning.data.split_lengths import length_report
from prompt_tuning.data.template import Placement
from prompt_tuning.errors import UserError
from prompt_tuning.network.prompts import Prompt

# TensorFlow only reads data; it would otherwise take all memory of JAX's GPU.
tf.config.set_visible_devices([], "GPU")

FEATURES = ("inputs", "targets")


class Batches(Iterator[dict[str, np.ndarray]]):
    """A stream of this process's rows of each batch.

    Attributes:
      position: number of the batch that comes next; ``load(start_batch=position)``
        continues there.
      report: what `length_report` found.
    """

    def __init__(
        self,
        ds: tf.data.Dataset,
        name: str,
        batch_size: int,
        start_batch: int,
        shard_info: tuple[int, int],
        report: LengthReport | None,
        edges: Sequence[int],
    ):
        self.position = start_batch
        self.report = report
        self._name = name
        self._batch_size = batch_size
        self._edges = edges
        process, count = shard_info
        rows = batch_size // count
        self._rows = slice(process * rows, (process + 1) * rows)
        self._iterator = ds.as_numpy_iterator()

    def __next__(self) -> dict[str, np.ndarray]:
        batch = examples.following(self._iterator, self._name)
        self.position += 1
        if self._edges:
            batch = trim(batch, self._edges)
        return {key: self._finish(key, array) for key, array in batch.items()}

    def _finish(self, key: str, array: np.ndarray) -> np.ndarray:
        if key == "decoder_loss_weights":
            array = array.astype(np.float32)
        return pad_rows(array, self._batch_size)[self._rows]


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:  # [b, ...] -> [rows, ...]
    """Fills a last batch up with rows of zeros, so that one shape is compiled."""
    return np.pad(array, ((0, rows - len(array)), *[(0, 0)] * (array.ndim - 1)))


def trim(
    batch: Mapping[str, np.ndarray], edges: Sequence[int]
) -> dict[str, np.ndarray]:  # [B, T] -> [B, edge]
    """Takes padding off the encoder's rows, up to the edge that the longest fits in.

    Targets keep their length: a loss may be divided by it.
    """
    longest = buckets.used(batch["encoder_input_tokens"]).max()
    length = buckets.fitting(int(longest), edges)
    return {
        key: array[:, :length] if key.startswith("encoder_") else array
        for key, array in batch.items()
    }


def real_rows(batch: Mapping[str, np.ndarray]) -> np.ndarray:  # [B] bool
    """Which rows hold examples; the others fill up the last batch of a split."""
    return (batch["encoder_input_tokens"] != 0).any(axis=1)


def load(
    name: str,
    *,
    split: str,
    task_feature_lengths: Mapping[str, int],
    prompts: Sequence[Prompt],
    vocab_size: int,
    batch_size: int,
    placement: str = Placement.PREPEND,
    shuffle: bool = True,
    seed: int = 0,
    num_epochs: int | None = None,
    pack: bool = False,
    module: str | None = None,
    start_batch: int = 0,
    shard_info: tuple[int, int] = (0, 1),
    examples_to_check: int = 10_000,
    edges: Sequence[int] = (),
    groups: bool = False,
) -> Batches:
    """Batches of a task or mixture.

    Args:
      name: a registered task or mixture.
      split: one of its splits.
      task_feature_lengths: text tokens of ``inputs`` (T) and ``targets`` (S). The
        prompt comes on top, except in packed rows, whose length this is.
      prompts: the prompts in the order of the model's bank; none for model tuning.
      vocab_size: rows of the model's embedding table, V.
      batch_size: rows of a batch over all processes.
      placement: see `Placement`.
      shuffle: whether to draw examples in an order that ``seed`` decides.
      seed: seed of the order and of random preprocessing.
      num_epochs: passes over the split; None goes on for ever.
      pack: whether rows hold several examples each.
      module: the module that registers the task when it is imported.
      start_batch: batches to leave out at the start, to resume a run.
      shard_info: this process's index and the number of processes.
      examples_to_check: how many examples `length_report` looks at first; 0 for none.
      edges: lengths that the encoder's rows may have, the last of them the full one.
        Each batch, over all processes, is padded to the smallest that its longest row
        fits in; none pads to the full length.
      groups: whether batches have the `GROUP_INDEX` of their rows.

    Returns:
      An iterator of dicts: ``encoder_input_tokens`` [B, T + P], and [B, S]
      ``decoder_input_tokens``, ``decoder_target_tokens``, ``decoder_loss_weights``;
      when packed also segment ids and positions.

    Raises:
      UserError: an unknown task, module or split; an empty split; targets that do not
        fit; a vocabulary that the model has no rows for.
    """
    if batch_size % shard_info[1]:
        raise UserError(
            f"BATCH_SIZE={batch_size} does not divide among {shard_info[1]} processes"
        )
    provider = examples.find(name, module)
    converter = make_converter(
        provider, task_feature_lengths, prompts, vocab_size, placement, pack, groups
    )
    report = None
    if examples_to_check:
        report = length_report(
            provider, split, task_feature_lengths, converter, examples_to_check
        )
    ds = examples.examples(
        provider, split, task_feature_lengths, shuffle, seed, num_epochs
    )
    lengths = {key: task_feature_lengths[key] for key in FEATURES}
    ds = converter(ds, lengths | ({GROUP_INDEX: 1} if groups else {}))
    ds = ds.batch(batch_size)
    ds = ds.skip(start_batch).prefetch(tf.data.AUTOTUNE)
    return Batches(ds, name, batch_size, start_batch, shard_info, report, edges)


def make_converter(
    provider: examples.Provider,
    lengths: Mapping[str, int],
    prompts: Sequence[Prompt],
    vocab_size: int,
    placement: str = Placement.PREPEND,
    pack: bool = False,
    groups: bool = False,
) -> PromptFeatureConverter:
    """The converter of a task's rows, for the model at hand; arguments as of `load`.

    Raises:
      UserError: the lengths, the task's features or its vocabulary do not fit.
    """
    if set(lengths) != set(FEATURES) or min(lengths.values()) < 1:
        raise UserError(
            f"TASK_FEATURE_LENGTHS={dict(lengths)} must give 'inputs' and 'targets' a "
            "length of 1 or more, and nothing else"
        )
    missing = [key for key in FEATURES if key not in provider.output_features]
    if missing:
        raise UserError(
            f"{provider.name} has no feature {missing[0]!r}: its output features must "
            "be 'inputs' and 'targets'"
        )
    vocabularies = [provider.output_features[key].vocabulary for key in FEATURES]
    size = max(examples.vocab_size(each, provider.name) for each in vocabularies)
    if size > vocab_size:
        raise UserError(
            f"the vocabulary of {provider.name} has {size} ids but the model's table "
            f"{vocab_size} rows: use the task's variant for this model's vocabulary"
        )
    eos_id = vocabularies[0].eos_id
    return PromptFeatureConverter(
        prompts, vocab_size, placement, 1 if eos_id is None else eos_id, pack, groups
    )
