# SPDX-License-Identifier: Apache-2.0
"""Many devices compute what one computes, and T5X's rules are T5X's rules."""

import contextlib
import dataclasses
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from prompt_tuning import trees
from prompt_tuning.checkpoints import layout
from prompt_tuning.devices import sharding
from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.training import optimizers, step

STEPS = 5


@pytest.fixture(scope="module")
def prompted(tiny_config) -> Model:
    return Model(Transformer(tiny_config, (Prompt("task", 5),)))


@pytest.fixture(scope="module")
def batch(tiny_config) -> dict:
    """Eight rows that start with the prompt."""
    text = jax.random.randint(jax.random.key(1), (8, 10), 2, 256)
    text = jnp.where(jnp.arange(10)[None] < jnp.arange(3, 11)[:, None], text, 0)
    ids = jnp.tile(tiny_config.vocab_size + jnp.arange(5), (8, 1))
    targets = jax.random.randint(jax.random.key(2), (8, 6), 2, 256)
    targets = targets.at[1, 3:].set(0)
    shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return {
        "encoder_input_tokens": jnp.concatenate([ids, text], axis=1),
        "decoder_input_tokens": jnp.where(targets > 0, shifted, 0),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(jnp.float32),
    }


@pytest.fixture(scope="module")
def params(prompted):
    return jax.jit(prompted.init)(jax.random.key(0))


def tune(model: Model, params, batch: dict, mesh=None, dims: tuple[int, int] = (1, 1)):
    """Loss and prompt gradient of the first step, and the prompt after `STEPS`."""
    tx = optax.chain(
        optax.trace(decay=0.0),  # keeps the gradient in its state
        optimizers.adafactor(
            0.3, multiply_by_parameter_scale=False, weight_decay_rate=1e-5
        ),
    )
    rules = sharding.logical_axis_rules(*dims)
    context = contextlib.nullcontext()
    if mesh is not None:
        shardings = sharding.param_shardings(model.abstract_params(), mesh, rules)
        params = jax.device_put(params, shardings)
        if dims[1] == 2:
            # Every kernel is cut over all devices.
            kernel = params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
            assert math.prod(kernel.sharding.shard_shape(kernel.shape)) * 8 == (
                kernel.size
            )
        batch = sharding.shard_batch(batch, mesh)
        context = sharding.partitioned(mesh, rules)
    tuned, frozen = registry.split(params, registry.rules_of("prompt_tuning"))
    state = step.TrainState.create({"task": tuned}, tx, jax.random.key(3))
    with context:
        train_step = jax.jit(step.make_train_step(model, tx))
        state, metrics = train_step(state, frozen, batch)
        gradient = state.opt_state[0].trace["task"]["prompts"]["task"]
        for _ in range(STEPS - 1):
            state, _ = train_step(state, frozen, batch)
    return metrics["loss"], gradient, state.tuned["task"]["prompts"]["task"]


@pytest.fixture(scope="module")
def alone(prompted, params, batch):
    return tune(prompted, params, batch)


