# SPDX-License-Identifier: Apache-2.0
"""What T5X calls things on disk, and how its index describes an array.

The package uses T5X's names of tensors, so there is nothing to translate: the table says
which names are a T5's and what else T5X saves beside them.
"""

import math
import pathlib
import re
from typing import Any

import numpy as np

FOLDER = re.compile(r"checkpoint_(\d+)")
# Files of a checkpoint: T5X's index; orbax's metadata and its database of arrays.
INDEX = "checkpoint"
METADATA = "_METADATA"
DATABASE = "manifest.ocdbt"
# How a file of the index's name begins in a checkpoint of TensorFlow.
TENSORFLOW = b"model_checkpoint_path"

# Where a train state is: TREE in the index, the folder ITEM in a checkpoint of orbax.
VERSION = 3
TREE = "optimizer"
ITEM = "state"
# What a name in a train state stands for: the first pattern that matches all of it
# counts, a name without a pattern is unknown. Optimizer states are dropped knowingly:
# what is frozen has none, and a prompt is tuned from its start.
TARGET = "target/"
STEP = "state/step"
HEADS = "(query|key|value|out)/kernel"
KINDS = (
    (STEP, "step"),
    (r"state/.*", "optimizer"),
    # encoder/prompt/prompt/prompt in the original project, prompts/NAME here.
    (r"target/(.*/)?prompts?/.*", "prompt"),
    (r"target/token_embedder/embedding", "network"),
    (r"target/(en|de)coder/relpos_bias/rel_embedding", "network"),
    (r"target/(encoder/encoder|decoder/decoder)_norm/scale", "network"),
    (r"target/(en|de)coder/layers_\d+/mlp/(wi|wi_\d|wo)/kernel", "network"),
    (r"target/(en|de)coder/layers_\d+/pre_mlp_layer_norm/scale", "network"),
    (r"target/encoder/layers_\d+/pre_attention_layer_norm/scale", "network"),
    (r"target/decoder/layers_\d+/pre_self_attention_layer_norm/scale", "network"),
    (r"target/decoder/layers_\d+/pre_cross_attention_layer_norm/scale", "network"),
    (r"target/encoder/layers_\d+/attention/" + HEADS, "network"),
    (r"target/decoder/layers_\d+/self_attention/" + HEADS, "network"),
    (r"target/decoder/layers_\d+/encoder_decoder_attention/" + HEADS, "network"),
    (r"target/decoder/logits_dense/kernel", "network"),
)

# A leaf of the index is a tensor, or describes its array for tensorstore if it has the
# keys SPEC. With one of DRIVERS the array lies beside the index.
SPEC = frozenset({"driver", "kvstore"})
DRIVERS = frozenset({"file", "gfile", "gcs"})
# T5X writes this instead of the bucket, for the checkpoint to be copied to another.
BUCKET = "t5x-dummy-bucket"
# T5X cuts larger arrays.
CHUNK_BYTES = 64 * 1024 * 1024
# Orbax's leaf for an array in a folder of its own: the prefix and the folder.
PLACEHOLDER = "PLACEHOLDER://"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of an index by '/'-joined name; the description of an array is a leaf.

    >>> flatten({"a": {"b": 1, "c": {"driver": "zarr", "kvstore": {}}}})
    {'a/b': 1, 'a/c': {'driver': 'zarr', 'kvstore': {}}}
    """
    if not isinstance(tree, dict) or tree.keys() >= SPEC:
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}/{key}" if prefix else str(key))
    return flat


def array_name(name: str) -> str:
    """Folder of a tensor's array.

    >>> array_name("target/encoder/encoder_norm/scale")
    'target.encoder.encoder_norm.scale'
    """
    return name.replace("/", ".")


def array_spec(
    name: str, shape: tuple[int, ...], dtype: np.dtype, cloud: bool
) -> dict[str, Any]:
    """The leaf that T5X writes into the index for the array of a tensor.

    Args:
      name: of the tensor in the train state.
      shape: of the tensor.
      dtype: of the tensor.
      cloud: whether the checkpoint is written to Google Cloud Storage.
    """
    kvstore = {"bucket": BUCKET, "driver": "gcs"} if cloud else {"driver": "file"}
    return {
        "driver": "zarr",
        "dtype": dtype.name,
        "kvstore": {**kvstore, "path": f"{array_name(name)}/"},
        "metadata": {
            "chunks": chunk_shape(shape, dtype.itemsize),
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(shape),
        },
    }


def array_place(leaf: dict[str, Any]) -> str:
    """Folder of the array that a leaf of the index describes.

    Raises:
      ValueError: it is of another format, or would not be inside of the checkpoint.
    """
    drivers = leaf["driver"], leaf["kvstore"]["driver"]
    if drivers[0] != "zarr" or drivers[1] not in DRIVERS:
        raise ValueError(f"the drivers {' and '.join(drivers)} are not T5X's")
    # Before version 0.1.14 of tensorstore the path stood outside of the kvstore.
    return inside(leaf["kvstore"].get("path") or leaf["path"])


def inside(path: str) -> str:
    """The path of a folder below the checkpoint, without slash at its end.

    >>> inside("target.encoder.encoder_norm.scale/")
    'target.encoder.encoder_norm.scale'

    Raises:
      ValueError: it leads out of the checkpoint.
    """
    place = pathlib.PurePosixPath(path)
    if place.is_absolute() or not place.parts or ".." in place.parts:
        raise ValueError(f"its array {path!r} is outside of the checkpoint")
    return str(place)


def array_ways(leaf: dict[str, Any], at: dict[str, Any]) -> list[dict[str, Any]]:
    """How tensorstore opens a described array: with its metadata, or if it has none.

    Args:
      leaf: of the index.
      at: tensorstore's description of the array's folder.
    """
    metadata = leaf.get("metadata", {})
    declared = {"dtype": leaf["dtype"]} if "dtype" in leaf else {}
    # T5X, too, compares these only: chunks and compression are what the array says.
    fixed = {key: metadata[key] for key in ("shape", "dtype") if key in metadata}
    ways = [zarr(at, metadata=fixed, **declared)]
    if metadata.keys() >= {"chunks", "compressor", "shape"}:
        ways.append(zarr(at, metadata=metadata, assume_metadata=True, **declared))
    return ways


def zarr(at: dict[str, Any], **declared: Any) -> dict[str, Any]:
    """How tensorstore opens an array so that a missing chunk is an error, not zeros."""
    strict = {"driver": "zarr", "open": True, "fill_missing_data_reads": False}
    return {**strict, "kvstore": at, **declared}


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Equal pieces of at most `CHUNK_BYTES`, cut along the longest axes as T5X does.

    >>> chunk_shape((32128, 4096), 4)
    [4016, 4096]
    """
    chunk = list(shape)
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        axis = chunk.index(max(chunk))
        smaller = range(chunk[axis] - 1, 0, -1)
        chunk[axis] = next(size for size in smaller if shape[axis] % size == 0)
    return chunk
