# SPDX-License-Identifier: Apache-2.0
"""What a method puts into a model's layers, as one small file beside prompts' own.

Tensors are float32: ``slots/SITE/KIND/FIELD`` for every array of every slot (see
`network.adapters`), and ``rows`` for a prompt that belongs to them. The card is that of a
prompt.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from prompt_tuning import files
from prompt_tuning.checkpoints import cards, prompt_file
from prompt_tuning.checkpoints.prompt_file import SLOTS
from prompt_tuning.errors import UserError
from prompt_tuning.network import adapters
from prompt_tuning.network.adapters import Slot
from prompt_tuning.network.slots import LowRank, Prefix, Rows, Scale
from prompt_tuning.network.text_slots import Generator, Mixture, Offset, Visibility
from prompt_tuning.types import Array

# What a run of one adapter calls it.
FILE = "adapter.safetensors"
ROWS = "rows"
# Of each kind of slot its class, by the name that files use.
KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        LowRank,
        Scale,
        Rows,
        Prefix,
        Offset,
        Generator,
        Mixture,
        Visibility,
    )
}


def save(
    path: files.Path,
    rows: np.ndarray | Array,
    slots: Mapping[str, Slot],
    card: dict[str, Any],
) -> None:
    """Writes slots of one owner, and the prompt that goes with them, atomically.

    Args:
      path: the file, by custom ``*.safetensors``.
      rows: ``[P, H]``; P may be 0.
      slots: by the path of their site.
      card: see `prompt_file.save_prompt`.

    Raises:
      UserError: a number is not finite, or the file cannot be written.
    """
    tensors = tensors_of(rows, slots)
    files.write(path, tensors, metadata_of(tensors, card, path))


def tensors_of(
    rows: np.ndarray | Array, slots: Mapping[str, Slot]
) -> dict[str, np.ndarray]:
    """The tensors of a file, float32, by their names."""
    tensors = {ROWS: np.asarray(rows, np.float32)}
    for site, slot in sorted(slots.items()):
        for field, array in slot.arrays().items():
            array = np.asarray(array, np.float32)
            tensors[f"{SLOTS}{site}/{type(slot).__name__}/{field}"] = array
    return tensors


def metadata_of(
    tensors: Mapping[str, np.ndarray], card: dict[str, Any], path: files.Path
) -> dict[str, str]:
    """What goes with them: the card, and the checksum of all their numbers.

    Raises:
      UserError: a number is not finite, or the card says what none may.
    """
    found = numbers(tensors)
    prompt_file.check_finite(found, path)
    length, width = tensors[ROWS].shape
    card = cards.check({**card, "length": length, "width": width}, path)
    return cards.encode(card, found)


def is_adapter(path: files.Path) -> bool:
    """Whether a file holds slots, by the names of its tensors."""
    try:
        with files.reading(path, "a prompt file") as file:
            return any(name.startswith(SLOTS) for name in file.keys())  # noqa: SIM118
    except UserError:
        return False


def load(
    path: files.Path,
) -> tuple[np.ndarray, dict[str, Slot], dict[str, Any]]:
    """Reads what `save` wrote: rows ``[P, H]``, slots by their site, the card.

    Raises:
      UserError: the file is missing, damaged or of another kind.
    """
    with files.reading(path, "an adapter file") as file:
        card = cards.decode(file.metadata() or {}, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if card is None or ROWS not in tensors:
        raise UserError(
            f"{path} is no adapter file: it has no card or no tensor {ROWS!r}; give the "
            "file that a training run wrote"
        )
    parts: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, array in tensors.items():
        if name == ROWS:
            continue
        site, _, field = name.removeprefix(SLOTS).rpartition("/")
        site, _, kind = site.rpartition("/")
        known = KINDS[kind].FIELDS if kind in KINDS else ()
        is_slot = name.startswith(SLOTS) and field in known
        if not is_slot or array.dtype != np.float32:
            raise UserError(
                f"{path} holds {name} {array.dtype}, which no adapter has; write it "
                "again with this version"
            )
        parts.setdefault(site, {}).setdefault(kind, {})[field] = array
    found = numbers(tensors)
    prompt_file.check_finite(found, path)
    card = cards.verified(card, found, path)
    slots = {}
    for site, kinds in parts.items():
        ((kind, fields),) = kinds.items()
        missing = set(KINDS[kind].FIELDS) - fields.keys()
        if missing:
            raise UserError(f"{path} lacks {', '.join(sorted(missing))} of {site}")
        slots[site] = KINDS[kind].of(*(fields[name] for name in KINDS[kind].FIELDS))
    return tensors[ROWS], slots, card


def check_fits(slots: Mapping[str, Slot], base: Mapping[str, Any]) -> None:
    """Refuses slots that a model has no place for.

    Raises:
      UserError: the first that does not fit.
    """
    for site, slot in slots.items():
        path, _, own = site.rpartition("/")
        for place, have in slot.sizes.items():
            want = adapters.widths_at(f"{path}/{place or own}", base)
            if want != have:
                raise UserError(
                    f"the adapter has {list(have)} at {site}, where this model has "
                    f"{'nothing' if want is None else list(want)} (layers, width); use "
                    "the model it was tuned on"
                )


def numbers(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """All numbers in the order of their tensors' names."""
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])
