# SPDX-License-Identifier: Apache-2.0
"""TPU chips and slices as data, and their devices for a compiler without a TPU.

A slice is written as Cloud TPU writes it: ``v5e:2x4`` is eight v5e chips. libtpu
describes the devices of any slice on a machine that has none; programs compiled for
them cannot run there, but say what memory and communication they need.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from importlib import metadata

import jax
from jax.experimental import topologies as jax_topologies
from packaging import requirements, specifiers

from prompt_tuning.errors import UserError

GIB = 2**30
LOCAL = "local"


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a plan has to know of a chip.

    Attributes:
      name: as in the name of a slice.
      hbm_gb: memory by the data sheet.
      usable_gib: what of it the TPU compiler lets a program have; it says so when it
        refuses one ("exceeds available HBM (31.25G)").
      vmem_mib: vector memory, where the compiler keeps arrays that have room.
      scratch_mib: what kernels may take of it for themselves; programs say so
        ("used_scoped_memory_configs", of which the largest were 15.6 MB, 31.8 MB and
        15.9 MB on a v5e, v6e and v5p).
      peak_tflops: peak rate of bfloat16 matrix products.
      slices: shapes that can be had.
      source: the data sheet.
    """

    name: str
    hbm_gb: int
    usable_gib: float
    vmem_mib: int
    scratch_mib: int
    peak_tflops: int
    slices: tuple[str, ...]
    source: str


_TWO_D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# 1x1x1 is one chip of a 2x2x1 host: it cannot be rented alone, but be used alone.
_THREE_D = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
_THREE_D += ("8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24")
_DOCS = "https://cloud.google.com/tpu/docs"

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16, 15.75, 128, 16, 197, _TWO_D, f"{_DOCS}/v5e"),
        Chip("v6e", 32, 31.25, 128, 32, 918, _TWO_D, f"{_DOCS}/v6e"),
        Chip("v5p", 95, 95.74, 64, 16, 459, _THREE_D, f"{_DOCS}/v5p"),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that a program is planned for.

    Attributes:
      name: ``v5e:2x4``, or ``local``.
      num_chips: devices of the slice.
      usable_bytes: memory that a program may use on each.
      vmem_bytes: vector memory of each that arrays may take; 0 where there is none.
      peak_tflops: of each, bfloat16; None where it is not known.
    """

    name: str
    num_chips: int
    usable_bytes: int
    vmem_bytes: int
    peak_tflops: float | None

    @property
    def described(self) -> str:
        """The devices in the words of a message."""
        if self.name == LOCAL:
            return f"this machine's devices ({self.num_chips})"
        return f"the chips of {self.name} ({self.num_chips})"

    @property
    def platform(self) -> str:
        """'tpu', or what the local devices are."""
        return jax.default_backend() if self.name == LOCAL else "tpu"

    def devices(self) -> list[jax.Device]:
        """The devices, which are real ones only if the topology is local.

        Raises:
          UserError: libtpu is not installed or does not know the slice.
        """
        if self.name == LOCAL:
            return jax.devices()
        return _described(self.name, self.num_chips)


def parse(name: str) -> Topology:
    """The topology of a name.

    >>> parse("v5e:2x4").num_chips
    8

    Raises:
      UserError: no such chip or slice; the nearest that there is is named.
    """
    if name == LOCAL:
        devices = jax.local_devices()
        return Topology(LOCAL, jax.device_count(), _local_bytes(devices), 0, None)
    kind, _, shape = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None:
        choice = ", ".join(f"{chip.name}:{chip.slices[1]}" for chip in CHIPS.values())
        raise UserError(
            f"no TPU chip is called {kind!r}; write TOPOLOGY={LOCAL} or a slice such as "
            f"{choice}"
        )
    if shape not in chip.slices:
        raise UserError(
            f"there is no slice {name!r}; set TOPOLOGY to {_nearest(shape, chip)}"
        )
    return Topology(
        name,
        _num_chips(shape),
        int(chip.usable_gib * GIB),
        (chip.vmem_mib - chip.scratch_mib) * 2**20,
        chip.peak_tflops,
    )


def bigger(topology: Topology) -> list[Topology]:
    """Slices to go to where a topology is too small: of the same chip, then others."""
    kind = topology.name.partition(":")[0]
    chips = [CHIPS[kind]] if kind in CHIPS else []
    chips += [chip for chip in CHIPS.values() if chip.name != kind]
    found = [parse(f"{chip.name}:{shape}") for chip in chips for shape in chip.slices]
    return [
        other
        for other in found
        if other.num_chips * other.usable_bytes
        > topology.num_chips * topology.usable_bytes
    ]


def _num_chips(shape: str) -> int:
    return math.prod(int(side) for side in shape.split("x"))


def _nearest(shape: str, chip: Chip) -> str:
    """Slices to choose instead: of the number of chips nearest to what was asked for."""
    if not re.fullmatch(r"\d+(x\d+)*", shape):
        return " or ".join(f"{chip.name}:{known}" for known in chip.slices[:3])
    wanted = max(1, _num_chips(shape))
    nearest = min(chip.slices, key=lambda s: abs(math.log(_num_chips(s) / wanted)))
    return f"{chip.name}:{nearest}"


def _local_bytes(devices: Sequence[jax.Device]) -> int:
    """Memory of a local device; simulated ones share that of the host."""
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // len(devices)


_NO_TPU_VM = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def check_libtpu(installed: str | None, wanted: str | None) -> None:
    """Refuses a compiler that JAX was not built for, before minutes are spent with it.

    Args:
      installed: libtpu's version, or None where there is none.
      wanted: the versions that JAX's own extra asks for, or None where it says none.

    Raises:
      UserError: they do not belong together.
    """
    if installed is None or wanted is None:
        return
    if not specifiers.SpecifierSet(wanted).contains(installed, prereleases=True):
        raise UserError(
            f"libtpu {installed} does not belong to jax {jax.__version__}, which asks "
            f"for libtpu{wanted}: pip install 'jax[tpu]=={jax.__version__}'"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def wanted_libtpu() -> str | None:
    """What the installed JAX asks of libtpu, e.g. '==0.0.42.*'."""
    asked = map(requirements.Requirement, metadata.requires("jax") or ())
    found = [str(each.specifier) for each in asked if each.name == "libtpu"]
    return found[0] if found else None


def _described(name: str, num_chips: int) -> list[jax.Device]:
    check_libtpu(_version("libtpu"), wanted_libtpu())
    # libtpu would ask Google Cloud's metadata server about the machine, complain that
    # it is no TPU VM, and keep a second process from planning at the same time.
    for key, value in _NO_TPU_VM.items():
        os.environ.setdefault(key, value)
    kind, _, shape = name.partition(":")
    kwargs = {}
    if num_chips == 1:
        # A host has four chips or more unless it is told otherwise.
        kwargs["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = jax_topologies.get_topology_desc(
            topology_name=f"{kind}:{shape}", platform="tpu", **kwargs
        )
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"libtpu does not describe {name} ({reason[0]}); install it with "
            "pip install 'jax[tpu]'"
        ) from error
    return list(found.devices)
