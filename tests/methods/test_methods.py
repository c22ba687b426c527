# SPDX-License-Identifier: Apache-2.0
"""Every method that makes prompts: what moves, what it stands for, side by side."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning import decoding, trees
from prompt_tuning.devices import sharding
from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.methods.attempt import Attempt
from prompt_tuning.methods.composed import Composed
from prompt_tuning.methods.decoder_prefix import DecoderPrefix
from prompt_tuning.methods.decoder_prompt import DecoderPrompt
from prompt_tuning.methods.decomposed_prompt import DecomposedPrompt
from prompt_tuning.methods.dept import DePT
from prompt_tuning.methods.ia3 import IA3
from prompt_tuning.methods.instruction_aware_prompt import (
    ABOVE,
    BELOW,
    InstructionAwarePrompt,
)
from prompt_tuning.methods.lora import LoRA
from prompt_tuning.methods.low_dimensional_prompt import LowDimensionalPrompt
from prompt_tuning.methods.masked_prompt import MaskedPrompt
from prompt_tuning.methods.method import HELD, Method, Start, assemble
from prompt_tuning.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning.methods.p_tuning import PTuning
from prompt_tuning.methods.prefix_tuning import PrefixTuning
from prompt_tuning.methods.residual_prompt import ResidualPrompt
from prompt_tuning.methods.superposed_prompt import SuperposedPrompt
from prompt_tuning.methods.wayward_prompt import WaywardPrompt
from prompt_tuning.network import quantization
from prompt_tuning.network.adapters import Where
from prompt_tuning.network.comparison import comparer
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt, virtual_ids
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.training import loop, optimizers
from prompt_tuning.training.members import Member, assembler, lessons, penalties
from prompt_tuning.training.schedule import Schedule
from prompt_tuning.training.step import TrainState, make_train_step

CONFIG = T5Config(64, 16, 2, 1, 1, 8, 32)
BASE_SIZES = T5Config(32128, 768, 12, 12, 12, 64, 2048)
LENGTH = 4
KEY = jax.random.key(0)
BASE = jax.jit(Model(Transformer(CONFIG)).init)(jax.random.key(1))
TABLE = BASE["token_embedder"]["embedding"]
ROWS = jax.random.normal(jax.random.key(2), (LENGTH, 16))
ADAMW = optimizers.adamw(0.05)
# All but those that tune the model, those with options of consequence once more.
METHODS = {
    kind: method()
    for kind, method in registry.METHODS.items()
    if method().result != "model" and method.__module__.startswith("prompt_tuning.")
}
METHODS["p_tuning_lstm"] = PTuning(encoder="lstm", hidden=6)
METHODS["decoder_prefix_short"] = DecoderPrefix(length=2)
# The defaults of these are above so small a width.
METHODS["dept"] = DePT(rank=7)
METHODS["low_dimensional_prompt"] = LowDimensionalPrompt(8)
METHODS["dept_short"] = DePT(rank=3, places=3)
METHODS["attempt"] = Attempt(("one", "two"), bottleneck=3, temperature=1.0)
METHODS["attempt_one"] = Attempt(("one",), bottleneck=2)
METHODS["multitask_prompt_distilled"] = MultitaskPrompt(("one", "two"))
METHODS["multitask_prompt_taught"] = MultitaskPrompt(("one", "two"), answers=0.9)
# Those that put something into the layers, beside a prompt that does not.
IN_LAYERS = {
    name: method
    for name, method in METHODS.items()
    if type(method).slots is not Method.slots or name == "prompt_tuning"
}


def start_of(method, base=BASE):
    saved = [jnp.roll(ROWS, i + 1, axis=1) for i, _ in enumerate(method.reads())]
    return Start(ROWS, TABLE, base, saved)


def started(method, key=KEY):
    return method.init(key, start_of(method))


def with_held(members, base=BASE):
    """The base model's parameters, and what methods hold, by the names of members."""
    held = {name: method.held(start_of(method)) for name, method in members.items()}
    return {**base, HELD: {name: own for name, own in held.items() if own}}


def bank_of(*members):
    """The prompts of members that have one, by their names."""
    return tuple(Prompt(name, LENGTH) for name, method in members if method.has_prompt)


def params_of(method, leaves, name="p"):
    """Parameters of the network with one member's leaves."""
    part = method.materialize(method.place(name, leaves), with_held({name: method}))
    bank = bank_of((name, method))
    return trees.merge(assemble({name: part}, [name], bank), BASE), bank


def batches(seed, start=0, has_prompt=True):
    """Rows of one prompt and of texts drawn by the number of the batch."""
    (ids,) = virtual_ids((Prompt("p", LENGTH),), CONFIG.vocab_size).values()
    for number in itertools.count(start):
        rng = np.random.default_rng([seed, number])
        targets = rng.integers(2, 64, (3, 2))
        text = rng.integers(2, 64, (3, 5))
        if has_prompt:
            text = np.concatenate([np.tile(ids, (3, 1)), text], axis=1)
        yield {
            "encoder_input_tokens": text.astype(np.int32),
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": np.ones((3, 2), np.float32),
        }


