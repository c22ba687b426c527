# SPDX-License-Identifier: Apache-2.0
"""int8 weights: what rounding loses, and that nothing but rounding happens."""

import dataclasses
import gc
import json
import re
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from prompt_tuning import cli, decoding, trees
from prompt_tuning.checkpoints import base_models, layout, loading, model_file, source
from prompt_tuning.commands import demo
from prompt_tuning.devices import sharding
from prompt_tuning.devices.partitioner import Partitioner
from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.network import layers, quantization
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.training import optimizers, step

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def restored(weights, scale):
    """The kernel that a quantised one stands for."""
    return np.asarray(weights, np.float32) * np.asarray(scale)[..., None, :]


@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5)], ids=["one", "stacked"])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
@pytest.mark.parametrize("library", [np, jnp], ids=["numpy", "jax"])
def test_a_weight_moves_by_half_a_scale_at_most(shape, dtype, library):
    kernel = library.asarray((random(*shape) * 10.0 ** np.arange(5)).astype(dtype))
    weights, scale = quantization.quantize(kernel)
    assert isinstance(weights, type(kernel)) and isinstance(scale, type(kernel))
    assert weights.dtype == np.int8 and weights.shape == shape
    assert scale.dtype == np.float32 and scale.shape == (*shape[:-2], shape[-1])
    moved = np.abs(restored(weights, scale) - np.asarray(kernel, np.float32))
    assert np.all(moved <= 0.5001 * np.asarray(scale)[..., None, :])
    # Every channel uses the whole range, and -128 is not in it.
    assert np.all(np.max(np.abs(np.asarray(weights, int)), axis=-2) == 127)


@pytest.mark.parametrize("value", [0.0, 1e-42], ids=["zero", "subnormal"])
def test_a_channel_of_zeros_stays_zero(value):
    kernel = random(6, 5)
    kernel[:, 2] = value
    weights, scale = quantization.quantize(kernel)
    assert np.all(weights[:, 2] == 0) and np.all(np.isfinite(scale))
    assert np.all(restored(weights, scale)[:, 2] == 0)


def test_a_damaged_weight_does_not_become_a_sound_one():
    kernel = random(6, 5)
    kernel[1, 2] = np.nan
    with np.errstate(invalid="ignore"):
        weights, scale = quantization.quantize(kernel)
    damaged = np.isnan(restored(weights, scale)).any(axis=0)
    np.testing.assert_array_equal(damaged, np.arange(5) == 2)