@pytest.mark.parametrize(
    ("partitions", "dims"),
    [
        pytest.param(1, (1, 1), id="8x1", marks=pytest.mark.slow),
        pytest.param(2, (1, 1), id="4x2"),
        pytest.param(4, (1, 1), id="2x4", marks=pytest.mark.slow),
        pytest.param(1, (1, 2), id="8x1-parameters-2d", marks=pytest.mark.slow),
        pytest.param(2, (1, 2), id="4x2-parameters-2d", marks=pytest.mark.slow),
        pytest.param(4, (1, 2), id="2x4-parameters-2d", marks=pytest.mark.slow),
        pytest.param(2, (2, 1), id="4x2-activations-2d", marks=pytest.mark.slow),
        pytest.param(2, (2, 2), id="4x2-both-2d", marks=pytest.mark.slow),
        pytest.param(4, (2, 2), id="2x4-both-2d"),
    ],
)
def test_a_mesh_computes_what_one_device_computes(
    prompted, params, batch, alone, partitions, dims
):
    mesh = sharding.make_mesh(partitions)
    assert dict(mesh.shape) == {"data": 8 // partitions, "model": partitions}
    loss, grad, prompt = tune(prompted, params, batch, mesh, dims)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    scale = float(jnp.max(jnp.abs(alone[1])))
    np.testing.assert_allclose(grad, alone[1], rtol=1e-5, atol=1e-5 * scale)
    # Adafactor divides by the root of a running mean, so that rounding of a gradient
    # near zero is worth more than elsewhere; the prompt itself moves by about 1.
    np.testing.assert_allclose(prompt, alone[2], rtol=1e-4, atol=1e-4)
    moved = np.asarray(prompt) - np.asarray(params["prompts"]["task"])
    assert np.max(np.abs(moved)) > 0.5


def test_activations_are_constrained_inside_the_context_only(prompted, params, batch):
    def constraints():
        # A fresh function each time, for a trace is kept by function.
        program = jax.jit(lambda params, batch: prompted.logits(params, batch))
        return program.lower(params, batch).as_text().count("sharding_constraint")

    assert constraints() == 0
    with sharding.partitioned(sharding.make_mesh(2), sharding.logical_axis_rules()):
        assert constraints() > 5


def test_rules_are_those_of_t5x(golden):
    expected = json.loads((golden / "logical_axis_rules.json").read_text())
    assert len(expected) == 4
    for key, rules in expected.items():
        activation, parameter = (int(part.split("=")[1]) for part in key.split(","))
        ours = sharding.logical_axis_rules(activation, parameter)
        assert ours[: len(rules)] == [tuple(rule) for rule in rules]
        assert ours[len(rules) :] == [("prompt", None), ("prompt_embed", None)]


def test_parameters_lie_where_t5x_puts_them(golden, prompted):
    expected = json.loads((golden / "mesh.json").read_text())["cpu_devices=4"]
    assert expected["mesh"] == {"data": 1, "model": 4}
    mesh = sharding.make_mesh(4, jax.devices()[:4])
    shardings = sharding.param_shardings(
        prompted.abstract_params(), mesh, sharding.logical_axis_rules()
    )
    shapes = trees.flatten(nn.meta.unbox(prompted.abstract_params()))
    found = {}
    for name, placed in trees.flatten(shardings).items():
        layers = layout.layer_names(name, shapes[name].shape)
        if layers is None:
            found[name] = placed.spec
        else:
            assert placed.spec[0] is None  # the axis of layers is not cut
            found.update(dict.fromkeys(layers, PartitionSpec(*placed.spec[1:])))
    assert found.pop("prompts/task") == PartitionSpec(None, None)
    assert found == {
        name: eval(spec, {"P": PartitionSpec})
        for name, spec in expected["specs"].items()
    }


def test_batches_are_spread_over_data(batch):
    mesh = sharding.make_mesh(2)
    placed = sharding.shard_batch(batch, mesh)
    for name, rows in placed.items():
        assert rows.sharding.shard_shape(rows.shape)[0] == 2
        np.testing.assert_array_equal(rows, batch[name])
    odd = {"encoder_input_tokens": np.ones((6, 3), np.int32)}
    with pytest.raises(UserError, match="6 rows .* 4 devices; .*BATCH_SIZE to 4 or 8"):
        sharding.shard_batch(odd, mesh)
    few = {"encoder_input_tokens": np.ones((3, 3), np.int32)}
    with pytest.raises(UserError, match="BATCH_SIZE to 4$"):
        sharding.shard_batch(few, mesh)


@pytest.mark.parametrize(
    ("partitions", "devices", "choice"),
    [(3, 8, "2 or 4"), (0, 8, "1"), (16, 8, "8"), (5, 7, "1 or 7")],
)
def test_partitions_that_do_not_divide_name_the_nearest(partitions, devices, choice):
    with pytest.raises(UserError, match=f"NUM_PARTITIONS to {choice}$"):
        sharding.make_mesh(partitions, jax.devices()[:devices])


def test_a_model_that_does_not_divide_is_refused_before_it_is_allocated():
    config = T5Config(
        vocab_size=250,
        emb_dim=32,
        num_heads=6,
        num_encoder_layers=2,
        num_decoder_layers=2,
        head_dim=8,
        mlp_dim=64,
    )
    with pytest.raises(UserError) as caught:
        sharding.param_shardings(
            Model(Transformer(config)).abstract_params(),
            sharding.make_mesh(4),
            sharding.logical_axis_rules(),
        )
    message = str(caught.value)
    assert "vocab 250 over 4 (model)" in message
    assert "heads 6 over 4 (model)" in message
    assert "mlp" not in message
    assert message.endswith("set NUM_PARTITIONS to 2")


def test_a_width_that_does_not_divide_over_data_names_what_does(prompted):
    config = dataclasses.replace(prompted.network.config, emb_dim=36)
    rules = sharding.logical_axis_rules(parameter_partitioning_dims=2)
    shapes = Model(Transformer(config)).abstract_params()
    with pytest.raises(
        UserError, match=r"embed 36 over 8 \(data\); .*PARTITIONS to 2$"
    ):
        sharding.param_shardings(shapes, sharding.make_mesh(1), rules)
    config = dataclasses.replace(config, emb_dim=33)
    shapes = Model(Transformer(config)).abstract_params()
    with pytest.raises(UserError, match="set PARAMETER_PARTITIONING_DIMS to 1$"):
        sharding.param_shardings(shapes, sharding.make_mesh(2), rules)


def test_unknown_partitioning_dims_are_refused():
    with pytest.raises(UserError, match="parameter_partitioning_dims=3"):
        sharding.logical_axis_rules(1, 3)


def test_rows_that_do_not_divide_are_filled_up():
    mesh = sharding.make_mesh(2)
    rows = np.arange(1, 7, dtype=np.int32).reshape(6, 1)
    spread = sharding.spread_rows(rows, mesh)
    assert spread.shape == (8, 1)
    assert spread.sharding.shard_shape(spread.shape) == (2, 1)
    np.testing.assert_array_equal(spread[:6], rows)
    assert not np.any(spread[6:])


def test_what_is_replicated_is_whole_everywhere_and_the_same():
    mesh = sharding.make_mesh(2)
    tree = {"key": jax.random.key(3), "prompt": np.ones((2, 3), np.float32)}
    placed = sharding.replicate(tree, mesh)
    for leaf in placed.values():
        assert leaf.is_fully_replicated and len(leaf.sharding.device_set) == 8
    assert jax.random.bits(placed["key"]) == jax.random.bits(tree["key"])
    np.testing.assert_array_equal(placed["prompt"], tree["prompt"])
    again = sharding.replicate(placed, mesh)
    assert again["prompt"] is placed["prompt"]