def member(name, method, seed=0, tx=ADAMW):
    return Member(
        name=name,
        tuned=method.place(name, started(method)),
        tx=method.optimizer(tx),
        batches=lambda start: batches(seed, start, method.has_prompt),
        materialize=method.materialize,
        **method.beside_examples,
    )


def fit(*members, frozen=BASE):
    bank = tuple(
        Prompt(each.name, LENGTH) for each in members if "prompts" in each.tuned
    )
    names = tuple(each.name for each in members) if len(members) > 1 else ()
    model = Model(Transformer(CONFIG, bank), members=names)
    return loop.fit(model, frozen, members, Schedule(3, log_period=1), key=KEY)


@pytest.mark.parametrize("name", ["residual_prompt", "lora", "prefix_tuning"])
def test_a_step_moves_every_leaf_and_its_prompt(name):
    method = METHODS[name]
    one = member("p", method)
    bank = bank_of(("p", method))
    tuned = {"p": one.tuned}
    step = make_train_step(
        Model(Transformer(CONFIG, bank)), ADAMW, assemble=assembler([one], bank)
    )
    state = TrainState.create(tuned, ADAMW, KEY)
    stream, step = one.batches(0), jax.jit(step)
    for _ in range(2):
        state, _ = step(state, BASE, next(stream))
    before, after = (trees.flatten(tree) for tree in (tuned, state.tuned))
    assert [name for name in before if (before[name] == after[name]).all()] == []
    assert {leaf.dtype for leaf in after.values()} == {jnp.dtype("float32")}
    was, now = (
        jax.tree.leaves(method.materialize(tree["p"], BASE))
        for tree in (tuned, state.tuned)
    )
    assert all(np.isfinite(leaf).all() for leaf in now)
    assert any((a != b).any() for a, b in zip(was, now, strict=True))


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_the_start_of_an_adapter_is_the_base_model_bit_for_bit(kind):
    method = registry.named(kind)
    batch = next(batches(0, has_prompt=False))
    model = Model(Transformer(CONFIG))
    params, _ = params_of(method, started(method))
    logits = jax.jit(model.logits)
    np.testing.assert_array_equal(logits(params, batch), logits(BASE, batch))
    score = jax.jit(model.score)
    np.testing.assert_array_equal(score(params, batch), score(BASE, batch))


def test_deep_prompts_of_a_networks_own_states_change_nothing():
    """States that the layers below would give are what prompt tuning computes."""
    method, config = registry.named("deep_prompt"), CONFIG
    batch = next(batches(0))
    model = Model(Transformer(config, bank_of(("p", method))))
    # With one layer the states before it are the rows themselves.
    params, _ = params_of(method, started(method))
    plain = {**BASE, "prompts": {"p": ROWS}}
    logits = jax.jit(model.logits)
    np.testing.assert_array_equal(logits(params, batch), logits(plain, batch))


