# SPDX-License-Identifier: Apache-2.0
"""Layers: masks on known arrays, every layer against numpy, the decoding cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from prompt_tuning.network import layers

B, Q, N, D, H, F = 2, 5, 3, 4, 6, 7


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_padding_mask_wants_both_ends_valid():
    mask = layers.padding_mask(jnp.array([[3, 0]]), jnp.array([[1, 7, 0]]))
    np.testing.assert_array_equal(mask, [[[[True, True, False], [False] * 3]]])


def test_the_segment_mask_keeps_examples_apart():
    mask = layers.segment_mask(jnp.array([[1, 2]]), jnp.array([[1, 1, 2]]))
    np.testing.assert_array_equal(mask, [[[[True, True, False], [False, False, True]]]])


def test_the_causal_mask_hides_what_comes_later():
    np.testing.assert_array_equal(
        layers.causal_mask(3)[0, 0], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    )


def test_a_mask_becomes_zero_or_a_large_finite_summand():
    bias = layers.mask_to_bias(jnp.array([True, False]), jnp.bfloat16)
    assert bias.dtype == jnp.bfloat16
    assert bias[0] == 0 and np.isfinite(bias[1]) and bias[1] < -9e9


def test_dense_multiplies_the_last_axis():
    kernel, x = random(H, F), random(B, Q, H, seed=1)
    y = layers.Dense(F, ("embed", "mlp")).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-6)


def test_the_rms_norm_divides_by_the_root_mean_square_without_centring():
    x, scale = random(B, Q, H) + 3, random(H, seed=1)
    y = layers.RMSNorm().apply({"params": {"scale": scale}}, x)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(y, want, rtol=1e-5)


def test_norm_statistics_are_float32_whatever_the_activations_are():
    # 1 + 1/256 squares to a number that bfloat16 rounds; the mean of 512 squares would
    # be lost in bfloat16, and 300 ** 2 overflows float16.
    x = jnp.full((1, 512), 300.0, jnp.float16)
    y = layers.RMSNorm(jnp.float16).apply({"params": {"scale": jnp.ones(512)}}, x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(y, np.float32), 1.0, rtol=1e-3)


def mlp(activations, params, x):
    block = layers.MLP(F, activations, 0.0, jnp.float32)
    return block.apply({"params": params}, x, deterministic=True)


def test_a_gated_mlp_multiplies_its_branches():
    gate, linear, out = random(H, F), random(H, F, seed=1), random(F, H, seed=2)
    params = {"wi_0": {"kernel": gate}, "wi_1": {"kernel": linear}}
    x = random(B, Q, H, seed=3)
    y = mlp(("gelu", "linear"), params | {"wo": {"kernel": out}}, x)
    gated = np.asarray(jax.nn.gelu(x @ gate)) * (x @ linear)
    np.testing.assert_allclose(y, gated @ out, rtol=1e-4, atol=1e-5)


def test_a_plain_mlp_has_one_input_kernel():
    wi, out, x = random(H, F), random(F, H, seed=2), random(B, Q, H, seed=3)
    y = mlp(("relu",), {"wi": {"kernel": wi}, "wo": {"kernel": out}}, x)
    np.testing.assert_allclose(y, np.maximum(x @ wi, 0) @ out, rtol=1e-4, atol=1e-5)


def test_an_unknown_activation_names_known_ones():
    with pytest.raises(ValueError, match="'gellu'; try 'relu', 'gelu', 'silu'"):
        layers.activation("gellu")


ATTENTION = layers.Attention(N, D, 0.0, jnp.float32)
KERNELS = {
    name: {"kernel": random(*shape, seed=seed)}
    for seed, (name, shape) in enumerate(
        {
            "query": (H, N * D),
            "key": (H, N * D),
            "value": (H, N * D),
            "out": (N * D, H),
        }.items()
    )
}


def reference_attention(x, memory, mask, bias):
    """Attention head by head and query by query."""
    heads = lambda y, name: (y @ KERNELS[name]["kernel"]).reshape(*y.shape[:2], N, D)
    query, key, value = heads(x, "query"), heads(memory, "key"), heads(memory, "value")
    mixed = np.zeros((*x.shape[:2], N, D))
    for b, q, n in np.ndindex(*mixed.shape[:3]):
        logits = np.where(mask[b, 0, q], key[b, :, n] @ query[b, q, n], -1e10)
        weights = scipy.special.softmax(logits + bias[0, n, q])
        mixed[b, q, n] = weights @ value[b, :, n]
    return mixed.reshape(*x.shape[:2], N * D) @ KERNELS["out"]["kernel"]


@pytest.mark.parametrize("cross", [False, True])
def test_attention_is_the_textbooks_without_rescaling(cross):
    x = random(B, Q, H, seed=5)
    memory = random(B, 4, H, seed=6) if cross else x
    mask = random(B, 1, Q, memory.shape[1], seed=7) > -0.5
    mask[..., 0] = True
    bias = random(1, N, Q, memory.shape[1], seed=8)
    y = ATTENTION.apply(
        {"params": KERNELS}, x, memory if cross else None, mask=mask, bias=bias
    )
    want = reference_attention(x, memory, mask, bias)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [None, random(1, N, Q, Q, seed=8)], ids=["", "bias"])
def test_fused_attention_is_given_what_ours_computes(bias):
    """By the implementation that every backend has, values and gradients."""
    mask = layers.segment_mask(*[jnp.array([[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]])] * 2)

    def outputs(x, attention):
        y = attention.apply({"params": KERNELS}, x, mask=mask, bias=bias)
        return jnp.sum(y * random(B, Q, H, seed=9)), y

    both = jax.value_and_grad(outputs, has_aux=True)
    x = random(B, Q, H, seed=5)
    found, expected = both(x, ATTENTION.clone(fused="xla")), both(x, ATTENTION)
    near = {"rtol": 1e-4, "atol": 1e-4}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **near), found, expected)


def test_a_query_that_may_attend_to_nothing_is_finite():
    x = random(1, Q, H)
    mask = np.zeros((1, 1, Q, Q), bool)
    y = ATTENTION.apply({"params": KERNELS}, x, mask=mask)
    everything = (x @ KERNELS["value"]["kernel"]).mean(1) @ KERNELS["out"]["kernel"]
    np.testing.assert_allclose(y[0, 0], everything[0], rtol=1e-4, atol=1e-5)


def test_decoding_token_by_token_is_causal_attention():
    x, memory = random(B, Q, H, seed=5), random(B, 4, H, seed=6)
    bias = random(1, N, Q, Q, seed=8)
    want = ATTENTION.apply(
        {"params": KERNELS}, x, mask=layers.causal_mask(Q), bias=bias
    )
    want_cross = ATTENTION.apply({"params": KERNELS}, x, memory)

    step = lambda variables, *args, **kwargs: ATTENTION.apply(
        {"params": KERNELS, **variables},
        *args,
        **kwargs,
        decode=True,
        mutable=["cache", "memory"],
    )
    _, state = step({}, jnp.zeros_like(x), bias=bias)
    _, cross = step({}, jnp.zeros_like(x), memory)
    for q in range(Q):
        y, state = step(state, x[:, q : q + 1], bias=bias)
        np.testing.assert_allclose(y[:, 0], want[:, q], rtol=1e-4, atol=1e-5)
        # The encoder's output was projected by the first call: another is not read.
        y, cross = step(cross, x[:, q : q + 1], jnp.full_like(memory, np.nan))
        np.testing.assert_allclose(y[:, 0], want_cross[:, q], rtol=1e-4, atol=1e-5)
    assert int(state["cache"]["cache_index"]) == Q


def bucket_of(distance, *, bidirectional):
    """Raffel et al. (2020), section 2.1, one distance at a time; 32 buckets to 128."""
    buckets, offset, back = 32, 0, -distance
    if bidirectional:
        buckets = 16
        offset = 16 if distance > 0 else 0
        back = abs(distance)
    back = max(back, 0)
    exact = buckets // 2
    if back < exact:
        return offset + back
    share = np.log(back / exact) / np.log(128 / exact)
    return offset + min(buckets - 1, exact + int(share * exact + 1e-5))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_positions_fall_into_t5s_buckets(bidirectional):
    distances = np.arange(-200, 201, dtype=np.int32)
    got = layers.relative_position_bucket(
        distances, bidirectional=bidirectional, num_buckets=32, max_distance=128
    )
    want = [bucket_of(int(d), bidirectional=bidirectional) for d in distances]
    np.testing.assert_array_equal(got, want)
    assert set(got) == set(range(32)) - ({16} if bidirectional else set())


def test_the_position_bias_reads_the_bucket_of_key_minus_query():
    table = random(N, 32)
    bias = layers.RelativePositionBias(N, 32, 128, True, jnp.float32).apply(
        {"params": {"rel_embedding": table}}, 4
    )
    assert bias.shape == (1, N, 4, 4)
    np.testing.assert_array_equal(bias[0, :, 2, 0], table[:, 2])
    np.testing.assert_array_equal(bias[0, :, 0, 2], table[:, 16 + 2])


@pytest.mark.parametrize("name", ["query", "key"])
def test_queries_start_smaller_by_the_root_of_the_head_width(name):
    wide = layers.Attention(8, 64, 0.0, jnp.float32)
    params = nn.meta.unbox(wide.init(jax.random.key(0), jnp.ones((1, 2, 256))))[
        "params"
    ]
    scale = 64**-0.5 if name == "query" else 1.0
    assert np.std(params[name]["kernel"]) == pytest.approx(scale / 16, rel=0.05)
