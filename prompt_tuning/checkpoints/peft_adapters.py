# SPDX-License-Identifier: Apache-2.0
"""Adapters as PEFT keeps them: LoRA and IA3 in and out, prefixes in.

PEFT names tensors by transformers' modules and keeps one for each layer, where ours are
stacked; its matrices are [out, in]. LoRA is written with the scale in B and
``lora_alpha = r``. PEFT's prefix tuning of an encoder-decoder reaches the decoder's
self-attention, and there layers i and i + L/2 read the same keys and values: that is taken
in, while prefixes of our own, each layer's its own, have no form there.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from prompt_tuning import files
from prompt_tuning.checkpoints import adapter_file, cards, layout, peft, prompt_file
from prompt_tuning.checkpoints.keys import huggingface
from prompt_tuning.checkpoints.keys import peft as keys
from prompt_tuning.errors import UserError
from prompt_tuning.network.adapters import INPUT, OUTPUT, PREFIX, Slot
from prompt_tuning.network.slots import LowRank, Prefix, Scale

_KERNEL = "/kernel"
_SUFFIXES = (keys.LORA_A, keys.LORA_B, keys.IA3_SCALE)
_SELF_ATTENTION = "decoder/layers/self_attention"
# Our names of methods, and PEFT's.
_METHODS = {keys.LORA: "lora", keys.IA3: "ia3", keys.PREFIX: "decoder_prefix"}


def is_adapter(path: files.Path) -> bool:
    """Whether the path is a folder of PEFT's with an adapter of a kind known here."""
    if not peft.is_prompt(path):
        return False
    config = files.read_json(files.inside(pathlib.Path(path), keys.CONFIG_FILE))
    return config.get("peft_type") in _METHODS


def load(path: files.Path) -> tuple[np.ndarray, dict[str, Any], dict[str, Slot]]:
    """Reads an adapter: no rows ``[0, H]``, its card, its slots by site.

    H is that of our card, or 0 where PEFT wrote the folder, which does not say it.

    Raises:
      UserError: it is damaged, of a pickle, or does what our layers cannot.
    """
    folder = pathlib.Path(path)
    config = files.read_json(files.inside(folder, keys.CONFIG_FILE))
    kind = config.get("peft_type")
    other = [name for name in keys.OTHER if config.get(name)]
    if config.get("bias", "none") != "none":
        other.append("bias")
    if str(config.get("init_lora_weights")).startswith(keys.OTHER_BASE):
        other.append("init_lora_weights")
    if config.get(keys.SUBMODULES, 2) not in (None, 2) and kind == keys.PREFIX:
        other.append(keys.SUBMODULES)
    if other:
        raise UserError(
            f"{folder} has {other[0]} {config[other[0]]!r}, for which our layers have no "
            "place: tune it without"
        )
    tensors, card = peft.read_tensors(folder)
    if any(array.ndim != 2 for array in tensors.values()):
        raise UserError(f"{folder} holds a tensor that is no matrix: save it again")
    if kind == keys.PREFIX:
        slots = _prefix(folder, config, tensors)
    else:
        slots = _by_module(folder, config, tensors)
    width = 0 if card is None else card.get("width") or 0
    rows = np.zeros((0, width), np.float32)
    numbers = adapter_file.numbers(adapter_file.tensors_of(rows, slots))
    prompt_file.check_finite(numbers, folder)
    if card is None:
        return rows, _card(folder, config), slots
    return rows, cards.verified(card, numbers, folder), slots


def save(
    folder: files.Path,
    rows: np.ndarray,
    slots: Mapping[str, Slot],
    card: dict[str, Any],
) -> None:
    """Writes an adapter as a folder that PEFT loads, whole or not at all.

    Raises:
      UserError: PEFT has no place for it, or the folder holds something.
    """
    kinds = {type(slot) for slot in slots.values()}
    if len(rows) or len(kinds) != 1 or not kinds <= {LowRank, Scale}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        what = f"a prompt of {len(rows)} rows beside them" if len(rows) else names
        raise UserError(
            f"PEFT's folders hold LoRA or IA3 alone, and this adapter has {what}: keep it "
            "in the native format"
        )
    tensors: dict[str, np.ndarray] = {}
    targets: dict[str, set[str]] = {INPUT: set(), OUTPUT: set()}
    for site, slot in slots.items():
        path, _, place = site.rpartition("/")
        fields = {name: np.asarray(x, np.float32) for name, x in slot.arrays().items()}
        for layer in range(len(next(iter(fields.values())))):
            module = _module(path, layer)
            targets[place].add(module.rpartition(".")[2])
            own = {name: array[layer] for name, array in fields.items()}
            if isinstance(slot, LowRank):
                tensors[f"{keys.MODEL}{module}{keys.LORA_A}"] = own["a"].T
                tensors[f"{keys.MODEL}{module}{keys.LORA_B}"] = own["b"].T
            else:
                shape = (1, -1) if place == INPUT else (-1, 1)
                tensors[f"{keys.MODEL}{module}{keys.IA3_SCALE}"] = own["by"].reshape(
                    shape
                )
    every = sorted(targets[INPUT] | targets[OUTPUT])
    if LowRank in kinds:
        ranks = {x.shape[0] for n, x in tensors.items() if n.endswith(keys.LORA_A)}
        if len(ranks) > 1:
            raise UserError(
                f"this adapter has the ranks {', '.join(map(str, sorted(ranks)))}, and "
                "PEFT's folders hold one: keep it in the native format"
            )
        (rank,) = ranks
        kind, own_fields = keys.LORA, {"r": rank, "lora_alpha": rank}
    else:
        kind = keys.IA3
        own_fields = {"feedforward_modules": sorted(targets[INPUT])}
    config = {
        **keys.CONSTANT,
        **keys.ADAPTER[kind],
        **own_fields,
        "peft_type": kind,
        "target_modules": every,
        "base_model_name_or_path": (card.get("base_model") or {}).get("name"),
    }
    numbers = adapter_file.tensors_of(rows, slots)
    metadata = adapter_file.metadata_of(numbers, card, folder)
    contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    peft.write(pathlib.Path(folder), config, contiguous, metadata)


