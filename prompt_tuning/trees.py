# SPDX-License-Identifier: Apache-2.0
"""Parameter trees as nested dicts whose leaves have '/'-joined names.

Everything that decides something per parameter (what is tuned, what is saved, which
name a checkpoint uses) does it by matching these names against ordered rules.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prompt_tuning import processes
from prompt_tuning.types import Params, PyTree, Shape

Rules = Sequence[tuple[str, str]]


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings into ``{'a/b/c': leaf}``, in the tree's order.

    >>> flatten({"a": {"b": 1, "c": 2}})
    {'a/b': 1, 'a/c': 2}
    """
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}/"))
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`.

    >>> unflatten({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def map_with_path(fn: Callable[..., Any], tree: Params, *rest: Params) -> dict:
    """Applies ``fn(name, leaf, *leaves_of_rest)`` to every leaf."""
    others = [flatten(other) for other in rest]
    return unflatten(
        {
            name: fn(name, leaf, *(other[name] for other in others))
            for name, leaf in flatten(tree).items()
        }
    )


def labels(tree: Params, rules: Rules) -> dict[str, Any]:
    """Labels every leaf with the first rule whose pattern matches its whole name.

    Args:
      tree: nested dict of parameters (or of shapes).
      rules: ordered ``(regular expression, label)`` pairs.

    Raises:
      ValueError: a leaf is covered by no rule; all such leaves are listed.
    """
    flat, missing = {}, []
    for name in flatten(tree):
        label = first_match(rules, name)
        if label is None:
            missing.append(name)
        flat[name] = label
    if missing:
        raise ValueError(
            f"no rule covers {', '.join(missing)}; end the rules with ('.*', 'frozen')"
        )
    return unflatten(flat)


def select(tree: Params, label_tree: Params, label: str) -> dict[str, Any]:
    """Keeps the leaves that carry ``label``; branches left empty disappear."""
    wanted = flatten(label_tree)
    return unflatten(
        {name: leaf for name, leaf in flatten(tree).items() if wanted[name] == label}
    )


def merge(*trees: Params) -> dict[str, Any]:
    """Joins trees with disjoint leaves into one.

    Raises:
      ValueError: two trees hold a leaf of the same name.
    """
    flat: dict[str, Any] = {}
    for tree in trees:
        for name, leaf in flatten(tree).items():
            if name in flat:
                raise ValueError(f"both trees hold {name!r}")
            flat[name] = leaf
    return unflatten(flat)


def count(tree: PyTree) -> int:
    """Number of scalars in the tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: PyTree) -> int:
    """Number of bytes that the tree's arrays occupy."""
    return sum(
        int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def fingerprint(tree: Params, dtype: Any = None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all leaves, as hexadecimal.

    Leaves are read one at a time, so that a sharded model never lies whole on the host,
    and hashed as ``dtype`` if one is given. The hash does not depend on where the
    leaves lie; those that several processes share are gathered, so all must call this.
    """
    digest = Digest()
    for name, leaf in sorted(flatten(tree).items()):
        array = np.ascontiguousarray(processes.whole(leaf))
        digest.add(name, dtype or array.dtype, array.shape, [array])
    return digest.hexdigest()


class Digest:
    """A `fingerprint` in the making, for leaves that are not all there at once."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(
        self, name: str, dtype: Any, shape: Shape, parts: Iterable[np.ndarray]
    ) -> None:
        """Takes in a leaf; leaves come in the order of their names.

        Args:
          name: of the leaf.
          dtype: what it is hashed as.
          shape: of the whole leaf.
          parts: its slices along the first axis, or the leaf as one part.
        """
        self._hash.update(f"{name}:{np.dtype(dtype)}:{tuple(shape)};".encode())
        for part in parts:
            array = np.ascontiguousarray(part.astype(dtype, copy=False))
            self._hash.update(memoryview(array.view(np.uint8).reshape(-1)))  # pyright: ignore[reportArgumentType]

    def hexdigest(self) -> str:
        """The fingerprint of what was added."""
        return self._hash.hexdigest()


def first_match(rules: Iterable[tuple[str, Any]], name: str) -> Any:
    """The value of the first rule whose pattern matches the whole name, or None."""
    return next((value for rule, value in rules if re.fullmatch(rule, name)), None)
