# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint on disk to the parameters of a network on its devices.

Loading is loud: every gap between the checkpoint and the network is named, all at once,
and nothing is ever filled with random numbers.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np

from prompt_tuning import dtypes, trees
from prompt_tuning.checkpoints import layout
from prompt_tuning.checkpoints.source import Source
from prompt_tuning.errors import UserError
from prompt_tuning.network import quantization
from prompt_tuning.network.prompts import PROMPT_LEAVES
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.types import Params, Shape

READERS = 4
TILE = 64
PIECE = 1 << 16
# Where a dtype keeps its exponent.
_EXPONENTS = {
    "float32": (np.uint32, np.uint32(0x7F800000)),
    "bfloat16": (np.uint16, np.uint16(0x7F80)),
    "float16": (np.uint16, np.uint16(0x7C00)),
}
# A model is known by its weights in this dtype, whatever they are kept in.
HASHED = dtypes.FLOATS[dtypes.BFLOAT16]
# What a run may choose for itself, whatever the checkpoint was trained with.
FREE = {"attention", "dropout_rate", "dtype", "int8_products", "remat", "unroll"}
T = TypeVar("T")


def load_params(
    source: Source,
    abstract_params: Params,
    dtype: str,
    shardings: Params | None = None,
    digest: trees.Digest | None = None,
) -> dict[str, Any]:
    """Reads a model, one tensor at a time, and places it on the devices.

    On the host there is never more than one stacked leaf, and the few tensors that are
    being read, beside what is placed there. Kernels are quantised tensor by tensor.

    Args:
      source: the checkpoint.
      abstract_params: names and shapes to expect, as `Model.abstract_params` gives
        them, boxed or not; prompts among them are left out. With int8 kernels, as of
        `quantization.quantize_abstract`, these are what is read into.
      dtype: 'float32' or 'bfloat16', of the other parameters in memory.
      shardings: where each leaf goes (see `sharding.param_shardings`); by default on
        the default device.
      digest: takes in the weights as they are in the checkpoint, rounded to bfloat16.

    Returns:
      The network's parameters under our names.

    Raises:
      UserError: the checkpoint is damaged or does not fit the network; all leaves that
        are missing, unused or of another shape are listed.
    """
    target = dtypes.floating(dtype)
    leaves = trees.flatten(nn.meta.unbox(abstract_params))
    made = {quantization.scale_name(name) for name in leaves if _is_int8(leaves[name])}
    wanted = {
        name: leaf
        for name, leaf in leaves.items()
        if name not in made and not re.fullmatch(PROMPT_LEAVES, name)
    }
    _check_fit(source, layout.shapes(wanted))
    place = {} if shardings is None else trees.flatten(shardings)
    loaded = {}
    # Several at a time: tensors may be compressed, or a round trip to the cloud away.
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        for name, leaf in sorted(wanted.items()):
            if _is_int8(leaf):
                scale = quantization.scale_name(name)
                arrays = {
                    name: np.empty(leaf.shape, np.int8),
                    scale: np.empty(leaves[scale].shape, np.float32),
                }
                read = _read_quantized
            else:
                arrays = {name: np.empty(leaf.shape, target)}
                read = _read
            layers = layout.layer_names(name, leaf.shape)
            slices = [arrays.values()] if layers is None else zip(*arrays.values())
            tensors = _ahead(
                pool, functools.partial(read, source), layers or [name], slices
            )
            if digest is None:
                collections.deque(tensors, maxlen=0)
            else:
                digest.add(name, HASHED, leaf.shape, tensors)
            for name, array in arrays.items():
                loaded[name] = _place(array, place.get(name))
    return trees.unflatten(loaded)


def stacked_shapes(source: Source) -> dict[str, Shape]:
    """The shapes of a model's leaves under our names."""
    shapes = {}
    for name, parts in layout.groups(source.specs).items():
        shape = tuple(source.specs[parts[0]].shape)
        shapes[name] = shape if parts == [name] else (len(parts), *shape)
    return shapes


