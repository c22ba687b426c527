# SPDX-License-Identifier: Apache-2.0
"""``prompt-tuning convert``: models and prompts from one format to another."""

import os
import pathlib

from prompt_tuning import files, report
from prompt_tuning.checkpoints import base_models, formats, merging, prompt_formats
from prompt_tuning.data import vocabularies
from prompt_tuning.errors import UserError

FORMATS = tuple(dict.fromkeys((*formats.FORMATS, *prompt_formats.FORMATS)))


def convert(
    path: str,
    output: str,
    *,
    to: str,
    dtype: str | None = None,
    vocabulary: str | None = None,
    adapter: str | None = None,
) -> None:
    """Writes a model or a prompt again in another format, to the last bit.

    A prompt is what `prompt_formats.detect` takes for one; a T5X checkpoint that holds
    both is a prompt if the wanted format is one of prompts.

    Args:
      path: a model (T5X, Hugging Face folder or hub name, gs://, ``embedded:NAME``)
        or a prompt or adapter (.safetensors, .npy, PEFT folder, T5X checkpoint).
      output: the folder or file to write.
      to: the format; for models 'native', 't5x' or 'huggingface', for prompts
        'native', 'npy', 'peft' or 'peft-doubled', for adapters 'native' or 'peft'.
      dtype: of a model, 'float32' or 'bfloat16'; None keeps what it has.
      vocabulary: SentencePiece model to put beside a model; by default the one that
        lies beside it already.
      adapter: of a model, an adapter of LoRA or IA3 to merge into its weights.

    Raises:
      UserError: ``path`` is of no known format, or ``to`` is none for what it holds,
        or the output is what is read, or cannot be written.
    """
    _check_output(path, output)
    if vocabulary is not None and to in formats.FORMATS:
        if to == "t5x":
            raise UserError(
                "T5X's format has no place for a --vocabulary: leave it out"
            )
        # Read, so that what is none is not put beside a model.
        vocabularies.load(vocabulary)
    found = prompt_formats.detect(path) if os.path.exists(path) else None
    wants_model, wants_prompt = to in formats.FORMATS, to in prompt_formats.FORMATS
    if found is not None and (found != "t5x" or not wants_model):
        if not wants_prompt:
            raise UserError(
                f"{path} is a prompt, which --to {to} cannot hold; choose one of "
                f"{', '.join(prompt_formats.FORMATS)}"
            )
        if any(option is not None for option in (dtype, vocabulary, adapter)):
            raise UserError(
                "--dtype, --vocabulary and --adapter are for models, not for prompts"
            )
        saved = prompt_formats.load_with_slots(path)
        for note in saved.card.get("notes", ()):
            report.say(note)
        prompt_formats.save_as(output, saved, to)
        what = f"a prompt of {len(saved.array)} positions"
        if saved.slots:
            what = f"an adapter at {len(saved.slots)} sites"
        report.say(f"wrote {output}: {what}")
        return
    source = base_models.open_checkpoint(path)
    if not wants_model:
        raise UserError(
            f"{path} is a model, which --to {to} cannot hold; choose one of "
            f"{', '.join(formats.FORMATS)}"
        )
    if adapter is not None:
        source = merging.merge(source, adapter)
    if source.prompts and to != "t5x":
        report.say(
            f"left out: {', '.join(source.prompts)}; --to npy or --to peft takes it"
        )
    pieces = vocabulary
    if pieces is None and to != "t5x":
        pieces = formats.find_vocabulary(source.path)
    with report.counting(f"to {to}", len(source.specs)) as advance:
        formats.write_model(
            output,
            source,
            to,
            dtype=dtype,
            vocabulary=pieces,
            progress=lambda name: advance(),
        )
    report.say(f"wrote {output}: {len(source.specs)} tensors")


def _check_output(path: str, output: str) -> None:
    """Refuses an output that is the source, one of its files, or a folder around it."""
    source = pathlib.Path(path)
    files.refuse_same([source], [output])
