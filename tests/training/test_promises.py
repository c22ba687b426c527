# SPDX-License-Identifier: Apache-2.0
"""The promises of prompt tuning, each as a test that a broken promise fails.

The sizes are chosen so that no activation has the shape of a weight: a shape in a
compiled program then tells which weight an array belongs to.
"""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning import trees
from prompt_tuning.methods import registry
from prompt_tuning.network import losses
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt, virtual_ids
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.training import optimizers
from prompt_tuning.training.step import TrainState, make_train_step

CONFIG = T5Config(
    vocab_size=251,
    emb_dim=23,
    num_heads=3,
    num_encoder_layers=2,
    num_decoder_layers=3,
    head_dim=7,
    mlp_dim=37,
)
PROMPTS = (Prompt("p", 5), Prompt("q", 6))
IDS = virtual_ids(PROMPTS, CONFIG.vocab_size)
MODEL = Model(Transformer(CONFIG, PROMPTS))
INPUTS, TARGETS = 13, 5
PROMPT_RULES = registry.rules_of("prompt_tuning")


def make_params():
    """Weights of a trained model's scale, drawn by numpy to save a compilation."""
    rng = np.random.default_rng(0)

    def draw(name, leaf):
        values = rng.normal(size=leaf.shape)
        if name.endswith("kernel"):
            values *= leaf.shape[-2] ** -0.5
        if name.endswith("scale"):
            values = 1 + 0.1 * values
        return jnp.asarray(values, jnp.float32)

    return trees.map_with_path(draw, nn.meta.unbox(MODEL.abstract_params()))


PARAMS = make_params()
TUNED, FROZEN = registry.split(PARAMS, PROMPT_RULES)
# Each example: a prompt, and the lengths of its text and of its targets.
EXAMPLES = (("p", 7, 4), ("q", 3, 2), ("q", 6, 5), ("p", 4, 3))


def example(i):
    """The input ids, prompt first, and the targets of example i."""
    name, text, target = EXAMPLES[i]
    rng = np.random.default_rng(i)
    draw = lambda length: rng.integers(2, 200, length)
    return np.concatenate([IDS[name], draw(text)]), np.append(draw(target - 1), 1)


def make_batch(rows, inputs, targets):
    """Lays the examples of every row end to end; packed rows get segment ids."""
    batch = {
        "encoder_input_tokens": np.zeros((len(rows), inputs), np.int32),
        "encoder_segment_ids": np.zeros((len(rows), inputs), np.int32),
        "decoder_input_tokens": np.zeros((len(rows), targets), np.int32),
        "decoder_target_tokens": np.zeros((len(rows), targets), np.int32),
        "decoder_segment_ids": np.zeros((len(rows), targets), np.int32),
    }
    for r, row in enumerate(rows):
        i = j = 0
        for segment, number in enumerate(row, start=1):
            source, target = example(number)
            batch["encoder_input_tokens"][r, i : i + len(source)] = source
            batch["encoder_segment_ids"][r, i : i + len(source)] = segment
            batch["decoder_target_tokens"][r, j : j + len(target)] = target
            batch["decoder_input_tokens"][r, j + 1 : j + len(target)] = target[:-1]
            batch["decoder_segment_ids"][r, j : j + len(target)] = segment
            i, j = i + len(source), j + len(target)
    if all(len(row) == 1 for row in rows):
        del batch["encoder_segment_ids"], batch["decoder_segment_ids"]
    weights = batch["decoder_target_tokens"] > 0
    return {**batch, "decoder_loss_weights": weights.astype(np.float32)}


BATCH = make_batch([[0], [1], [2], [3]], INPUTS, TARGETS)


# What one step of each method is.


@dataclasses.dataclass
class Run:
    """A method's compiled step, and the states that three steps go through."""

    jaxpr: object
    compiled: object
    frozen: dict
    states: list


