# SPDX-License-Identifier: Apache-2.0
"""T5X's names of parameters and ours.

T5X keeps every layer apart (``encoder/layers_0/mlp/wo/kernel``); the network scans over
one leaf that stacks them (``encoder/layers/mlp/wo/kernel``, layers first). Files hold
T5X's names; this module is the only place that knows both.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

LAYER = re.compile(r"(.*/)?layers_(\d+)/(.*)")
STACKED = re.compile(r"(.*/)?layers/(.*)")


def groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Our name of every leaf, and the T5X names it is made of, in order of layers.

    >>> groups(["a/layers_1/w", "a/layers_0/w", "a/scale"])
    {'a/layers/w': ['a/layers_0/w', 'a/layers_1/w'], 'a/scale': ['a/scale']}

    Raises:
      ValueError: the layers of a leaf are not 0, 1, 2 and so on.
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        match = LAYER.fullmatch(name)
        if match is None:
            found[name] = {0: name}
        else:
            stacked = f"{match[1] or ''}layers/{match[3]}"
            found.setdefault(stacked, {})[int(match[2])] = name
    for stacked, layers in found.items():
        if sorted(layers) != list(range(len(layers))):
            raise ValueError(f"{stacked!r} has gaps: layers {sorted(layers)}")
    return {
        stacked: [layers[index] for index in range(len(layers))]
        for stacked, layers in found.items()
    }


def stack(flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Turns ``{T5X name: array}`` into ``{our name: array}``, on the host."""
    return {
        stacked: np.stack([np.asarray(flat[name]) for name in names])
        if stacked not in flat
        else np.asarray(flat[stacked])
        for stacked, names in groups(flat).items()
    }


def unstack(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `stack`: one leaf for each layer, under T5X's names."""
    result = {}
    for name, leaf in flat.items():
        layers = layer_names(name, leaf.shape)
        if layers is None:
            result[name] = leaf
        else:
            result.update({one: leaf[index] for index, one in enumerate(layers)})
    return result


def layer_names(name: str, shape: tuple[int, ...]) -> list[str] | None:
    """T5X's names of a stacked leaf's slices; None if the leaf is not stacked."""
    match = STACKED.fullmatch(name)
    if match is None:
        return None
    return [f"{match[1] or ''}layers_{i}/{match[2]}" for i in range(shape[0])]


def shapes(flat: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """``{T5X name: shape}`` of leaves under our names, which need only have shapes."""
    result = {}
    for name, leaf in flat.items():
        layers = layer_names(name, leaf.shape)
        if layers is None:
            result[name] = tuple(leaf.shape)
        else:
            result.update(dict.fromkeys(layers, tuple(leaf.shape[1:])))
    return result


def sizes(shape_of: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes of a T5 read off its shapes, under the names of `T5Config`.

    Args:
      shape_of: ``{T5X name: shape}``.

    Returns:
      Those of the sizes that the names present tell.
    """
    table = (  # size, leaf, axis
        ("vocab_size", "token_embedder/embedding", 0),
        ("emb_dim", "token_embedder/embedding", 1),
        ("num_heads", "encoder/relpos_bias/rel_embedding", 0),
        ("joined_kv", "encoder/layers_0/attention/query/kernel", 1),
        ("mlp_dim", "encoder/layers_0/mlp/wo/kernel", 0),
    )
    found = {
        size: shape_of[leaf][axis]
        for size, leaf, axis in table
        if len(shape_of.get(leaf, ())) > axis
    }
    heads, joined = found.get("num_heads"), found.pop("joined_kv", None)
    if heads and joined:
        found["head_dim"] = joined // heads
    for side in ("encoder", "decoder"):
        pattern = re.compile(rf"{side}/layers_(\d+)/.*")
        layers = {match[1] for name in shape_of if (match := pattern.fullmatch(name))}
        if layers:
            found[f"num_{side}_layers"] = len(layers)
    return found


def collapse(names: Iterable[str]) -> list[str]:
    """Shortens a list of T5X names for a message: layers of one leaf become a range.

    >>> collapse(["a/layers_0/w", "a/layers_1/w", "a/layers_3/w", "a/scale"])
    ['a/layers_{0-1,3}/w', 'a/scale']
    """
    numbers: dict[str, list[int]] = {}
    for name in names:
        match = LAYER.fullmatch(name)
        if match is None:
            numbers[name] = []
        else:
            key = f"{match[1] or ''}layers_{{}}/{match[3]}"
            numbers.setdefault(key, []).append(int(match[2]))
    return [
        key.replace("{}", f"{{{_ranges(sorted(found))}}}") if found else key
        for key, found in numbers.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(
        str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs
    )