def test_kernels_alone_become_int8_beside_scales_with_their_axes(tiny_model):
    boxed = tiny_model.abstract_params()
    before = trees.flatten(boxed)
    after = trees.flatten(quantization.quantize_abstract(boxed))
    kernels = [name for name in before if name.endswith("/kernel")]
    # Three attentions of four, two MLPs of three, and the logits.
    assert len(kernels) == 12 + 6 + 1 and set(before) < set(after)
    for name, box in before.items():
        if name not in kernels:
            assert after[name] == box
            continue
        assert (after[name].value.dtype, after[name].names) == (np.int8, box.names)
        assert after[name].value.shape == box.value.shape
    assert {name for name in after if name not in before} == {
        f"{name}_scale" for name in kernels
    }
    scale = after["encoder/layers/mlp/wi_0/kernel_scale"]
    assert scale.names == ("layers", "mlp")
    assert scale.value == jax.ShapeDtypeStruct((2, 64), np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_multiplies_its_outputs_by_the_scale(dtype):
    weights, scale = quantization.quantize(random(32, 16))
    x = jnp.asarray(random(2, 3, 32, seed=1), dtype)
    dense = layers.Dense(16, ("embed", "mlp"), dtype)

    def outputs(x, params):
        y = dense.apply({"params": params}, x)
        return jnp.sum(y.astype(jnp.float32) ** 2), y

    both = jax.value_and_grad(outputs, has_aux=True)
    (_, y), grad = both(x, {"kernel": weights, "kernel_scale": scale})
    (_, expected), expected_grad = both(x, {"kernel": restored(weights, scale)})
    assert y.dtype == grad.dtype == jnp.dtype(dtype)
    near = 1e-5 if dtype == "float32" else 0.02
    for found, wanted in ((y, expected), (grad, expected_grad)):
        found, wanted = (np.asarray(z, np.float32) for z in (found, wanted))
        largest = float(np.max(np.abs(wanted)))
        np.testing.assert_allclose(found, wanted, rtol=near, atol=near * largest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_of_int8_loses_the_rounding_of_its_rows_alone(dtype):
    """Rows of any size, each as it is alone; one of zeros gives zeros."""
    weights, scale = quantization.quantize(jnp.asarray(random(32, 16)))
    kernel = restored(weights, scale)
    sizes = np.float32([1, 1e-20, 1e20, 0])[:, None]
    rows = jnp.asarray(random(4, 32, seed=1) * sizes, dtype)
    found = quantization.product(rows, weights, scale)
    assert found.dtype == jnp.dtype(dtype)
    exact = np.asarray(rows, np.float32) @ kernel
    largest = np.max(np.abs(np.asarray(rows, np.float32)), axis=-1, keepdims=True)
    # Half a step of each input, and what the result's own dtype rounds.
    most = 0.5 * largest / 127 * np.abs(kernel).sum(0)
    most += np.abs(exact) * float(jnp.finfo(dtype).eps)
    moved = np.abs(np.asarray(found, np.float32) - exact)
    assert np.all(moved <= 1.001 * most) and np.any(moved[0] > 0)
    for number in range(4):
        alone = quantization.product(rows[number : number + 1], weights, scale)
        np.testing.assert_array_equal(alone[0], found[number])


def test_the_gradient_of_a_product_of_int8_is_that_of_the_whole_rows():
    weights, scale = quantization.quantize(jnp.asarray(random(32, 16)))
    rows, slope = jnp.asarray(random(4, 32, seed=1)), jnp.asarray(random(4, 16, seed=2))
    _, backward = jax.vjp(lambda x: quantization.product(x, weights, scale), rows)
    np.testing.assert_allclose(
        backward(slope)[0], slope @ restored(weights, scale).T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("tied", [False, True], ids=["t5_1_1", "t5_1_0"])
def test_with_products_of_int8_no_kernel_becomes_a_float(
    quantized, tiny_config, tiny_batch, tied
):
    """In encoder, decoder and output layer, ranking as well as decoding."""
    _, params = quantized
    config = dataclasses.replace(
        tiny_config, int8_products=True, logits_via_embedding=tied
    )
    model, tokens = Model(Transformer(config)), tiny_batch["encoder_input_tokens"]
    labels = jnp.ones((2, 3), jnp.int32)
    floated = re.compile(r"stablehlo\.convert .*xi8>\) -> tensor<.*x(f32|bf16)>")
    for program in (
        lambda params: model.rank(params, tokens, labels),
        lambda params: model.predict(params, tokens, decoding.Greedy(3)),
    ):
        text = jax.jit(program).lower(params).as_text()
        assert not floated.search(text)
        products = re.findall(r"dot_general .*xi8>, tensor<.*xi8>\) -> .*xi32>", text)
        assert len(products) >= 10


def test_products_of_int8_need_int8_kernels(tiny_config, quantized):
    config = dataclasses.replace(tiny_config, int8_products=True)
    with pytest.raises(UserError, match="need int8 kernels: give FROZEN_DTYPE='int8'"):
        base_models.load(config, quantized[0])


def test_the_embedded_model_answers_alike_with_products_of_int8():
    """Of 24 rankings of labels, all but close calls."""
    loaded = base_models.load(demo.CONFIG, demo.CHECKPOINT, frozen_dtype="int8")
    rounded = dataclasses.replace(loaded.config, int8_products=True)
    words = loaded.vocabulary.encode(
        "a gorgeous , witty , dull , tedious mess . it was"
    )
    drawn = np.random.default_rng(0).choice(words, (24, 12)).astype(np.int32)
    pieces = [loaded.vocabulary.encode(label) for label in ("negative", "positive")]
    labels = np.zeros((2, max(map(len, pieces))), np.int32)
    for row, ids in zip(labels, pieces):
        row[: len(ids)] = ids
    first, second = (
        np.asarray(
            jax.jit(Model(Transformer(config)).rank)(loaded.params, drawn, labels)
        )
        for config in (loaded.config, rounded)
    )
    margin = first[:, 1] - first[:, 0]
    moved = np.abs(second[:, 1] - second[:, 0] - margin)
    assert 0 < moved.max() < 0.5 and moved.mean() < 0.15, (moved.max(), moved.mean())
    clear = np.abs(margin) > 0.5
    assert clear.sum() >= 8
    np.testing.assert_array_equal(second.argmax(1)[clear], first.argmax(1)[clear])


@pytest.fixture(scope="module")
def quantized(tiny_model, tiny_params, tmp_path_factory):
    """The tiny model's folder and its weights loaded as int8 on one device."""
    folder = tmp_path_factory.mktemp("quantized")
    model_file.save_model(folder, tiny_params, {})
    abstract = quantization.quantize_abstract(tiny_model.abstract_params())
    opened = model_file.open_checkpoint(folder)
    return folder, loading.load_params(opened, abstract, "float32")


def test_loading_quantises_layer_by_layer(quantized, tiny_params):
    _, params = quantized
    loaded, whole = trees.flatten(params), trees.flatten(tiny_params)
    for name, leaf in whole.items():
        if name.endswith("/kernel"):
            weights, scale = quantization.quantize(np.asarray(leaf))
            np.testing.assert_array_equal(loaded.pop(name), weights)
            np.testing.assert_array_equal(loaded.pop(f"{name}_scale"), scale)
        else:
            np.testing.assert_array_equal(loaded.pop(name), leaf)
    assert not loaded


@pytest.mark.parametrize("tied", [False, True], ids=["t5_1_1", "t5_1_0"])
def test_the_network_computes_what_the_restored_kernels_compute(
    tiny_config, tiny_batch, tied
):
    config = dataclasses.replace(tiny_config, logits_via_embedding=tied)
    model = Model(Transformer(config))
    flat = trees.flatten(jax.jit(model.init)(jax.random.key(0)))
    int8, floating = dict(flat), dict(flat)
    for name in flat:
        if name.endswith("/kernel"):
            int8[name], int8[f"{name}_scale"] = quantization.quantize(flat[name])
            floating[name] = restored(int8[name], int8[f"{name}_scale"])
    logits = jax.jit(model.logits)
    found = logits(trees.unflatten(int8), tiny_batch)
    np.testing.assert_allclose(
        found, logits(trees.unflatten(floating), tiny_batch), rtol=1e-4, atol=1e-4
    )
    # And these are not the unquantised ones.
    assert not np.allclose(found, logits(trees.unflatten(flat), tiny_batch), atol=1e-4)


def test_eight_devices_hold_and_compute_what_one_does(
    quantized, tiny_config, tiny_model, tiny_batch
):
    folder, alone = quantized
    whole = base_models.load(tiny_config, folder)
    spread = base_models.load(
        tiny_config,
        folder,
        frozen_dtype="int8",
        partitioner=Partitioner(num_partitions=4),
    )
    flat = trees.flatten(spread.params)
    assert spread.fingerprint == whole.fingerprint
    assert spread.fingerprint == trees.fingerprint(whole.params, jnp.bfloat16)
    for name, leaf in trees.flatten(alone).items():
        np.testing.assert_array_equal(flat[name], leaf)
        assert flat[name].dtype == leaf.dtype
    for name, shape in {
        "encoder/layers/mlp/wi_0/kernel": (2, 32, 16),
        "encoder/layers/mlp/wi_0/kernel_scale": (2, 16),
        "encoder/layers/mlp/wo/kernel": (2, 16, 32),
        "encoder/layers/mlp/wo/kernel_scale": (2, 32),
        "decoder/logits_dense/kernel_scale": (64,),
    }.items():
        assert flat[name].sharding.shard_shape(flat[name].shape) == shape, name
    batch = {name: jnp.tile(rows, (2, 1))[:4] for name, rows in tiny_batch.items()}
    with sharding.partitioned(spread.mesh, sharding.logical_axis_rules()):
        placed = sharding.shard_batch(batch, spread.mesh)
        found = jax.jit(tiny_model.logits)(spread.params, placed)
    expected = jax.jit(tiny_model.logits)(alone, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_prompt_is_tuned_on_int8_weights_as_on_the_restored_ones(
    quantized, tiny_config, tiny_batch
):
    _, int8 = quantized
    flat = trees.flatten(int8)
    floating = {
        name: restored(leaf, flat[f"{name}_scale"]) if leaf.dtype == np.int8 else leaf
        for name, leaf in flat.items()
        if not name.endswith("_scale")
    }
    prompts = {"prompts": {"task": jnp.asarray(random(3, 32))}}
    ids = np.broadcast_to(np.arange(256, 259), (3, 3))
    tokens = jnp.concatenate([ids, tiny_batch["encoder_input_tokens"]], axis=1)
    batch = {**tiny_batch, "encoder_input_tokens": tokens}
    model = Model(Transformer(tiny_config, (Prompt("task", 3),)))
    tx = optimizers.adafactor(0.3, multiply_by_parameter_scale=False)
    tuned = []
    for weights in (int8, trees.unflatten(floating)):
        params = trees.merge(weights, prompts)
        moving, frozen = registry.split(params, registry.rules_of("prompt_tuning"))
        before = trees.fingerprint(frozen)
        state = step.TrainState.create({"task": moving}, tx, jax.random.key(0))
        train_step = jax.jit(step.make_train_step(model, tx))
        for _ in range(3):
            state, _ = train_step(state, frozen, batch)
        assert trees.fingerprint(frozen) == before
        tuned.append(np.asarray(state.tuned["task"]["prompts"]["task"]))
    np.testing.assert_allclose(*tuned, rtol=1e-4, atol=1e-4)
    assert np.max(np.abs(tuned[0] - prompts["prompts"]["task"])) > 0.3


def test_loading_holds_a_few_tensors_beside_the_leaf(tiny_config):
    config = dataclasses.replace(tiny_config, num_encoder_layers=40)
    abstract = quantization.quantize_abstract(
        Model(Transformer(config)).abstract_params()
    )
    shapes = layout.shapes(
        {
            name: leaf
            for name, leaf in trees.flatten(nn.meta.unbox(abstract)).items()
            if not name.endswith("_scale")
        }
    )
    alive, most = [], 0

    def read(name):
        nonlocal most
        tensor = random(*shapes[name])
        alive.append(weakref.ref(tensor))
        most = max(most, sum(each() is not None for each in alive))
        return tensor

    specs = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in shapes.items()}
    made = source.Source("made", "memory", specs, read)
    gc.collect()
    loading.load_params(made, abstract, "float32", digest=trees.Digest())
    assert len(alive) == len(shapes) and most <= 2 * loading.READERS


def test_the_table_of_an_int8_model_follows_auto(tiny_checkpoint):
    loaded = base_models.load(
        T5Config(8192, 16, 2, 1, 1, 8, 32), tiny_checkpoint, frozen_dtype="int8"
    )
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)}
    assert dtypes == {"int8", "float32"} and loaded.table.dtype == jnp.float32
    assert loaded.config.dtype == "float32"


def test_int8_is_for_frozen_weights_alone():
    assert registry.weights_dtype("prompt_tuning", "int8") == "int8"
    assert registry.weights_dtype("prompt_tuning", "auto") == "auto"
    assert registry.weights_dtype("lora", "int8") == "int8"
    assert registry.weights_dtype("model_tuning", "bfloat16") == "float32"
    assert registry.weights_dtype("norm_tuning", "bfloat16") == "float32"
    with pytest.raises(UserError, match="'model_tuning' tunes .* int8 .*'auto'$"):
        registry.weights_dtype("model_tuning", "int8")
    with pytest.raises(UserError, match="frozen weights alone .FROZEN_DTYPE.$"):
        base_models.resolve_dtype("int8")


def test_a_prompt_of_int8_weights_fits_the_floating_ones(
    tiny_checkpoint, reviews, tmp_path
):
    """`loop` and `eval` on the command line, on a mesh of eight devices."""

    def command(name, *files, **values):
        values |= {
            "MIXTURE_OR_TASK_NAME": "quantization_reviews",
            "TASK_FILES": reviews,
            "TEMPLATE": "{sentence}",
            "LABEL_NAMES": ["good", "bad"],
            "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4},
            "INITIAL_CHECKPOINT_PATH": str(tiny_checkpoint),
            "EVAL_BATCH_SIZE": 8,
        }
        words = [f"--gin_file={file}" for file in files]
        words += [f"--gin.{key}={value}" for key, value in values.items()]
        assert cli.main([name, *words]) == 0

    files = ("models/tiny.gin", "tasks/local_file.gin")
    command(
        "train",
        *files,
        "methods/prompt_tuning.gin",
        MODEL_DIR=tmp_path,
        FROZEN_DTYPE="'int8'",
        NUM_PARTITIONS=2,
        TRAIN_STEPS=2,
        BATCH_SIZE=8,
        PROMPT_LENGTH=3,
    )
    # Without --force: the card names the model, not the dtype that it was kept in.
    prompt = tmp_path / "prompt.safetensors"
    command("eval", *files, PROMPT_FILE=prompt, EVAL_OUTPUT_DIR=tmp_path / "eval")
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["examples"] == 4
