# SPDX-License-Identifier: Apache-2.0
"""Where arrays lie on many devices: a mesh of T5X's two axes, and T5X's rules.

Rows of a batch are spread over ``batching``; heads, MLP and vocabulary over ``model``.
Prompts and their optimizer state are whole on every device.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import spmd
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from prompt_tuning import processes, trees
from prompt_tuning.errors import UserError
from prompt_tuning.types import Array, Batch, Params, PyTree

DATA, MODEL = "data", "model"
Rules = Sequence[tuple[str, str | None]]


def make_mesh(
    num_partitions: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes ``batching`` and ``model``, laid out for the devices' network.

    Args:
      num_partitions: devices that one copy of the model is cut over.
      devices: by default all devices of all processes.

    Raises:
      UserError: ``num_partitions`` does not divide the number of devices of a slice.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = by_slice(devices)
    size = len(slices[0])
    if num_partitions < 1 or size % num_partitions:
        raise UserError(
            f"{num_partitions} model partitions do not divide {size} devices; "
            f"set NUM_PARTITIONS to {_nearest(num_partitions, size)}"
        )
    shape = (size // num_partitions, num_partitions)
    # An axis of a physical torus may have to be cut between the two axes of the mesh.
    if len(slices) > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            shape, (len(slices), 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    return mesh_of(grid)


def by_slice(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each TPU slice; devices of other kinds count as one."""
    tpus = devices[0].platform == "tpu"
    index = lambda device: getattr(device, "slice_index", 0) if tpus else 0
    return [
        [device for device in devices if index(device) == number]
        for number in sorted({index(device) for device in devices})
    ]


def mesh_of(grid: np.ndarray) -> Mesh:  # [data, model] of devices
    """The mesh of devices that already lie in its shape."""
    # Flax's logical partitioning leaves the inside of a program to the compiler.
    return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def logical_axis_rules(
    activation_partitioning_dims: int = 1, parameter_partitioning_dims: int = 1
) -> list[tuple[str, str | None]]:
    """T5X's standard rules from logical to mesh axes, and two for prompts.

    Args:
      activation_partitioning_dims: 2 also spreads the hidden width of activations over
        ``model``.
      parameter_partitioning_dims: 2 also spreads the hidden width of parameters over
        ``batching``.

    Raises:
      UserError: either is neither 1 nor 2.
    """
    for name, dims in (
        ("activation_partitioning_dims", activation_partitioning_dims),
        ("parameter_partitioning_dims", parameter_partitioning_dims),
    ):
        if dims not in (1, 2):
            raise UserError(f"{name}={dims!r} is neither 1 nor 2; set one of these")
    embed = []
    if activation_partitioning_dims == 2:
        embed.append(("embed", MODEL))
    if parameter_partitioning_dims == 2:
        embed.append(("embed", DATA))
    heads = [("mlp", MODEL), ("heads", MODEL), ("kv", None), ("joined_kv", MODEL)]
    whole = [("embed", None)] if not embed else []
    names = ("relpos_buckets", "abspos_buckets", "length", "layers", "stack")
    names += ("mlp_activations", "prompt", "prompt_embed")
    rules = [("batch", DATA), ("vocab", MODEL), *whole, *heads, *embed]
    return rules + [(name, None) for name in names]


