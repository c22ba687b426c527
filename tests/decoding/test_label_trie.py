# SPDX-License-Identifier: Apache-2.0
"""Decoding bound to labels: only labels come out, in the order that ranking gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import decoding
from prompt_tuning.decoding import Beam, Greedy, LabelTrie, Sampling
from prompt_tuning.devices import sharding
from prompt_tuning.errors import UserError
from prompt_tuning.inference.answerer import Answerer
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.tasks import features

# Common beginnings, a label that begins another, one of a single token.
LABELS = np.array(
    [[9, 12, 1, 0], [9, 1, 0, 0], [9, 12, 30, 1], [200, 12, 1, 0], [41, 7, 7, 1]]
)
OTHERS = np.array([[9, 12, 1], [77, 5, 1], [100, 1, 0]])
WIDTH = 4


def predict(model, *args, **kwargs):
    fn = jax.jit(model.predict, static_argnames="strategy")
    return jax.tree.map(np.asarray, fn(*args, **kwargs))


def as_set(rows):
    return {tuple(np.trim_zeros(row, "b").tolist()) for row in np.asarray(rows)}


def test_a_wide_beam_ranks_the_labels(tiny_model, tiny_params, tiny_batch):
    inputs = tiny_batch["encoder_input_tokens"]
    ranked = np.asarray(tiny_model.rank(tiny_params, inputs, LABELS))
    constraint = LabelTrie.build([LABELS], WIDTH).rows([0, 0, 0])
    strategy = Beam(WIDTH, num_decodes=7, alpha=0.0)
    tokens, scores = predict(
        tiny_model, tiny_params, inputs, strategy, constraint=constraint
    )
    order = np.argsort(ranked, axis=1)
    np.testing.assert_array_equal(tokens[:, 2:], LABELS[order])
    want = np.take_along_axis(ranked, order, axis=1)
    np.testing.assert_allclose(scores[:, 2:], want, rtol=1e-5)
    # Two more beams than labels: nothing that is no label takes their places.
    assert not tokens[:, :2].any()
    assert np.all(scores[:, :2] == np.float32(decoding.NEG_INF))


def test_greedy_walks_down_the_trie(tiny_model, tiny_params, tiny_batch):
    """One token at a time, the likeliest of those that continue a label."""
    inputs = tiny_batch["encoder_input_tokens"]
    constraint = LabelTrie.build([LABELS], WIDTH).rows([0, 0, 0])
    tokens, scores = predict(
        tiny_model, tiny_params, inputs, Greedy(6), constraint=constraint
    )
    for row in range(len(inputs)):
        left, taken = LABELS, []
        while not taken or taken[-1] != 1:
            batch = {
                "encoder_input_tokens": inputs[row : row + 1],
                "decoder_input_tokens": jnp.array([[0, *taken]]),
                "decoder_target_tokens": jnp.array([[*taken, 1]]),
            }
            logits = np.asarray(tiny_model.logits(tiny_params, batch))[0, -1]
            allowed = np.unique(left[:, len(taken)])
            taken.append(int(allowed[np.argmax(logits[allowed])]))
            left = left[left[:, len(taken) - 1] == taken[-1]]
        padded = np.array(taken + [0] * (6 - len(taken)))
        np.testing.assert_array_equal(tokens[row, 0], padded)
        (index,) = np.flatnonzero((LABELS == padded[:WIDTH]).all(axis=1))
        ranked = tiny_model.rank(tiny_params, inputs[row : row + 1], LABELS)
        np.testing.assert_allclose(scores[row, 0], ranked[0, index], rtol=1e-5)


def test_rows_of_several_tasks_share_a_batch(tiny_model, tiny_params, tiny_batch):
    inputs = tiny_batch["encoder_input_tokens"]
    trie = LabelTrie.build([LABELS, OTHERS], WIDTH)
    strategy = Beam(6, num_decodes=3)
    args = (tiny_model, tiny_params, inputs, strategy)
    mixed = predict(*args, constraint=trie.rows([1, None, 0]))
    free = predict(*args)
    for row, sets in ((0, [1, 1, 1]), (2, [0, 0, 0])):
        alone = predict(*args, constraint=trie.rows(sets))
        np.testing.assert_array_equal(mixed[0][row], alone[0][row])
        np.testing.assert_allclose(mixed[1][row], alone[1][row], rtol=1e-6)
    assert as_set(mixed[0][0]) == as_set(OTHERS)
    assert as_set(mixed[0][2]) < as_set(LABELS)
    np.testing.assert_array_equal(mixed[0][1], free[0][1])
    np.testing.assert_allclose(mixed[1][1], free[1][1], rtol=1e-6)


def test_another_label_set_does_not_compile_anew(tiny_model, tiny_params, tiny_batch):
    inputs = tiny_batch["encoder_input_tokens"]
    fn = jax.jit(tiny_model.predict, static_argnames="strategy")
    seen = []
    for labels in (LABELS, np.where(LABELS > 1, LABELS + 3, LABELS)):
        constraint = LabelTrie.build([labels], WIDTH).rows([0, 0, 0])
        tokens, _ = fn(tiny_params, inputs, Greedy(6), constraint=constraint)
        seen.append(as_set(tokens[:, 0]))
        assert seen[-1] <= as_set(labels)
    assert fn._cache_size() == 1
    assert not seen[0] & seen[1]


def test_an_answerer_searches_among_labels_on_several_devices():
    model = Model(Transformer(T5Config(8192, 16, 2, 1, 1, 8, 32)))
    params = jax.jit(model.init)(jax.random.key(0))
    vocabulary = features.vocabulary("mini")
    labels = ["good", "bad", "film", "story", "fine", "a good film"]
    # Stronger weights, so that rows differ in their answers.
    params = jax.tree.map(lambda x: 3 * x, params)
    tokens = np.random.default_rng(0).integers(2, 8192, (5, 6), np.int32)
    ranked = Answerer(model, vocabulary, labels=labels).answer(params, tokens)
    assert len(np.unique(ranked, axis=0)) > 1
    for mesh in (None, sharding.make_mesh()):
        beam = Answerer(
            model,
            vocabulary,
            labels=labels,
            strategy=functools.partial(Beam, num_decodes=6, alpha=0.0),
            max_decode_len=8,
            mesh=mesh,
        )
        found = beam.answer(params, tokens)
        np.testing.assert_array_equal(found[:, : ranked.shape[1]], ranked)
        assert not found[:, ranked.shape[1] :].any()
    with pytest.raises(UserError, match="raise max_decode_len=2"):
        Answerer(model, vocabulary, labels=labels, strategy=Greedy, max_decode_len=2)


VOCAB = 50
TABLE = np.random.default_rng(0).normal(0, 2, (VOCAB, VOCAB)).astype(np.float32)
TOY = np.array([[3, 4, 1], [3, 5, 1], [6, 1, 0]])


def run(strategy, constraint, batch=1, prefix=None, calls=None):
    """Decodes with a network whose next token depends on the last one only."""

    def network(ids, step, ancestry, cache):
        if calls is not None:
            calls.append(ids.size)
        return jnp.asarray(TABLE)[ids.reshape(-1)], cache

    forced = decoding.forced_tokens(prefix, batch, strategy, constraint)
    result = decoding.decode(
        strategy, network, {}, forced, jax.random.key(0), constraint
    )
    return jax.tree.map(np.asarray, result)


def toy_log_probs(label, start=0, allowed=None):
    """Log-probability of the label's tokens, or among ``allowed(previous tokens)``."""
    total, last = 0.0, start
    for place, token in enumerate(label):
        logits = TABLE[last].copy()
        if allowed is not None:
            keep = sorted(allowed(tuple(label[:place])))
            logits = np.where(np.isin(np.arange(VOCAB), keep), logits, -np.inf)
        total += logits[token] - np.log(np.sum(np.exp(logits)))
        last = token
    return total


