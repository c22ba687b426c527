# SPDX-License-Identifier: Apache-2.0
"""TPU slices by name, and what is said of those that do not exist."""

import jax
import jax.numpy as jnp
import pytest

from prompt_tuning.devices import sharding, topologies
from prompt_tuning.errors import UserError


@pytest.mark.parametrize(
    ("name", "chips", "gb"),
    [("v5e:2x4", 8, 16), ("v6e:1x1", 1, 32), ("v5p:2x2x1", 4, 95)],
)
def test_topologies_are_parsed(name, chips, gb):
    found = topologies.parse(name)
    assert (found.num_chips, found.platform) == (chips, "tpu")
    # Memory in binary units, or a little of the data sheet's kept by the system.
    assert 0.97 * gb <= found.usable_bytes / topologies.GIB <= 1.01 * gb


def test_the_local_devices_are_a_topology():
    found = topologies.parse("local")
    assert found.num_chips == jax.device_count() and found.usable_bytes > 0
    assert found.devices() == jax.devices()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e:3x3", "set TOPOLOGY to v5e:2x4"),
        ("v5e:2x2x1", "set TOPOLOGY to v5e:2x2"),
        ("v5p:4x4", "set TOPOLOGY to v5p:2x2x4"),
        ("v5e", "set TOPOLOGY to v5e:1x1 or v5e:2x2"),
        ("h100:8", "no TPU chip is called 'h100'"),
    ],
)
def test_a_slice_that_does_not_exist(name, says):
    with pytest.raises(UserError, match=says):
        topologies.parse(name)


def test_a_compiler_of_another_jax_is_refused_at_once():
    with pytest.raises(
        UserError, match=r"libtpu 0\.0\.52 does not belong to jax .*pip"
    ):
        topologies.check_libtpu("0.0.52", "==0.0.42.*")


@pytest.mark.parametrize(
    ("installed", "wanted"),
    [("0.0.42.1", "==0.0.42.*"), (None, "==0.0.42.*"), ("0.0.52", None)],
)
def test_a_compiler_that_belongs_to_jax_is_taken(installed, wanted):
    topologies.check_libtpu(installed, wanted)


def test_jax_says_which_compiler_it_wants():
    assert topologies.wanted_libtpu().startswith("==")


@pytest.mark.parametrize("name", ["v5e:1x1", "v6e:1x1", "v5p:1x1x1"])
def test_usable_memory_is_what_the_compiler_grants(name):
    """It says so when it refuses a program; this one takes 200 GiB."""
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    place = topologies.parse(name)
    mesh = sharding.make_mesh(1, place.devices())
    whole = sharding.replicated(mesh)
    huge = jax.ShapeDtypeStruct((100, 2**30), jnp.int8, sharding=whole)
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    granted = f"{place.usable_bytes / topologies.GIB:.2f}".rstrip("0")
    assert f"exceeds available HBM ({granted}G)" in str(refused.value)
