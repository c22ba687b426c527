# SPDX-License-Identifier: Apache-2.0
"""A tuned prompt as one small file: the array and a card that says where it is from.

Prompts reach absolute values of several hundred, so they are float32 on disk, always.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from prompt_tuning import files
from prompt_tuning.checkpoints import cards
from prompt_tuning.errors import UserError
from prompt_tuning.types import Array

# What a run of one prompt calls it; its folder then names the prompt.
FILE = "prompt.safetensors"
# Where a run of several puts them, each under its own name.
FOLDER = "prompts"
TENSOR = "prompt"
# What begins the names of tensors that only an adapter has (see `adapter_file`).
SLOTS = "slots/"


def save_prompt(
    path: files.Path, prompt: np.ndarray | Array, card: dict[str, Any]
) -> None:
    """Writes a prompt ``[P, H]`` float32 and its card, atomically.

    Args:
      path: the file, by custom ``*.safetensors``.
      prompt: the array; it must be finite.
      card: what can be said in JSON: method, placement, task, base_model (name,
        fingerprint), recipe, metric, versions; length and width are added.

    Raises:
      UserError: the prompt holds NaN or infinity, the card what no card has (see
        `cards.check`), or the file cannot be written.
      ValueError: the array is not ``[P, H]`` float32, or the card contradicts it.
    """
    array = np.asarray(prompt)
    if array.ndim != 2 or array.dtype != np.float32:
        raise ValueError(
            f"a prompt is [P, H] float32, not {list(array.shape)} {array.dtype}"
        )
    check_finite(array, path)
    facts = {"length": array.shape[0], "width": array.shape[1]}
    for key, value in facts.items():
        if card.get(key, value) != value:
            raise ValueError(f"the card says {key} {card[key]}, the array has {value}")
    card = cards.check({**card, **facts}, path)
    files.write(path, {TENSOR: array}, cards.encode(card, array))


def load_prompt(path: files.Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Reads what `save_prompt` wrote: the array ``[P, H]`` and its card.

    Raises:
      UserError: the file is missing, damaged or not a prompt.
    """
    with files.reading(path, "a prompt file") as file:
        if any(name.startswith(SLOTS) for name in file.keys()):  # noqa: SIM118
            raise UserError(
                f"{path} holds an adapter, which changes the model's layers, and not a "
                "prompt alone; `eval`, `infer` and the folder of `serve` take it"
            )
        card = cards.decode(file.metadata() or {}, path)
        if TENSOR not in file.keys() or card is None:  # noqa: SIM118
            raise UserError(
                f"{path} is no prompt file: it has no tensor {TENSOR!r} with a card; "
                "give the file that a training run wrote"
            )
        array = file.get_tensor(TENSOR)
    if array.ndim != 2 or array.dtype != np.float32:
        raise UserError(
            f"{path} holds a {array.dtype} array {list(array.shape)}, a prompt is "
            "[length, width] float32; write it again with save_prompt"
        )
    if [card.get("length"), card.get("width")] != list(array.shape):
        raise UserError(
            f"{path} contradicts itself: its card says length {card.get('length')} and "
            f"width {card.get('width')}, its array is {list(array.shape)}; write it "
            "again with save_prompt"
        )
    check_finite(array, path)
    return array, cards.verified(card, array, path)


def check_compatible(
    card: Mapping[str, Any], base_fingerprint: str, width: int, force: bool = False
) -> None:
    """Refuses a prompt that was tuned on another base model.

    Args:
      card: the prompt's card.
      base_fingerprint: of the base model at hand, made as that in the card was.
      width: hidden width H of the base model.
      force: use the prompt whatever model it is from, if the widths agree; the
        command line's ``--force``.

    Raises:
      UserError: the widths or, without ``force``, the base models differ.
    """
    base = card.get("base_model") or {}
    name = base.get("name") or "a model without name"
    # What stands in layers alone has no rows; its own sizes tell whether it fits.
    if card.get("width") != width and card.get("length") != 0:
        raise UserError(
            f"the prompt has width {card.get('width')}, the model has width {width}; "
            f"use the model it was tuned on ({name})"
        )
    if force or base.get("fingerprint") == base_fingerprint:
        return
    if not base.get("fingerprint"):
        raise UserError(
            "the prompt's card does not say which base model it was tuned on; "
            "use it all the same with --force"
        )
    raise UserError(
        f"the prompt was tuned on {name} (fingerprint {base['fingerprint'][:12]}), not "
        f"on this model ({base_fingerprint[:12]}); use that model, or use the prompt "
        "all the same with --force"
    )


def check_vocabulary(
    card: dict[str, Any], fingerprint: str, force: bool = False
) -> None:
    """Refuses a prompt that was tuned with another vocabulary, if its card names one.

    Args:
      card: the prompt's card.
      fingerprint: of the vocabulary at hand (see `vocabularies.Vocabulary`).
      force: use the prompt whatever its vocabulary.

    Raises:
      UserError: the vocabularies differ and there is no ``force``.
    """
    tuned_with = card.get("vocabulary_fingerprint")
    if force or tuned_with in (None, fingerprint):
        return
    raise UserError(
        f"the prompt was tuned with the vocabulary {card.get('vocabulary')} "
        f"({tuned_with[:12]}), this is another one ({fingerprint[:12]}); use a task "
        "with that vocabulary, or use the prompt all the same with --force"
    )


def check_finite(array: np.ndarray, path: files.Path) -> None:
    """Refuses a prompt with numbers that are none.

    Raises:
      UserError: it holds NaN or infinity.
    """
    bad = int(np.sum(~np.isfinite(array)))
    if bad:
        raise UserError(
            f"the prompt {path} holds {bad} values that are not finite; tune it again "
            "with a lower learning rate"
        )
