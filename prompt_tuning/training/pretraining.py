# SPDX-License-Identifier: Apache-2.0
"""Pre-training batches from arrays of token ids, without TensorFlow.

Four kinds of rows share a batch: span corruption (Raffel et al. 2020, section 3.1.4),
prefix language modelling (the LM adaptation of Lester et al. 2021, section 3.3), packed
sentences with a teacher's vectors (see `distillation`) and packed labelled examples,
T5 1.0's supervised share. A batch depends on the seed and the
step alone, so that a resumed run sees what an uninterrupted one would have seen.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from prompt_tuning import trees
from prompt_tuning.data.span_corruption import (
    EOS_ID,
    corrupt_spans,
    span_corruption_length,
)
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.training import token_arrays
from prompt_tuning.training.distillation import VECTORS, Sentences
from prompt_tuning.types import Params

# Sentences shorter than this are shown whole: a span hidden would take their sense.
SHORTEST_CORRUPTED = 6
# No row holds more sentences with vectors than one for so many encoder positions.
POSITIONS_PER_VECTOR = 8

# Inputs, targets, and the number of the vector that goes with them or -1.
Example = tuple[np.ndarray, np.ndarray, int]
Given = TypeVar("Given")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Labelled examples as ragged arrays, as `scripts/mini/prepare.py` writes them.

    Attributes:
      inputs: token ids of all inputs, end to end, each with its EOS.
      input_offsets: where example i starts, and the end: [N + 1].
      targets: token ids of all targets, likewise.
      target_offsets: [N + 1].
      task: index into ``task_names`` for each example: [N].
      task_names: names of the tasks.
    """

    inputs: np.ndarray
    input_offsets: np.ndarray
    targets: np.ndarray
    target_offsets: np.ndarray
    task: np.ndarray
    task_names: np.ndarray

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Labelled":
        """Reads an ``.npz`` file.

        Raises:
          UserError: the file lacks an array.
        """
        with np.load(path) as file:
            names = [field.name for field in dataclasses.fields(cls)]
            missing = [name for name in names if name not in file]
            if missing:
                raise UserError(f"{path} lacks the arrays {', '.join(missing)}")
            return cls(**{name: file[name] for name in names})

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the inputs and targets of example ``i``."""
        return (
            self.inputs[self.input_offsets[i] : self.input_offsets[i + 1]],
            self.targets[self.target_offsets[i] : self.target_offsets[i + 1]],
        )


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A stream of batches.

    Attributes:
      text: ids of the documents, each ended by EOS.
      labelled: labelled examples, or None.
      vocab_size: ids from the last one downward are the sentinels.
      batch_size: rows of a batch, B.
      inputs_length: T.
      targets_length: S.
      span_corruption: share of the rows.
      prefix_lm: share of the rows.
      distilled: share of the rows; the remaining rows are labelled.
      sentences: what distilled rows hold, or None.
      task_weights: how often each task is drawn; tasks left out are not drawn.
      noise_density: share of tokens that span corruption hides.
      mean_span_length: mean length of a hidden span.
      seed: seed of everything random.
    """

    text: np.ndarray
    labelled: Labelled | None
    vocab_size: int
    batch_size: int
    inputs_length: int = 128
    targets_length: int = 32
    span_corruption: float = 0.25
    prefix_lm: float = 0.25
    distilled: float = 0.0
    sentences: Sentences | None = None
    task_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    noise_density: float = 0.15
    mean_span_length: float = 3.0
    seed: int = 0

    def __post_init__(self):
        parts = (self.span_corruption, self.prefix_lm, self.distilled)
        shares = sum(parts)
        if shares > 1.0 + 1e-9 or min(parts) < 0:
            raise UserError(
                f"span_corruption={self.span_corruption}, prefix_lm={self.prefix_lm} "
                f"and distilled={self.distilled} must not be negative and add up to 1 "
                "at most"
            )
        if self.distilled and self.sentences is None:
            raise UserError("distilled rows need sentences with vectors")
        if self.num_labelled:
            if self.labelled is None:
                raise UserError(
                    "the shares leave rows for labelled examples but there are none: "
                    "give a labelled file or let the shares add up to 1"
                )
            names = set(self.labelled.task_names.tolist())
            unknown = sorted(set(self.task_weights) - names)
            if unknown or not self.task_weights:
                raise UserError(
                    f"task_weights: unknown {unknown or 'none given'}; the labelled "
                    f"tasks are {', '.join(sorted(names))}"
                )
            self._check_lengths()
        room = self.inputs_length + self.targets_length
        if len(self.text) <= 2 * room:
            raise UserError(
                f"the text has {len(self.text)} tokens, rows take up to {room}: give "
                "more text or shorter rows"
            )

    def _check_lengths(self) -> None:
        """Refuses labelled examples that no row has room for."""
        labelled = self.labelled
        if labelled is None:
            return
        drawn = np.isin(labelled.task_names[labelled.task], list(self.task_weights))
        for kind, room in (
            ("input", self.inputs_length),
            ("target", self.targets_length),
        ):
            lengths = np.diff(getattr(labelled, f"{kind}_offsets"))[drawn]
            if (longest := int(lengths.max(initial=0))) > room:
                raise UserError(
                    f"{int(np.sum(lengths > room))} labelled {kind}s are longer than "
                    f"{room} tokens: set {kind.upper()}S_LENGTH={longest} or more"
                )

    def batches(self, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Batches from step ``start`` on, without end."""
        pools = self._pools()
        step = start
        while True:
            yield self.batch(step, pools)
            step += 1

    def batch(self, step: int, pools=None) -> dict[str, np.ndarray]:
        """The batch of one step: features as `Model` takes them, packed."""
        rng = np.random.default_rng((self.seed, step))
        num_span, num_prefix, num_distilled, num_labelled = self.rows_by_kind
        rows: list[list[Example]] = []
        rows += [[(*self._span_corruption(rng), -1)] for _ in range(num_span)]
        rows += [[(*self._prefix_lm(rng), -1)] for _ in range(num_prefix)]
        rows += self._fill(num_distilled, lambda: self._distilled(rng))
        if num_labelled:
            examples, weights = pools or self._pools()
            draw = lambda: self._labelled(rng, examples, weights)
            rows += self._fill(num_labelled, draw)
        batch = pack(rows, self.inputs_length, self.targets_length)
        if num_distilled:
            batch[VECTORS] = self._vectors(rows)
        return batch

    @property
    def rows_by_kind(self) -> tuple[int, int, int, int]:
        """Rows of span corruption, prefix LM, distilled and labelled ones."""
        shares = (self.span_corruption, self.prefix_lm, self.distilled)
        first, second, third = (round(self.batch_size * share) for share in shares)
        return first, second, third, self.batch_size - first - second - third

    @property
    def num_labelled(self) -> int:
        """Labelled rows of a batch."""
        return self.rows_by_kind[-1]

    @property
    def num_vectors(self) -> int:
        """Places for vectors in each row, M."""
        return self.inputs_length // POSITIONS_PER_VECTOR

    def _vectors(self, rows: list[list[Example]]) -> np.ndarray:  # [B, M, D]
        values = self._some(self.sentences).vectors
        found = np.zeros((len(rows), self.num_vectors, values.shape[1]), np.float32)
        for r, row in enumerate(rows):
            for place, (_, _, number) in enumerate(row):
                if number >= 0:
                    found[r, place] = values[number]
        return found

    def _chunk(self, rng: np.random.Generator, length: int) -> np.ndarray:
        start = rng.integers(0, len(self.text) - length)
        return self.text[start : start + length].astype(np.int32)

    def _span_corruption(self, rng) -> tuple[np.ndarray, np.ndarray]:
        length = span_corruption_length(
            self.inputs_length,
            self.targets_length,
            self.noise_density,
            self.mean_span_length,
        )
        return corrupt_spans(
            self._chunk(rng, length),
            rng,
            self.vocab_size,
            self.noise_density,
            self.mean_span_length,
        )

    def _prefix_lm(self, rng) -> tuple[np.ndarray, np.ndarray]:
        split = int(rng.integers(self.inputs_length // 4, self.inputs_length))
        chunk = self._chunk(rng, split + self.targets_length)
        return chunk[:split], chunk[split:]

    def _pools(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Examples of every drawn task, and the tasks' probabilities."""
        if self.labelled is None:
            return [], np.zeros(0)
        names = self.labelled.task_names.tolist()
        pools = [
            np.flatnonzero(self.labelled.task == names.index(name))
            for name in self.task_weights
        ]
        weights = np.array(list(self.task_weights.values()), np.float64)
        return pools, weights / weights.sum()

    @staticmethod
    def _some(given: Given | None) -> Given:
        """What rows of a kind are drawn from, which `__post_init__` saw to."""
        if given is None:
            raise ValueError("rows are asked for that nothing is given for")
        return given

    def _labelled(self, rng, examples: list[np.ndarray], weights) -> Example:
        pool = examples[rng.choice(len(examples), p=weights)]
        inputs, targets = self._some(self.labelled).example(
            pool[rng.integers(len(pool))]
        )
        return inputs.astype(np.int32), targets.astype(np.int32), -1

    def _distilled(self, rng) -> Example:
        sentences = self._some(self.sentences)
        number = int(rng.choice(sentences.chosen))
        ids = sentences.sentence(number)
        if len(ids) >= SHORTEST_CORRUPTED:
            noise = (self.noise_density, self.mean_span_length)
            return *corrupt_spans(ids, rng, self.vocab_size, *noise), number
        return np.append(ids, EOS_ID), np.zeros(0, np.int32), number

    def _fill(self, num_rows: int, draw: Callable[[], Example]) -> list[list[Example]]:
        """Fills rows first-fit, from a draw somewhat larger than they hold."""
        rows: list[list[Example]] = [[] for _ in range(num_rows)]
        room = np.tile([self.inputs_length, self.targets_length], (num_rows, 1))
        misses = 0
        while num_rows and misses < 8:
            example = draw()
            size = np.array([len(example[0]), len(example[1])])
            # Places for vectors run out only where sentences are very short.
            fits = [
                r
                for r in np.flatnonzero((room >= size).all(axis=1))
                if example[2] < 0 or len(rows[r]) < self.num_vectors
            ]
            if not fits:
                misses += 1
                continue
            rows[fits[0]].append(example)
            room[fits[0]] -= size
        return rows


def pack(rows: list[list[Example]], inputs_length: int, targets_length: int) -> dict:
    """Lays each row's examples end to end, with segment ids from 1 on.

    Returns:
      ``encoder_input_tokens``, ``encoder_segment_ids`` [B, T] and
      ``decoder_input_tokens``, ``decoder_target_tokens``, ``decoder_segment_ids``,
      ``decoder_loss_weights`` [B, S].
    """
    size = len(rows)
    batch = {
        "encoder_input_tokens": np.zeros((size, inputs_length), np.int32),
        "encoder_segment_ids": np.zeros((size, inputs_length), np.int32),
        "decoder_input_tokens": np.zeros((size, targets_length), np.int32),
        "decoder_target_tokens": np.zeros((size, targets_length), np.int32),
        "decoder_segment_ids": np.zeros((size, targets_length), np.int32),
    }
    for r, row in enumerate(rows):
        i = j = 0
        for segment, (inputs, targets, *_) in enumerate(row, start=1):
            end_i, end_j = i + len(inputs), j + len(targets)
            batch["encoder_input_tokens"][r, i:end_i] = inputs
            batch["encoder_segment_ids"][r, i:end_i] = segment
            batch["decoder_target_tokens"][r, j:end_j] = targets
            # Every example starts from padding (id 0), T5's beginning of sequence.
            batch["decoder_input_tokens"][r, j + 1 : end_j] = targets[:-1]
            batch["decoder_segment_ids"][r, j:end_j] = segment
            i, j = end_i, end_j
    batch["decoder_loss_weights"] = (batch["decoder_target_tokens"] > 0).astype(  # pyright: ignore[reportArgumentType]
        np.float32
    )
    return batch


def load(folder: str | pathlib.Path, suffix: str = "", **kwargs: Any) -> Mixture:
    """The mixture over ``text{suffix}.npy`` and ``labelled{suffix}.npz`` of a folder.

    Args:
      folder: where the arrays lie; the labelled file may be missing.
      suffix: '' for the training part, '_validation' for the held-out part.
      **kwargs: the other attributes of `Mixture`.

    Raises:
      UserError: there is no text, or see `token_arrays`.
    """
    text_path = pathlib.Path(folder) / f"text{suffix}.npy"
    labelled_path = pathlib.Path(folder) / f"labelled{suffix}.npz"
    size = kwargs["vocab_size"]
    text = token_arrays.read(text_path, size)
    labelled = None
    if labelled_path.exists():
        labelled = Labelled.load(labelled_path)
        for kind in ("input", "target"):
            ids, offsets = (
                getattr(labelled, f"{kind}{part}") for part in ("s", "_offsets")
            )
            token_arrays.check(ids, f"{kind}s of {labelled_path}", size)
            token_arrays.check_offsets(
                offsets, len(ids), f"{kind}_offsets of {labelled_path}"
            )
    sentences = None
    if kwargs.get("distilled"):
        path = pathlib.Path(folder) / "sentences.npz"
        sentences = Sentences.load(path, held_out=bool(suffix))
        token_arrays.check(sentences.ids, f"ids of {path}", size)
    return Mixture(text, labelled, sentences=sentences, **kwargs)


def held_out_metrics(model: Model, mixture: Mixture, num_batches: int = 4):
    """A function of (tuned, frozen) leaves that gives held-out metrics.

    Token accuracy of each kind of row: higher is better for all, so that their mean may
    choose the best step.
    """
    evaluate = jax.jit(lambda params, rows: model.loss(params, rows)[1])
    names = ("span_corruption", "prefix_lm", "distilled", "labelled")
    kinds, start = {}, 0
    for name, count in zip(names, mixture.rows_by_kind, strict=True):
        kinds[name] = slice(start, start + count)
        start += count

    def metrics(tuned: Params, frozen: Params) -> dict[str, float]:
        params = trees.merge(tuned, frozen)
        batches = [mixture.batch(step) for step in range(num_batches)]
        values = {}
        for kind, part in kinds.items():
            if part.start == part.stop:
                continue
            sums = [
                evaluate(params, {name: rows[part] for name, rows in batch.items()})
                for batch in batches
            ]
            correct = sum(int(s["correct"]) for s in sums)
            # Sentences that are all too short to be corrupted have no targets.
            weight = max(sum(int(s["weight"]) for s in sums), 1)
            values[f"{kind}_accuracy"] = correct / weight
            if kind == "distilled":
                cosine = sum(float(s["cosine"]) for s in sums)
                values["cosine"] = cosine / sum(float(s["sentences"]) for s in sums)
        return values

    return metrics
