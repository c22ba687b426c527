# SPDX-License-Identifier: Apache-2.0
"""Decoding: equal to T5X's stored decodes, and the properties that none stores."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from prompt_tuning import decoding, trees
from prompt_tuning.decoding import Beam, Greedy, Sampling
from prompt_tuning.errors import UserError
from prompt_tuning.network import losses
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer

VARIANTS = {"t5_1_1": (("gelu", "linear"), False), "t5_1_0": (("relu",), True)}
# Nothing in the tiny models makes this token likely: decodes never end.
NEVER = 255


def predict(model, *args, **kwargs):
    """`Model.predict` compiled, its strategy being static."""
    fn = jax.jit(model.predict, static_argnames="strategy")
    return jax.tree.map(np.asarray, fn(*args, **kwargs))


def stacked(flat):
    """T5X's ``layers_0/x, layers_1/x`` as one leaf ``layers/x``."""
    tree = {re.sub(r"layers_\d+", "layers", name): [] for name in flat}
    for name in sorted(flat):  # There are fewer than ten layers.
        tree[re.sub(r"layers_\d+", "layers", name)].append(flat[name])
    return trees.unflatten(
        {k: np.stack(v) if "/layers/" in k else v[0] for k, v in tree.items()}
    )


@pytest.fixture(scope="module")
def reference(golden):
    """A function from a variant to (model, parameters, inputs)."""

    def load(variant, prompts=()):
        activations, tied = VARIANTS[variant]
        config = T5Config(
            256, 32, 4, 2, 2, 8, 64, activations, logits_via_embedding=tied
        )
        inputs = np.load(golden / variant / "decode.npz")["encoder_input_tokens"]
        params = stacked(dict(np.load(golden / variant / "params.npz")))
        return Model(Transformer(config, prompts)), params, inputs

    return load


