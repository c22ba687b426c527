# SPDX-License-Identifier: Apache-2.0
"""T5X's own checkpoints, without T5X.

Such a checkpoint is a folder ``checkpoint_N`` with an index, the file ``checkpoint``
(Flax's msgpack), and zarr arrays. A leaf of the index is a tensor or tensorstore's
description of its array. Driver and bucket in a description are those of the time of
writing: arrays are looked for beside the index, wherever that lies now.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.serialization
import jax
import numpy as np
import tensorstore as ts

from prompt_tuning import dtypes, files, trees
from prompt_tuning.checkpoints.keys import t5x
from prompt_tuning.checkpoints.source import Source
from prompt_tuning.errors import UserError

CLOUD = re.compile(r"gs://([^/]+)/*(.*)")
# About two minutes; tensorstore's own 32 are a quarter of an hour without network.
RETRIES = {"max_retries": 8}


def is_checkpoint(path: str) -> bool:
    """Whether a native checkpoint of T5X, or a folder of such, lies at ``path``.

    Args:
      path: a local folder or ``gs://BUCKET/PATH``.

    Raises:
      UserError: Google Cloud Storage does not answer.
    """
    folder = latest(path)
    return has(folder, t5x.INDEX) and not has(folder, t5x.METADATA)


def open_checkpoint(path: str) -> Source:
    """Opens a native checkpoint of T5X; tensors that have an array are not read.

    Args:
      path: a checkpoint, or a folder of several, of which the last is taken; local or
        ``gs://BUCKET/PATH``.

    Returns:
      The parameters and prompts, without optimizer states; the step as metadata.

    Raises:
      UserError: there is no such checkpoint, or it is damaged, of another format, or
        names a place outside of it. `Source.read` raises it for a damaged tensor.
    """
    folder = latest(path)
    index = read_index(folder)
    leaves = t5x.flatten(index.get(t5x.TREE, index))
    owners: dict[str, str] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, dict):
            with reading(f"{folder}, {name}"):
                place = t5x.array_place(leaf)
                if name != owners.setdefault(place, name):
                    raise ValueError(f"its array is that of {owners[place]}")
                leaves[name] = t5x.array_ways(leaf, kvstore(folder, place))
    return make_source(folder, "t5x", leaves)


def write_checkpoint(
    folder: str,
    source: Source,
    *,
    step: int = 0,
    dtype: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Writes ``folder/checkpoint_{step}`` in T5X's native layout, tensor by tensor.

    Args:
      folder: local or ``gs://BUCKET/PATH``; made if missing.
      source: the parameters and prompts.
      step: the training step that the checkpoint is said to be of.
      dtype: 'float32' or 'bfloat16', of the network; None keeps that of each tensor.
        Prompts are never rounded.
      progress: called with the name of every tensor that is written.

    Raises:
      UserError: the checkpoint exists or cannot be written, or a tensor cannot be read
        or is neither float32 nor bfloat16.
    """
    kept = None if dtype is None else dtypes.floating(dtype)
    target = f"{folder.rstrip('/')}/checkpoint_{step}"
    cloud = bool(CLOUD.fullmatch(target))
    with _whole(target) as place:
        # No param_states, as when T5X saves a state for inference: eval and infer restore
        # it; train does with fallback_to_scratch, which starts the optimizer anew.
        leaves: dict[str, Any] = {t5x.STEP: np.asarray(step, np.int32)}
        for name in (*source.specs, *source.prompts):
            array = source.read(name)
            if kept is not None and name in source.specs:
                array = array.astype(kept)
            if array.dtype not in dtypes.FLOATS.values():
                raise UserError(f"{name} is {array.dtype}; write it as float32")
            full = t5x.TARGET + name
            spec = t5x.array_spec(full, array.shape, array.dtype, cloud)
            at = kvstore(place, t5x.array_name(full))
            ts.open({**spec, "kvstore": at}, create=True).result().write(array).result()
            leaves[full] = spec
            if progress is not None:
                progress(name)
        tree = trees.unflatten(dict(sorted(leaves.items())))
        encoded = flax.serialization.msgpack_serialize(
            {"version": t5x.VERSION, t5x.TREE: tree}, in_place=True
        )
        store(place).write(t5x.INDEX, encoded).result()


@contextlib.contextmanager
def _whole(target: str) -> Iterator[str]:
    """Yields where to write a checkpoint that is to appear when it is whole.

    Nothing can be renamed on Google Cloud Storage. There the index makes a checkpoint of
    a folder, and is written last.
    """
    cloud = CLOUD.fullmatch(target)
    if _cloud_names(target, "", "") if cloud else os.path.lexists(target):
        raise UserError(f"{target} is there already; choose another folder or step")
    place = target if cloud else f"{target}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        yield place
        if not cloud:
            os.rename(place, target)
    except BaseException as error:
        if cloud:
            with contextlib.suppress(ValueError):
                store(place).delete_range(ts.KvStore.KeyRange()).result()
        else:
            shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, OSError | ValueError) and not isinstance(error, UserError):
            raise files.unwritable(target, error) from error
        raise


def latest(path: str) -> str:
    """The last ``checkpoint_N`` in a folder of such; ``path`` itself if it has none."""
    path = path.rstrip("/") or path
    if t5x.FOLDER.fullmatch(os.path.basename(path)):
        return path
    if CLOUD.fullmatch(path):
        keys = _cloud_names(path, "checkpoint_", "checkpoint_:")
        names = {key.partition("/")[0] for key in keys}
    else:
        names = {each.name for each in pathlib.Path(path).glob("checkpoint_*")}
    steps = {int(m[1]): m[0] for name in names if (m := t5x.FOLDER.fullmatch(name))}
    return f"{path}/{steps[max(steps)]}" if steps else path


