# SPDX-License-Identifier: Apache-2.0
"""What the commands share: folders, versions, a prompt beside its base model."""

import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from prompt_tuning import report, trees
from prompt_tuning.base import BaseModel
from prompt_tuning.checkpoints import files, prompt_file, prompt_formats
from prompt_tuning.errors import UserError
from prompt_tuning.prompts import Prompt
from prompt_tuning.types import Params

PROMPT_FILE = "prompt.safetensors"
TUNED_MODEL = "model"
RESULTS_FILE = "results.json"
OnStart = Callable[[pathlib.Path], None]


def attach(
    source: BaseModel, path: str | None, force: bool = False
) -> tuple[tuple[Prompt, ...], Params, Mapping[str, Any]]:
    """Loads a prompt beside a base model.

    Returns:
      The network's prompts, all parameters and the prompt's card.

    Raises:
      UserError: the prompt was tuned on another model (unless ``force``), or has
        another width.
    """
    if path is None:
        return (), source.params, {}
    array, card = prompt_formats.load(path)
    for note in card.get("notes", ()):
        report.say(note)
    prompt_file.check_compatible(
        card, source.fingerprint, source.config.emb_dim, force=force
    )
    prompt = Prompt(str(card.get("task") or "prompt").replace("/", "_"), len(array))
    params = trees.merge(source.params, {"prompts": {prompt.name: array}})
    return (prompt,), params, card


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    names = ("prompt-tuning", "jax", "flax", "optax")
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def writable_folder(path: str, on_start: OnStart | None = None) -> pathlib.Path:
    """Makes a folder, tries to write into it and hands it to ``on_start``.

    Raises:
      UserError: it cannot be written.
    """
    folder = pathlib.Path(path)
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}); choose another folder"
        ) from error
    if on_start is not None:
        on_start(folder)
    return folder


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON under a temporary name, then renames it."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes text under a temporary name, then renames it.

    Raises:
      UserError: the folder cannot be written or the disk is full.
    """
    with files.replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
