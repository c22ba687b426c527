# SPDX-License-Identifier: Apache-2.0
"""``infer``: answers texts with a tuned prompt."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from prompt_tuning import base
from prompt_tuning.commands.common import attach, write_text
from prompt_tuning.errors import UserError
from prompt_tuning.model import Model
from prompt_tuning.network import T5Config, Transformer


def infer(
    *,
    config: T5Config,
    initial_checkpoint_path: str,
    prompt_file: str,
    texts: Sequence[str] = (),
    input_file: str | None = None,
    output_file: str | None = None,
    batch_size: int = 32,
    max_decode_length: int = 32,
    frozen_dtype: str = "auto",
    activation_dtype: str = "auto",
    force: bool = False,
) -> list[dict[str, Any]]:
    """Answers texts with a tuned prompt.

    Args:
      config: sizes of the model.
      initial_checkpoint_path: the base model (see `formats.open_model`), or
        ``embedded:NAME``.
      prompt_file: the prompt; its card says which labels and vocabulary it has.
      texts: texts to answer.
      input_file: more of them, one a line.
      output_file: JSONL of the answers; None prints them.
      batch_size: rows of a batch.
      max_decode_length: longest answer where the prompt has no label set.
      frozen_dtype: dtype of the weights.
      activation_dtype: dtype of the computation.
      force: take a prompt that was tuned on another model or vocabulary.

    Returns:
      For each text ``input``, ``answer`` and, with a label set, ``scores``: the
      probability of each label among them.
    """
    texts = [*texts, *(read_lines(input_file) if input_file else ())]
    if not texts:
        raise UserError("no text to answer: give texts or --gin.INPUT_FILE=FILE")
    if empty := [i + 1 for i, text in enumerate(texts) if not text.strip()]:
        raise UserError(f"text {empty[0]} is empty; leave it out")
    from prompt_tuning import infer as inference

    source = base.load(
        config,
        initial_checkpoint_path,
        frozen_dtype=frozen_dtype,
        activation_dtype=activation_dtype,
    )
    prompts, params, card = attach(source, prompt_file, force)
    rows = inference.answer_texts(
        Model(Transformer(source.config, prompts)),
        params,
        texts,
        card,
        batch_size=batch_size,
        max_decode_len=max_decode_length,
        force=force,
    )
    if output_file is not None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(pathlib.Path(output_file), text)
    return rows


def read_lines(path: str) -> list[str]:
    """The lines of a UTF-8 file, empty ones left out.

    Raises:
      UserError: the file is missing or not UTF-8.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    return [line for line in text.splitlines() if line.strip()]
