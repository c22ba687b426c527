# SPDX-License-Identifier: Apache-2.0
"""A base model as a folder with one safetensors file under T5X's names.

The package's own format of models. Prompts have files of their own.
"""

import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from prompt_tuning import dtypes, files
from prompt_tuning.checkpoints import source
from prompt_tuning.checkpoints.source import Source
from prompt_tuning.errors import UserError
from prompt_tuning.network.prompts import PROMPT_LEAVES
from prompt_tuning.types import Params

FILE = "model.safetensors"
# Beside the weights, so that one folder says what its ids mean.
VOCABULARY = "spiece.model"
STORED = {dtypes.CODES[name]: dtype for name, dtype in dtypes.FLOATS.items()}


def is_checkpoint(path: files.Path) -> bool:
    """Whether ``path`` is a folder with a model file; whose it is, nothing says."""
    return (pathlib.Path(path) / FILE).is_file()


def open_checkpoint(path: files.Path) -> Source:
    """Opens what `save_model` or `write_checkpoint` wrote.

    Args:
      path: the folder.

    Raises:
      UserError: the file is missing or damaged, or holds other dtypes.
    """
    folder = pathlib.Path(path)
    with _open(folder) as file:
        specs = {}
        for name in file.keys():  # noqa: SIM118
            header = file.get_slice(name)
            dtype = STORED.get(header.get_dtype())
            if dtype is None:
                raise UserError(
                    f"{name} is stored as {header.get_dtype()}; convert the model to "
                    "float32 or bfloat16"
                )
            specs[name] = jax.ShapeDtypeStruct(tuple(header.get_shape()), dtype)
        texts = file.metadata() or {}
    try:
        metadata = {key: json.loads(text) for key, text in texts.items()}
        crcs = metadata.pop(files.CRC, {})
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} has damaged metadata; copy or write the model again"
        ) from error

    def read(name: str) -> np.ndarray:
        # Opened anew each time: no pages of a file in memory stay behind.
        with _open(folder) as file:
            array = file.get_tensor(name)
        # Files of earlier versions have no checksums.
        data = memoryview(array.reshape(-1).view(np.uint8))
        if crcs and crcs.get(name) != files.crc32(data):
            raise UserError(
                f"{folder} is damaged: {name} is not what was written; copy or write "
                "the model again"
            )
        return array

    return Source(str(folder), "native", specs, read, metadata=metadata)


def save_model(
    folder: files.Path,
    params: Params,
    metadata: Mapping[str, Any],
    dtype: str | None = None,
    vocabulary: pathlib.Path | None = None,
) -> None:
    """Writes the network's parameters to ``folder/model.safetensors``, atomically.

    Args:
      folder: made if missing; other files in it stay.
      params: the network under our names, without prompts.
      metadata: what can be said in JSON, by key.
      dtype: 'float32' or 'bfloat16'; None keeps the dtype of each leaf.
      vocabulary: SentencePiece model to put beside the weights.

    Raises:
      UserError: an unknown dtype, or a file cannot be written.
      ValueError: ``params`` holds a prompt, or a leaf of another dtype.
    """
    write_checkpoint(
        folder,
        source.from_params(params),
        metadata=metadata,
        dtype=dtype,
        vocabulary=vocabulary,
    )


def write_checkpoint(
    folder: files.Path,
    model: Source,
    *,
    metadata: Mapping[str, Any],
    dtype: str | None = None,
    vocabulary: files.Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Writes a model tensor by tensor; arguments and errors as of `save_model`.

    Args:
      folder: made if missing; other files in it stay.
      model: its tensors are read one by one.
      metadata: what can be said in JSON, by key.
      dtype: 'float32' or 'bfloat16'; None keeps the dtype of each tensor.
      vocabulary: SentencePiece model to put beside the weights.
      progress: told the name of each tensor before it is read.
    """
    prompts = [name for name in model.specs if re.fullmatch(PROMPT_LEAVES, name)]
    if prompts:
        raise ValueError(f"a model file holds no prompts: {', '.join(prompts)}")
    specs = {}
    for name, spec in model.specs.items():
        target = spec.dtype if dtype is None else dtypes.floating(dtype)
        if target not in dtypes.FLOATS.values():
            raise ValueError(f"{name} is {target}; give float32 or bfloat16")
        specs[name] = jax.ShapeDtypeStruct(spec.shape, target)

    def read(name: str) -> np.ndarray:
        if progress is not None:
            progress(name)
        return model.read(name).astype(specs[name].dtype, copy=False)

    texts = {key: json.dumps(value) for key, value in metadata.items()}
    files.write_stream(pathlib.Path(folder) / FILE, specs, read, texts, checksums=True)
    if vocabulary is not None:
        with files.replacing(pathlib.Path(folder) / VOCABULARY) as temporary:
            shutil.copyfile(vocabulary, temporary)


def _open(folder: files.Path):
    return files.reading(pathlib.Path(folder) / FILE, "a model file of this package")