@pytest.mark.parametrize("limit", [{}, {"topk": 1}, {"topk": 40}, {"topp": 0.999}])
def test_samples_are_labels_by_their_renormalised_chances(limit):
    def allowed(before):
        return {3: {4, 5}, 4: {1}, 5: {1}, 6: {1}}[before[-1]] if before else {3, 6}

    constraint = LabelTrie.build([TOY], 3).rows([0])
    strategy = Sampling(5, num_decodes=2000, **limit)
    tokens, scores = run(strategy, constraint)
    found, counts = np.unique(tokens[0], axis=0, return_counts=True)
    assert as_set(found) <= as_set(TOY)
    if limit.get("topk") == 1:
        assert len(found) == 1 and np.all(scores == 0.0)
        return
    assert as_set(found) == as_set(TOY)
    for row, count in zip(found, counts, strict=True):
        label = np.trim_zeros(row, "b").tolist()
        chance = np.exp(toy_log_probs(label, allowed=allowed))
        error = 5 * np.sqrt(chance * (1 - chance) / 2000)
        assert abs(count / 2000 - chance) <= error
        mine = (tokens[0] == row).all(axis=1)
        np.testing.assert_allclose(scores[0][mine], np.log(chance), rtol=1e-4)


def test_a_label_follows_a_prefix():
    prefix = jnp.array([[7, 8], [9, 0]])
    constraint = LabelTrie.build([TOY], 3).rows([0, 0])
    for strategy in (Greedy(5), Beam(5, num_decodes=3, alpha=0.0)):
        tokens, scores = run(strategy, constraint, batch=2, prefix=prefix)
        for row, forced in enumerate(([7, 8], [9])):
            count = len(forced)
            assert (tokens[row, :, :count] == forced).all()
            assert as_set(tokens[row, :, count:]) <= as_set(TOY)
            best = np.trim_zeros(tokens[row, -1, count:], "b")
            want = toy_log_probs(best, start=forced[-1])
            np.testing.assert_allclose(scores[row, -1], want, rtol=1e-5)
    want = max(toy_log_probs(np.trim_zeros(x, "b"), start=9) for x in TOY)
    np.testing.assert_allclose(scores[1, -1], want, rtol=1e-5)


