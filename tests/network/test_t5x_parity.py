# SPDX-License-Identifier: Apache-2.0
"""Parity with T5X: its numbers on tiny models, to 1e-5 or better.

The reference keeps layers apart (``layers_0/...``), we stack them; `stack` maps its
arrays to ours. Where the reference has no numbers of its own making (a padded query row
attends to everything in one implementation and to nothing in another), a comparison
says so and leaves the position out.
"""

import itertools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import trees
from prompt_tuning.methods import registry
from prompt_tuning.network import layers, losses
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.training import optimizers
from prompt_tuning.training.step import TrainState, make_train_step

VARIANTS = {
    "t5_1_1": {"mlp_activations": ("gelu", "linear"), "logits_via_embedding": False},
    "t5_1_0": {"mlp_activations": ("relu",), "logits_via_embedding": True},
}
SIZES = (256, 32, 4, 2, 2, 8, 64)


def stack(flat):
    """T5X's flat names to our tree: ``layers_0, layers_1`` become one leaf."""
    stacked, layers_of = {}, {}
    for name, value in flat.items():
        match = re.fullmatch(r"(.*/layers)_(\d+)/(.*)", name)
        if match:
            group = layers_of.setdefault(f"{match[1]}/{match[3]}", {})
            group[int(match[2])] = value
        else:
            stacked[name] = value
    for name, group in layers_of.items():
        stacked[name] = np.stack([group[i] for i in range(len(group))])
    return trees.unflatten(stacked)


def load(path, prefix=""):
    with np.load(path) as file:
        return {k[len(prefix) :]: file[k] for k in file if k.startswith(prefix)}


def assert_trees_close(got, want, *, rtol, atol=0.0):
    """Every leaf, relative to its own largest value."""
    got, want = trees.flatten(got), trees.flatten(want)
    assert got.keys() == want.keys()
    for name, value in want.items():
        bound = rtol * np.abs(value).max() + atol
        np.testing.assert_allclose(got[name], value, rtol=0, atol=bound, err_msg=name)


class Reference:
    """One variant's files, our model of it, and what that model computes."""

    def __init__(self, folder):
        self.folder = folder
        self.model = Model(Transformer(T5Config(*SIZES, **VARIANTS[folder.name])))
        self.params = stack(load(folder / "params.npz"))
        self.batch = load(folder / "inputs.npz")
        self.forward = load(folder / "forward.npz")

        @jax.jit
        def compute(params, batch):
            def loss(params):
                return self.model.loss(params, batch)[0]

            loss_value, grads = jax.value_and_grad(loss)(params)
            encoded = self.model.network.apply(
                {"params": params},
                batch["encoder_input_tokens"],
                enable_dropout=False,
                method="encode",
            )
            return {
                "logits": self.model.logits(params, batch),
                "scores": self.model.score(params, batch),
                "encoded": encoded,
                "loss": loss_value,
                "grads": grads,
            }

        self.ours = compute(self.params, self.batch)


@pytest.fixture(scope="module", params=VARIANTS)
def reference(request, golden):
    return Reference(golden / request.param)


def test_the_parameter_tree_is_t5xs(reference):
    want = json.loads((reference.folder / "param_tree.json").read_text())
    got = {}
    for name, box in trees.flatten(reference.model.abstract_params()).items():
        axes, shape = list(box.names), list(box.value.shape)
        names = [name]
        if "/layers/" in name:
            assert axes.pop(0) == "layers"
            names = [
                name.replace("/layers/", f"/layers_{i}/") for i in range(shape.pop(0))
            ]
        spec = {"shape": shape, "dtype": str(box.value.dtype), "logical_axes": axes}
        got |= dict.fromkeys(names, spec)
    assert got == want


@pytest.mark.parametrize("name", ["encoded", "logits", "scores", "loss"])
def test_the_forward_pass(name, reference):
    want = reference.forward[name]
    np.testing.assert_allclose(
        reference.ours[name], want, rtol=0, atol=1e-5 * np.abs(want).max()
    )


def test_the_gradient_of_every_parameter(reference):
    want = stack(load(reference.folder / "grads.npz"))
    assert_trees_close(reference.ours["grads"], want, rtol=1e-5)


def losses_of(reference):
    for key, value in json.loads((reference.folder / "losses.json").read_text())[
        "loss"
    ].items():
        options = dict(option.split("=") for option in key.split(","))
        factor = options["loss_normalizing_factor"]
        factor = {"None": None}.get(factor, factor)
        yield (
            float(options["label_smoothing"]),
            float(options["z_loss"]),
            float(factor) if factor and factor.isdigit() else factor,
            value,
        )


