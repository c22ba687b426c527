# SPDX-License-Identifier: Apache-2.0
"""A base model on disk, whatever its format, as tensors under T5X's names.

Every reader returns a `Source` and every writer takes one, so that a conversion is a
reader followed by a writer and no two formats know of each other. Tensors are read when
they are asked for, one by one: a model need not fit into memory to be converted.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from prompt_tuning import trees
from prompt_tuning.checkpoints import layout
from prompt_tuning.types import Params


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that was opened but not read.

    Attributes:
      path: where it lies, for messages.
      format: 'native', 't5x', 't5x-orbax', 'huggingface', or 'memory'.
      specs: shape and dtype on disk of every tensor of the network, by T5X name and in
        T5X's orientation: ``encoder/layers_0/mlp/wo/kernel`` is ``[F, H]``.
      read: gives one of them by its name, in the dtype on disk.
      sizes: what the checkpoint says of its architecture, under the names of
        `T5Config`; empty where the format says nothing.
      metadata: what else it says, in JSON's types.
      prompts: shape and dtype of soft prompts saved with the weights, by T5X name;
        `read` gives them, too.
      unknown: names, as on disk, of tensors that belong neither to a T5 nor to a
        prompt nor to an optimizer.
    """

    path: str
    format: str
    specs: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[str], np.ndarray]
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompts: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(
        default_factory=dict
    )
    unknown: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What people call it: its folder, with the run's for a step of a run.

        >>> Source("gs://t5/lm100k_base/checkpoint_1100000/", "t5x", {}, len).name
        'lm100k_base/checkpoint_1100000'
        """
        *_, run, folder = ("", *pathlib.PurePosixPath(self.path).parts)
        return f"{run}/{folder}" if folder.startswith("checkpoint_") else folder


def from_params(params: Params) -> Source:
    """The network's parameters under our names, as writers take them.

    Slices of stacked leaves are fetched from the devices when they are read.
    """
    origins: dict[str, tuple[Any, int | None]] = {}
    for name, leaf in trees.flatten(params).items():
        layers = layout.layer_names(name, leaf.shape)
        if layers is None:
            origins[name] = leaf, None
        else:
            origins.update({one: (leaf, index) for index, one in enumerate(layers)})

    def read(name: str) -> np.ndarray:
        leaf, index = origins[name]
        return np.asarray(leaf if index is None else leaf[index])

    specs = {
        name: jax.ShapeDtypeStruct(leaf.shape[index is not None :], leaf.dtype)
        for name, (leaf, index) in origins.items()
    }
    return Source("the parameters in memory", "memory", specs, read)