def test_a_prefix_starts_as_the_keys_of_normed_rows():
    """What the one encoder layer projects, hidden states being the rows."""
    method = registry.named("prefix_tuning")
    found = started(method)["encoder"]["layers"]["attention"]["key_rows"][0]
    layer = jax.tree.map(lambda x: x[0], BASE["encoder"]["layers"])
    normed = ROWS / np.sqrt(np.mean(np.square(ROWS), -1, keepdims=True) + 1e-6)
    normed = normed * layer["pre_attention_layer_norm"]["scale"][None]
    wanted = normed @ layer["attention"]["key"]["kernel"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_does_not_see_another_is_as_without_it():
    """A prompt that sees no text; a text that sees no prompt; a prompt read forwards."""

    def encoded(method, *ids):
        params, bank = params_of(method, ROWS)
        batch = {
            "encoder_input_tokens": np.array([np.concatenate(ids)], np.int32),
            "decoder_input_tokens": np.zeros((1, 1), np.int32),
            "decoder_target_tokens": np.ones((1, 1), np.int32),
        }
        model = Model(Transformer(CONFIG, bank))
        return np.asarray(jax.jit(model.states)(params, batch)[0][0])

    prompt, text = np.arange(64, 64 + LENGTH), np.array([5, 9, 11])
    plain = registry.named("prompt_tuning")
    usual = encoded(plain, prompt, text)
    for method, part, alone in (
        (MaskedPrompt(), slice(0, LENGTH), prompt),
        (MaskedPrompt(text_sees_prompt=False), slice(LENGTH, None), text),
        (MaskedPrompt(prompt_sees_ahead=False), slice(0, 2), prompt[:2]),
    ):
        found = encoded(method, prompt, text)[part]
        np.testing.assert_allclose(found, encoded(method, alone), rtol=1e-4, atol=1e-5)
        assert np.abs(found - usual[part]).max() > 1e-3
    seen = MaskedPrompt(prompt_sees_text=True)
    np.testing.assert_array_equal(encoded(seen, prompt, text), usual)


def test_a_decoder_prompt_of_one_layer_is_tokens_before_the_first():
    """In one layer the states of tokens are their embeddings, which nothing changes."""
    tokens = np.array([5, 9, 11])
    params, bank = params_of(DecoderPrompt(3), {"layers": TABLE[tokens][None]})
    model, batch = Model(Transformer(CONFIG, bank)), next(batches(0, has_prompt=False))
    before = np.tile(tokens, (3, 1))
    longer = batch | {
        name: np.concatenate([before, batch[name]], axis=1)
        for name in ("decoder_input_tokens", "decoder_target_tokens")
    }
    np.testing.assert_allclose(
        jax.jit(model.logits)(params, batch),
        jax.jit(model.logits)(BASE, longer)[:, 3:],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "method", [PrefixTuning(hidden=5), DecoderPrefix(LENGTH, hidden=5)], ids=str
)
def test_a_network_makes_the_keys_of_a_prefix_and_is_not_saved(method):
    """Its formula, in the shapes that are tuned without it; every leaf has a part."""
    leaves = started(method)
    plain = dataclasses.replace(method, hidden=None)
    found, wanted = (m.slots(started(m), BASE) for m in (method, plain))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, wanted)
    site = "decoder/layers/self_attention"
    own = leaves if method.kind == "decoder_prefix" else leaves["decoder"]["layers"]
    own = own.get("self_attention", own)
    states = np.tanh(own["rows"] @ own["down"]["kernel"] + own["down"]["bias"][None])
    made = states @ own["up"]["kernel"] + own["up"]["bias"][None]
    keys, values = np.split(np.asarray(made), 2, axis=1)  # Of one layer.
    prefix = found[f"{site}/prefix"]
    np.testing.assert_allclose(prefix.keys[0, 0], keys, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(prefix.values[0, 0], values, rtol=1e-4, atol=1e-5)
    squares = lambda leaves: sum(
        jnp.square(array).sum()
        for slot in method.slots(leaves, BASE).values()
        for array in slot.arrays().values()
    )
    for path, leaf in trees.flatten(jax.grad(squares)(leaves)).items():
        assert np.abs(leaf).max() > 0, path


def test_offsets_of_zero_leave_the_prompt_alone():
    batch = next(batches(0))
    method = METHODS["dept"]
    model = Model(Transformer(CONFIG, bank_of(("p", method))))
    params, _ = params_of(method, started(method))
    plain = {**BASE, "prompts": {"p": ROWS}}
    logits = jax.jit(model.logits)
    np.testing.assert_array_equal(logits(params, batch), logits(plain, batch))


@pytest.mark.parametrize("name", METHODS)
def test_examples_packed_into_a_row_are_read_apart(name):
    """Whatever a method puts before, beside or into an example, wherever it stands."""
    method = METHODS[name]
    leaves = jax.tree.map(lambda x: x + 0.3, started(method))
    params, bank = params_of(method, leaves)
    one, two = (
        {
            key: value[:1]
            for key, value in next(batches(seed, 0, method.has_prompt)).items()
        }
        for seed in (1, 2)
    )
    two["encoder_input_tokens"] = two["encoder_input_tokens"][:, :-2]
    packed = {
        key: np.concatenate([one[key], two[key], np.zeros((1, 2), one[key].dtype)], 1)
        for key in one
    }
    long, short = (each["encoder_input_tokens"].shape[1] for each in (one, two))
    for side, lengths in (("encoder", (long, short, 2)), ("decoder", (2, 2, 2))):
        packed[f"{side}_segment_ids"] = np.repeat([1, 2, 0], lengths)[None]
    logits = jax.jit(Model(Transformer(CONFIG, bank)).logits)
    found = logits(params, packed)[0]
    for row, place in ((one, slice(0, 2)), (two, slice(2, 4))):
        wanted = logits(params, row)[0]
        np.testing.assert_allclose(found[place], wanted, rtol=1e-4, atol=1e-5)


def test_instruction_aware_prompts_differ_with_the_text():
    """The formula of the paper, over the text of each row."""
    method = InstructionAwarePrompt(bottleneck=3)
    leaves = started(method)
    (slot,) = method.slots(leaves, BASE).values()
    h = jax.random.normal(jax.random.key(5), (1, 6, 16))
    where = Where(
        jnp.array([[0, 1, -9, -9, -9, -64]]), None, jnp.array([[1, 1, 1, 1, 1, 0]])
    )
    found = jax.tree.map(lambda x: x[0], slot)(h, where, h)
    z = h[0, 2:5] @ leaves["down"][0]
    weights = jax.nn.softmax(z @ leaves["pool"][0], axis=0)
    pooled = weights.T @ z
    active = jnp.polyval(jnp.array(ABOVE[::-1]), pooled)
    active /= 1 + jnp.abs(jnp.polyval(jnp.array((*BELOW[::-1], 0.0)), pooled))
    np.testing.assert_allclose(active, nn.gelu(pooled, approximate=False), atol=3e-3)
    wanted = active @ leaves["up"][0]
    np.testing.assert_allclose(found[0, :2], wanted[:2], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[0, 2:], h[0, 2:])


@pytest.mark.parametrize(
    "name",
    ["lora", "deep_prompt", "prefix_tuning", "decoder_prefix", "dept"]
    + ["instruction_aware_prompt"],
)
def test_decoding_says_what_teacher_forcing_says(name):
    """Cached decoding passes the same sites: the likelihood of its own greedy answer."""
    method = METHODS[name]
    leaves = jax.tree.map(lambda x: x + 0.02, started(method))
    params, bank = params_of(method, leaves)
    model = Model(Transformer(CONFIG, bank))
    tokens = next(batches(3, has_prompt=method.has_prompt))["encoder_input_tokens"]
    decode = lambda params, tokens: model.predict(
        params, tokens, decoding.Greedy(max_decode_len=4)
    )
    found, _ = jax.jit(decode)(params, tokens)
    found = np.asarray(found[:, -1])
    batch = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": np.pad(found, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": found,
        "decoder_loss_weights": (found > 0).astype(np.float32),
    }
    best = np.asarray(jax.jit(model.logits)(params, batch)).argmax(-1)
    np.testing.assert_array_equal(np.where(found > 0, best, 0), found)
    ranked = jax.jit(model.rank)(params, tokens, found[:1])
    batch = {**batch, "decoder_target_tokens": np.tile(found[:1], (3, 1))}
    batch["decoder_input_tokens"] = np.tile(batch["decoder_input_tokens"][:1], (3, 1))
    batch["decoder_loss_weights"] = (batch["decoder_target_tokens"] > 0) * 1.0
    np.testing.assert_allclose(
        ranked[:, 0], jax.jit(model.score)(params, batch), rtol=1e-4, atol=1e-4
    )


