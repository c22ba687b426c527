# SPDX-License-Identifier: Apache-2.0
"""Folders of Hugging Face's transformers: T5 1.0, 1.1, Flan-T5, mT5 and ByT5.

config.json says the sizes, safetensors files hold the weights under PyTorch's names and
orientation; `keys.huggingface` translates both.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from prompt_tuning import files, trees
from prompt_tuning.checkpoints import hub, layout
from prompt_tuning.checkpoints.keys import huggingface as keys
from prompt_tuning.checkpoints.source import Source
from prompt_tuning.dtypes import READ_AS, floating
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer

WHAT = "a safetensors file of a Hugging Face model"
PIECE = 2**24  # Numbers of two tensors that are compared at once.
T5X_TABLE, T5X_HEAD = keys.TABLE[0][1], keys.HEAD[0][1]


class _Stored(NamedTuple):
    """A tensor as the header of its file has it."""

    name: str
    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str


def is_checkpoint(path: files.Path) -> bool:
    """Whether a folder is one of transformers; `open_checkpoint` says if it is a T5."""
    folder = pathlib.Path(path)
    try:
        return "model_type" in files.read_json(files.inside(folder, keys.CONFIG))
    except UserError:
        # No other format has a file of this name: a damaged one is to be told of.
        return (folder / keys.CONFIG).is_file()


def open_checkpoint(path: files.Path) -> Source:
    """Opens a folder of config.json and safetensors files without reading weights.

    A table that is saved under several names is there once, so is the output layer
    that is tied to it; only to see that they are the same, they are read, in pieces.
    float16 becomes float32.

    Raises:
      UserError: this is no T5, or files are missing, damaged, elsewhere or contradict
        each other.
    """
    folder = pathlib.Path(path)
    config = files.read_json(files.inside(folder, keys.CONFIG))
    sizes = keys.sizes_of(config, str(folder / keys.CONFIG))
    stored = _headers(folder)

    origins: dict[str, tuple[_Stored, bool]] = {}  # By T5X name; transposed there?
    unknown = []
    for name, tensor in stored.items():
        if (found := keys.to_t5x(name)) is not None:
            origins[found[0]] = tensor, found[1]
        elif name not in (*keys.TABLE_NAMES, *keys.LEFTOVERS):
            unknown.append(name)
    tied, rescaled = keys.is_tied(config), keys.is_rescaled(config)
    tables = [stored[name] for name in keys.TABLE_NAMES if name in stored]
    if tables:
        origins[T5X_TABLE] = tables[0], False
    if rescaled and T5X_HEAD in origins:
        tables.append(origins.pop(T5X_HEAD)[0])
    elif tied and tables and not rescaled:
        # What version 5 of transformers makes of a T5 1.1 without output layer.
        origins.setdefault(T5X_HEAD, (tables[0], True))
    for tensor in tables[1:]:
        _check_same(folder, tables[0], tensor)

    specs = {}
    for t5x_name, (tensor, transposed) in origins.items():
        if tensor.dtype not in READ_AS:
            raise UserError(
                f"{tensor.name} in {folder} is stored as {tensor.dtype}; save the "
                "model as float32 or bfloat16"
            )
        specs[t5x_name] = _spec(tensor.shape, READ_AS[tensor.dtype], transposed)
    found = layout.sizes({name: spec.shape for name, spec in specs.items()})
    for size, value in found.items():
        if value != sizes[size]:
            raise UserError(
                f"{folder} contradicts itself: {size} is {sizes[size]} in "
                f"{keys.CONFIG}, {value} in the weights; download or save it again"
            )

    def read(t5x_name: str) -> np.ndarray:
        tensor, transposed = origins[t5x_name]
        # Opened anew each time: no pages of a file in memory stay behind.
        with files.reading(tensor.file, WHAT) as file:
            array = file.get_tensor(tensor.name)
        array = array.astype(specs[t5x_name].dtype, copy=False)
        return array.T if transposed else array

    return Source(
        path=str(folder),
        format="huggingface",
        specs=specs,
        read=read,
        sizes={**sizes, "logits_via_embedding": rescaled},
        metadata={name: config[name] for name in keys.METADATA if name in config},
        unknown=tuple(unknown),
    )


def resolve(name: files.Path) -> pathlib.Path:
    """The folder of a model on this machine, or of the copy of one on the hub.

    Args:
      name: a folder, or a name of the hub such as ``google/flan-t5-base``, which is
        downloaded once and then found without a network.

    Raises:
      UserError: there is no such folder and the hub gives no such model.
    """
    path = pathlib.Path(name)
    if path.exists():
        return path
    if not hub.is_name(str(name)):
        raise UserError(f"there is no folder {name}; give the folder of a model")
    return hub.download(str(name), keys.HUB_FILES, "model")


def write_checkpoint(
    folder: files.Path,
    source: Source,
    *,
    sizes: Mapping[str, Any],
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    vocabulary: files.Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Writes what transformers' `from_pretrained` takes, tensor by tensor, atomically.

    Args:
      folder: must not exist.
      source: the weights; its prompts have no place in the folder.
      sizes: all fields of `T5Config`.
      dtype: 'float32' or 'bfloat16'; None keeps the dtype of each tensor.
      shard_bytes: weights of more bytes are spread over files of at most so many.
      vocabulary: a SentencePiece model to put beside the weights.
      progress: called with the T5X name of each tensor before it is read.

    Raises:
      UserError: the folder exists or cannot be written, the weights do not fit the
        sizes, or transformers has no such T5.
    """
    folder, architecture = pathlib.Path(folder), T5Config(**sizes)
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already; remove it or choose another folder")
    if vocabulary is not None and not os.path.isfile(vocabulary):
        raise UserError(f"there is no vocabulary {vocabulary}; give a spiece.model")
    if dtype is not None:
        floating(dtype)
    _check_fit(source, architecture)
    kind = source.metadata.get("model_type")
    dtypes = {str(dtype or spec.dtype) for spec in source.specs.values()}
    config = keys.config_of(
        architecture,
        kind if kind in keys.ARCHITECTURES else "t5",
        "float32" if len(dtypes) > 1 else dtypes.pop(),
    )

    origins, specs = {}, {}  # By the name there.
    for t5x_name, spec in source.specs.items():
        name, transposed = keys.from_t5x(t5x_name)
        origins[name] = t5x_name, transposed
        specs[name] = _spec(spec.shape, dtype or spec.dtype, transposed)

    def read(name: str) -> np.ndarray:
        t5x_name, transposed = origins[name]
        if progress is not None:
            progress(t5x_name)
        array = source.read(t5x_name).astype(specs[name].dtype, copy=False)
        return array.T if transposed else array

    documents = {keys.CONFIG: config, keys.GENERATION: keys.SPECIAL_IDS}
    shards = _shards(specs, shard_bytes)
    if len(shards) > 1:
        documents[keys.INDEX] = {
            "metadata": {"total_size": trees.num_bytes(specs)},
            "weight_map": {name: file for file in shards for name in shards[file]},
        }
    with files.replacing(folder) as temporary:
        temporary.mkdir()
        for file, names in shards.items():
            some = {name: specs[name] for name in names}
            files.write_stream(temporary / file, some, read, {"format": "pt"})
        for file, content in documents.items():
            (temporary / file).write_text(json.dumps(content, indent=2) + "\n")
        if vocabulary is not None:
            shutil.copyfile(vocabulary, temporary / keys.VOCABULARY)


