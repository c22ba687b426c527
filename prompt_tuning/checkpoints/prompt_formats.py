# SPDX-License-Identifier: Apache-2.0
"""One door for soft prompts of every format, in and out.

A prompt is an array ``[P, H]`` float32 and a card. Formats that hold nothing but
numbers (a bare NumPy file, a T5X checkpoint) are given a card that says where they came
from and names no base model: that the prompt fits a model is then the user's word.

The original project keeps a prompt as a NumPy file that is called after its parameter,
``encoder.prompt.prompt.prompt``, so files are known by their first bytes, not by their
names.
"""

import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from prompt_tuning import files
from prompt_tuning.checkpoints import (
    adapter_file,
    cards,
    peft,
    peft_adapters,
    prompt_file,
    t5x_native,
    t5x_orbax,
)
from prompt_tuning.checkpoints.source import Source
from prompt_tuning.errors import UserError
from prompt_tuning.network.adapters import Slot

# Versions of NumPy's format; later ones differ for records with names only.
NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def detect(path: files.Path) -> str | None:
    """Names a prompt's format by what lies at ``path``; reads no tensor.

    Args:
      path: a file, or a folder that PEFT, the original project or T5X wrote.

    Returns:
      'native', 'npy', 'peft', 't5x', or None if no prompt is there.

    Raises:
      UserError: the path is a damaged T5X checkpoint or a folder that cannot be read,
        or Google Cloud Storage does not answer.
    """
    return _find(path)[0]


def _find(path: files.Path) -> tuple[str | None, Source | None]:
    """The format, and the T5X checkpoint: opening it may be many trips to the cloud."""
    if os.path.isfile(path):
        if _is_npy(path):
            return "npy", None
        own = _is_native(path) or adapter_file.is_adapter(path)
        return ("native" if own else None), None
    if peft.is_prompt(path):
        return "peft", None
    if (source := _open_t5x(path)) is not None:
        return ("t5x" if source.prompts else None), source
    return ("npy" if _npy_files(path) else None), None


class Saved(NamedTuple):
    """What a file holds.

    Attributes:
      array: the prompt ``[P, H]``; P may be 0.
      card: see `load`.
      slots: what goes into the model's layers beside it, by site.
    """

    array: np.ndarray
    card: Mapping[str, Any]
    slots: Mapping[str, Slot] = MappingProxyType({})


def load_with_slots(path: files.Path) -> Saved:
    """As `load`, for those who can put an adapter into a model's layers.

    Raises:
      UserError: as `load` does, or it is a damaged adapter.
    """
    if os.path.isfile(path) and adapter_file.is_adapter(path):
        array, slots, card = adapter_file.load(path)
        return Saved(array, card, slots)
    if peft_adapters.is_adapter(path):
        return Saved(*peft_adapters.load(path))
    return Saved(*load(path))


def save_as(path: files.Path, saved: Saved, format: str) -> None:
    """Writes a prompt, one in words too, or an adapter in one of `FORMATS`.

    Raises:
      UserError: see `save`; the format has no place for the adapter.
    """
    # One for free text has no words of labels, but a template that is all of it.
    rowless = not len(saved.array) and saved.card.get("template") is not None
    in_words = not saved.slots and (bool(saved.card.get("verbalizers")) or rowless)
    if not saved.slots and not in_words:
        save(path, saved.array, saved.card, format)
    elif format == "native":
        save_own(path, saved)
    elif in_words:
        raise UserError(
            f"a prompt in words has no rows, and the format {format!r} holds nothing "
            "else: choose native"
        )
    elif format == "peft":
        peft_adapters.save(path, saved.array, saved.slots, dict(saved.card))
    else:
        raise UserError(
            f"an adapter changes the model's layers, and the format {format!r} is for "
            "prompts: choose native or peft"
        )


def save_own(path: files.Path, saved: Saved) -> None:
    """Writes what `load_with_slots` reads, in this package's own format.

    Raises:
      UserError: a number is not finite, or the file cannot be written.
    """
    if saved.slots:
        adapter_file.save(path, saved.array, saved.slots, dict(saved.card))
    else:
        prompt_file.save_prompt(path, saved.array, dict(saved.card))