@dataclasses.dataclass
class Mixed:
    """Rows of all methods that work in the layers, in one batch of a model.

    The base model's kernels are what int8 ones stand for.
    """

    model: Model
    base: dict
    int8: dict
    held: dict
    leaves: dict
    batch: dict
    alone: list

    def gradient_and_logits(self, base, held, leaves, batch):
        """Of the loss with respect to all leaves, and the logits of all rows."""
        model, frozen = self.model, {**base, HELD: held}

        def loss_and_logits(leaves):
            parts = {
                name: IN_LAYERS[name].materialize(own, frozen)
                for name, own in leaves.items()
            }
            own = assemble(parts, list(IN_LAYERS), model.network.prompts)
            params = trees.merge(own, base)
            return model.loss(params, batch)[0], model.logits(params, batch)

        return jax.grad(loss_and_logits, has_aux=True)(leaves)


@pytest.fixture(scope="module")
def mixed():
    config = dataclasses.replace(CONFIG, num_encoder_layers=2)
    base = trees.flatten(jax.jit(Model(Transformer(config)).init)(jax.random.key(1)))
    int8 = dict(base)
    for name in (name for name in base if name.endswith("/kernel")):
        int8[name], scale = quantization.quantize(np.asarray(base[name]))
        int8[quantization.scale_name(name)] = scale
        base[name] = jnp.asarray(int8[name] * scale[..., None, :])
    base = trees.unflatten(base)
    frozen = with_held(IN_LAYERS, base)
    bank = bank_of(*IN_LAYERS.items())
    ids = virtual_ids(bank, config.vocab_size)
    leaves, rows, alone = {}, [], []
    for number, (name, method) in enumerate(IN_LAYERS.items()):
        own = method.init(jax.random.key(number), start_of(method, base))
        own = method.place(name, jax.tree.map(lambda x: x + 0.01, own))
        leaves[name] = own
        stream = batches(number, has_prompt=method.has_prompt)
        row = {key: value[:1] for key, value in next(stream).items()}
        prompts = bank_of((name, method))
        part = method.materialize(own, frozen)
        single = trees.merge(assemble({name: part}, [name], prompts), base)
        logits = jax.jit(Model(Transformer(config, prompts)).logits)
        alone.append(logits(single, row)[0])
        tokens = row["encoder_input_tokens"]
        if method.has_prompt:
            tokens = np.concatenate([ids[name][None], tokens[:, LENGTH:]], axis=1)
        tokens = np.pad(tokens, ((0, 0), (0, LENGTH + 5 - tokens.shape[1])))
        index = np.full(1, number, np.int32)
        rows.append({**row, "encoder_input_tokens": tokens, "prompt_index": index})
    # Two devices share the rows.
    rows += rows[: len(rows) % 2]
    batch = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    batch["targets_length"] = np.full(len(rows), 2, np.int32)
    config = dataclasses.replace(config, remat="full")
    model = Model(Transformer(config, bank), members=tuple(IN_LAYERS))
    int8 = trees.unflatten(int8)
    return Mixed(model, base, int8, frozen[HELD], leaves, batch, alone)


@pytest.fixture(scope="module")
def together(mixed):
    function = jax.jit(mixed.gradient_and_logits)
    return function(mixed.base, mixed.held, mixed.leaves, mixed.batch)


def test_rows_of_all_methods_in_one_batch_equal_each_alone(mixed, together):
    """Two layers, the batch under remat; gradients of every leaf are there."""
    gradient, logits = together
    for found, wanted in zip(logits, mixed.alone, strict=False):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)
    for name, leaf in trees.flatten(gradient).items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, name