def _spec(shape: tuple[int, ...], dtype: Any, transposed: bool) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape[::-1] if transposed else shape, np.dtype(dtype))


def _shards(
    specs: Mapping[str, jax.ShapeDtypeStruct], limit: int
) -> dict[str, list[str]]:
    """Spreads tensors over files: ``{file: names}``."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, spec in specs.items():
        size = trees.num_bytes(spec)
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {keys.WEIGHTS: shards[0]}
    return {
        keys.SHARD.format(number, len(shards)): names
        for number, names in enumerate(shards, start=1)
    }


def _check_fit(source: Source, architecture: T5Config) -> None:
    """Raises a UserError that lists all tensors that are not as the sizes have them."""
    abstract = Model(Transformer(architecture)).abstract_params()
    wanted = layout.shapes(trees.flatten(nn.meta.unbox(abstract)))
    found = {name: spec.shape for name, spec in source.specs.items()}
    found |= dict.fromkeys(source.unknown)
    wrong = [n for n in {**wanted, **found} if wanted.get(n, ()) != found.get(n, ())]
    if wrong:
        raise UserError(
            f"{source.path} does not fit the sizes; missing, unused or of another "
            f"shape: {', '.join(layout.collapse(wrong))}; give the sizes of this model"
        )


def _headers(folder: pathlib.Path) -> dict[str, _Stored]:
    """All tensors of the folder's files, which the index must agree with."""
    expected: dict[str, set[str]] = {}
    if os.path.lexists(folder / keys.WEIGHTS):
        expected[keys.WEIGHTS] = set()
    elif os.path.lexists(folder / keys.INDEX):
        places = files.read_json(files.inside(folder, keys.INDEX)).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(
                f"{folder / keys.INDEX} names no tensors; download it again"
            )
        for name, file in places.items():
            expected.setdefault(str(file), set()).add(name)
    else:
        raise UserError(
            f"{folder} has no {keys.WEIGHTS}, and files of PyTorch are not read; write "
            "one with transformers: T5ForConditionalGeneration.from_pretrained(...)"
            ".save_pretrained(..., safe_serialization=True)"
        )
    stored = {}
    for file, names in expected.items():
        path = files.inside(folder, file)
        with files.reading(path, WHAT) as opened:
            for name in opened.keys():  # noqa: SIM118
                header = opened.get_slice(name)
                shape = tuple(header.get_shape())
                stored[name] = _Stored(name, path, shape, header.get_dtype())
            wrong = sorted(names ^ set(opened.keys())) if names else []
        if wrong:
            raise UserError(
                f"{folder / keys.INDEX} and {file} disagree on {', '.join(wrong)}; "
                "download or save the model again"
            )
    return stored


def _check_same(folder: pathlib.Path, table: _Stored, other: _Stored) -> None:
    """Compares what must be the same tensor under two names, to the bit."""
    same = table[2:] == other[2:] and len(table.shape) == 2
    if same:
        rows, columns = table.shape
        step = max(1, PIECE // max(1, columns))
        # The last piece must end with the tensor: a slice is not cut to fit.
        pieces = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
        with files.reading(table.file, WHAT) as a, files.reading(other.file, WHAT) as b:
            a, b = a.get_slice(table.name), b.get_slice(other.name)
            same = all(a[piece].tobytes() == b[piece].tobytes() for piece in pieces)
    if not same:
        raise UserError(
            f"{other.name} and {table.name} differ in {folder}, though its "
            f"{keys.CONFIG} has them as one; if the output layer is its own, set "
            "tie_word_embeddings to false there and remove scale_decoder_outputs"
        )