@functools.cache
def run_of(method):
    tuned, frozen = registry.split(PARAMS, registry.rules_of(method))
    tx = optimizers.adafactor(0.1, weight_decay_rate=1e-5)
    step = make_train_step(MODEL, tx)
    states = [TrainState.create({"all": tuned}, tx, jax.random.key(0))]
    compiled = jax.jit(step).lower(states[0], frozen, BATCH).compile()
    for _ in range(3):
        states.append(compiled(states[-1], frozen, BATCH)[0])
    jaxpr = jax.make_jaxpr(step)(states[0], frozen, BATCH)
    return Run(jaxpr, compiled, frozen, states)


@pytest.mark.parametrize("method", ["prompt_tuning", "model_tuning"])
def test_a_step_moves_every_tuned_parameter_and_no_other(method):
    run = run_of(method)
    before = trees.flatten(PARAMS)
    after = trees.flatten(trees.merge(run.states[1].tuned["all"], run.frozen))
    assert before.keys() == after.keys()
    moved = {name for name in before if (before[name] != after[name]).any()}
    labels = trees.flatten(trees.labels(PARAMS, registry.rules_of(method)))
    assert moved == {name for name, label in labels.items() if label == registry.TUNED}


def test_frozen_bytes_are_the_same_after_a_run():
    """The step's program returns no frozen leaf, and alters none in place."""
    frozen = registry.split(make_params(), PROMPT_RULES)[1]
    run = run_of("prompt_tuning")
    assert trees.fingerprint(run.frozen) == trees.fingerprint(frozen)
    hashes = {trees.fingerprint(state.tuned) for state in run.states}
    assert len(hashes) == len(run.states)


def equations(jaxpr):
    """Every equation of a program, also those inside scans and calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def weight_shapes():
    """Shape -> name of every weight, also of one layer's slice, also transposed."""
    shapes = {}
    for name, leaf in trees.flatten(FROZEN).items():
        whole = [leaf.shape, leaf.shape[1:]] if "/layers/" in name else [leaf.shape]
        for shape in whole:
            shapes[shape] = shapes[shape[::-1]] = name
    return shapes


MATRICES = {
    (251, 23): "token_embedder/embedding",
    (23, 251): "decoder/logits_dense/kernel",
    (23, 37): "mlp/wi",
    (37, 23): "mlp/wo",
    (23, 21): "query, key, value",
    (21, 23): "out",
    (3, 32): "relpos_bias/rel_embedding",
}


def weight_sized_outputs(method):
    """Shapes of weights that some equation of the step computes."""
    shapes = weight_shapes()
    return {
        output.aval.shape
        for equation in equations(run_of(method).jaxpr.jaxpr)
        for output in equation.outvars
        if getattr(output.aval, "shape", None) in shapes
    }


def test_no_gradient_of_a_frozen_weight_is_in_the_program():
    found = weight_sized_outputs("prompt_tuning")
    assert not found, {shape: weight_shapes()[shape] for shape in found}


def test_model_tuning_has_the_gradients_that_the_test_above_looks_for():
    assert weight_sized_outputs("model_tuning") >= set(MATRICES)


def products(method):
    """Shapes of the matrix products' results in the optimised program, transposed
    so that the smaller side comes first (layouts are the compiler's to choose)."""
    text = run_of(method).compiled.as_text()
    found = re.findall(r"= f32\[([\d,]+)\]\S* (?:dot|custom-call)\(", text)
    return {tuple(sorted(map(int, dims.split(",")))) for dims in found}


def test_no_matrix_product_of_the_compiled_program_has_a_weights_shape():
    # The bias table and the embedding table get their gradients by scattering.
    weights = {tuple(sorted(shape)) for shape in list(MATRICES)[1:-1]}
    assert products("prompt_tuning") and not products("prompt_tuning") & weights
    assert products("model_tuning") >= weights


@pytest.mark.parametrize(
    ("make", "moments"),
    [(optimizers.adafactor, 1), (optimizers.adamw, 2)],
    ids=["ada", "adamw"],
)
def test_the_optimizer_keeps_statistics_of_tuned_leaves_alone(make, moments):
    leaves = jax.tree.leaves(make(0.1).init(TUNED))
    # Counters and Adafactor's placeholders have one element.
    shapes = sorted(leaf.shape for leaf in leaves if leaf.size > 1)
    assert shapes == sorted([(5, 23), (6, 23)] * moments)