@pytest.mark.slow
def test_all_methods_are_the_same_on_int8_weights_spread_over_devices(mixed, together):
    """Two copies of the model, each cut over two devices."""
    mesh = sharding.make_mesh(2, jax.devices()[:4])
    rules = sharding.logical_axis_rules()
    network = dataclasses.replace(mixed.model.network, prompts=())
    boxed = quantization.quantize_abstract(Model(network).abstract_params())
    base = jax.device_put(mixed.int8, sharding.param_shardings(boxed, mesh, rules))
    held, leaves = sharding.replicate((mixed.held, mixed.leaves), mesh)
    with sharding.partitioned(mesh, rules):
        batch = sharding.shard_batch(mixed.batch, mesh)
        found = jax.jit(mixed.gradient_and_logits)(base, held, leaves, batch)
    kernel = base["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert kernel.dtype == jnp.int8
    assert kernel.sharding.shard_shape(kernel.shape)[2] * 2 == kernel.shape[2]
    for own, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(together)):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(own, wanted, rtol=1e-3, atol=1e-4 * max(scale, 1.0))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in IN_LAYERS])
def test_every_leaf_has_a_part_in_the_prompt(name):
    """Prompts of all kinds are looked up in one way, so that rows and penalty tell all."""
    method = METHODS[name]
    base = {**BASE, HELD: method.held(start_of(method))}
    leaves = jax.tree.map(lambda x: x + 0.01, started(method))
    weights = jax.random.normal(jax.random.key(7), ROWS.shape)
    total = lambda leaves: (
        (method.rows(leaves, base) * weights).sum() + method.penalty(leaves, base)
    )
    for path, leaf in trees.flatten({"": jax.grad(total)(leaves)}).items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def side_by_side_and_alone(names, compared, tx=ADAMW):
    """Tunes all of them together, and those that are compared alone."""
    members = [member(name, METHODS[name], seed, tx) for seed, name in enumerate(names)]
    frozen = with_held({name: METHODS[name] for name in names})
    together = fit(*members, frozen=frozen)
    for each in (m for m in members if m.name in compared):
        alone = fit(each, frozen=frozen)[each.name]
        for found, wanted in zip(
            jax.tree.leaves(together[each.name].tuned), jax.tree.leaves(alone.tuned)
        ):
            np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(together[each.name].loss, alone.loss, rtol=1e-5)


def test_methods_side_by_side_end_where_each_does_alone():
    names = ["lora", "ia3", "deep_prompt", "p_tuning", "decoder_prefix"]
    names += ["wayward_prompt", "multitask_prompt_taught"]
    side_by_side_and_alone(names, ("lora", "deep_prompt", "p_tuning", *names[-2:]))


@pytest.mark.slow
def test_all_methods_side_by_side_end_where_each_does_alone():
    # Adam's first steps are the gradients' signs, so that it makes a step of the rate out
    # of a rounded zero, of which so many leaves have some.
    side_by_side_and_alone(list(METHODS), METHODS, optax.sgd(0.05))


def test_a_wayward_prompt_pays_for_its_distance_once_a_step():
    """By the formula, whatever parts a batch has; beside another method, too."""
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    base = {HELD: {"text": rows + np.array([[1.0], [3.0]], np.float32)}}
    assert WaywardPrompt(gamma=0.5).penalty(rows, base) == 0.5 * (4 * 1 + 4 * 9) / 2
    pair = Composed((WaywardPrompt(gamma=2.0), "lora"))
    own = WaywardPrompt(gamma=2.0)
    batch = next(batches(0))
    grads = []
    for method, parts in ((registry.named("prompt_tuning"), 1), (own, 1), (own, 3)):
        one = member("p", method)
        bank = bank_of(("p", method))
        step = make_train_step(
            Model(Transformer(CONFIG, bank)),
            optax.sgd(1.0),
            parts,
            assembler([one], bank),
            penalties([one]),
        )
        tuned = {"p": method.place("p", ROWS + 0.25)}
        state = TrainState.create(tuned, optax.sgd(1.0), KEY)
        after, _ = jax.jit(step)(state, with_held({"p": method}), batch)
        grads.append(ROWS + 0.25 - after.tuned["p"]["prompts"]["p"])
    plain, once, in_parts = grads
    np.testing.assert_allclose(
        once - plain, np.full(ROWS.shape, 2.0 * 2 * 0.25 / LENGTH), atol=1e-4
    )
    np.testing.assert_allclose(in_parts, once, rtol=1e-4, atol=1e-4)
    assert pair.has_penalty and not Composed().has_penalty
    tuned = pair.place("p", started(pair))
    tuned["prompts"]["p"]["wayward_prompt"] = ROWS + 0.25
    found = pair.penalize(tuned, with_held({"p": pair}))
    np.testing.assert_allclose(found, 2.0 * 16 * 0.25**2, rtol=1e-5)