def _module(path: str, layer: int) -> str:
    """Transformers' module of one layer: ``encoder.block.0.layer.0.SelfAttention.q``."""
    side, _, rest = path.partition("/layers/")
    name, _ = huggingface.from_t5x(f"{side}/layers_{layer}/{rest}{_KERNEL}")
    return name.removesuffix(".weight")


def _by_module(
    folder: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, Slot]:
    """The slots of LoRA or IA3, stacked over layers."""
    parts: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for name, tensor in tensors.items():
        path, layer, suffix = _place(folder, name)
        own = parts.setdefault(path, {}).setdefault(suffix, {})
        own[layer] = np.asarray(tensor, np.float32)
    slots: dict[str, Slot] = {}
    for path, fields in parts.items():
        stacked = {}
        for suffix, own in fields.items():
            shapes = {x.shape for x in own.values()}
            if sorted(own) != list(range(len(own))) or len(shapes) != 1:
                raise UserError(
                    f"{folder} lacks layers of {path}, or they are of several sizes: an "
                    "adapter here has all layers of a module"
                )
            stacked[suffix] = np.stack([own[i] for i in range(len(own))])
        if keys.IA3_SCALE in stacked:
            by = stacked[keys.IA3_SCALE]
            place = INPUT if by.shape[1] == 1 else OUTPUT
            slots[f"{path}/{place}"] = Scale.of(by.reshape(len(by), -1))
            continue
        if len(stacked) != 2:
            raise UserError(f"{folder} has one of the two matrices of {path} alone")
        a, b = (np.swapaxes(stacked[s], 1, 2) for s in (keys.LORA_A, keys.LORA_B))
        if not a.shape[2] == b.shape[1] == _number(folder, config, "r"):
            raise UserError(
                f"{folder} contradicts itself: its rank is {config['r']}, that of {path} "
                f"{a.shape[2]} and {b.shape[1]}; save it again with PEFT"
            )
        scale = np.float32(_scale(folder, config))
        slots[f"{path}/{OUTPUT}"] = LowRank.of(a, b if scale == 1 else b * scale)
    return slots


def _place(folder: pathlib.Path, name: str) -> tuple[str, int, str]:
    """The path of our module, the layer, and what of it a tensor of PEFT's is.

    Raises:
      UserError: no layer of a T5 has such a module.
    """
    for suffix in _SUFFIXES:
        if name.startswith(keys.MODEL) and name.endswith(suffix):
            module = name[len(keys.MODEL) : -len(suffix)]
            found = huggingface.to_t5x(f"{module}.weight")
            match = layout.LAYER.fullmatch(found[0]) if found else None
            if match is not None and match[3].endswith(_KERNEL):
                path = f"{match[1]}layers/{match[3].removesuffix(_KERNEL)}"
                return path, int(match[2]), suffix
    raise UserError(
        f"{folder} holds {name}, which is no LoRA or IA3 of a T5's layers; only these are "
        "taken"
    )


def _number(folder: pathlib.Path, config: Mapping[str, Any], name: str) -> Any:
    """A number above 0 of the configuration.

    Raises:
      UserError: it is none.
    """
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(
            f"{folder} has {name} {value!r} where a number above 0 belongs; save it "
            "again with PEFT"
        )
    return value


def _scale(folder: pathlib.Path, config: Mapping[str, Any]) -> float:
    """What PEFT multiplies a product of low rank by."""
    rank, alpha = (_number(folder, config, name) for name in ("r", "lora_alpha"))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _prefix(
    folder: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, Slot]:
    """The prefix of the decoder's self-attention.

    PEFT repeats its 2 L entries of P rows and cuts the list into fours, of which this
    attention takes two.
    """
    length, layers, width = (
        int(_number(folder, config, name))
        for name in ("num_virtual_tokens", "num_layers", "token_dim")
    )
    array = tensors.get(keys.TENSOR)
    shape = (length, 2 * layers * width)
    if array is None or len(tensors) > 1 or array.shape != shape:
        raise UserError(
            f"{folder} contradicts itself: its configuration says {keys.TENSOR} "
            f"{list(shape)}; save it again with PEFT"
        )
    entries = np.asarray(array, np.float32).reshape(length, 2 * layers, -1)
    entries = entries.transpose(1, 0, 2)
    first = 4 * np.arange(layers) % (2 * layers)
    made = Prefix.of(entries[first], entries[first + 1])  # pyright: ignore[reportArgumentType]
    return {f"{_SELF_ATTENTION}/{PREFIX}": made}


def _card(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The card of an adapter that PEFT tuned."""
    name = config.get("base_model_name_or_path")
    return {
        "method": _METHODS[config["peft_type"]],
        "length": 0,
        "width": 0,
        "base_model": {} if name is None else {"name": name},
        "source": {"format": "peft", "path": folder.absolute().name},
        "notes": [cards.NO_CHECKSUM],
    }