def param_shardings(
    abstract_boxed_params: Params, mesh: Mesh | AbstractMesh, rules: Rules
) -> Params:
    """Where every parameter lies.

    Args:
      abstract_boxed_params: shapes in boxes with logical axes, as
        `Model.abstract_params` gives them.
      mesh: see `make_mesh`.
      rules: see `logical_axis_rules`.

    Returns:
      A `NamedSharding` for every leaf, without boxes.

    Raises:
      UserError: a dimension does not divide over the devices it is spread over; all
        such dimensions are listed.
    """
    specs = nn.get_partition_spec(abstract_boxed_params)
    shardings = spmd.logical_to_mesh_sharding(specs, mesh, list(rules))  # pyright: ignore[reportArgumentType]
    _check_divides(abstract_boxed_params, specs, shardings, mesh)
    return shardings


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Puts a batch on the devices, its rows spread over ``batching``.

    Args:
      batch: arrays ``[rows, ...]``; with several processes, each one's own rows, in
        the order of the processes.
      mesh: see `make_mesh`.

    Raises:
      UserError: the rows do not divide over the devices.
    """
    parts, hosts = mesh.shape[DATA], processes.count()
    for name, rows in batch.items():
        total = rows.shape[0] * hosts
        if total % parts:
            raise UserError(
                f"{total} rows of {name} do not divide over {parts} devices; "
                f"set BATCH_SIZE to {nearest_multiples(total, parts)}"
            )
    if shares_rows(mesh):
        # Rows go to processes that did not draw them.
        return {
            name: spread_rows(np.concatenate(processes.gather(rows)), mesh)
            for name, rows in batch.items()
        }
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    return {
        name: jax.make_array_from_process_local_data(sharding, rows)
        for name, rows in batch.items()
    }


def shares_rows(mesh: Mesh) -> bool:
    """Whether devices of several processes hold the same rows of a batch.

    They do where one copy of the model is cut over devices of several processes.
    `shard_batch` is a collective operation there.
    """
    holders = [{device.process_index for device in row} for row in mesh.devices]
    return any(len(row) > 1 for row in holders)


def spread_rows(rows: np.ndarray, mesh: Mesh) -> Array:  # [b, ...] -> [B, ...]
    """Spreads rows that every process holds over ``batching``.

    Rows of zeros at the end make their number one that the devices divide.
    """
    missing = -len(rows) % mesh.shape[DATA]
    rows = np.pad(rows, ((0, missing), *[(0, 0)] * (rows.ndim - 1)))
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    return jax.make_array_from_callback(rows.shape, sharding, lambda at: rows[at])


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Lays arrays whole on every device of all processes.

    Args:
      tree: arrays and random keys, with the same values in every process; those that
        lie on the mesh already stay as they are.
      mesh: see `make_mesh`.
    """

    def place(leaf: Array) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = place(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(words, dtype=leaf.dtype)  # pyright: ignore[reportArgumentType]
        if getattr(getattr(leaf, "sharding", None), "mesh", None) == mesh:
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(
            host.shape, replicated(mesh), lambda at: host[at]
        )

    return jax.tree.map(place, tree)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of what is whole on every device: prompts, their state, keys."""
    return NamedSharding(mesh, PartitionSpec())


@contextlib.contextmanager
def partitioned(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Makes the network's constraints on activations hold in programs traced inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(list(rules)):
        yield


def _check_divides(
    abstract_boxed: Params, specs: Params, shardings: Params, mesh: Mesh | AbstractMesh
) -> None:
    cut: dict[str, set[int]] = {DATA: set(), MODEL: set()}  # sizes that are spread
    bad: dict[str, str] = {}
    logical, placed = trees.flatten(specs), trees.flatten(shardings)
    for leaf_name, leaf in trees.flatten(nn.meta.unbox(abstract_boxed)).items():
        axes = zip(leaf.shape, logical[leaf_name], placed[leaf_name].spec, strict=False)
        for size, axis, mesh_axis in axes:
            if mesh_axis is None:
                continue
            cut[mesh_axis].add(size)
            if size % mesh.shape[mesh_axis]:
                bad[axis] = f"{axis} {size} over {mesh.shape[mesh_axis]} ({mesh_axis})"
    if bad:
        fits = lambda parts: (
            not any(
                size % over
                for over, sizes in (
                    (parts, cut[MODEL]),
                    (mesh.size // parts, cut[DATA]),
                )
                for size in sizes
            )
        )
        choice = _nearest(mesh.shape[MODEL], mesh.size, fits)
        raise UserError(
            f"the model does not divide over the devices: {', '.join(bad.values())}; "
            + (
                f"set NUM_PARTITIONS to {choice}"
                if choice
                else "set PARAMETER_PARTITIONING_DIMS to 1"
            )
        )


def nearest_multiples(number: int, grain: int) -> str:
    """The multiples of ``grain`` next below and above a number, as a choice."""
    below = max(0, number // grain * grain)
    return f"{f'{below} or ' if below else ''}{below + grain}"


def _nearest(
    wanted: int, number: int, fits: Callable[[int], bool] = lambda divisor: True
) -> str:
    """The divisors of ``number`` next below and above ``wanted``, as a choice."""
    divisors = [d for d in range(1, number + 1) if number % d == 0 and fits(d)]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(str(d) for d in below + above)