# Batches that must not matter.


@jax.jit
def gradient_of(tuned, frozen, batch):
    def loss_fn(tuned):
        params = trees.merge(tuned, frozen)
        token_loss, _ = losses.cross_entropy(
            MODEL.logits(params, batch), batch["decoder_target_tokens"]
        )
        return MODEL.loss(params, batch)[0], token_loss * batch["decoder_loss_weights"]

    (loss, token_loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(tuned)
    return loss, token_loss, grads["prompts"]


def prompt_gradient(tuned, batch):
    """Loss, loss of every token, gradient of the prompts."""
    return gradient_of(tuned, FROZEN, batch)


def assert_close(got, want):
    """Gradients to 1e-5 of their largest value."""
    for name in want:
        bound = 1e-5 * np.abs(want[name]).max()
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=bound)


def test_packed_rows_equal_separate_rows():
    packed = make_batch([[0, 1], [2, 3]], 24, 9)
    # Both rows mix the prompts, and examples of one prompt lie in unlike places.
    loss, token_loss, grads = prompt_gradient(TUNED, packed)
    want_loss, want_token_loss, want_grads = prompt_gradient(TUNED, BATCH)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    assert_close(grads, want_grads)
    segments = packed["decoder_segment_ids"]
    per_example = [
        float(token_loss[row][segments[row] == segment].sum())
        for row in (0, 1)
        for segment in (1, 2)
    ]
    np.testing.assert_allclose(per_example, want_token_loss.sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("factor", [None, *losses.NORMALIZING_FACTORS])
def test_packing_changes_the_loss_by_the_count_of_positions_alone(factor):
    """Each kind of divisor counts what its name says, wherever the targets lie."""
    packed = make_batch([[0, 1], [2, 3]], 24, 9)
    model = Model(MODEL.network, loss_normalizing_factor=factor)
    loss = lambda batch: float(model.loss(PARAMS, batch)[0])
    ratio = 1.0
    if factor == "NUM_TOTAL_TARGET_TOKENS":
        sizes = [batch["decoder_target_tokens"].size for batch in (BATCH, packed)]
        ratio = sizes[0] / sizes[1]
        assert ratio != 1
    np.testing.assert_allclose(loss(packed), ratio * loss(BATCH), rtol=1e-5)


def test_padding_that_is_left_out_changes_nothing():
    """What `batching.trim` does to a batch; the targets keep their padding."""
    wide = make_batch([[0], [1], [2], [3]], 40, TARGETS)
    trimmed = {
        name: value[:, :13] if name.startswith("encoder_") else value
        for name, value in wide.items()
    }
    assert (trimmed["encoder_input_tokens"] != 0).sum() == (
        wide["encoder_input_tokens"] != 0
    ).sum()
    loss, token_loss, grads = prompt_gradient(TUNED, trimmed)
    want_loss, want_token_loss, want_grads = prompt_gradient(TUNED, wide)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    np.testing.assert_allclose(token_loss, want_token_loss, rtol=1e-5, atol=1e-6)
    assert_close(grads, want_grads)


def test_a_mixed_batch_gives_each_prompt_the_gradient_of_its_rows_alone():
    _, token_loss, mixed = prompt_gradient(TUNED, BATCH)
    alone = {name: 0.0 for name in mixed}
    for row, (prompt, _, _) in enumerate(EXAMPLES):
        one = {name: value[row : row + 1] for name, value in BATCH.items()}
        _, one_loss, grads = prompt_gradient(TUNED, one)
        np.testing.assert_allclose(one_loss[0], token_loss[row], rtol=1e-5, atol=1e-5)
        (other,) = set(grads) - {prompt}
        assert grads[prompt].any() and not grads[other].any()
        alone[prompt] += np.asarray(grads[prompt])
    assert_close(mixed, alone)


@pytest.mark.parametrize("factor", [None, *losses.NORMALIZING_FACTORS])
def test_accumulated_gradients_equal_the_whole_batchs(factor):
    """Whatever the loss is divided by, and however many targets each part holds."""
    counts = BATCH["decoder_loss_weights"].reshape(2, -1).sum(axis=1)
    assert counts[0] != counts[1]
    tx = optax.sgd(1.0)
    model = Model(MODEL.network, loss_normalizing_factor=factor)
    # From zeros, a step of rate 1 shows the gradient to float32's last bits.
    zeros = jax.tree.map(jnp.zeros_like, TUNED)
    state = TrainState.create({"all": zeros}, tx, jax.random.key(0))
    step = jax.jit(make_train_step(model, tx, num_microbatches=2))
    after, metrics = step(state, FROZEN, BATCH)

    weights, divisor = losses.weights_and_divisor(
        jax.tree.map(jnp.asarray, BATCH), factor
    )
    loss, _, grads = prompt_gradient(zeros, {**BATCH, "decoder_loss_weights": weights})
    np.testing.assert_allclose(metrics["loss"], loss / divisor, rtol=1e-5)
    assert_close(
        jax.tree.map(jnp.negative, after.tuned["all"]["prompts"]),
        jax.tree.map(lambda grad: grad / divisor, grads),
    )


# Resuming, and low precision.


def through_numpy(state):
    """What a checkpoint does: arrays out, arrays in."""
    saved = jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key)))
    loaded = jax.tree.map(jnp.asarray, saved)
    return loaded.replace(key=jax.random.wrap_key_data(loaded.key))


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit():
    model = Model(Transformer(dataclasses.replace(CONFIG, dropout_rate=0.2), PROMPTS))
    tx = optimizers.adafactor(0.3, multiply_by_parameter_scale=False)
    step = jax.jit(make_train_step(model, tx))
    start = TrainState.create({"all": TUNED}, tx, jax.random.key(5))

    def run(state, count):
        metrics = {}
        for _ in range(count):
            state, metrics = step(state, FROZEN, BATCH)
        return state, metrics

    straight, metrics = run(start, 4)
    resumed, metrics_too = run(through_numpy(run(start, 2)[0]), 2)
    fingerprint = lambda state: [
        np.asarray(leaf).tobytes()
        for leaf in jax.tree.leaves(through_numpy(state).replace(key=None))
    ]
    assert fingerprint(straight) == fingerprint(resumed)
    assert metrics["loss"] == metrics_too["loss"]
    # Dropout was on, and its mask follows the step and the root key.
    loss_at = lambda **change: float(
        step(start.replace(**change), FROZEN, BATCH)[1]["loss"]
    )
    values = {loss_at(), loss_at(step=jnp.int32(1)), loss_at(key=jax.random.key(6))}
    assert len(values) == 3 and loss_at() in values


