# SPDX-License-Identifier: Apache-2.0
"""Answers to texts from a tuned prompt: ranked labels or decoded text."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.data.feature_converter import PromptFeatureConverter
from prompt_tuning.inference.evaluation import Answerer
from prompt_tuning.network.model import Model
from prompt_tuning.runs import task_data
from prompt_tuning.tasks import features
from prompt_tuning.types import Params


def answer_texts(
    model: Model,
    params: Params,
    texts: Sequence[str],
    card: Mapping[str, Any],
    *,
    batch_size: int = 32,
    max_decode_len: int = 32,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Answers each text.

    Args:
      model: a network that holds the prompt.
      params: all leaves, the prompt's among them.
      texts: raw texts, as the prompt's task gives them to the model.
      card: the prompt's card: labels, vocabulary, placement, template.
      batch_size: rows of a batch.
      max_decode_len: longest answer where there are no labels.
      force: take a vocabulary that is no longer the one of the card.

    Returns:
      For each text ``input``, ``answer`` and, with labels, ``scores``: the probability
      of each label among them.

    Raises:
      UserError: the vocabulary of the card is not to be had, or has changed.
    """
    vocabulary = features.vocabulary(card.get("vocabulary") or "t5")
    prompt_file.check_vocabulary(card, features.fingerprint(vocabulary), force)
    converter = PromptFeatureConverter(
        model.network.prompts,
        model.network.config.vocab_size,
        card.get("placement") or "prepend",
    )
    labels = card.get("labels")
    answerer = Answerer(
        model,
        vocabulary,
        labels=labels,
        max_decode_len=max_decode_len,
    )
    rows: list[dict[str, Any]] = []
    batches = task_data.text_batches(
        texts, vocabulary, converter, batch_size, card.get("template")
    )
    for tokens in batches:
        part = texts[len(rows) : len(rows) + batch_size]
        if labels:
            scores = np.asarray(answerer.scores(params, tokens))
            chances = np.asarray(jax.nn.softmax(scores, axis=-1))
            rows += [
                {
                    "input": text,
                    "answer": labels[int(np.argmax(chance))],
                    "scores": {
                        label: round(float(p), 4)
                        for label, p in zip(labels, chance, strict=True)
                    },
                }
                for text, chance in zip(part, chances)
            ]
        else:
            answers = answerer.answer(params, tokens)
            rows += [
                {"input": text, "answer": vocabulary.decode(answer.tolist())}
                for text, answer in zip(part, answers)
            ]
    return rows