def test_a_shared_prompt_is_distilled_from_its_teachers():
    """Their distance is the loss's, and falls; without teachers nothing is there."""
    plain, method = MultitaskPrompt(), MultitaskPrompt(("one", "two"), 0.5)
    leaves = started(method)
    own = {name: leaf for name, leaf in leaves.items() if name != "of_teachers"}
    assert jax.tree.all(jax.tree.map(jnp.array_equal, own, started(plain)))
    assert not plain.has_penalty and plain.held(start_of(plain)) == {}
    base = {HELD: method.held(start_of(method))}
    teachers = [jnp.roll(ROWS, i + 1, axis=1) for i in range(2)]
    distances = [jnp.mean(jnp.sum((ROWS - each) ** 2, axis=1)) for each in teachers]
    found = method.penalty(leaves, base)
    np.testing.assert_allclose(found, 0.5 * np.mean(distances), rtol=1e-6)
    # Each teacher has vectors of its own, and none but the shared prompt is the task's.
    gradient = jax.grad(method.penalty)(leaves, base)
    np.testing.assert_array_equal(gradient["left"], 0)
    np.testing.assert_array_equal(gradient["right"], 0)
    assert jnp.all(jnp.any(gradient["of_teachers"]["right"] != 0, axis=1))
    # A shared prompt and vectors that make the teachers cost nothing.
    lefts = jnp.array([[2.0] * LENGTH, [3.0] * LENGTH])
    exact = {
        "of_teachers": {"left": lefts, "right": jnp.ones((2, ROWS.shape[1]))},
        "shared": ROWS,
    }
    base = {HELD: {"teachers": jnp.stack([2 * ROWS, 3 * ROWS])}}
    np.testing.assert_allclose(method.penalty(exact, base), 0.0, atol=1e-9)
    # Training draws them together, and moves the teachers themselves not at all.
    one, held = member("p", method), with_held({"p": method})
    (result,) = fit(one, frozen=held).values()
    after = result.tuned["prompts"]["p"]
    before = method.penalty(leaves, {HELD: held[HELD]["p"]})
    assert method.penalty(after, {HELD: held[HELD]["p"]}) < before
    np.testing.assert_array_equal(held[HELD]["p"]["teachers"], jnp.stack(teachers))


@pytest.mark.slow
def test_a_shared_prompt_learns_its_teachers_answers():
    """Divergence and distance by their formula, in parts of a batch, too."""
    one, method = MultitaskPrompt(("one", "two")), METHODS["multitask_prompt_taught"]
    held = with_held({"p": method})
    bank, batch = bank_of(("p", method)), next(batches(0))
    # The last of the six targets does not count.
    batch["decoder_loss_weights"][2, 1] = 0.0
    model = Model(Transformer(CONFIG, bank))
    tuned = method.place("p", started(method))

    @jax.jit
    def read(rows):
        params = {**BASE, "prompts": {"p": rows}}
        hidden = model.states(params, batch)[1]
        return hidden, jax.nn.log_softmax(model.logits(params, batch))

    wanted = []
    hidden, ours = read(ROWS)
    for teacher in held[HELD]["p"]["teachers"]:
        its_hidden, theirs = read(teacher)
        divergence = (np.exp(theirs) * (theirs - ours)).sum(-1)
        apart = divergence + np.square(hidden - its_hidden).mean(-1)
        wanted.append((apart * batch["decoder_loss_weights"]).sum())

    @functools.partial(jax.jit, static_argnums=0)
    def lesson(model, held):
        compare = comparer(model, {**BASE, "prompts": {"p": ROWS}}, batch)
        return method.teach(tuned, held, functools.partial(compare, "p"))

    found = lesson(model, held)
    np.testing.assert_allclose(found, 0.9 * np.mean(wanted), rtol=1e-5)
    assert found > 0.01
    in_pieces = dataclasses.replace(model, max_logit_bytes=1)
    again = lesson(in_pieces, held)
    np.testing.assert_allclose(again, found, rtol=1e-5)
    # A teacher that is the product itself has nothing to say.
    same = {**held, HELD: {"p": {"teachers": jnp.stack([ROWS, ROWS])}}}
    found = lesson(model, same)
    np.testing.assert_allclose(found, 0.0, atol=1e-6)
    # What a step makes of it does not hang on how the batch is cut.
    after = []
    for taught, parts in ((one, 1), (method, 1), (method, 3)):
        of_run = member("p", taught)
        step = make_train_step(
            model,
            optax.sgd(1.0),
            parts,
            assembler([of_run], bank),
            penalties([of_run]),
            lessons([of_run]),
        )
        state = TrainState.create({"p": tuned}, optax.sgd(1.0), KEY)
        after.append(jax.jit(step)(state, held, batch)[0].tuned["p"]["prompts"]["p"])
    without, once, in_parts = after
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        once,
        in_parts,
    )
    np.testing.assert_array_equal(without["right"], once["right"])
    assert jnp.any(jnp.abs(without["shared"] - once["shared"]) > 1e-5)