def has(folder: str, name: str) -> bool:
    """Whether a folder has a file of this name."""
    if CLOUD.fullmatch(folder):
        return bool(_cloud_names(folder, name, f"{name}\0"))
    return os.path.isfile(os.path.join(folder, name))


def kvstore(folder: str, name: str = "") -> dict[str, Any]:
    """Tensorstore's description of a folder, or of the folder ``name`` below it."""
    if match := CLOUD.fullmatch(folder):
        root = {"driver": "gcs", "bucket": match[1], "path": match[2]}
        root["gcs_request_retries"] = RETRIES
    else:
        root = {"driver": "file", "path": os.path.realpath(folder)}
    return root | {"path": os.path.join(root["path"], name, "")}


def store(folder: str) -> ts.KvStore:
    """A folder's files by name."""
    return ts.KvStore.open(kvstore(folder)).result()


def _cloud_names(folder: str, first: str, end: str) -> list[str]:
    """Names of files in and below a folder, from ``first`` to before ``end``."""
    with reading(folder):
        keys = store(folder).list(ts.KvStore.KeyRange(first, end)).result()
        return [key.decode() for key in keys]


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns an exception, of any class, into a `UserError` about ``what``.

    Damaged bytes make msgpack, JSON, NumPy and tensorstore raise most of what there is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = re.sub(r"^[A-Z_]+: | \[tensorstore_spec=.*", "", files.first_line(error))
        why = f"it lacks {why}" if isinstance(error, KeyError) else why
        login = ", or log in with `gcloud auth application-default login`"
        cure = f"copy it again{login if what.startswith('gs://') else ''}"
        raise UserError(f"cannot read {what}: {why}; {cure}") from error


def read_index(folder: str) -> dict[str, Any]:
    """The tree in the index of a checkpoint.

    Raises:
      UserError: there is none, or it is cut short or something else.
    """
    if not has(folder, t5x.INDEX):
        raise UserError(f"{folder} has no T5X checkpoint; give its checkpoint_N")
    check_links(folder)
    with reading(f"{folder}/{t5x.INDEX}"):
        encoded = store(folder).read(t5x.INDEX).result().value
        if encoded.startswith(t5x.TENSORFLOW):
            raise UserError(f"{folder} is of TensorFlow; convert it with T5X")
        tree = flax.serialization.msgpack_restore(encoded)
        if not isinstance(tree, dict):
            raise TypeError("it is no tree of tensors")
        if tree.get("version", 0) not in range(t5x.VERSION + 1):
            raise ValueError(f"its version is {tree['version']}, not {t5x.VERSION}")
        return tree


def check_links(folder: str) -> None:
    """Refuses a local folder with links to what lies outside of it."""
    root = pathlib.Path(folder).resolve()
    for each in () if CLOUD.fullmatch(folder) else root.rglob("*"):
        if each.is_symlink() and not each.resolve().is_relative_to(root):
            link = f"{folder}/{each.relative_to(root)}"
            raise UserError(f"{link} is a link out of the checkpoint; put a copy there")


def make_source(folder: str, format_name: str, leaves: Mapping[str, Any]) -> Source:
    """Sorts the leaves of a train state by what they are, and opens its arrays.

    Args:
      folder: the checkpoint.
      format_name: 't5x' or 't5x-orbax'.
      leaves: by name in the train state: an array, or a list of how tensorstore opens
        one; what comes second is for an array without metadata.

    Raises:
      UserError: a tensor is damaged or of another dtype, or there is none.
    """
    kinds = {name: trees.first_match(t5x.KINDS, name) for name in leaves}
    wanted = [name for name in leaves if kinds[name] in ("network", "prompt", "step")]
    arrays: dict[str, ts.TensorStore] = {}
    metadata = {}
    # Together: there may be hundreds, each a round trip to the cloud.
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        opening = {name: pool.submit(_open_array, leaves[name]) for name in wanted}
    for name, opened in opening.items():
        with reading(f"{folder}, {name}"):
            array = opened.result()
            if kinds[name] == "step":
                metadata["step"] = int(array.read().result())
            elif array.dtype.numpy_dtype in dtypes.FLOATS.values():
                arrays[name.removeprefix(t5x.TARGET)] = array
            else:
                raise TypeError(f"it is {array.dtype.name}, not float32 or bfloat16")
    if not arrays:
        raise UserError(f"{folder} holds no tensor of a T5; give a T5X checkpoint")

    def read(name: str) -> np.ndarray:
        if name not in arrays:
            raise UserError(f"{folder} holds no {name}; give a checkpoint that does")
        with reading(f"{folder}, {name}"):
            return arrays[name].read().result()

    specs = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
        for name, array in arrays.items()
    }
    prompts = {n: specs.pop(n) for n in arrays if kinds[t5x.TARGET + n] == "prompt"}
    unknown = tuple(name for name in leaves if kinds[name] is None)
    return Source(folder, format_name, specs, read, {}, metadata, prompts, unknown)


def _open_array(leaf: Any) -> ts.TensorStore:
    if not isinstance(leaf, list):
        return ts.array(np.asarray(leaf))
    try:
        return ts.open(leaf[0]).result()
    except ValueError as error:
        if len(leaf) == 1 or not str(error).startswith("NOT_FOUND"):
            raise
        return ts.open(leaf[1]).result()
