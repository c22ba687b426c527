# SPDX-License-Identifier: Apache-2.0
"""Batches that several prompts share: each one's own rows, laid one below another.

Every prompt draws its rows as if it were alone. All that mixing has to do is to move the
ids of its virtual tokens to the prompt's place in the bank, to fill shorter rows up with
padding, and to say whose each row is.
"""

import collections
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from prompt_tuning.network.prompts import Prompt, virtual_ids
from prompt_tuning.training import prefetch

Rows = Mapping[str, np.ndarray]
# So many of the last batches can be mixed again: those that are drawn ahead of a step, one
# in the thread's hands, and that of the step itself.
KEPT = prefetch.AHEAD + 2


class Mixed(Iterator[dict[str, np.ndarray]]):
    """A stream of batches, each made of a batch of every prompt's own stream.

    Beside the features of those batches it has ``prompt_index`` [B], the number of each
    row's member, and ``targets_length`` [B], the length of its targets
    before they were filled up to those of its neighbours. The stream of a bank of one
    prompt, or of none, passes as it is: a step that has no rows to tell apart is
    quicker.
    """

    def __init__(
        self,
        streams: Mapping[str, Iterator[Rows]],
        bank: Sequence[Prompt],
        vocab_size: int,
        members: Sequence[str],
        position: int = 0,
        multiple: int = 1,
    ):
        """Takes the streams by the names of their members.

        Args:
          streams: in their rows the ids from V on are positions of their one prompt.
          bank: all prompts of the network; those of several streams have their names.
          vocab_size: rows of the embedding table, V.
          members: the names of all, in the order of their numbers.
          position: the number of the streams' next batch.
          multiple: batches are filled up to a multiple of it, with rows of zeros. They
            have no target, and so no share in any prompt's loss.
        """
        ids = virtual_ids(bank, vocab_size)
        self._streams = dict(streams)
        self._alone = len(self._streams) == 1 and len(members) <= 1
        self._places = {name: number for number, name in enumerate(members)}
        self._shifts = {name: int(ids[name][0]) - vocab_size for name in ids}
        self._vocab_size = vocab_size
        self._multiple = multiple
        self._position = position
        self._last: collections.deque[dict[str, Rows]] = collections.deque(maxlen=KEPT)
        self._again: collections.deque[dict[str, Rows]] = collections.deque()

    def __next__(self) -> dict[str, np.ndarray]:
        if self._again:
            drawn = self._again.popleft()
        else:
            drawn = {name: next(rows) for name, rows in self._streams.items()}
        self._last.append(drawn)
        self._position += 1
        if self._alone:
            return dict(next(iter(drawn.values())))
        parts = [self._own(name, drawn[name]) for name in self._streams]
        return {key: self._join([part[key] for part in parts]) for key in parts[0]}

    def go_on(self, position: int, names: Collection[str]) -> None:
        """Mixes the rows of these prompts alone, from the batch of this number on.

        Batches that were drawn ahead of it are mixed anew.
        """
        while self._position > position:
            self._again.appendleft(self._last.pop())
            self._position -= 1
        for name in self._streams.keys() - set(names):
            del self._streams[name]

    def _own(self, name: str, batch: Rows) -> dict[str, np.ndarray]:
        """One prompt's rows as the network of all prompts wants them."""
        tokens = np.asarray(batch["encoder_input_tokens"])
        rows, length = np.shape(batch["decoder_target_tokens"])
        return {
            **batch,
            "encoder_input_tokens": np.where(
                tokens < self._vocab_size, tokens, tokens + self._shifts.get(name, 0)
            ),
            "prompt_index": np.full(rows, self._places[name], np.int32),
            "targets_length": np.full(rows, length, np.int32),
        }

    def _join(self, parts: Sequence[np.ndarray]) -> np.ndarray:  # [b, w], ... -> [B, W]
        """All prompts' values of a feature, shorter rows filled up with zeros."""
        rows = sum(len(part) for part in parts)
        rows += -rows % self._multiple
        widest = np.max([np.shape(part)[1:] for part in parts], axis=0).astype(int)
        joined = np.zeros((rows, *widest), np.asarray(parts[0]).dtype)
        start = 0
        for part in parts:
            own = joined[start : start + len(part)]
            own[(slice(None), *map(slice, np.shape(part)[1:]))] = part
            start += len(part)
        return joined
