# SPDX-License-Identifier: Apache-2.0
"""Prompts of tokens: found by gradients, or nearest to the rows of a soft prompt.

The search is that of HotFlip (Ebrahimi et al. 2018, https://arxiv.org/abs/1712.06751) as
AutoPrompt uses it (Shin et al. 2020, https://arxiv.org/abs/2010.15980). The loss's gradient
at the embedding of one position says to first order what each piece of the vocabulary would
change there, ``(E_v - E_now) . g``. The most promising pieces are scored truly on the same
batch, and the best stays if it is better on the validation rows, too. The prompt is one of
table rows at virtual positions, and so answers as any other does.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning import files, prompt_names, report, trees
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.data import in_memory
from prompt_tuning.data.label_sets import LabelNames
from prompt_tuning.data.splits import TRAIN, VALIDATION
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.inference import prompt_view
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.library import checks, models, rows
from prompt_tuning.library.predictor import Predictor
from prompt_tuning.library.rows import Rows
from prompt_tuning.library.tuned_prompt import TunedPrompt
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import Transformer
from prompt_tuning.types import Array, Batch

SWAPS, NEAREST = "token_swaps", "nearest_tokens"
STATE = "token_swaps.json"
# Encoder positions of a row, those of the prompt included.
LONGEST = 1024


@dataclasses.dataclass(frozen=True)
class Swapped:
    """What `search` ends with.

    Attributes:
      prompt: the tokens' rows as a prompt, to be saved, predicted with and served.
      ids: the tokens [P].
      text: what they read as; a tokenizer may cut it otherwise.
      before: the mean loss of a target token on the validation rows at the start.
      after: likewise at the end.
      kept: swaps that stayed.
      forward_passes: rows that encoder and decoder read, also before an interruption.
      backward_passes: rows that a gradient was taken of.
    """

    prompt: TunedPrompt
    ids: tuple[int, ...]
    text: str
    before: float
    after: float
    kept: int
    forward_passes: int
    backward_passes: int


@dataclasses.dataclass
class _State:
    """How far a search has come."""

    ids: list[int]
    before: float
    value: float
    step: int = 0
    kept: int = 0
    forward: int = 0
    backward: int = 0


def search(
    base: BaseModel,
    train: Any,
    validation: Any,
    *,
    template: str | None = None,
    labels: LabelNames | None = None,
    length: int = 5,
    steps: int = 100,
    candidates: int = 16,
    batch_size: int = 32,
    seed: int = 0,
    target_column: str = "label",
    name: str = "tokens",
    folder: files.Path | None = None,
) -> Swapped:
    """Swaps tokens of a prompt as long as the loss falls, by gradients.

    Args:
      base: what `load` gave.
      train: rows that gradients and candidates are measured on, see `tune`.
      validation: rows on which a swap must be better to stay.
      template: the inputs, ``{column}`` standing for a value and ``{prompt}`` for the
        tokens, which else stand in front.
      labels: the answers to choose from, see `tune`; None is free text.
      length: P, tokens of the prompt. It starts as common pieces, drawn by the seed.
      steps: swaps that are tried; each takes one position, drawn at random.
      candidates: pieces that are scored truly in a step.
      batch_size: rows of a batch.
      seed: of the start, the batches and the positions.
      target_column: of dicts, frames and data sets, the column of the answer.
      name: what the prompt is called.
      folder: keeps how far the search has come after each step, so that the same call
        goes on and ends as if it had not been interrupted.

    Raises:
      UserError: rows or values are unsound, or the folder holds another search.
    """
    vocabulary = models.vocabulary_of(base)
    labels = rows.found_labels(train, target_column, labels)
    names = rows.label_names(labels)
    for given, what in (
        (length, "length"),
        (steps, "steps"),
        (batch_size, "batch_size"),
    ):
        checks.whole(given, what)
    checks.whole(candidates, "candidates")
    checks.whole(seed, "seed", 0, 2**32 - 1)
    read = functools.partial(
        rows.read, template=template, target_column=target_column, labels=labels
    )
    table = np.asarray(base.table, np.float32)
    card = {
        "method": SWAPS,
        "length": length,
        "width": table.shape[1],
        "template": template,
        "placement": "prepend",
        "labels": names,
        "vocabulary": vocabulary.name,
        "vocabulary_fingerprint": vocabulary.fingerprint,
        "base_model": base.identity,
    }
    task = _Task(base, prompt_names.check(name), card, length, batch_size)
    parts = {
        TRAIN: task.arrays(read(train, TRAIN)),
        VALIDATION: task.arrays(read(validation, VALIDATION)),
    }
    allowed = _words(vocabulary)
    values = (length, candidates, batch_size, seed)
    key = _digest([base.fingerprint, card["template"], names, values, *parts.values()])
    path = None if folder is None else pathlib.Path(folder) / STATE
    state = _resumed(path, key)
    if state is None:
        start = np.random.default_rng([seed, 0]).choice(
            allowed[:1000], length, replace=len(allowed) < length
        )
        first = task.loss(table[start], parts[VALIDATION])
        state = _State([int(i) for i in start], first, first)
        state.forward += len(parts[VALIDATION]["encoder_input_tokens"])
    while state.step < steps:
        _step(state, task, parts, table, allowed, candidates, seed)
        if path is not None:
            files.write_json(path, {"key": key, **dataclasses.asdict(state)})
    text = vocabulary.decode(state.ids)
    report.say(
        f"{state.kept} of {state.step} swaps stayed, by {state.forward} forward and "
        f"{state.backward} backward passes of a row: the loss is {state.value:.4f}, it was "
        f"{state.before:.4f}; the tokens read {text!r}"
    )
    card |= {
        "tokens": state.ids,
        "text": text,
        "recipe": {"steps": state.step, "candidates": candidates, "seed": seed},
        "metric": {"negative_loss": -state.value},
        "versions": report.versions(),
    }
    return Swapped(
        TunedPrompt(name, table[state.ids], card),
        tuple(state.ids),
        text,
        state.before,
        state.value,
        state.kept,
        state.forward,
        state.backward,
    )


def nearest(
    prompt: TunedPrompt, base: BaseModel, name: str | None = None
) -> TunedPrompt:
    """The prompt whose rows are those of the tokens nearest to a soft prompt's, by cosine.

    Args:
      prompt: [P, H], tuned.
      base: the model that it was tuned on.
      name: what the projection is called; by default as the prompt, with ``_tokens``.

    Raises:
      UserError: the prompt has no rows, has more than rows, or is of another width.
    """
    vocabulary = models.vocabulary_of(base)
    table = np.asarray(base.table, np.float32)
    if prompt.slots or not len(prompt.array):
        raise UserError(
            f"{prompt.name} is not a prompt of rows alone, so it has no nearest tokens"
        )
    if prompt.array.shape[1] != table.shape[1]:
        raise UserError(
            f"{prompt.name} has width {prompt.array.shape[1]}, the model {table.shape[1]}: "
            "give the model that it was tuned on"
        )
    found, _ = prompt_view.nearest_tokens(
        prompt.array, table[: vocabulary.vocab_size], 1
    )
    ids = found[:, 0].tolist()
    card = {
        **prompt.card,
        "method": NEAREST,
        "tokens": ids,
        "text": vocabulary.decode(ids),
        "projected_from": prompt.card.get("method"),
        "metric": {},
    }
    name = prompt_names.check(f"{prompt.name}_tokens" if name is None else name)
    return TunedPrompt(name, table[ids], card)


def accuracy(prompt: TunedPrompt, base: BaseModel, asked: Rows) -> float:
    """The share of rows that a prompt answers with the very target, in percent."""
    said = Predictor(base, prompt)([dict(row) for row in asked.columns])
    pairs = zip(said, asked.answers, strict=True)
    right = [row["answer"].strip() == target.strip() for row, target in pairs]
    return 100 * float(np.mean(right))


def _step(
    state: _State,
    task: "_Task",
    parts: Mapping[str, dict[str, np.ndarray]],
    table: np.ndarray,
    allowed: np.ndarray,
    candidates: int,
    seed: int,
) -> None:
    """Tries to swap one token."""
    state.step += 1
    # Of the step alone, so that a search that was interrupted draws the same.
    random = np.random.default_rng([seed, state.step])
    count = len(parts[TRAIN]["encoder_input_tokens"])
    chosen = random.choice(count, min(task.batch_size, count), replace=False)
    batch = {name: array[chosen] for name, array in parts[TRAIN].items()}
    position = int(random.integers(len(state.ids)))
    value, gradient = task.gradient(table[state.ids], batch)
    estimate = table[allowed] @ gradient[position]
    order = allowed[np.argsort(estimate, kind="stable")]
    promising = order[order != state.ids[position]][:candidates]
    scored = []
    for piece in promising.tolist():
        ids = [*state.ids[:position], piece, *state.ids[position + 1 :]]
        scored.append((task.loss(table[ids], batch), ids))
    state.backward += len(chosen)
    state.forward += len(chosen) * (1 + len(scored))
    best, ids = min(scored, key=lambda pair: pair[0])
    if best >= value:
        return
    state.forward += len(parts[VALIDATION]["encoder_input_tokens"])
    held_out = task.loss(table[ids], parts[VALIDATION])
    if held_out < state.value:
        state.ids, state.value = ids, held_out
        state.kept += 1


class _Task:
    """Rows as arrays, and the loss of a prompt's rows on them."""

    def __init__(
        self,
        base: BaseModel,
        name: str,
        card: Mapping[str, Any],
        length: int,
        batch_size: int,
    ):
        self.batch_size = batch_size
        self._vocabulary = models.vocabulary_of(base)
        self._size = base.config.vocab_size
        nothing = np.zeros((length, base.config.emb_dim), np.float32)
        store = PromptStore(base, length)
        self._encoding = store.make(name, nothing, card, self._vocabulary).encoding
        model = Model(Transformer(base.config, (Prompt(name, length),)))
        self._params = base.params

        def loss(prompt: Array, params: Any, batch: Batch) -> Array:
            own = trees.merge(params, {"prompts": {name: prompt}})
            _, metrics = model.loss(own, batch)
            return metrics["token_loss"] / jnp.maximum(metrics["weight"], 1.0)

        self._loss = jax.jit(lambda *given: loss(*given))
        self._gradient = jax.jit(jax.value_and_grad(loss))

    def arrays(self, asked: Rows) -> dict[str, np.ndarray]:
        """Rows padded to the longest: encoder [N, T], decoder [N, S]."""
        eos = self._vocabulary.eos_id
        inputs = [self._encoding.encode(row, LONGEST) for row in asked.columns]
        inputs = [np.where(ids < 0, self._size - 1 - ids, ids) for ids in inputs]
        targets = [
            np.array([*self._vocabulary.encode(text), eos], np.int32)
            for text in asked.answers
        ]
        target = in_memory.padded(targets, max(map(len, targets)))
        return {
            "encoder_input_tokens": in_memory.padded(inputs, max(map(len, inputs))),
            "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": target,
            "decoder_loss_weights": (target > 0).astype(np.float32),
        }

    def gradient(
        self, prompt: np.ndarray, batch: Mapping[str, np.ndarray]
    ) -> tuple[float, np.ndarray]:
        """The mean loss of a target token, and its gradient at the prompt's rows."""
        value, gradient = self._gradient(prompt, self._params, batch)
        return float(value), np.asarray(gradient)

    def loss(self, prompt: np.ndarray, part: Mapping[str, np.ndarray]) -> float:
        """The mean loss of a target token on all rows of a part."""
        total = weight = 0.0
        for batch in _batches(part, self.batch_size):
            own = float(np.sum(batch["decoder_loss_weights"]))
            total += own * float(self._loss(prompt, self._params, batch))
            weight += own
        return total / weight