def test_every_loss_option(reference):
    count = 0
    for smoothing, z_loss, factor, want in losses_of(reference):
        weights, divisor = losses.weights_and_divisor(
            {k: jnp.asarray(v) for k, v in reference.batch.items()}, factor
        )
        token_loss, _ = losses.cross_entropy(
            reference.ours["logits"],
            reference.batch["decoder_target_tokens"],
            z_loss=z_loss,
            label_smoothing=smoothing,
        )
        got = float(jnp.sum(token_loss * weights) / divisor)
        assert got == pytest.approx(want, rel=1e-5), (smoothing, z_loss, factor)
        count += 1
    # Two values of each number, five ways to normalise.
    assert count == 20


def test_the_model_passes_its_loss_options_on(reference):
    options = (0.1, 1e-4, "AVERAGE_PER_SEQUENCE")
    (want,) = [v for *key, v in losses_of(reference) if tuple(key) == options]
    smoothing, z_loss, factor = options
    model = Model(reference.model.network, z_loss, smoothing, factor)
    loss, _ = jax.jit(model.loss)(reference.params, reference.batch)
    assert float(loss) == pytest.approx(want, rel=1e-5)


def test_packed_rows(golden):
    packed = load(golden / "t5_1_1" / "packed.npz")
    model = Model(Transformer(T5Config(*SIZES, **VARIANTS["t5_1_1"])))
    params = stack(load(golden / "t5_1_1" / "params.npz"))
    logits = jax.jit(model.logits)(params, packed)
    bound = 1e-5 * np.abs(packed["logits"]).max()
    np.testing.assert_allclose(logits, packed["logits"], rtol=0, atol=bound)


def adafactor_statistics(opt_state):
    """``name -> (v_row, v_col, v)`` of every parameter that a matrix rule covers."""
    groups = opt_state.inner_states
    found = {}
    for name, chain in trees.flatten(groups["stacked"].inner_state).items():
        if isinstance(chain, tuple) and chain and hasattr(chain[0], "v_row"):
            moments = chain[0]
            found[name] = (moments.v_row, moments.v_col, moments.v)
    moments = groups["matrix"].inner_state[0]
    columns = [trees.flatten(t) for t in (moments.v_row, moments.v_col, moments.v)]
    for name, v_row in columns[0].items():
        if hasattr(v_row, "shape"):
            found[name] = tuple(column[name] for column in columns)
    return found


def test_two_steps_of_adafactor(reference):
    tx = optimizers.adafactor(1e-2, decay_rate=0.8, step_offset=0)
    tx = optimizers.by_member({"model": tx})
    step = jax.jit(make_train_step(reference.model, tx))
    params = jax.tree.map(jnp.asarray, reference.params)
    state = TrainState.create({"model": params}, tx, jax.random.key(0))
    for number in (1, 2):
        state, _ = step(state, {}, reference.batch)
        path = reference.folder / f"adafactor_step{number}.npz"
        want = stack(load(path, "target/"))
        assert_trees_close(state.tuned["model"], want, rtol=1e-6, atol=1e-7)
        assert int(load(path)["state/step"]) == int(state.step) == number

        slots = trees.flatten(stack(load(path, "state/param_states/")))
        ours = adafactor_statistics(state.opt_state["model"])
        assert ours.keys() == trees.flatten(state.tuned["model"]).keys()
        for name, values in ours.items():
            for slot, value in zip(("v_row", "v_col", "v"), values, strict=True):
                expected = slots[f"{name}/{slot}"]
                np.testing.assert_allclose(
                    value,
                    expected,
                    rtol=0,
                    atol=2e-5 * np.abs(expected).max(),
                    err_msg=f"{name}/{slot}",
                )
            # Without momentum T5X keeps a placeholder, and we nothing.
            assert not slots[f"{name}/m"].any()


def test_learning_rates(golden):
    schedules = json.loads((golden / "lr_schedules.json").read_text())
    assert len(schedules) == 5
    for key, rates in schedules.items():
        factors, base, warmup = key.split("|")
        ours = optimizers.learning_rate_schedule(factors, float(base), int(warmup))
        for step, rate in rates.items():
            assert float(ours(int(step))) == pytest.approx(rate, rel=1e-6), (key, step)


# The prompt: five virtual tokens before the text.


@pytest.fixture(scope="module")
def prompted(golden):
    """Our model with the reference's prompt, its batch, and its numbers."""
    forward = load(golden / "prompt" / "forward.npz")
    network = Transformer(
        T5Config(*SIZES, **VARIANTS["t5_1_1"]), (Prompt("prompt", 5),)
    )
    params = stack(load(golden / "t5_1_1" / "params.npz"))
    params["prompts"] = {"prompt": forward["prompt"]}
    batch = load(golden / "t5_1_1" / "inputs.npz")
    text = batch["encoder_input_tokens"]
    ids = np.broadcast_to(np.arange(256, 261, dtype=text.dtype), (len(text), 5))
    batch["encoder_input_tokens"] = np.concatenate([ids, text], axis=1)
    return Model(network), params, batch, forward