def test_bfloat16_weights_leave_prompts_gradients_and_statistics_in_float32():
    model = Model(Transformer(dataclasses.replace(CONFIG, dtype="bfloat16"), PROMPTS))
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), FROZEN)
    tx = optimizers.adafactor(0.3, multiply_by_parameter_scale=False)
    state = TrainState.create({"all": TUNED}, tx, jax.random.key(0))

    def loss(tuned):
        return model.loss(trees.merge(tuned, frozen), BATCH)[0]

    for tree in (jax.eval_shape(jax.grad(loss), TUNED), state.opt_state.inner_states):
        kinds = {leaf.dtype for leaf in jax.tree.leaves(tree)}
        assert kinds <= {jnp.dtype("float32"), jnp.dtype("int32")}
    after, metrics = jax.jit(make_train_step(model, tx))(state, frozen, BATCH)
    same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape
    assert all(jax.tree.leaves(jax.tree.map(same, after.tuned["all"], TUNED)))
    assert all(jax.tree.leaves(jax.tree.map(same, after.opt_state, state.opt_state)))
    want, _, _ = prompt_gradient(TUNED, BATCH)
    np.testing.assert_allclose(metrics["loss"], want, rtol=0.02)
    assert np.isfinite(metrics["grad_norm"]) and float(metrics["loss"]) != float(want)