def test_attention_over_prompts_is_that_of_the_paper():
    """Its formula for one row, over the text alone: not over the padding."""
    method = Attempt(("one", "two"), bottleneck=3, temperature=2.0)
    leaves = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(8), x.shape),
        started(method),
    )
    base = {HELD: method.held(start_of(method))}
    (slot,) = method.slots(leaves, base).values()
    y = jax.random.normal(jax.random.key(5), (1, 8, 16))
    y = y.at[0, 7].set(9.0)
    where = Where(
        jnp.array([[0, 1, 2, 3, -9, -9, -9, -64]]),
        None,
        jnp.array([[1, 1, 1, 1, 1, 1, 1, 0]]),
    )
    found = jax.tree.map(lambda x: x[0], slot)(y, where, y)
    prompts = np.stack([*base[HELD]["sources"], leaves["rows"]])
    low = nn.silu(y[0, 4:7].max(axis=0) @ leaves["down"])
    query = np.asarray(low @ leaves["up"])
    query = (query - query.mean()) / np.sqrt(query.var() + 1e-5)
    query = query * leaves["norm"]["scale"] + leaves["norm"]["bias"]
    weights = jax.nn.softmax(prompts.max(axis=1) @ query / 2.0)
    assert np.ptp(weights) > 0.01
    wanted = y[0, :4] + np.einsum("m,mph->ph", weights, prompts)
    np.testing.assert_allclose(found[0, :4], wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found[0, 4:], y[0, 4:])


def test_a_part_at_rate_zero_leaves_the_other_to_itself():
    """LoRA that stays at its start is none: the prompt ends where it does alone."""
    method = Composed(("prompt_tuning", "lora"), rates=(1.0, 0.0))
    before = started(method)
    found = fit(member("p", method))["p"].tuned["prompts"]["p"]
    alone = fit(member("p", registry.named("prompt_tuning")))["p"]
    np.testing.assert_allclose(
        found["prompt_tuning"], alone.tuned["prompts"]["p"], rtol=1e-5
    )
    for path, leaf in trees.flatten(found["lora"]).items():
        np.testing.assert_array_equal(leaf, trees.flatten(before["lora"])[path])


@pytest.mark.parametrize(
    ("method", "length", "count"),
    [
        # T5-base, H = 768; the counts that the papers or their code give.
        (ResidualPrompt(), 10, 1_231_904 + 7_680),
        (DecomposedPrompt(rank=10), 100, 8_680),
        (DecomposedPrompt(rank=64), 100, 55_552),
        (LowDimensionalPrompt(dimensions=2), 100, 1_736),
        (LowDimensionalPrompt(dimensions=64), 100, 7_936),
        (LowDimensionalPrompt(dimensions=256), 100, 27_136),
        (DePT(rank=45), 40, 76_800),
        (MultitaskPrompt(), 100, 76_800 + 100 + 768),
        (LoRA(), 0, 884_736),
        (IA3(), 0, 104_448),
        (PrefixTuning(), 20, 1_105_920),
        (DecoderPrefix(20), 0, 368_640),
        (DecoderPrompt(20), 0, 184_320),
        # PEFT's prefix encoder with its projection: P H + (H + 1) m + (m + 1) 2 L H.
        (DecoderPrefix(20, hidden=512), 0, 15_360 + 769 * 512 + 513 * 18_432),
        (InstructionAwarePrompt(16, shared_layers=4), 4, 3 * 2 * 16 * 768 + 12 * 76),
        (Attempt(), 100, 231_936),
    ],
    ids=str,
)
def test_as_many_numbers_move_as_is_published(method, length, count):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    base = nn.meta.unbox(Model(Transformer(BASE_SIZES)).abstract_params())
    start = Start(shape(length, 768), shape(32128, 768), base)
    assert trees.count(jax.eval_shape(method.init, KEY, start)) == count


def test_a_residual_branch_of_zeros_leaves_the_rows_alone():
    leaves = started(ResidualPrompt(bottleneck=5))
    leaves["norm"]["scale"] = jnp.zeros(16)
    np.testing.assert_array_equal(ResidualPrompt(5).rows(leaves, BASE), ROWS)


def test_low_rank_is_low():
    prompt = DecomposedPrompt(rank=2).rows(started(DecomposedPrompt(rank=2)), BASE)
    assert np.linalg.matrix_rank(prompt) == 2


