# SPDX-License-Identifier: Apache-2.0
"""Soft prompts as PEFT keeps them: a folder with a tensor and a JSON configuration.

For encoder-decoder models PEFT allocates ``2 x P`` rows and uses the first P. Reading
takes those and says so in the card's ``notes``. Writing makes P rows and a configuration
to match, which `peft.PeftModel.from_pretrained` loads; ``doubled=True`` adds P rows of
zeros, for a model whose `PromptTuningConfig` was left at PEFT's defaults.

A multitask prompt of PEFT's is read as what its one task makes of it, the shared rows times
the task's matrix: a prompt like any other. Of one that has rows for the decoder, too, those
are left out, as PEFT's ``generate`` does. Ours is saved as its product anyway, so that it is
written as such a prompt.

Our card travels in the tensor file's metadata, which PEFT leaves alone, so that nothing
is lost on the way there and back.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from prompt_tuning import dtypes, files
from prompt_tuning.checkpoints import cards
from prompt_tuning.checkpoints.keys import peft as keys
from prompt_tuning.data.template import WHOLE_PROMPT, Positions, Template
from prompt_tuning.errors import UserError


def is_prompt(path: files.Path) -> bool:
    """Whether the path is a folder that PEFT wrote, whatever its method."""
    return (pathlib.Path(path) / keys.CONFIG_FILE).is_file()


def load(path: files.Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Reads a prompt ``[P, H]`` float32 and makes its card.

    Args:
      path: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
      The rows that PEFT uses, and the card that `save` was given or, for a prompt that
      PEFT tuned, one made of its configuration.

    Raises:
      UserError: the folder holds another method, a pickle, more than the prompt, or
        parts that contradict each other or lie elsewhere.
    """
    folder = pathlib.Path(path)
    config = _read_config(files.inside(folder, keys.CONFIG_FILE))
    rows, own_card = _read_tensor(folder, config)
    length, width = config["num_virtual_tokens"], config["token_dim"]
    submodules = config.get(keys.SUBMODULES)
    if submodules is None:
        submodules = keys.DEFAULT_SUBMODULES
    if submodules not in (1, 2) or rows.shape != (length * submodules, width):
        raise UserError(
            f"{folder} contradicts itself: its array is {list(rows.shape)}, its "
            f"configuration says {submodules} x {length} rows of width {width}; save "
            "it again with PEFT"
        )
    prompt = np.ascontiguousarray(rows[:length], np.float32)
    if own_card is None:
        return prompt, _card(folder, config, len(rows))
    if [own_card.get("length"), own_card.get("width")] != [length, width]:
        raise UserError(
            f"{folder} contradicts itself: its card and its configuration name "
            "different sizes; export the prompt again"
        )
    return prompt, cards.verified(own_card, prompt, folder)


def save(
    folder: files.Path,
    array: np.ndarray,
    card: Mapping[str, Any],
    doubled: bool = False,
) -> None:
    """Writes a prompt as a folder that PEFT loads, whole or not at all.

    Args:
      folder: made; it may exist if it is empty.
      array: ``[P, H]`` float32, finite.
      card: the prompt's card, with its length and width.
      doubled: writes ``[2 P, H]``, the lower half zeros, as a model expects that has
        PEFT's default ``num_transformer_submodules``.

    Raises:
      UserError: the folder holds something or cannot be written, or the prompt is not
        one that stands in front of the text, the only place that PEFT knows.
    """
    folder = pathlib.Path(folder)
    _check_fits_peft(card)
    rows = np.concatenate([array, np.zeros_like(array)]) if doubled else array
    config = {
        **{
            name: (card.get("peft") or {}).get(name, default)
            for name, default in keys.PEFT_ONLY.items()
        },
        **{name: _at(card, where) for name, where in keys.FROM_CARD.items()},
        **keys.CONSTANT,
        keys.SUBMODULES: len(rows) // len(array),
    }
    write(folder, config, {keys.TENSOR: rows}, cards.encode(card, array))