@pytest.mark.parametrize("strategy", [Greedy(50), Beam(50), Sampling(50)])
def test_the_search_stops_at_the_longest_label(strategy):
    calls = []
    with jax.disable_jit():  # The loop runs in Python, so that calls can be counted.
        run(strategy, LabelTrie.build([TOY], 3).rows([0]), calls=calls)
    assert len(calls) <= 3


def test_a_thousand_labels_take_a_beam_of_four():
    rng = np.random.default_rng(1)
    labels = np.unique(rng.integers(2, VOCAB, (1000, 3)), axis=0)
    labels = np.pad(labels, ((0, 0), (0, 1)), constant_values=1)
    trie = LabelTrie.build([labels], 4)
    assert trie.tokens.shape[1] == 64  # As many as tokens follow the root, rounded up.
    tokens, scores = run(Beam(4, alpha=0.0), trie.rows([0]))
    assert as_set(tokens[0]) <= as_set(labels)
    for row, score in zip(tokens[0], scores[0], strict=True):
        np.testing.assert_allclose(score, toy_log_probs(row), rtol=1e-5)


@pytest.mark.parametrize(
    ("sets", "error", "message"),
    [
        ([TOY, []], UserError, "label set 1 is empty"),
        ([[[3, 4, 5, 1]]], UserError, "has 4 tokens: raise max_decode_len=3"),
        ([[[3, 4]]], ValueError, "must end with its only end token 1"),
        ([[[3, 1, 4, 1]]], ValueError, "must end with its only end token 1"),
        ([[[0, 0]]], ValueError, "must end with its only end token 1"),
        ([[[3, 0, 1]]], ValueError, "must end with its only end token 1"),
    ],
)
def test_sets_that_cannot_be_written_are_refused(sets, error, message):
    with pytest.raises(error, match=message):
        LabelTrie.build(sets, 3)


def test_a_constraint_that_does_not_fit_is_refused():
    trie = LabelTrie.build([TOY], 4)
    with pytest.raises(ValueError, match="make it for 2 rows and max_decode_len=5"):
        decoding.forced_tokens(None, 2, Greedy(5), trie.rows([0]))
    with pytest.raises(ValueError, match="make it for 1 rows and max_decode_len=3"):
        decoding.forced_tokens(None, 1, Greedy(3), trie.rows([0]))
    with pytest.raises(ValueError, match="Q up to 1, what max_decode_len=5 leaves"):
        prefix = jnp.array([[7, 8]])
        decoding.forced_tokens(prefix, 1, Greedy(5), trie.rows([0]))
    with pytest.raises(IndexError):
        trie.rows([1])
