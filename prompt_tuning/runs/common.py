# SPDX-License-Identifier: Apache-2.0
"""What the commands share: folders, versions, a prompt beside its base model."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import numpy as np

from prompt_tuning import files, processes, report, trees
from prompt_tuning.checkpoints import prompt_file, prompt_formats
from prompt_tuning.checkpoints.base_models import BaseModel
from prompt_tuning.devices import sharding
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.types import Params

PROMPT_FILE = "prompt.safetensors"
TUNED_MODEL = "model"
RESULTS_FILE = "results.json"
SECONDS_TO_APPEAR = 5.0
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
    prompts = {"prompts": {prompt.name: array}}
    if source.mesh is not None:
        prompts = sharding.replicate(prompts, source.mesh)
    params = trees.merge(source.params, prompts)
    return (prompt,), params, card


def check_eval_batch(rows: int, partitioner: Partitioner) -> None:
    """Says it where rows of an evaluation's batches are padding on every device.

    Raises:
      UserError: there are no rows.
    """
    if rows < 1:
        raise UserError(f"EVAL_BATCH_SIZE={rows} must be 1 or more")
    shards = partitioner.mesh.shape[sharding.DATA]
    if missing := -rows % shards:
        report.say(
            f"EVAL_BATCH_SIZE={rows} does not divide over {shards} data shards: batches "
            f"get {missing} empty rows; set it to "
            f"{sharding.nearest_multiples(rows, shards)} to waste none"
        )


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

    Process 0 does all of it; the others look whether they see what it wrote.

    Raises:
      UserError: it is a URL, it cannot be written, or is not one and the same folder
        for all processes.
    """
    if "://" in path:
        raise UserError(
            f"cannot write to {path}: a folder of a file system is needed; mount the "
            "bucket and give its path there, or choose a folder on a disk"
        )
    folder = pathlib.Path(path)
    probe = folder / f".probe-{processes.agreed(os.getpid())}"
    processes.in_first(lambda: _make(folder, probe))
    seen = processes.gather(_appears(probe))
    processes.in_first(lambda: _remove(probe))
    if not seen.all():
        raise UserError(
            f"process {int(np.argmin(seen))} does not see what process 0 writes to "
            f"{folder}; choose a folder on a file system that all hosts share"
        )
    if on_start is not None:
        processes.in_first(lambda: on_start(folder))
    return folder


def _make(folder: pathlib.Path, probe: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
    except OSError as error:
        raise _unwritable(folder, error) from error


def _remove(probe: pathlib.Path) -> None:
    try:
        probe.unlink()
    except OSError as error:
        raise _unwritable(probe.parent, error) from error


def _unwritable(folder: pathlib.Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to {folder} ({error.strerror}); choose another folder"
    )


def _appears(path: pathlib.Path) -> bool:
    """Whether a file is there; network file systems may show it a little later."""
    end = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


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
