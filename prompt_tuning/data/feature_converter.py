# SPDX-License-Identifier: Apache-2.0
"""Writes the virtual tokens of soft prompts into a task's inputs.

A task may say where its prompt goes: in its ``inputs`` the id -(i + 1) stands for
position i of the row's prompt and `WHOLE_PROMPT` for all of it. Where a task says
nothing, which is the rule, the whole prompt is placed by a `Placement`. Lengths count
text tokens only; the prompt's length comes on top.
"""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from prompt_tuning.data.template import WHOLE_PROMPT, Placement
from prompt_tuning.errors import UserError
from prompt_tuning.network.prompts import Prompt, virtual_ids

# An optional feature of a row: which of several prompts is its own.
PROMPT_INDEX = "prompt_index"
# Another: the number of its group, where the loss compares groups.
GROUP_INDEX = "group_index"


class PromptFeatureConverter(seqio.EncDecFeatureConverter):
    """An encoder-decoder converter whose encoder inputs hold virtual tokens.

    An unpacked row has room for ``inputs`` text tokens and the longest prompt. A packed
    row is ``inputs`` tokens long, prompts included, and every segment in it carries its
    own. Text beyond that room is cut off its end; EOS and virtual tokens stay. Without
    prompts nothing is inserted, and positions that a task names are left out.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        vocab_size: int,
        placement: str = Placement.PREPEND,
        eos_id: int = 1,
        pack: bool = False,
        groups: bool = False,
    ):
        """Takes the prompts in the order of the `PromptBank`.

        Args:
          prompts: row i uses the prompt that its ``prompt_index`` names, 0 by default.
          vocab_size: rows of the embedding table, V.
          placement: see `Placement`.
          eos_id: the last text token that survives cutting.
          pack: whether rows hold several examples.
          groups: whether rows keep their `GROUP_INDEX`, which a packed one cannot.
        """
        # Lengths are checked here, against text tokens; the base class would count
        # virtual ones.
        kept = {GROUP_INDEX: self.FeatureSpec(dtype=tf.int32, rank=0)}
        super().__init__(
            pack=pack,
            apply_length_check=False,
            passthrough_features=kept if groups else None,
        )
        self._groups = groups
        self._ids = list(virtual_ids(prompts, vocab_size).values())
        self._placement = Placement(placement)
        self._eos_id = eos_id
        self._limit: int | None = None

    def limited_to(self, inputs_length: int) -> "PromptFeatureConverter":
        """The same converter, for callers that find out lengths themselves.

        `seqio.Evaluator` given no lengths asks for those of its longest example; this
        keeps the rows to ``inputs_length``, as in training.
        """
        limited = copy.copy(self)
        limited._limit = inputs_length
        return limited

    @property
    def prompt_length(self) -> int:
        """Length of the longest prompt, P."""
        return max((len(ids) for ids in self._ids), default=0)

    def row_length(self, inputs_length: int) -> int:
        """Encoder length of a row, T + P, or T where rows are packed."""
        if self._limit is not None:
            inputs_length = min(inputs_length, self._limit)
        return inputs_length + (0 if self.pack else self.prompt_length)

    def text_length(self, inputs_length: int) -> int:
        """Text tokens that one example may have.

        Raises:
          UserError: a packed row is shorter than its prompt.
        """
        room = self.row_length(inputs_length) - self.prompt_length
        if room < 1:
            raise UserError(
                f"packed rows of {inputs_length} tokens leave no room for text beside "
                f"a prompt of {self.prompt_length}: raise "
                "TASK_FEATURE_LENGTHS['inputs']"
            )
        return room

    def get_model_feature_lengths(
        self, task_feature_lengths: Mapping[str, int]
    ) -> Mapping[str, int]:
        return super().get_model_feature_lengths(
            self._row_lengths(task_feature_lengths)
        )

    def _row_lengths(self, lengths: Mapping[str, int]) -> dict[str, int]:
        return {**lengths, "inputs": self.row_length(lengths["inputs"])}

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        text_length = self.text_length(task_feature_lengths["inputs"])
        targets_length = task_feature_lengths["targets"]

        def insert(example):
            targets = example["targets"]
            tf.debugging.assert_less_equal(
                tf.size(targets), targets_length, message=_TARGETS_TOO_LONG
            )
            inputs = cut(example["inputs"], text_length, self._eos_id)
            row = {"inputs": self.insert(inputs, example), "targets": targets}
            if self._groups:
                row[GROUP_INDEX] = example[GROUP_INDEX]
            return row

        ds = ds.map(insert, num_parallel_calls=tf.data.AUTOTUNE)
        lengths = self._row_lengths(task_feature_lengths)
        lengths.pop(GROUP_INDEX, None)  # A number is not filled up.
        return super()._convert_features(ds, lengths)

    def insert(self, inputs: tf.Tensor, example: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Puts virtual ids into one example's cut inputs."""
        if not self._ids:
            return tf.boolean_mask(inputs, inputs >= 0)
        prompt = self._prompt_of(example)  # [P_n]
        length = tf.size(prompt)
        marked = tf.cond(
            tf.reduce_any(inputs < 0), lambda: inputs, lambda: self._mark(inputs)
        )
        # Repeat every whole-prompt mark P_n times, then number the copies.
        copies = tf.where(marked == WHOLE_PROMPT, length, 1)
        start = tf.repeat(tf.cumsum(copies, exclusive=True), copies)
        expanded = tf.repeat(marked, copies)
        position = tf.where(
            expanded == WHOLE_PROMPT,
            tf.range(tf.size(expanded)) - start,
            # ids are negated only where they are positions: -(-2**31) overflows
            -1 - tf.where(expanded == WHOLE_PROMPT, -1, expanded),
        )
        virtual = expanded < 0
        # The checks must run before the look-up, which would fail less clearly.
        checks = [
            tf.debugging.assert_less(
                tf.where(virtual, position, -1), length, message=_BEYOND_PROMPT
            ),
            tf.debugging.assert_less_equal(
                tf.reduce_sum(tf.cast(virtual, tf.int32)),
                self.prompt_length,
                message=_PROMPT_REPEATED,
            ),
        ]
        with tf.control_dependencies(checks):
            position = tf.where(virtual, position, 0)
        return tf.where(virtual, tf.gather(prompt, position), expanded)

    def _mark(self, inputs: tf.Tensor) -> tf.Tensor:
        mark = tf.constant([WHOLE_PROMPT], tf.int32)
        at = {
            Placement.PREPEND: 0,
            Placement.AFTER_BOS: 1,
            Placement.APPEND: tf.size(inputs),
        }[self._placement]
        return tf.concat([inputs[:at], mark, inputs[at:]], axis=0)

    def _prompt_of(self, example: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """The ids of the row's own prompt: [P_n]."""
        index = tf.cast(example.get(PROMPT_INDEX, 0), tf.int32)
        checks = [
            tf.debugging.assert_less(index, len(self._ids), message=_NO_SUCH_PROMPT),
            tf.debugging.assert_non_negative(index, message=_NO_SUCH_PROMPT),
        ]
        with tf.control_dependencies(checks):
            index = tf.identity(index)
        lengths = tf.constant([len(ids) for ids in self._ids])
        start = tf.cumsum(lengths, exclusive=True)[index]
        ids = tf.constant(np.concatenate(self._ids), tf.int32)
        return ids[start : start + lengths[index]]


# What a row can be refused for; `cure` tells the user about them.
_TARGETS_TOO_LONG = "targets too long"
_BEYOND_PROMPT = "position beyond the prompt"
_PROMPT_REPEATED = "more virtual tokens than the prompt has"
_NO_SUCH_PROMPT = "no such prompt"
_CURES = {
    _TARGETS_TOO_LONG: "targets are longer than TASK_FEATURE_LENGTHS['targets']: "
    "raise it",
    _BEYOND_PROMPT: "the inputs name a position beyond the end of the prompt: raise "
    "PROMPT_LENGTH or change the template",
    _PROMPT_REPEATED: "the inputs name more positions than the prompt has: name each "
    "position once",
    _NO_SUCH_PROMPT: "a row's prompt_index names a prompt that does not exist: give "
    "as many prompts as the task uses",
}


def cure(error: tf.errors.InvalidArgumentError) -> str | None:
    """What the user can do about a row that a converter refused, if it is one."""
    text = str(error)
    return next((cure for mark, cure in _CURES.items() if mark in text), None)


def cut(inputs: tf.Tensor, text_length: int, eos_id: int) -> tf.Tensor:
    """Cuts the text of one example to ``text_length`` tokens.

    Text goes off the end; a final EOS stays, and so do all virtual (negative) ids.
    """
    is_text = inputs >= 0
    rank = tf.cumsum(tf.cast(is_text, tf.int32))  # text tokens up to here
    total = tf.reduce_max(tf.concat([[0], rank], axis=0))
    is_last = is_text & (rank == total)
    ends = is_last & (inputs == eos_id)
    kept = text_length - tf.cast(tf.reduce_any(ends), tf.int32)
    fits = total <= text_length
    return tf.boolean_mask(
        inputs, tf.logical_not(is_text) | fits | (rank <= kept) | ends
    )
