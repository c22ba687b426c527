# SPDX-License-Identifier: Apache-2.0
"""T5X's checkpoints as orbax writes them, which is what T5X does by default.

The folder ``checkpoint_N/state`` has the names of all tensors in a JSON file,
``_METADATA``, and their arrays in an OCDBT database or in a folder each. Before there was
the JSON file, an index as that of T5X's native format had a placeholder for every array.
Arrays are opened by tensorstore as native ones are: a missing piece is an error, where
orbax would fill in zeros.
"""

import json
from typing import Any

from prompt_tuning.checkpoints import t5x_native
from prompt_tuning.checkpoints.keys import t5x
from prompt_tuning.checkpoints.source import Source
from prompt_tuning.errors import UserError


def is_checkpoint(path: str) -> bool:
    """Whether a checkpoint of T5X by orbax, or a folder of such, lies at ``path``.

    Args:
      path: a local folder or ``gs://BUCKET/PATH``.

    Raises:
      UserError: Google Cloud Storage does not answer.
    """
    return _state_folder(t5x_native.latest(path)) is not None


def open_checkpoint(path: str) -> Source:
    """Opens a checkpoint of T5X by orbax; tensors that have an array are not read.

    Args:
      path: a checkpoint, or a folder of several, of which the last is taken; local or
        ``gs://BUCKET/PATH``.

    Returns:
      The parameters and prompts, without optimizer states; the step as metadata.

    Raises:
      UserError: there is no such checkpoint, or it is damaged, of another format, or
        names a place outside of it. `Source.read` raises it for a damaged tensor.
    """
    folder = t5x_native.latest(path)
    state = _state_folder(folder)
    if state is None:
        raise UserError(f"{folder} has no T5X checkpoint; give its checkpoint_N")
    t5x_native.check_links(folder)
    leaves = _leaves(state)
    database = t5x_native.has(state, t5x.DATABASE)
    for name, leaf in leaves.items():
        if isinstance(leaf, str) and leaf.startswith(t5x.PLACEHOLDER):
            with t5x_native.reading(f"{folder}, {name}"):
                place = t5x.inside(leaf.removeprefix(t5x.PLACEHOLDER))
                at = t5x_native.kvstore(state, "" if database else place)
                if database:
                    at = {"driver": "ocdbt", "base": at, "path": f"{place}/"}
                leaves[name] = [t5x.zarr(at)]
    return t5x_native.make_source(folder, "t5x-orbax", leaves)


def _state_folder(folder: str) -> str | None:
    """Where the train state is; the oldest checkpoints have no folder for it."""
    state = f"{folder}/{t5x.ITEM}"
    if t5x_native.has(state, t5x.METADATA) or t5x_native.has(state, t5x.INDEX):
        return state
    return folder if t5x_native.has(folder, t5x.METADATA) else None


def _leaves(state: str) -> dict[str, Any]:
    """The leaves of the train state: placeholders of arrays, or arrays, by name."""
    leaves: dict[str, Any] = {}
    if t5x_native.has(state, t5x.INDEX):
        leaves = t5x.flatten(t5x_native.read_index(state))
    if t5x_native.has(state, t5x.METADATA):
        with t5x_native.reading(f"{state}/{t5x.METADATA}"):
            encoded = t5x_native.store(state).read(t5x.METADATA).result().value
            for entry in json.loads(encoded)["tree_metadata"].values():
                keys = [str(part["key"]) for part in entry["key_metadata"]]
                # Where it is to be skipped, the index has the value itself.
                if not entry["value_metadata"]["skip_deserialize"]:
                    leaves["/".join(keys)] = t5x.PLACEHOLDER + ".".join(keys)
    return leaves