def test_a_prompted_forward_pass_and_its_gradient(prompted):
    model, params, batch, forward = prompted
    tuned, frozen = registry.split(params, registry.rules_of("prompt_tuning"))

    @jax.jit
    def compute(tuned):
        def loss(tuned):
            return model.loss(trees.merge(tuned, frozen), batch)[0]

        params = trees.merge(tuned, frozen)
        encoded = model.network.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            enable_dropout=False,
            method="encode",
        )
        scores = model.score(params, batch)
        return (
            encoded,
            model.logits(params, batch),
            scores,
            *jax.value_and_grad(loss)(tuned),
        )

    encoded, logits, scores, loss, grads = compute(tuned)
    # Only rows of tokens compare: what a padded query attends to is arbitrary (the
    # reference fills its mask in another way) and nothing reads it.
    for got, want, ids in (
        (encoded, forward["encoded"], batch["encoder_input_tokens"]),
        (logits, forward["logits"], batch["decoder_target_tokens"]),
    ):
        valid = ids > 0
        assert 0 < valid.sum() < valid.size
        np.testing.assert_allclose(
            np.asarray(got)[valid],
            want[valid],
            rtol=0,
            atol=1e-5 * np.abs(want[valid]).max(),
        )
    np.testing.assert_allclose(loss, forward["loss"], rtol=1e-6)
    np.testing.assert_allclose(scores, forward["scores"], rtol=1e-5)
    want = forward["grad_prompt"]
    np.testing.assert_allclose(
        grads["prompts"]["prompt"], want, rtol=0, atol=1e-5 * np.abs(want).max()
    )


def test_three_steps_of_prompt_tuning(prompted, golden):
    model, params, batch, _ = prompted
    tuned, frozen = registry.split(
        jax.tree.map(jnp.asarray, params), registry.rules_of("prompt_tuning")
    )
    # The original code's recipe.
    tx = optimizers.adafactor(
        0.3, multiply_by_parameter_scale=False, weight_decay_rate=1e-5
    )
    step = jax.jit(make_train_step(model, tx))
    state = TrainState.create({"prompt": tuned}, tx, jax.random.key(0))
    final = load(golden / "prompt" / "state_after_step3.npz")
    for number, loss in zip(itertools.count(1), final["losses"]):
        state, metrics = step(state, frozen, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        want = np.load(golden / "prompt" / f"prompt_after_step{number}.npy")
        np.testing.assert_allclose(
            state.tuned["prompt"]["prompts"]["prompt"], want, rtol=0, atol=1e-5
        )
    assert int(state.step) == int(final["state/step"]) == 3
    moments = state.opt_state.inner_states["prompt"].inner_state[0]
    want = final["state/param_states/encoder/prompt/prompt/prompt/v"]
    np.testing.assert_allclose(
        moments.v["prompt"]["prompts"]["prompt"], want, rtol=0, atol=1e-5 * want.max()
    )


def test_prefixing_ids_is_concatenating_the_prompt_to_the_bit(prompted):
    model, params, batch, forward = prompted
    ids = batch["encoder_input_tokens"]

    def concatenated(module, text):
        """The textbook way: embed the text, put the prompt before it, encode."""
        rows = module.token_embedder(text, None, module.config.dtype)
        prompt = jnp.asarray(forward["prompt"])
        prompt = jnp.broadcast_to(prompt, (text.shape[0], *prompt.shape))
        valid = jnp.concatenate([jnp.ones(prompt.shape[:2], int), text], axis=1)
        x = jnp.concatenate([prompt, rows], axis=1)
        return x, module.encoder(x, layers.padding_mask(valid, valid))

    def prefixed(module, ids):
        return module._embed(ids), module.encode(ids, enable_dropout=False)

    run = lambda method, ids: jax.jit(
        lambda ids: model.network.apply({"params": params}, ids, method=method)
    )(ids)
    for got, want in zip(
        run(prefixed, ids), run(concatenated, ids[:, 5:]), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_the_prompts_axes_are_the_originals(golden, prompted):
    tree = json.loads((golden / "prompt" / "param_tree.json").read_text())
    box = prompted[0].abstract_params()["prompts"]["prompt"]
    assert isinstance(box, nn.LogicallyPartitioned)
    assert tree["encoder/prompt/prompt/prompt"] == {
        "shape": list(box.value.shape),
        "dtype": str(box.value.dtype),
        "logical_axes": list(box.names),
    }
