# SPDX-License-Identifier: Apache-2.0
"""What a soft prompt looks like: norms, nearest tokens, redundancy.

The questions are those of Lester et al. (2021), section 7: which tokens the positions
lie next to, and how many of them lie next to the same.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import rich.console
import rich.table
import rich.text

from prompt_tuning import plots
from prompt_tuning.checkpoints import base_models, formats
from prompt_tuning.checkpoints.source import Source
from prompt_tuning.errors import UserError

if TYPE_CHECKING:
    import sentencepiece

# Tokens that are shown for each position.
NEIGHBOURS = 3
# Rows whose cosine is at least this are counted as saying the same.
ALIKE = 0.95
# Among so many tokens a label is looked for at each position: those that the paper shows.
NEAR = 5


def facts(prompt: np.ndarray) -> dict[str, str]:
    """Norms, values and redundancy of a prompt ``[P, H]``, as texts by name."""
    norms = np.linalg.norm(prompt, axis=1)
    alike = int(np.sum(np.triu(cosines(prompt, prompt), 1) >= ALIKE))
    pairs = len(prompt) * (len(prompt) - 1) // 2
    return {
        "norm of rows": f"{norms.mean():.4g} ({norms.min():.4g} to {norms.max():.4g})",
        "values": f"{prompt.min():.4g} to {prompt.max():.4g}",
        "rows alike": f"{alike} of {pairs} pairs have a cosine of {ALIKE} or more",
    }


def cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:  # [P, V]
    """Cosines of all pairs of ``[P, H]`` and ``[V, H]``; 0 for a row of zeros."""

    def unit(array: np.ndarray) -> np.ndarray:
        length = np.linalg.norm(array, axis=1, keepdims=True)
        return array / np.maximum(length, 1e-12)

    return unit(rows) @ unit(others.astype(np.float32)).T


def nearest_tokens(
    prompt: np.ndarray, table: np.ndarray, count: int = NEIGHBOURS
) -> tuple[np.ndarray, np.ndarray]:  # [P, count], [P, count]
    """Ids and cosines of the tokens nearest to every position, the nearest first.

    Args:
      prompt: ``[P, H]``.
      table: embedding table ``[V, H]``.
      count: tokens for each position.
    """
    found = cosines(prompt, table)
    ids = np.argsort(-found, axis=1, kind="stable")[:, :count]
    return ids, np.take_along_axis(found, ids, axis=1)


def neighbours(prompt: np.ndarray, base_model: str) -> rich.console.Group:
    """Tables of the tokens nearest to every position, and of those nearest to several.

    Raises:
      UserError: the model is of another width or cannot be read.
    """
    words = nearest_words(prompt, base_model)
    view = rich.table.Table("position", "nearest tokens (cosine)")
    for position, pairs in enumerate(words):
        texts = (f"{token} {value:.2f}" for token, value in pairs)
        view.add_row(str(position), rich.text.Text(", ".join(texts)))
    shared = [
        f"{token} {count} times"
        for token, count in Counter(pairs[0][0] for pairs in words).most_common()
        if count > 1
    ]
    text = ", ".join(shared) if shared else "none"
    return rich.console.Group(
        view, rich.text.Text(f"nearest to several positions: {text}")
    )


def nearest_words(
    prompt: np.ndarray, base_model: str, count: int = NEIGHBOURS
) -> list[list[tuple[str, float]]]:
    """Of every position of ``[P, H]``, the nearest tokens and their cosines.

    Raises:
      UserError: the model is of another width or cannot be read.
    """
    ids, values, vocabulary = _near(prompt, base_model, count)

    def name(token: int) -> str:
        if vocabulary is None:
            return str(token)
        known = token < vocabulary.get_piece_size()
        return repr(vocabulary.id_to_piece(token)) if known else f"<{token}>"

    return [
        [(name(int(token)), float(value)) for token, value in zip(*row, strict=True)]
        for row in zip(ids, values, strict=True)
    ]


def reading(
    prompt: np.ndarray, base_model: str, labels: Sequence[str]
) -> dict[str, float]:
    """How a prompt ``[P, H]`` reads as words, after section 7 of Lester et al. (2021).

    Args:
      prompt: ``[P, H]``.
      base_model: what it was tuned on.
      labels: the answers that its task has, as texts.

    Returns:
      ``distinct_nearest``, percent of the positions whose nearest token is that of no other
      position; ``nearest_cosine``, the mean cosine with the nearest token, times 100; and,
      where there are labels and the model has its vocabulary beside it, ``labels_found``,
      percent of the labels all of whose tokens are among the `NEAR` nearest of positions.

    Raises:
      UserError: the model is of another width or cannot be read.
    """
    ids, values, vocabulary = _near(prompt, base_model, NEAR)
    nearest = Counter(ids[:, 0].tolist())
    found = {
        "distinct_nearest": 100 * sum(n == 1 for n in nearest.values()) / len(prompt),
        "nearest_cosine": 100 * float(values[:, 0].mean()),
    }
    if labels and vocabulary is not None:
        near = set(ids.flatten().tolist())
        there = [near.issuperset(vocabulary.encode(label)) for label in labels]
        found["labels_found"] = 100 * sum(there) / len(labels)
    return found


def _near(
    prompt: np.ndarray, base_model: str, count: int
) -> tuple[np.ndarray, np.ndarray, "sentencepiece.SentencePieceProcessor | None"]:
    """Ids and cosines ``[P, count]`` of the nearest tokens; the model's vocabulary."""
    source = base_models.open_checkpoint(base_model)
    table = embedding_table(source)
    if table.shape[1] != prompt.shape[1]:
        raise UserError(
            f"the prompt has width {prompt.shape[1]}, the model {source.path} has "
            f"width {table.shape[1]}; give the model it was tuned on"
        )
    return *nearest_tokens(prompt, table, count), _vocabulary(source)


def embedding_table(source: Source) -> np.ndarray:
    """The embedding table ``[V, H]`` of a base model.

    Raises:
      UserError: it has none.
    """
    name = "token_embedder/embedding"
    if name not in source.specs:
        raise UserError(f"{source.path} holds no {name}; give the folder of a T5 model")
    return source.read(name)


def draw(prompt: np.ndarray, path: str) -> None:
    """Draws norms and cosines of a prompt to a PNG.

    Raises:
      UserError: the picture cannot be written.
    """
    norms = np.linalg.norm(prompt, axis=1)
    plots.prompt(path, norms, cosines(prompt, prompt))


def _vocabulary(source: Source) -> "sentencepiece.SentencePieceProcessor | None":
    """The SentencePiece vocabulary beside the model, if there is one."""
    path = formats.find_vocabulary(source.path)
    if path is None:
        return None
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path))
