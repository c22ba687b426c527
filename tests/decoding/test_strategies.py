# SPDX-License-Identifier: Apache-2.0
"""Strategies against NumPy: all decodes written out, distributions computed by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import decoding
from prompt_tuning.decoding import Beam, Greedy, Sampling

VOCAB, LENGTH, EOS = 4, 3, 1
# Logits after every sequence of up to three tokens, named by its digits in base VOCAB
# behind a leading 1.
LOGITS = np.random.default_rng(0).normal(0, 1.5, (2 * VOCAB**LENGTH, VOCAB))
LOG_PROBS = np.array(jax.nn.log_softmax(LOGITS.astype(np.float32)))


def network(ids, step, ancestry, cache):
    """Logits that depend on all tokens a decode has read, which name them."""
    cache = cache.at[:, :, step].set(ids)
    itself = jnp.arange(cache.shape[1])[None, :]
    if ancestry is None:
        ancestry = jnp.broadcast_to(itself[..., None], cache.shape)
    read = jnp.take_along_axis(cache, ancestry.at[:, :, step].set(itself), axis=1)
    name = jnp.ones(ids.shape, jnp.int32)
    for place in range(1, cache.shape[2]):  # Behind the start token.
        name = jnp.where(place <= step, name * VOCAB + read[:, :, place], name)
    return jnp.asarray(LOGITS, jnp.float32)[name.reshape(-1)], cache


def run(strategy, batch=1, prefix=None, seed=None):
    shape = (batch, strategy.num_decodes, strategy.max_decode_len)
    cache = jnp.zeros(shape, jnp.int32)
    forced = decoding.forced_tokens(prefix, batch, strategy)
    rng = None if seed is None else jax.random.key(seed)
    result = decoding.decode(strategy, network, cache, forced, rng)
    return jax.tree.map(np.asarray, result)


def log_prob(tokens, log_probs=LOG_PROBS):
    """Sum over the tokens up to the end token."""
    name, total = 1, 0.0
    for token in tokens:
        total += log_probs[name, token]
        if token == EOS:
            break
        name = name * VOCAB + token
    return total


def ended_decodes():
    """All decodes of up to LENGTH tokens that end, padded."""
    others = [token for token in range(VOCAB) if token != EOS]
    for count in range(LENGTH):
        for tokens in itertools.product(others, repeat=count):
            yield (*tokens, EOS, *[0] * (LENGTH - count - 1))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_what_exhaustive_search_finds(alpha):
    def score(tokens):
        return log_prob(tokens) / ((5 + tokens.index(EOS) + 1) / 6) ** alpha

    want = sorted(ended_decodes(), key=score)
    assert len(want) == 13
    # Of K beams 2K continuations are looked at; the nine of two tokens have 36.
    tokens, scores = run(Beam(LENGTH, num_decodes=18, alpha=alpha, eos_id=EOS))
    np.testing.assert_array_equal(tokens[0, 5:], want)
    np.testing.assert_allclose(scores[0, 5:], list(map(score, want)), rtol=1e-5)
    # There are no more than 13: the first places stay empty.
    assert not tokens[0, :5].any()
    np.testing.assert_array_equal(scores[0, :5], np.float32(decoding.NEG_INF))


def test_greedy_takes_the_likeliest_token_of_every_step():
    tokens, scores = run(Greedy(LENGTH, eos_id=EOS))
    name, want = 1, []
    while len(want) < LENGTH and EOS not in want:
        want.append(int(np.argmax(LOGITS[name])))
        name = name * VOCAB + want[-1]
    np.testing.assert_array_equal(tokens[0, 0, : len(want)], want)
    assert not tokens[0, 0, len(want) :].any()
    np.testing.assert_allclose(scores[0, 0], log_prob(want), rtol=1e-5)


def limited(probs, topk, topp):
    """What top-k or top-p leave of one distribution, renormalised."""
    order = np.argsort(-probs)
    count = topk or 1 + int(np.sum(np.cumsum(probs[order]) < (topp or 1.0)))
    kept = np.zeros_like(probs)
    kept[order[:count]] = probs[order[:count]]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "topk", "topp", "support"),
    [(1.0, 2, 0.0, 2), (0.5, 0, 0.8, 2), (2.0, 3, 0.0, 3), (3.0, 0, 0.9, 4)],
)
def test_samples_have_the_limited_distribution(temperature, topk, topp, support):
    count = 4000
    strategy = Sampling(1, temperature, topk, topp, num_decodes=count, eos_id=EOS)
    tokens, scores = run(strategy, seed=1)
    exponentials = np.exp(LOGITS[1] / temperature)
    want = limited(exponentials / exponentials.sum(), topk, topp)
    share = np.bincount(tokens[0, :, 0], minlength=VOCAB) / count
    assert np.count_nonzero(share) == np.count_nonzero(want) == support
    error = 5 * np.sqrt(want * (1 - want) / count)
    assert np.all(np.abs(share - want) <= error)
    np.testing.assert_allclose(scores[0], np.log(want[tokens[0, :, 0]]), rtol=1e-4)


def test_a_seed_gives_its_samples_again():
    strategy = Sampling(LENGTH, temperature=2.0, num_decodes=8, eos_id=EOS)
    first, again, other = (run(strategy, batch=2, seed=seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[0][0], first[0][1])  # Rows draw on their own.


def test_samples_end_at_their_end_token_and_score_up_to_it():
    tokens, scores = run(Sampling(LENGTH, num_decodes=64, eos_id=EOS), seed=0)
    ends = np.argmax(tokens[0] == EOS, axis=1)[np.any(tokens[0] == EOS, axis=1)]
    assert set(ends) == {0, 1, 2}
    for decode, score in zip(tokens[0].tolist(), scores[0], strict=True):
        if EOS in decode:
            assert not any(decode[decode.index(EOS) + 1 :])
        np.testing.assert_allclose(score, log_prob(decode), rtol=1e-5)


def test_samples_continue_a_prefix_that_is_not_scored():
    prefix = jnp.array([[2, 3], [3, 0]])
    strategy = Sampling(LENGTH, num_decodes=16, eos_id=EOS)
    tokens, scores = run(strategy, batch=2, prefix=prefix, seed=0)
    assert (tokens[0, :, :2] == [2, 3]).all() and (tokens[1, :, 0] == 3).all()
    assert len(np.unique(tokens[1], axis=0)) > 1
    for row, forced in zip(range(2), ((2, 3), (3,)), strict=True):
        for decode, score in zip(tokens[row].tolist(), scores[row], strict=True):
            want = log_prob(decode) - log_prob(forced)
            np.testing.assert_allclose(score, want, rtol=1e-4, atol=1e-5)


def test_the_loop_stops_when_all_samples_have_ended():
    calls = []

    def ends_at_once(ids, step, ancestry, cache):
        calls.append(ids.size)
        row = jnp.where(jnp.arange(VOCAB) == EOS, 0.0, -1e9)
        return jnp.broadcast_to(row, (ids.size, VOCAB)), cache

    strategy = Sampling(50, num_decodes=3, eos_id=EOS)
    forced = decoding.forced_tokens(jnp.array([[2, 2], [0, 0]]), 2, strategy)
    with jax.disable_jit():  # The loop runs in Python, so that calls can be counted.
        tokens, _ = decoding.decode(
            strategy, ends_at_once, {}, forced, jax.random.key(0)
        )
    assert calls == [6, 6, 6]
    np.testing.assert_array_equal(tokens[0, :, :4], [[2, 2, 1, 0]] * 3)
    np.testing.assert_array_equal(tokens[1, :, :2], [[1, 0]] * 3)