def assert_decodes(actual, tokens, scores=None):
    np.testing.assert_array_equal(actual[0], tokens)
    if scores is not None:
        np.testing.assert_allclose(actual[1], scores, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_decodes_that_never_end(golden, reference, variant):
    model, params, inputs = reference(variant)
    want = np.load(golden / variant / "decode.npz")
    tokens, scores = predict(model, params, inputs, Greedy(8))
    np.testing.assert_array_equal(tokens[:, 0], want["greedy_tokens"])
    np.testing.assert_allclose(scores, want["beam1_scores"], rtol=1e-5)
    for name, strategy in (
        ("beam1", Beam(8, num_decodes=1)),
        ("beam4", Beam(8)),
        ("beam4_alpha0", Beam(8, alpha=0.0)),
    ):
        actual = predict(model, params, inputs, strategy)
        assert_decodes(actual, want[f"{name}_tokens"], want[f"{name}_scores"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_samples(golden, reference, variant):
    model, params, inputs = reference(variant)
    want = np.load(golden / variant / "decode.npz")
    strategy = Sampling(8, temperature=1.0, topk=40, num_decodes=2)
    actual = predict(model, params, inputs, strategy, jax.random.PRNGKey(7))
    name = "sample_T1_topk40_seed7"
    assert_decodes(actual, want[f"{name}_tokens"], want[f"{name}_scores"])


@pytest.mark.parametrize("length", [pytest.param(8, marks=pytest.mark.slow), 12])
def test_stored_decodes_that_end(golden, reference, length):
    model, params, inputs = reference("t5_1_1")
    want = np.load(golden / "t5_1_1" / "decode_eos.npz")
    eos_id = int(want["eos_id"])
    actual = predict(model, params, inputs, Greedy(length, eos_id=eos_id))
    assert_decodes(actual, want[f"greedy_len{length}_tokens"][:, None])
    for beams in (2, 4):
        for alpha in (0.0, 0.6, 1.0):
            strategy = Beam(length, num_decodes=beams, alpha=alpha, eos_id=eos_id)
            actual = predict(model, params, inputs, strategy)
            name = f"beam{beams}_alpha{alpha}_len{length}"
            assert_decodes(actual, want[f"{name}_tokens"], want[f"{name}_scores"])


def test_stored_decodes_of_a_prefix(golden, reference):
    model, params, inputs = reference("t5_1_1")
    want = np.load(golden / "t5_1_1" / "decode_eos.npz")
    prefix = want["prefix_decoder_input_tokens"][:, 1:]
    actual = predict(model, params, inputs, Greedy(8), decoder_prefix=prefix)
    assert_decodes(actual, want["prefix_greedy_tokens"][:, None])


def test_stored_decodes_of_a_prompt(golden, reference):
    model, params, inputs = reference("t5_1_1", (Prompt("task", 5),))
    want = np.load(golden / "prompt" / "forward.npz")
    params["prompts"] = {"task": want["prompt"]}
    virtual = np.broadcast_to(np.arange(256, 261), (len(inputs), 5))
    inputs = np.concatenate([virtual, inputs], axis=1)
    actual = predict(model, params, inputs, Greedy(8))
    assert_decodes(actual, want["greedy_tokens"][:, None])
    actual = predict(model, params, inputs, Beam(8))
    assert_decodes(actual, want["beam4_tokens"], want["beam4_scores"])


def teacher_forced_score(model, params, inputs, tokens, counted):
    """Log-probability of the counted ``tokens`` [B, S] without a cache."""
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": jnp.pad(tokens[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": tokens,
    }
    token_loss, _ = losses.cross_entropy(model.logits(params, batch), tokens)
    return -np.sum(np.asarray(token_loss) * counted, axis=1)


def test_one_beam_is_greedy_and_scores_are_log_probabilities(
    tiny_model, tiny_params, tiny_batch
):
    # With an end token in reach the two differ: the beam also keeps a decode that ended
    # on the second best token.
    inputs = tiny_batch["encoder_input_tokens"]
    greedy = predict(tiny_model, tiny_params, inputs, Greedy(7, eos_id=NEVER))
    beam = predict(
        tiny_model, tiny_params, inputs, Beam(7, num_decodes=1, alpha=0.0, eos_id=NEVER)
    )
    assert_decodes(beam, *greedy)
    want = teacher_forced_score(tiny_model, tiny_params, inputs, greedy[0][:, 0], 1.0)
    np.testing.assert_allclose(greedy[1][:, 0], want, rtol=1e-5)


def test_a_beam_continues_a_prefix(tiny_model, tiny_params, tiny_batch):
    inputs = tiny_batch["encoder_input_tokens"]
    prefix = jnp.array([[12, 7, 9], [30, NEVER, 0], [0, 0, 0]])
    strategy = Beam(6, num_decodes=3, eos_id=NEVER)
    tokens, scores = predict(
        tiny_model, tiny_params, inputs, strategy, decoder_prefix=prefix
    )
    np.testing.assert_array_equal(tokens[0, :, :3], [[12, 7, 9]] * 3)
    np.testing.assert_array_equal(tokens[1, :, 0], [30] * 3)
    assert NEVER not in tokens  # An end token in a prefix is not forced.
    free = predict(tiny_model, tiny_params, inputs, strategy)
    assert_decodes((tokens[2], scores[2]), free[0][2], free[1][2])
    for row in tokens:
        assert len({tuple(decode) for decode in row}) == 3
    counted = np.arange(6) >= np.array([3, 1, 0])[:, None]
    want = teacher_forced_score(tiny_model, tiny_params, inputs, tokens[:, -1], counted)
    np.testing.assert_allclose(scores[:, -1], want, rtol=1e-5)


@pytest.mark.parametrize(
    "strategy", [Greedy(6), Beam(6, num_decodes=3), Sampling(6, temperature=0.0)]
)
def test_compiled_and_eager_agree(tiny_model, tiny_params, tiny_batch, strategy):
    inputs = tiny_batch["encoder_input_tokens"]
    eager = tiny_model.predict(tiny_params, inputs, strategy)
    assert_decodes(predict(tiny_model, tiny_params, inputs, strategy), *eager)


@pytest.mark.parametrize("strategy", [Greedy(6), Beam(6, num_decodes=3)])
def test_a_row_is_decoded_as_if_alone(tiny_model, tiny_params, tiny_batch, strategy):
    inputs = tiny_batch["encoder_input_tokens"]
    together = predict(tiny_model, tiny_params, inputs, strategy)
    alone = predict(tiny_model, tiny_params, inputs[2:, :4], strategy)
    assert np.all(inputs[2, 4:] == 0)
    assert_decodes((together[0][2:], together[1][2:]), *alone)


class Chain:
    """A network whose next token depends on the last one only; counts its calls."""

    def __init__(self, probs):
        self.log_probs = jnp.log(jnp.asarray(probs, jnp.float32))  # [V, V]
        self.calls = 0

    def __call__(self, ids, step, ancestry, cache):
        self.calls += 1
        return self.log_probs[ids.reshape(-1)], cache.at[:, :, step].set(ids)

    def run(self, strategy, batch=1, prefix=None, rng=None):
        shape = (batch, strategy.num_decodes, strategy.max_decode_len)
        cache = jnp.zeros(shape, jnp.int32)
        forced = decoding.forced_tokens(prefix, batch, strategy)
        return decoding.decode(strategy, self, cache, forced, rng)


# Token 1 ends. From the start 2 is likelier than 3; 2 leads to 3, 3 to the end.
STEPS = [
    [0.0, 0.1, 0.5, 0.4],
    [0.25, 0.25, 0.25, 0.25],
    [0.0, 0.1, 0.2, 0.7],
    [0.0, 0.9, 0.05, 0.05],
]


def test_greedy_stops_when_every_row_has_ended():
    chain = Chain(STEPS)
    with jax.disable_jit():  # The loop runs in Python, so that calls can be counted.
        prefix = jnp.array([[3, 0], [0, 0]])
        tokens, scores = chain.run(Greedy(50), batch=2, prefix=prefix)
    assert chain.calls == 3
    np.testing.assert_array_equal(tokens[:, 0, :4], [[3, 1, 0, 0], [2, 3, 1, 0]])
    assert not tokens[:, 0, 4:].any()
    np.testing.assert_allclose(scores[:, 0], np.log([0.9, 0.5 * 0.7 * 0.9]), rtol=1e-6)


def test_beam_search_stops_when_nothing_can_improve():
    chain = Chain(STEPS)
    with jax.disable_jit():
        tokens, scores = chain.run(Beam(50, num_decodes=2, alpha=0.0))
    assert chain.calls < 6
    np.testing.assert_array_equal(tokens[0, :, :4], [[2, 3, 1, 0], [3, 1, 0, 0]])
    np.testing.assert_allclose(scores[0], np.log([0.315, 0.36]), rtol=1e-6)


def test_length_penalty_divides_the_log_probability():
    # A decode of n tokens is divided by (5 + n) / 6, so the longer one wins now.
    tokens, scores = Chain(STEPS).run(Beam(50, num_decodes=2, alpha=2.0))
    np.testing.assert_array_equal(tokens[0, -1, :4], [2, 3, 1, 0])
    np.testing.assert_allclose(scores[0, -1], np.log(0.315) / (8 / 6) ** 2, rtol=1e-6)


def test_ancestry_says_what_a_beam_continues():
    """What a network saw before a token is what the returned beam holds before it."""

    class Recorder(Chain):
        # Its next logits depend on all the tokens that its cache says a beam has said.
        def __call__(self, ids, step, ancestry, cache):
            _, cache = super().__call__(ids, step, ancestry, cache)
            beams = jnp.arange(cache.shape[1])
            if ancestry is None:
                ancestry = jnp.zeros(cache.shape, jnp.int32)
            ancestry = ancestry.at[:, :, step].set(beams[None])
            said = jnp.take_along_axis(cache, ancestry, axis=1)
            said = jnp.where(jnp.arange(said.shape[2])[None, None] <= step, said, 0)
            code = jnp.sum(said * (7 ** jnp.arange(5))[None, None], axis=2).reshape(-1)
            return 2 * jnp.sin(code[:, None] * jnp.arange(1, 5)[None]), cache

    recorder = Recorder(STEPS)
    tokens, scores = recorder.run(Beam(5, num_decodes=3, eos_id=NEVER))
    for decode, score in zip(tokens[0], scores[0], strict=True):
        forced = Recorder(STEPS)
        total, last = 0.0, 0
        cache = jnp.zeros((1, 1, 5), jnp.int32)
        for step, token in enumerate(decode):
            logits, cache = forced(jnp.array([[last]]), step, None, cache)
            total += jax.nn.log_softmax(logits)[0, token]
            last = int(token)
        np.testing.assert_allclose(score, total, rtol=1e-5)


def test_samples_follow_the_distribution_and_come_best_last():
    strategy = Sampling(1, num_decodes=4000, eos_id=NEVER)
    tokens, scores = Chain(STEPS).run(strategy, rng=jax.random.key(0))
    share = np.bincount(tokens[0, :, 0], minlength=4) / 4000
    np.testing.assert_allclose(share, STEPS[0], atol=0.03)
    assert np.all(np.diff(scores[0]) >= 0)
    np.testing.assert_allclose(scores[0, -1], np.log(0.5), rtol=1e-5)
    raw_key, _ = Chain(STEPS).run(strategy, rng=jax.random.PRNGKey(0))
    np.testing.assert_array_equal(raw_key, tokens)
    cold = Sampling(1, temperature=0.5, num_decodes=4000, eos_id=NEVER)
    tokens, _ = Chain(STEPS).run(cold, rng=jax.random.key(0))
    squared = np.square(STEPS[0])
    share = np.bincount(tokens[0, :, 0], minlength=4) / 4000
    np.testing.assert_allclose(share, squared / squared.sum(), atol=0.03)


def test_topk_and_topp_keep_the_right_tokens():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]]))
    kept = lambda masked: (masked > decoding.NEG_INF / 2).astype(int).tolist()
    everything = [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert kept(decoding.keep_topk(logits, 2)) == [[0, 1, 0, 1], [1, 1, 1, 1]]
    assert kept(decoding.keep_topk(logits, 9)) == everything
    assert kept(decoding.keep_topp(logits, 0.01)) == [[0, 1, 0, 0], [1, 1, 1, 1]]
    assert kept(decoding.keep_topp(logits, 0.6)) == [[0, 1, 0, 1], [1, 1, 1, 1]]
    assert kept(decoding.keep_topp(logits, 0.8)) == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert kept(decoding.keep_topp(logits, 1.0)) == everything


def loops_of(jaxpr):
    """Every while loop of a jaxpr, outermost first."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from loops_of(inner)


def products_of(jaxpr):
    """Every matrix product of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from products_of(inner)


def test_the_encoders_output_is_projected_outside_the_loop(
    tiny_model, tiny_params, tiny_batch
):
    inputs = tiny_batch["encoder_input_tokens"]
    batch, length = inputs.shape
    strategy = Beam(7, num_decodes=2)
    jaxpr = jax.make_jaxpr(lambda p: tiny_model.predict(p, inputs, strategy))(
        tiny_params
    )
    loop = next(loops_of(jaxpr.jaxpr))
    body = loop.params["body_jaxpr"].jaxpr
    products = list(products_of(body))
    assert products
    for equation in products:  # Projections work on one token a row, not on inputs.
        rows = equation.outvars[0].aval.shape[0]
        assert rows not in (batch * length, 2 * batch * length)
    constants = loop.params["body_nconsts"] + loop.params["cond_nconsts"]
    carried = [v.aval.shape for v in loop.invars[constants:]]
    # Of each layer keys and values of S positions of both beams, and once for both
    # those of the inputs.
    assert carried.count((batch, 4, 7 * 2, 8)) == 2 * 2
    fixed = [v.aval.shape for v in loop.invars[:constants]]
    assert fixed.count((batch, 4, length, 8)) == 2 * 2
    assert not [shape for shape in carried if length in shape]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Greedy(0), "max_decode_len=0 must be 1 or more"),
        (lambda: Beam(5, num_decodes=0), "num_decodes=0 must be 1 or more"),
        (lambda: Beam(5, alpha=-1.0), "alpha=-1.0 must be 0 or more"),
        (lambda: Sampling(5, temperature=-1.0), "temperature=-1.0 must be 0 or more"),
        (lambda: Sampling(5, temperature=0.0, num_decodes=2), "set num_decodes=1"),
        (lambda: Sampling(5, topk=3, topp=0.5), "set one to 0"),
        (lambda: Sampling(5, topk=-1), "topk=-1 must be 0 or more"),
        (lambda: Sampling(5, topp=1.5), r"topp=1.5 in \[0, 1\]"),
    ],
)
def test_bad_settings_name_the_cure(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_prefix_that_does_not_fit_is_refused():
    for shape in ((2, 6), (3, 4), (2,)):
        with pytest.raises(ValueError, match=r"pass \[2, Q\] with Q up to"):
            decoding.forced_tokens(jnp.ones(shape, jnp.int32), 2, Greedy(5))


def test_sampling_without_a_key_is_refused():
    with pytest.raises(ValueError, match="pass rng="):
        Chain(STEPS).run(Sampling(3))