def fingerprint(source: Source) -> str:
    """What `load_params` makes of a model's weights, which are read for it."""
    digest, groups = trees.Digest(), layout.groups(source.specs)
    for name, shape in sorted(stacked_shapes(source).items()):
        digest.add(name, HASHED, shape, map(source.read, groups[name]))
    return digest.hexdigest()


def check_sizes(source: Source, config: T5Config) -> None:
    """Refuses a checkpoint that says of itself that it is another architecture.

    Raises:
      UserError: all sizes that differ, with both values.
    """
    other = [
        f"{name} is {source.sizes[name]} there and {value} in the model file"
        for name, value in dataclasses.asdict(config).items()
        if name in source.sizes and name not in FREE and source.sizes[name] != value
    ]
    if other:
        raise UserError(
            f"the checkpoint {source.path} is of another architecture: "
            f"{', '.join(other)}; choose the model file of its size"
        )


def _is_int8(leaf: jax.ShapeDtypeStruct) -> bool:
    return leaf.dtype == np.int8


def _ahead(
    pool: concurrent.futures.Executor, read: Callable[..., T], *arguments: Iterable
) -> Iterator[T]:
    """What `read` returns, in order, with a few calls ahead of the one asked for."""
    running: collections.deque[concurrent.futures.Future[T]] = collections.deque()
    for each in zip(*arguments, strict=True):
        running.append(pool.submit(read, *each))
        if len(running) > READERS:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _read(source: Source, name: str, into: Iterable[np.ndarray]) -> np.ndarray:
    """Reads a tensor; returns it as it was put in its place."""
    (array,) = into
    _fill(array, _finite(source, name))
    return array


def _read_quantized(
    source: Source, name: str, into: Iterable[np.ndarray]
) -> np.ndarray:
    """Reads a kernel and quantises it; returns it as it was, for a digest."""
    weights, scale = into
    kernel = np.empty(weights.shape, np.float32)
    _fill(kernel, _finite(source, name))
    weights[...], scale[...] = quantization.quantize(kernel)
    return kernel.astype(HASHED)


def _finite(source: Source, name: str) -> np.ndarray:
    """Reads a tensor and refuses one with NaN or infinity."""
    tensor = source.read(name)
    if not is_finite(tensor):
        raise UserError(
            f"{source.path}: {name} holds values that are not finite (NaN or infinity); "
            "copy the checkpoint again, or take another one"
        )
    return tensor


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers are finite; as fast as the memory for 2 and 4 bytes each."""
    known = _EXPONENTS.get(array.dtype.name)
    if known is None:
        return bool(np.isfinite(array).all())
    # NaN and infinity are the numbers whose exponent has no zero.
    unsigned, exponent = known
    flat = array.ravel(order="K").view(unsigned)
    pieces = (flat[i : i + PIECE] for i in range(0, flat.size, PIECE))
    return not any(np.any((piece & exponent) == exponent) for piece in pieces)


def _fill(array: np.ndarray, tensor: np.ndarray) -> None:
    """Copies a tensor, a transposed one tile by tile.

    Row by row, every element of a transposed tensor would be in another cache line.
    """
    if array.dtype == tensor.dtype:
        # As integers: NumPy copies numbers that it does not know, such as bfloat16,
        # one by one.
        bits = f"u{array.dtype.itemsize}"
        array, tensor = array.view(bits), tensor.view(bits)
    if tensor.ndim != 2 or tensor.flags.c_contiguous:
        array[...] = tensor
        return
    rows, columns = tensor.shape
    for i in range(0, rows, TILE):
        for j in range(0, columns, TILE):
            tile = slice(i, i + TILE), slice(j, j + TILE)
            array[tile] = tensor[tile]


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)
    # A process of several fills only the parts that its own devices hold.
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])


def _check_fit(source: Source, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises one UserError that lists everything that does not fit."""
    found = {name: tuple(spec.shape) for name, spec in source.specs.items()}
    missing = [name for name in wanted if name not in found]
    unused = [name for name in found if name not in wanted]
    unused += source.unknown
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
        f"the checkpoint {source.path} does not fit the model; {'; '.join(parts)}; "
        "choose the checkpoint and the model file of one and the same size and "
        "architecture"
    )
