# SPDX-License-Identifier: Apache-2.0
"""Our backward passes compute what JAX's compute and keep only what they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.network import saved_activations

DTYPES = pytest.mark.parametrize(
    ("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 2e-2)]
)


def draw(seed, *shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def kept(function, *primals):
    """Shapes of the arrays that the backward pass of a function is given."""
    _, backward = jax.vjp(function, *primals)
    return sorted(leaf.shape for leaf in jax.tree.leaves(backward))


def assert_close(actual, wanted, rtol):
    assert actual.dtype == wanted.dtype
    actual, wanted = (np.asarray(x, np.float32) for x in (actual, wanted))
    np.testing.assert_allclose(actual, wanted, rtol, rtol * np.abs(wanted).max())


def gradients(function, slope, *primals):
    value, backward = jax.vjp(function, *primals)
    return value, *backward(slope)


@DTYPES
def test_softmax(dtype, rtol):
    logits, slope = (3 * draw(i, 2, 3, 7, dtype=dtype) for i in range(2))
    plain = lambda x: jax.nn.softmax(x.astype(jnp.float32)).astype(x.dtype)
    ours = gradients(saved_activations.softmax, slope, logits)
    for actual, wanted in zip(ours, gradients(plain, slope, logits), strict=True):
        assert_close(actual, wanted, rtol)
    assert kept(saved_activations.softmax, logits) == [logits.shape]


@DTYPES
@pytest.mark.parametrize("spec", ["ri,io->ro", "bqd,bkd->bqk"])
def test_product(dtype, rtol, spec):
    shapes = {"ri,io->ro": ((5, 4), (4, 3)), "bqd,bkd->bqk": ((2, 5, 4), (2, 3, 4))}
    x, y = (draw(i, *shape, dtype=dtype) for i, shape in enumerate(shapes[spec]))
    ours = lambda x, y: saved_activations.product(spec, x, y)
    plain = lambda x, y: jnp.einsum(spec, x, y)
    slope = draw(2, *plain(x, y).shape, dtype=dtype)
    for actual, wanted in zip(
        gradients(ours, slope, x, y), gradients(plain, slope, x, y), strict=True
    ):
        assert_close(actual, wanted, rtol)


def test_a_product_is_summed_in_float32():
    ones = jnp.ones((1, 1001), "bfloat16")
    # 1001 is no bfloat16; neighbours lie 4 apart there, and a sum in bfloat16 would
    # never pass 256.
    assert saved_activations.product("ri,io->ro", ones, ones.T) == 1000


def test_a_product_with_a_frozen_factor_keeps_that_factor_alone():
    x, y = draw(0, 5, 4), draw(1, 4, 3)
    assert kept(lambda x: saved_activations.product("ri,io->ro", x, y), x) == [y.shape]
    assert kept(lambda y: saved_activations.product("ri,io->ro", x, y), y) == [x.shape]


def test_what_is_recomputed_keeps_its_arguments_alone():
    x, y = draw(0, 5, 4), draw(1, 5, 4)
    gate = saved_activations.recomputed(lambda x, y: jax.nn.gelu(x) * y)
    assert kept(gate, x, y) == [x.shape, y.shape]
    wanted = jax.grad(lambda x: (jax.nn.gelu(x) * y).sum())(x)
    actual = jax.grad(lambda x: gate(x, y).sum())(x)
    np.testing.assert_allclose(actual, wanted, 1e-5, 1e-6)