def load(path: files.Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Reads a prompt ``[P, H]`` float32 and its card, whatever the format.

    Numbers are never rounded: narrower ones are widened, and wider ones are taken only
    if float32 holds every one of them.

    Args:
      path: see `detect`.

    Returns:
      The array and its card. The card of a prompt that this package did not write has
      ``source``, the format and file it came from, and may have ``notes``, sentences
      that a user ought to see.

    Raises:
      UserError: there is no prompt, or more than one, or it is damaged.
    """
    format, source = _find(path)
    match format:
        case "npy":
            file = path if os.path.isfile(path) else _only(path, _npy_files(path))
            array, card = _read_npy(file), _card("npy", file)
        case "t5x" if source is not None:
            name = _only(path, sorted(source.prompts))
            array, card = source.read(name), _card("t5x", source.path)
            card["source"]["parameter"] = name
        case "peft":
            array, card = peft.load(path)
        case None if not os.path.isfile(path):
            raise UserError(
                f"there is no prompt at {path}; give a prompt file, or a folder with a "
                "prompt that PEFT, T5X or the original project wrote"
            )
        # Ours, or a file of which our reader says best what is wrong.
        case _:
            return prompt_file.load_prompt(path)
    array = _float32(array, path)
    card = cards.check(card, path)
    return array, {**card, "length": array.shape[0], "width": array.shape[1]}


def save(
    path: files.Path, array: np.ndarray, card: Mapping[str, Any], format: str
) -> None:
    """Writes a prompt in one of `FORMATS`, whole or not at all.

    Args:
      path: the file, written under exactly this name and replaced if there is one; for
        PEFT a folder, which must be new or empty.
      array: ``[P, H]``, finite; it is written as float32.
      card: the prompt's card; a bare NumPy file has no place for it.
      format: 'native' (`prompt_file`), 'npy' (the original project's), 'peft', or
        'peft-doubled' (see `peft.save`).

    Raises:
      UserError: an unknown format, a prompt that the format cannot hold, or a path that
        cannot be written.
      ValueError: the card contradicts the array.
    """
    if format not in _WRITERS:
        raise UserError(
            f"no format of prompts is called {format!r}; choose one of "
            f"{', '.join(FORMATS)}"
        )
    array = _float32(np.asarray(array), path)
    facts = {"length": array.shape[0], "width": array.shape[1]}
    if {**facts, **card} != {**card, **facts}:
        raise ValueError(f"the card names other sizes than {list(array.shape)}")
    _WRITERS[format](path, array, cards.check({**card, **facts}, path))


def _write_npy(path: files.Path, array: np.ndarray, card: Mapping[str, Any]) -> None:
    del card
    # Into an open file: given a name, NumPy would add a suffix to it.
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


_WRITERS: dict[str, Callable[[files.Path, np.ndarray, dict[str, Any]], None]] = {
    "native": prompt_file.save_prompt,
    "npy": _write_npy,
    "peft": peft.save,
    "peft-doubled": functools.partial(peft.save, doubled=True),
}
FORMATS = tuple(_WRITERS)


def _is_native(path: files.Path) -> bool:
    try:
        with files.reading(path, "a prompt file") as file:
            return (
                prompt_file.TENSOR in file.keys()  # noqa: SIM118
                and cards.CARD in (file.metadata() or {})
            )
    except UserError:
        return False


def _is_npy(path: files.Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(np.lib.format.MAGIC_PREFIX)) == (
                np.lib.format.MAGIC_PREFIX
            )
    except OSError:
        return False


def _npy_files(folder: files.Path) -> list[str]:
    """NumPy files directly in a folder, such as ``numpy_checkpoints/checkpoint_7``."""
    if not os.path.isdir(folder):
        return []
    try:
        inside = sorted(pathlib.Path(folder).iterdir())
    except OSError as error:
        raise UserError(
            f"cannot read {folder}: {files.first_line(error)}; choose a folder that you "
            "may read"
        ) from error
    return [str(entry) for entry in inside if entry.is_file() and _is_npy(entry)]


def _open_t5x(path: files.Path) -> Source | None:
    for reader in (t5x_native, t5x_orbax):
        if reader.is_checkpoint(os.fspath(path)):
            return reader.open_checkpoint(os.fspath(path))
    return None


def _only(path: files.Path, names: Sequence[str]) -> str:
    """The one name, where there is one."""
    if len(names) != 1:
        raise UserError(
            f"{path} holds {len(names)} prompts ({', '.join(names)}), and which is "
            "meant is not clear; give a file or checkpoint of one"
        )
    return names[0]


def _card(format: str, path: files.Path) -> dict[str, Any]:
    """The card of numbers that came without one."""
    name = os.path.basename(os.fspath(path).rstrip("/"))
    # T5X's arrays are compressed, with a checksum.
    notes = {"notes": [cards.NO_CHECKSUM]} if format == "npy" else {}
    return {
        "method": "prompt_tuning",
        "source": {"format": format, "path": name},
        "base_model": {},
        **notes,
    }


def _read_npy(path: files.Path) -> np.ndarray:
    """A NumPy file's array; the file is checked against its header before."""
    try:
        with open(path, "rb") as file:
            shape, _, dtype = NPY_HEADERS[np.lib.format.read_magic(file)](file)
            size = file.tell() + math.prod(shape) * dtype.itemsize
            if size != os.fstat(file.fileno()).st_size:
                raise ValueError(f"its header says that it is {size} bytes long")
            file.seek(0)
            return np.load(file, allow_pickle=False)
    # NumPy parses a header as Python, and a damaged one raises whatever that may.
    except Exception as error:
        raise UserError(
            f"{path} is damaged or holds no plain numbers "
            f"({files.first_line(error)}); copy or write it again"
        ) from error


def _float32(array: np.ndarray, path: files.Path) -> np.ndarray:
    """The same numbers as ``[P, H]`` float32, if they are a prompt."""
    floats = array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16
    # Swapped bytes are refused, too: nobody writes them, and a flipped bit can say so.
    if array.ndim != 2 or 0 in array.shape or not floats or not array.dtype.isnative:
        raise UserError(
            f"{path} holds a {array.dtype} array {list(array.shape)}, a prompt is "
            "[length, width] of floating-point numbers; give another"
        )
    prompt_file.check_finite(array, path)
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(array, np.float32)
    if not np.array_equal(narrow.astype(array.dtype), array):
        raise UserError(
            f"{path} holds {array.dtype} numbers that would have to be rounded to "
            "float32; round them with numpy.astype if that is what you want"
        )
    return narrow
