# SPDX-License-Identifier: Apache-2.0
"""Answers to texts from tuned prompts, one or several together."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning import decoding, files
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.errors import UserError
from prompt_tuning.inference import ensembles
from prompt_tuning.inference.encoding import TEXT
from prompt_tuning.inference.engine import Engine
from prompt_tuning.inference.store import PromptStore
from prompt_tuning.library import models
from prompt_tuning.library.rows import is_missing, short
from prompt_tuning.library.tuned_prompt import TunedPrompt, load_prompt

Given = TunedPrompt | files.Path


class Predictor:
    """A frozen model with prompts; call it with texts.

    Attributes:
      names: the prompts, in the order they were given.
    """

    def __init__(
        self,
        base: BaseModel,
        prompts: Given | Sequence[Given],
        *,
        combine: str = "vote",
        batch_size: int = 32,
        max_input_length: int = 1024,
        max_answer_length: int = 32,
        strategy: decoding.Strategy | None = None,
        force: bool = False,
    ):
        """Loads the prompts; programs are compiled when they are first needed.

        Args:
          base: what `load` gave.
          prompts: what `tune` gave, files, folders or names of the Hugging Face hub.
          combine: how several prompts' answers become one: 'vote', 'mean' or 'best'
            (see `ensembles`).
          batch_size: rows of a batch.
          max_input_length: longest input in tokens, its prompt included.
          max_answer_length: longest answer where the prompt has no label set.
          strategy: decodes free text, in place of greedily.
          force: take prompts that were tuned on another model or vocabulary.

        Raises:
          UserError: a prompt is missing, does not fit the model, or has another's name.
        """
        models.vocabulary_of(base)
        if isinstance(prompts, TunedPrompt | str | pathlib.PurePath):
            prompts = [prompts]
        if not isinstance(prompts, Sequence) or not prompts:
            raise UserError(
                f"prompts is {short(prompts)}: give a list of prompts, of their files or "
                "of their names on the Hugging Face hub"
            )
        if combine not in ensembles.RULES:
            raise UserError(
                f"combine={combine!r} must be one of {', '.join(ensembles.RULES)}"
            )
        found = [_prompt(prompt) for prompt in prompts]
        room = max(1, sum(len(prompt.array) for prompt in found))
        store = PromptStore(base, room, force=force)
        for prompt in found:
            store.add(prompt.name, prompt.array, prompt.card, slots=prompt.slots)
        self.names = [prompt.name for prompt in found]
        self._combine = combine
        self._engine = Engine(
            base,
            store,
            batch_sizes=(1, batch_size),
            longest=max_input_length,
            strategy=strategy or decoding.Greedy(max_decode_len=max_answer_length),
        )

    def __call__(
        self, rows: Sequence[str | Mapping[str, Any]], *, calibrate: bool = False
    ) -> list[dict[str, Any]]:
        """Answers texts, or dicts with the columns of the prompts' template.

        Args:
          rows: texts or dicts, one or more.
          calibrate: set each label's score off against those for inputs without content
            (Zhao et al. 2021, https://arxiv.org/abs/2102.09690).

        Returns:
          For each row ``input``, ``answer`` and, with a label set, ``scores``: the
          probability of each label, or its share of the votes. Of several prompts also
          ``answers``, those of each.

        Raises:
          UserError: a row cannot be answered; the message says which, counted from 1.
        """
        if isinstance(rows, str | bytes | Mapping) or not hasattr(rows, "__len__"):
            raise UserError(
                f"texts is {short(rows)}: give a list of texts, or of dicts"
            )
        if not len(rows):
            raise UserError("there is no text to answer: give a list of one or more")
        requests = []
        for number, row in enumerate(rows, start=1):
            try:
                requests.append(self._engine.prepare(self._row(row, calibrate)))
            except UserError as error:
                raise UserError(f"text {number}: {error}") from error
        answers = self._engine.run(requests)
        told = ("answer", "scores", "answers")
        return [
            {"input": row} | {key: answer[key] for key in told if key in answer}
            for row, answer in zip(rows, answers, strict=True)
        ]

    def _row(self, row: Any, calibrate: bool) -> dict[str, Any]:
        """A row as the engine has it."""
        if is_missing(row):
            raise UserError(f"it is {row}: leave it out")
        if not isinstance(row, str | Mapping):
            raise UserError(f"it is {short(row)}: give a text, or a dict of columns")
        columns = {TEXT: row} if isinstance(row, str) else dict(row)
        several = {"combine": self._combine} if len(self.names) > 1 else {}
        prompt = self.names if several else self.names[0]
        return {"calibrate": calibrate, **columns, "prompt": prompt, **several}


def _prompt(given: Any) -> TunedPrompt:
    if isinstance(given, TunedPrompt):
        return given
    if isinstance(given, str | pathlib.PurePath):
        return load_prompt(given)
    raise UserError(
        f"one of the prompts is {short(given)}: give what tune made, a file or a name of "
        "the Hugging Face hub"
    )