def test_a_projection_is_made_of_its_seed_alone():
    rows = [
        LowDimensionalPrompt(8, seed).rows(started(LowDimensionalPrompt(8)), BASE)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any()


def test_a_superposed_prompt_starts_as_rows_of_the_table():
    prompt = SuperposedPrompt(pieces=8).rows(started(SuperposedPrompt(8)), BASE)
    nearest = np.abs(prompt[:, None] - TABLE[None]).sum(-1).argmin(-1)
    np.testing.assert_array_equal(prompt, TABLE[nearest])
    assert len(set(nearest.tolist())) == LENGTH
    with pytest.raises(UserError, match=r"set SuperposedPrompt.pieces to 4 or more"):
        started(SuperposedPrompt(pieces=3))


def test_an_lstm_reads_from_both_ends():
    method = METHODS["p_tuning_lstm"]
    leaves = started(method)
    rows = method.rows(leaves, BASE)
    for touched in (0, LENGTH - 1):
        other = {**leaves, "rows": leaves["rows"].at[touched].add(1.0)}
        changed = np.asarray(method.rows(other, BASE) != rows).any(axis=1)
        assert changed.all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResidualPrompt(bottleneck=0), "ResidualPrompt.bottleneck=0 must be"),
        (lambda: DecomposedPrompt(rank=2.5), "DecomposedPrompt.rank=2.5 must be"),
        (lambda: DecomposedPrompt(rank=True), "DecomposedPrompt.rank=True must be"),
        (lambda: LowDimensionalPrompt("8"), "dimensions='8' must be a whole number"),
        (lambda: PTuning(encoder="gru"), "encoder='gru' must be 'mlp' or 'lstm'"),
        (lambda: LoRA(rank=0), "LoRA.rank=0 must be a whole number"),
        (lambda: started(LoRA(rank=17)), "LoRA.rank=17 is more than .* has"),
        (lambda: started(LoRA(targets=("q",))), r"targets=\['q'\]: q is no kernel"),
        (lambda: DecoderPrefix(length=0), "DecoderPrefix.length=0 must be"),
        (lambda: DecoderPrompt(length=0), "DecoderPrompt.length=0 must be"),
        (lambda: MaskedPrompt(prompt_sees_itself=False), "see nothing at all"),
        (lambda: MaskedPrompt(prompt_sees_text=1), "must be True or False"),
        (lambda: PrefixTuning(hidden=0), "PrefixTuning.hidden=0 must be"),
        (lambda: Composed(("lora",)), "must be two methods or more, each once"),
        (lambda: Composed(("lora", "lora")), "must be two methods or more, each once"),
        (lambda: Composed(("lora", "model_tuning")), "moves the model itself"),
        (lambda: Composed(("deep_prompt", "p_tuning")), "more than one has a prompt"),
        (lambda: Composed(("lora", "absent")), "no method is called 'absent'"),
        (lambda: Composed(rates=(1.0,)), "a number of 0 or more for each of the 2"),
        (
            lambda: Composed(rates=(1.0, -1.0)),
            "a number of 0 or more for each of the 2",
        ),
        (
            lambda: DePT(offset_rate=-1),
            "DePT.offset_rate=-1 must be a number of at least 0",
        ),
        (lambda: DePT(places=1.5), "DePT.places=1.5 must be"),
        (
            lambda: started(InstructionAwarePrompt(shared_layers=2)),
            "shared_layers=2 does not divide the 1 layers",
        ),
        (lambda: WaywardPrompt(gamma=-1.0), "gamma=-1.0 must be 0 or more"),
        (lambda: Attempt(temperature=0.0), "temperature=0.0 must be a number above 0"),
        (lambda: MultitaskPrompt("one"), r"must be a list of files, e.g. \('one',\)"),
        (lambda: MultitaskPrompt(distillation=0.0), "distillation=0.0 must be above 0"),
        (
            lambda: MultitaskPrompt(("x",), answers=-1.0),
            "answers=-1.0 must be 0 or more",
        ),
        (lambda: MultitaskPrompt(answers=0.9), "there are none: name their files"),
        (
            lambda: Composed((MultitaskPrompt(("x",), answers=0.9), "lora")),
            "learns from answers of the model without the other parts; leave it out",
        ),
        (
            lambda: MultitaskPrompt(("x",)).held(Start(ROWS, TABLE, BASE, [ROWS[:3]])),
            r"x is a prompt of \[3, 16\], where this one is \[4, 16\]",
        ),
        (lambda: Attempt("one"), r"must be a list of files, e.g. \('one',\)"),
        (lambda: Attempt().held(start_of(Attempt())), "give their files as ATTEMPT_"),
        (
            lambda: Attempt(("x",)).held(Start(ROWS, TABLE, BASE, [ROWS[:3]])),
            r"x is a prompt of \[3, 16\], where attempt needs \[4, 16\]",
        ),
        (lambda: PTuning(hidden=-1), "PTuning.hidden=-1 must be a whole number"),
        (lambda: registry.named("absent"), "no method is called 'absent'; choose"),
    ],
)
def test_options_that_are_none_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_method_of_ones_own_needs_no_other_file():
    @dataclasses.dataclass(frozen=True)
    class Shifted(Method, kind="shifted_prompt"):
        def init(self, key, start):
            return {"rows": start.rows, "shift": jnp.zeros(start.rows.shape[1:])}

        def rows(self, leaves, base):
            return jax.lax.stop_gradient(leaves["rows"]) + leaves["shift"][None]

    try:
        method = registry.named("shifted_prompt")
        assert method == Shifted() and method.describe() == "shifted_prompt"
        found = fit(member("p", method))["p"].tuned["prompts"]["p"]
        assert np.abs(found["shift"]).min() > 0
        with pytest.raises(ValueError, match="two methods are called"):
            type("Other", (Method,), {}, kind="shifted_prompt")
    finally:
        del registry.METHODS["shifted_prompt"]