def write(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a folder of PEFT's, whole or not at all.

    Raises:
      UserError: it holds something or cannot be written.
    """
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    # PEFT wants to be told that the tensors are PyTorch's.
    metadata = {"format": "pt", **metadata}
    with files.replacing(folder) as temporary:
        if os.path.lexists(folder) and (folder.is_file() or any(folder.iterdir())):
            raise UserError(f"{folder} exists already; give a new folder")
        temporary.mkdir()
        files.write(temporary / keys.TENSOR_FILE, tensors, metadata)
        (temporary / keys.CONFIG_FILE).write_text(text, encoding="utf-8")


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    """The configuration of a prompt of an encoder-decoder model, checked."""
    config = files.read_json(path)
    for name in ("peft_type", "task_type"):
        found, wanted = config.get(name), keys.CONSTANT[name]
        if found != wanted and (name, found) != ("peft_type", keys.MULTITASK):
            raise UserError(
                f"{path} has {name} {found!r}; only {wanted!r} is a prompt for a T5, "
                "so give the folder of one"
            )
    for name in ("num_virtual_tokens", "token_dim"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise UserError(
                f"{path} has {name} {config.get(name)!r} where a number of 1 or more "
                "belongs; save the prompt again with PEFT"
            )
    if config["peft_type"] == keys.MULTITASK and config.get(keys.TASKS) != 1:
        raise UserError(
            f"{path} has {keys.TASKS} {config.get(keys.TASKS)!r}, and a prompt is that of "
            "one: choose it by PEFT's prompt_tuning_init='EXACT_SOURCE_TASK' with "
            "num_tasks=1, and save that"
        )
    return config


def _read_tensor(
    folder: pathlib.Path, config: Mapping[str, Any]
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The rows as they are on disk, and our card if we wrote the file.

    Those of a multitask prompt are float32 products of what lies there.
    """
    tensors, card = read_tensors(folder)
    multitask = config["peft_type"] == keys.MULTITASK
    wanted = [keys.TENSOR]
    if multitask:
        wanted += [keys.TASK_COLUMNS, keys.TASK_ROWS]
    if sorted(tensors) != sorted(wanted):
        raise UserError(
            f"{folder / keys.TENSOR_FILE} holds the tensors {sorted(tensors)}, a prompt is "
            f"{' and '.join(map(repr, wanted))} alone; give the folder of a prompt"
        )
    rows = tensors[keys.TENSOR]
    if multitask:
        left, right = (
            np.asarray(tensors[name], np.float32)
            for name in (keys.TASK_COLUMNS, keys.TASK_ROWS)
        )
        if (
            [rows.ndim, left.ndim, right.ndim] != [2, 3, 3]
            or (left.shape[:2], right.shape[::2])
            != ((1, len(rows)), (1, rows.shape[1]))
            or left.shape[2] != right.shape[1]
        ):
            raise UserError(
                f"{folder} contradicts itself: its arrays are {list(rows.shape)}, "
                f"{list(left.shape)} and {list(right.shape)}; save it again with PEFT"
            )
        rows = np.asarray(rows, np.float32) * (left[0] @ right[0])
    return rows, card


def read_tensors(
    folder: pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """The tensors of a folder by their names, and our card if we wrote the file.

    Raises:
      UserError: they are a pickle, damaged, or of a type that float32 does not hold.
    """
    path = files.inside(folder, keys.TENSOR_FILE)
    if not path.exists() and (folder / keys.PICKLE_FILE).exists():
        raise UserError(
            f"{folder} holds its prompt as a pickle, which can run any code and is not "
            "opened; save it again with save_pretrained(..., safe_serialization=True)"
        )
    with files.reading(path, "a prompt of PEFT") as file:
        names = list(file.keys())
        for name in names:
            dtype = file.get_slice(name).get_dtype()
            # Each of these widens to float32 without a change of value.
            if dtype not in dtypes.READ_AS:
                raise UserError(
                    f"{path} holds numbers of type {dtype} ({name}); save it again as "
                    "float32"
                )
        card = cards.decode(file.metadata() or {}, path)
        return {name: file.get_tensor(name) for name in names}, card


def _card(folder: pathlib.Path, config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The card of a prompt that PEFT tuned."""
    length = config["num_virtual_tokens"]
    card = {
        "method": keys.OWN_NAMES[config["peft_type"]],
        "placement": "prepend",
        "source": {"format": "peft", "path": folder.absolute().name},
    }
    for name, where in keys.FROM_CARD.items():
        _put(card, where, config.get(name))
    card.setdefault("base_model", {})
    known = {*keys.FROM_CARD, *keys.CONSTANT}
    if config["peft_type"] == keys.MULTITASK:
        # Starts that prompts of one task do not have.
        known |= {name for name in config if name.startswith("prompt_tuning_init")}
    card["peft"] = {
        **{k: v for k, v in config.items() if v is not None and k not in known},
        "unused_rows": rows - length,
    }
    card["notes"] = [cards.NO_CHECKSUM]
    if rows > length:
        unused = f"the other {rows - length} were left out"
        uses = f"uses the first {length}"
        if config["peft_type"] == keys.MULTITASK:
            uses = (
                f"generates with the first {length}, but puts the others before the "
                "decoder's input while it trains"
            )
        card["notes"].append(f"PEFT saved {rows} rows and {uses}; {unused}")
    return card


def _check_fits_peft(card: Mapping[str, Any]) -> None:
    """Refuses a prompt that would compute something else in PEFT."""
    placement = card.get("placement") or "prepend"
    template = card.get("template")
    parts = list(Template.parse(template).parts) if template else []
    pieces = [part for part in parts if isinstance(part, Positions)]
    in_front = not pieces or parts[:1] == [Positions((WHOLE_PROMPT,))]
    if placement != "prepend" or not in_front:
        raise UserError(
            "PEFT puts a prompt in front of the text and nowhere else, but this one "
            "was tuned for another place; keep it in the native or npy format"
        )


def _at(card: Mapping[str, Any], where: tuple[str, ...]) -> Any:
    """The entry of nested records, or None."""
    value: Any = card
    for key in where:
        value = (value or {}).get(key)
    return value


def _put(card: dict[str, Any], where: tuple[str, ...], value: Any) -> None:
    """Sets an entry of nested records, made as needed; None is left out."""
    if value is None:
        return
    *outer, last = where
    for key in outer:
        card = card.setdefault(key, {})
    card[last] = value