def _batches(
    part: Mapping[str, np.ndarray], size: int
) -> Iterator[dict[str, np.ndarray]]:
    """All rows in their order; the last batch is filled up with rows of no weight."""
    count = len(part["encoder_input_tokens"])
    size = min(size, count)
    for start in range(0, count, size):
        own = {name: array[start : start + size] for name, array in part.items()}
        missing = size - len(own["encoder_input_tokens"])
        yield {name: np.pad(x, ((0, missing), (0, 0))) for name, x in own.items()}


def _words(vocabulary: Vocabulary) -> np.ndarray:
    """The pieces that read as something: no padding, sentinels, or marks of the model."""
    marks = (0, vocabulary.eos_id, vocabulary.unk_id)
    texts = {
        piece: vocabulary.decode([piece]).strip()
        for piece in range(vocabulary.vocab_size)
        if piece not in marks
    }
    found = [x for x, text in texts.items() if text and not text.startswith("<")]
    return np.array(found)


def _digest(values: Any) -> str:
    """What tells a search from others."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, dict):
            for array in value.values():
                digest.update(np.ascontiguousarray(array).tobytes())
        else:
            digest.update(json.dumps(value).encode())
    return digest.hexdigest()[:32]


def _resumed(path: pathlib.Path | None, key: str) -> _State | None:
    """How far the search of a folder has come.

    Raises:
      UserError: it is another one.
    """
    if path is None or not path.is_file():
        return None
    found = files.read_json(path)
    if found.pop("key", None) != key:
        raise UserError(
            f"{path} is of a search with other rows or values: give another folder"
        )
    return _State(**found)
