# SPDX-License-Identifier: Apache-2.0
"""What one prompt is worth to another task or to another model.

A prompt can be the start of another task's (``pt.tune(..., init="saved:PATH")``; SPoT, Vu
et al. 2022, https://arxiv.org/abs/2110.07904), and the nearest of many is a good one to
start from. What tasks added to their starts can be summed (task prompt vectors, Belanec et
al. 2024, https://arxiv.org/abs/2408.01119). And a prompt of one model can be carried to
another that has the same vocabulary (Lester et al. 2022, https://arxiv.org/abs/2208.05577).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.errors import UserError
from prompt_tuning.library.models import vocabulary_of
from prompt_tuning.library.tuned_prompt import TunedPrompt

# The pieces that recycling learns from: the most common are left out, since they are no
# words.
SKIPPED, WORDS = 1000, 4000


def similarity(
    one: TunedPrompt, other: TunedPrompt, by: Literal["mean", "pairs"] = "mean"
) -> float:
    """How alike two tasks are by their prompts, in [-1, 1] (SPoT).

    Args:
      one: a prompt.
      other: another of the same model.
      by: 'mean', the cosine of the two mean rows; 'pairs', the mean cosine of all pairs
        of rows.

    Raises:
      UserError: they are of two models, or there is no such measure.
    """
    _check_same_model([one, other])
    if by == "mean":
        rows = [prompt.array.mean(axis=0, keepdims=True) for prompt in (one, other)]
    elif by == "pairs":
        rows = [prompt.array for prompt in (one, other)]
    else:
        raise UserError(f"by={by!r} is not 'mean' or 'pairs'")
    return float(np.mean(_unit(rows[0]) @ _unit(rows[1]).T))


def nearest(
    prompt: TunedPrompt,
    candidates: Sequence[TunedPrompt],
    by: Literal["mean", "pairs"] = "mean",
) -> list[tuple[TunedPrompt, float]]:
    """The candidates with their `similarity` to a prompt, the nearest first.

    Raises:
      UserError: see `similarity`.
    """
    found = [(each, similarity(prompt, each, by)) for each in candidates]
    return sorted(found, key=lambda pair: -pair[1])


def add_tasks(
    start: TunedPrompt,
    tasks: Sequence[tuple[TunedPrompt, TunedPrompt]],
    scale: float = 1.0,
) -> TunedPrompt:
    """A start moved by what each task added to its own: ``P + scale * sum(T_i - S_i)``.

    Args:
      start: P, whose name and card the result keeps.
      tasks: (tuned prompt T_i, the prompt S_i that it started from), all as long as P.
      scale: of the sum.

    Raises:
      UserError: they are of several models or lengths, or there is no task.
    """
    everyone = [start, *(prompt for pair in tasks for prompt in pair)]
    if not tasks:
        raise UserError("tasks is empty: give (tuned prompt, its start) of one or more")
    _check_same_model(everyone)
    lengths = {len(prompt.array) for prompt in everyone}
    if len(lengths) > 1:
        raise UserError(
            f"prompts of {', '.join(map(str, sorted(lengths)))} rows cannot be added: "
            "tune all at one length"
        )
    moved = sum(tuned.array - own_start.array for tuned, own_start in tasks)
    return _made(start, start.array + np.float32(scale) * moved)


def recycle(
    prompt: TunedPrompt,
    source: BaseModel,
    target: BaseModel,
    how: Literal["linear", "mixture", "nearest"] = "linear",
) -> TunedPrompt:
    """A prompt for another model, made without its examples.

    Args:
      prompt: the prompt, tuned on ``source``.
      source: its model.
      target: another of the same vocabulary; its width may differ.
      how: 'linear', the map that takes rows of the one embedding table to those of the
        other; 'mixture', each row as a mixture of the one's rows, mixed of the other's;
        'nearest', the piece that is nearest to a row by cosine.

    Raises:
      UserError: the prompt is another model's, the vocabularies differ, or there is no
        such way.
    """
    _check_prompt(prompt)
    if prompt.card.get("base_model") not in (None, source.identity):
        raise UserError(
            f"{prompt.name!r} was tuned on another model than {source.name}: give that "
            "as 'source'"
        )
    names = [vocabulary_of(model) for model in (source, target)]
    if names[0].fingerprint != names[1].fingerprint:
        raise UserError(
            f"{source.name} has the vocabulary {names[0].name}, {target.name} has "
            f"{names[1].name}: a prompt can be carried within one vocabulary only"
        )
    pieces = names[0].vocab_size
    first = min(SKIPPED, pieces // 8)
    words = slice(first, min(pieces, first + WORDS))
    ours, theirs = (np.asarray(model.table, np.float32) for model in (source, target))
    if how == "linear":
        solved = np.linalg.lstsq(ours[words], theirs[words], rcond=None)[0]
        array = prompt.array @ solved
    elif how == "mixture":
        weights = np.linalg.lstsq(ours[words].T, prompt.array.T, rcond=None)[0]
        array = weights.T @ theirs[words]
    elif how == "nearest":
        cosine = _unit(prompt.array) @ _unit(ours[:pieces]).T
        array = theirs[cosine.argmax(axis=1)]
    else:
        raise UserError(f"how={how!r} is not 'linear', 'mixture' or 'nearest'")
    return _made(prompt, array, base_model=target.identity)


def _made(prompt: TunedPrompt, array: np.ndarray, **changed) -> TunedPrompt:
    """A prompt whose metric nobody has measured yet."""
    card = {key: value for key, value in prompt.card.items() if key != "metric"}
    array = np.ascontiguousarray(array, np.float32)
    length, width = array.shape
    card = {**card, "length": length, "width": width, **changed}
    return dataclasses.replace(prompt, array=array, card=card)


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(norms, 1e-12)


def _check_prompt(prompt: TunedPrompt) -> None:
    if not isinstance(prompt, TunedPrompt):
        raise UserError(
            f"{type(prompt).__name__} is no prompt: give what load_prompt returns"
        )
    if prompt.slots:
        raise UserError(
            f"{prompt.name} holds an adapter, which changes the model's layers: only "
            "prompts are compared, added and carried"
        )


def _check_same_model(prompts: Sequence[TunedPrompt]) -> None:
    for prompt in prompts:
        _check_prompt(prompt)
    models = [prompt.card.get("base_model") for prompt in prompts]
    known = [model for model in models if model is not None]
    widths = {prompt.array.shape[1] for prompt in prompts}
    if any(model != known[0] for model in known) or len(widths) > 1:
        raise UserError(
            "the prompts were tuned on several models, whose rows have nothing to do "
            "with one another: carry them to one with recycle first"
        )
