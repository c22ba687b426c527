# SPDX-License-Identifier: Apache-2.0
"""A base model as a folder with one safetensors file under T5X's names.

Loading is loud: every gap between the file and the network is named, all at once, and
nothing is ever filled with random numbers. Prompts have files of their own.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from prompt_tuning import optim, trees
from prompt_tuning.checkpoints import files, layout
from prompt_tuning.errors import UserError
from prompt_tuning.types import Params

FILE = "model.safetensors"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Names in the header of a safetensors file.
STORED = {"F32": "float32", "BF16": "bfloat16"}


def save_model(
    folder: files.Path,
    params: Params,
    metadata: dict[str, Any],
    dtype: str | None = None,
) -> None:
    """Writes the network's parameters to ``folder/model.safetensors``, atomically.

    Args:
      folder: made if missing; other files in it stay.
      params: the network under our names, without prompts.
      metadata: what can be said in JSON, by key.
      dtype: 'float32' or 'bfloat16'; None keeps the dtype of each leaf.

    Raises:
      UserError: an unknown dtype, or the file cannot be written.
      ValueError: ``params`` holds a prompt, or a leaf of another dtype.
    """
    target = None if dtype is None else _dtype(dtype)
    flat = layout.unstack(trees.flatten(params))
    prompts = [name for name in flat if re.fullmatch(optim.PROMPT, name)]
    if prompts:
        raise ValueError(f"a model file holds no prompts: {', '.join(prompts)}")
    arrays = {}
    for name, leaf in flat.items():
        array = np.asarray(leaf)
        array = array if target is None else array.astype(target)
        if array.dtype not in DTYPES.values():
            raise ValueError(f"{name} is {array.dtype}; give float32 or bfloat16")
        arrays[name] = array
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    files.write(pathlib.Path(folder) / FILE, arrays, texts)


def load_model(
    folder: files.Path,
    abstract_params: Params,
    dtype: str,
    shardings: Params | None = None,
) -> dict[str, Any]:
    """Reads a model, one tensor at a time, and places it on the devices.

    Args:
      folder: what `save_model` wrote.
      abstract_params: names and shapes to expect, as `Model.abstract_params` gives
        them, boxed or not; prompts among them are left out.
      dtype: 'float32' or 'bfloat16', of the parameters in memory.
      shardings: where each leaf goes (see `sharding.param_shardings`); by default on
        the default device.

    Returns:
      The network's parameters under our names.

    Raises:
      UserError: the file is missing or damaged or does not fit the network; all leaves
        that are missing, unused or of another shape are listed.
    """
    target = _dtype(dtype)
    wanted = {
        name: leaf
        for name, leaf in trees.flatten(nn.meta.unbox(abstract_params)).items()
        if not re.fullmatch(optim.PROMPT, name)
    }
    place = {} if shardings is None else trees.flatten(shardings)
    loaded = {}
    with _open(folder) as file:
        _check_fit(str(folder), _shapes(file), layout.shapes(wanted))
        for name, leaf in wanted.items():
            layers = layout.layer_names(name, leaf.shape)
            array = np.empty(leaf.shape, target)
            for index, stored in enumerate(layers or [name]):
                array[index if layers else ...] = file.get_tensor(stored)
            loaded[name] = _place(array, place.get(name))
    return trees.unflatten(loaded)


def read_metadata(folder: files.Path) -> dict[str, Any]:
    """The metadata that `save_model` was given; reads no tensor."""
    with _open(folder) as file:
        try:
            return {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
        except json.JSONDecodeError as error:
            raise UserError(
                f"{folder} has damaged metadata; copy or write the model again"
            ) from error


def read_specs(folder: files.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype on disk of every leaf, by T5X name; reads no tensor."""
    with _open(folder) as file:
        return {
            name: jax.ShapeDtypeStruct(
                shape, DTYPES[STORED[file.get_slice(name).get_dtype()]]
            )
            for name, shape in _shapes(file).items()
        }


def read_tensor(folder: files.Path, name: str) -> np.ndarray:
    """One tensor by its T5X name, as it is on disk.

    Raises:
      UserError: the model has no such tensor.
    """
    with _open(folder) as file:
        if name not in _shapes(file):
            raise UserError(f"{folder} holds no {name}; give the folder of a T5 model")
        return file.get_tensor(name)


def _open(folder: files.Path):
    return files.reading(pathlib.Path(folder) / FILE, "a model file of this package")


def _shapes(file) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, which must be float32 or bfloat16."""
    result = {}
    for name in file.keys():  # noqa: SIM118
        header = file.get_slice(name)
        if header.get_dtype() not in STORED:
            raise UserError(
                f"{name} is stored as {header.get_dtype()}; convert the model to "
                "float32 or bfloat16"
            )
        result[name] = tuple(header.get_shape())
    return result


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    # A process of several fills only the parts that its own devices hold.
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])


def _check_fit(
    folder: str,
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises one UserError that lists everything that does not fit."""
    missing = [name for name in wanted if name not in found]
    unused = [name for name in found if name not in wanted]
    shapes: dict[str, list[str]] = {}
    for name in wanted:
        if name in found and found[name] != wanted[name]:
            what = f"{list(found[name])} instead of {list(wanted[name])}"
            shapes.setdefault(what, []).append(name)
    if not (missing or unused or shapes):
        return
    have, want = layout.sizes(found), layout.sizes(wanted)
    other = [
        f"{size} {have[size]} in the file, {want[size]} in the model"
        for size in want
        if size in have and have[size] != want[size]
    ]
    parts = [f"it is of another size ({'; '.join(other)})"] if other else []
    if missing:
        parts.append(f"missing: {', '.join(layout.collapse(missing))}")
    if unused:
        parts.append(f"unused: {', '.join(layout.collapse(unused))}")
    for what, names in shapes.items():
        parts.append(f"shape {what}: {', '.join(layout.collapse(names))}")
    raise UserError(
        f"the checkpoint {folder} does not fit the model; {'; '.join(parts)}; choose "
        "the checkpoint and the model file of one and the same size and architecture"
    )


def _dtype(name: str) -> np.dtype:
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]
