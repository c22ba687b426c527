# SPDX-License-Identifier: Apache-2.0
"""T5X runs our network: its numbers, its trainer, its commands.

Everything but the refusal to go without it needs T5X, which is installed from git and
skipped where it does not import (docs/t5x.md).
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from flax.linen import partitioning as flax_partitioning
from jax.sharding import Mesh

from prompt_tuning import trees
from prompt_tuning.checkpoints import prompt_formats, t5x_native
from prompt_tuning.data import feature_converter
from prompt_tuning.errors import UserError
from prompt_tuning.methods import registry
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.training import optimizers, prompt_starts
from prompt_tuning.training.step import TrainState, make_train_step

ROOT = pathlib.Path(__file__).parents[1]
SIZES = (256, 32, 4, 2, 2, 8, 64)
VARIANTS = {
    "t5_1_1": {"mlp_activations": ("gelu", "linear"), "logits_via_embedding": False},
    "t5_1_0": {"mlp_activations": ("relu",), "logits_via_embedding": True},
}
LENGTH = 5
PROMPT = "encoder/prompt/prompt/prompt"
# The original project's recipe.
RECIPE = {"multiply_by_parameter_scale": False, "weight_decay_rate": 1e-5}


@pytest.fixture(scope="module")
def t5x():
    """The adapter and the modules of T5X that it is tried with."""
    pytest.importorskip("t5x")
    names = ("adafactor", "decoding", "models", "optimizers", "partitioning")
    return types.SimpleNamespace(
        adapter=importlib.import_module("prompt_tuning.t5x_adapter"),
        **{
            name: importlib.import_module(f"t5x.{name}")
            for name in (*names, "trainer", "utils")
        },
    )


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, t5x, golden):
    """T5X's model around our network, its parameters and its golden folder."""
    folder = golden / request.param
    module = t5x.adapter.Transformer(T5Config(*SIZES, **VARIANTS[request.param]))
    return model_around(t5x, module), load(folder / "params.npz"), folder


@pytest.fixture(scope="module")
def prompted(t5x, golden):
    """The same with the golden prompt before the inputs."""
    module = t5x.adapter.Transformer(T5Config(*SIZES), LENGTH)
    optimizer = t5x.optimizers.MultiOptimizer(
        [
            (
                t5x.adapter.tuned_params(),
                t5x.adafactor.Adafactor(factored=False, **RECIPE),
            )
        ]
    )
    forward = load(golden / "prompt" / "forward.npz")
    params = load(golden / "t5_1_1" / "params.npz") | {PROMPT: forward["prompt"]}
    batch = load(golden / "t5_1_1" / "inputs.npz")
    text = batch["encoder_input_tokens"]
    ids = np.broadcast_to(np.arange(256, 256 + LENGTH, dtype=text.dtype), (3, LENGTH))
    batch["encoder_input_tokens"] = np.concatenate([ids, text], axis=1)
    return model_around(t5x, module, optimizer), params, batch, forward


def model_around(t5x, module, optimizer=None):
    vocabulary = seqio.ByteVocabulary()
    return t5x.models.EncoderDecoderModel(
        module, vocabulary, vocabulary, optimizer, z_loss=1e-4
    )


def load(path):
    with np.load(path) as file:
        return dict(file)


def initial_variables(model, batch):
    return model.get_initial_variables(
        jax.random.PRNGKey(0),
        {name: x.shape for name, x in batch.items()},
        {name: x.dtype for name, x in batch.items()},
    )


def described(variables):
    """Shape, dtype and logical axes of every parameter, as the golden files have it."""
    axes = flax_partitioning.get_axis_names(variables["params_axes"])
    axes = trees.flatten(flax.core.unfreeze(axes))
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "logical_axes": list(axes[name]),
        }
        for name, leaf in trees.flatten(variables["params"]).items()
    }


def test_without_t5x_the_import_says_what_to_do():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.modules['t5x'] = None; import prompt_tuning.t5x_adapter",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError") and "docs/t5x.md" in last


def test_the_tree_and_its_axes_are_those_of_t5x(variant):
    model, _, folder = variant
    found = described(initial_variables(model, load(folder / "inputs.npz")))
    assert found == json.loads((folder / "param_tree.json").read_text())


def test_the_prompt_has_its_original_name_and_axes(prompted, golden):
    model, _, batch, _ = prompted
    found = described(initial_variables(model, batch))
    assert found == json.loads((golden / "prompt" / "param_tree.json").read_text())


def test_stacking_is_undone(t5x, prompted):
    _, params, _, _ = prompted
    stacked = t5x.adapter.stack(trees.unflatten(params))
    assert stacked["prompts"]["prompt"].shape == (LENGTH, 32)
    assert stacked["encoder"]["layers"]["mlp"]["wo"]["kernel"].shape == (2, 64, 32)
    back = trees.flatten(t5x.adapter.unstack(stacked))
    assert back.keys() == params.keys()
    for name, leaf in params.items():
        np.testing.assert_array_equal(back[name], leaf)


def test_logits_loss_and_scores(variant):
    model, params, folder = variant
    batch, want = load(folder / "inputs.npz"), load(folder / "forward.npz")

    @jax.jit
    def compute(params):
        loss, _ = model.loss_fn(params, batch, None)
        return (
            model._compute_logits(params, batch),
            loss,
            model.score_batch(params, batch),
        )

    logits, loss, scores = compute(trees.unflatten(params))
    bound = 1e-5 * np.abs(want["logits"]).max()
    np.testing.assert_allclose(logits, want["logits"], rtol=0, atol=bound)
    np.testing.assert_allclose(loss, want["loss"], rtol=1e-6)
    np.testing.assert_allclose(scores, want["scores"], rtol=1e-5)


def test_greedy_and_beam_search(t5x, variant):
    model, params, folder = variant
    params, want = trees.unflatten(params), load(folder / "decode.npz")
    beam = jax.jit(
        lambda params: model.predict_batch_with_aux(
            params, want, num_decodes=4, return_all_decodes=True
        )
    )
    tokens, aux = beam(params)
    np.testing.assert_array_equal(tokens, want["beam4_tokens"])
    np.testing.assert_allclose(aux["scores"], want["beam4_scores"], rtol=1e-5)
    sampler = t5x.models.EncoderDecoderModel(
        model.module,
        model.input_vocabulary,
        model.output_vocabulary,
        None,
        decode_fn=t5x.decoding.temperature_sample,
    )
    tokens, _ = sampler.predict_batch_with_aux(
        params, want, decoder_params={"temperature": 0.0}
    )
    np.testing.assert_array_equal(tokens, want["greedy_tokens"])


def test_the_prompted_model(prompted):
    model, params, batch, want = prompted
    params = trees.unflatten(params)
    logits = jax.jit(model._compute_logits)(params, batch)
    valid = batch["decoder_target_tokens"] > 0
    bound = 1e-5 * np.abs(want["logits"][valid]).max()
    np.testing.assert_allclose(
        np.asarray(logits)[valid], want["logits"][valid], rtol=0, atol=bound
    )
    rows = batch | {"decoder_input_tokens": np.zeros((3, 8), np.int32)}
    tokens, aux = model.predict_batch_with_aux(
        params, rows, num_decodes=4, return_all_decodes=True
    )
    np.testing.assert_array_equal(tokens, want["beam4_tokens"])
    np.testing.assert_allclose(aux["scores"], want["beam4_scores"], rtol=1e-5)


def test_dropout_needs_a_key_and_changes_the_loss(t5x, golden):
    config = T5Config(*SIZES, dropout_rate=0.5)
    model = model_around(t5x, t5x.adapter.Transformer(config))
    params = trees.unflatten(load(golden / "t5_1_1" / "params.npz"))
    batch = load(golden / "t5_1_1" / "inputs.npz")
    losses = [
        float(model.loss_fn(params, batch, key)[0])
        for key in (None, jax.random.PRNGKey(0), jax.random.PRNGKey(1))
    ]
    assert len(set(losses)) == 3


def test_the_mask_is_that_of_our_methods(t5x, prompted):
    _, params, _, _ = prompted
    for method in ("prompt_tuning", "model_tuning"):
        rules = registry.rules_of(method)
        ours = t5x.adapter.stack(trees.unflatten(params))
        tuned, _ = registry.split(ours, rules)
        names = trees.unflatten({name: name for name in params})
        found = set(t5x.adapter.tuned_params(method).iterate(names))
        assert found == set(trees.flatten(t5x.adapter.unstack(tuned)))
        assert PROMPT in found
    with pytest.raises(UserError, match="no method is called .*model_tuning"):
        t5x.adapter.tuned_params("absent")
    with pytest.raises(UserError, match="no leaves for residual_prompt"):
        t5x.adapter.tuned_params("residual_prompt")


@pytest.fixture(scope="module", params=[1, 4])
def trained(request, t5x, prompted):
    """T5X's trainer after each of three steps on 1 or 4 devices."""
    model, params, batch, _ = prompted
    rules = t5x.partitioning.standard_logical_axis_rules(
        additional_rules=(("prompt", None), ("prompt_embed", None))
    )
    partitioner = t5x.partitioning.PjitPartitioner(1, logical_axis_rules=rules)
    devices = np.array(jax.devices()[: request.param]).reshape(1, -1)
    partitioner.mesh = Mesh(devices, ("data", "model"))
    initializer = t5x.utils.TrainStateInitializer(
        model.optimizer_def,
        model.get_initial_variables,
        {name: x.shape for name, x in batch.items()},
        partitioner,
        {name: x.dtype for name, x in batch.items()},
    )
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    state = state.replace_params(flax.core.freeze(trees.unflatten(params)))
    states = []
    with t5x.trainer.Trainer(
        model,
        state,
        partitioner,
        (),
        None,
        initializer.train_state_axes,
        jax.random.PRNGKey(0),
        learning_rate_fn=lambda step: 0.3,
        num_microbatches=None,
    ) as trainer:
        for _ in range(3):
            trainer.train(iter([batch]), 1)
            states.append(jax.device_get(trainer.train_state.state_dict()))
    return [trees.flatten(state) for state in states]


def test_three_steps_of_t5x_move_the_prompt_as_the_original_did(trained, golden):
    for number, state in enumerate(trained, 1):
        want = np.load(golden / "prompt" / f"prompt_after_step{number}.npy")
        np.testing.assert_allclose(state[f"target/{PROMPT}"], want, rtol=0, atol=1e-5)
    final = load(golden / "prompt" / "state_after_step3.npz")
    want = final[f"state/param_states/{PROMPT}/v"]
    np.testing.assert_allclose(
        trained[-1][f"state/param_states/{PROMPT}/v"],
        want,
        rtol=0,
        atol=1e-5 * want.max(),
    )


def test_three_steps_of_t5x_move_nothing_else(trained, prompted, golden):
    _, params, _, _ = prompted
    for name, before in params.items():
        after = trained[-1][f"target/{name}"]
        assert np.array_equal(before, after) == (name != PROMPT), name
    tree = json.loads((golden / "prompt" / "train_state_tree.json").read_text())
    held = {name for name, leaf in trained[-1].items() if leaf is not None}
    assert held == {name for name, leaf in tree.items() if "shape" in (leaf or {})}


def test_three_steps_of_t5x_are_three_steps_of_ours(trained, t5x, prompted):
    model, params, batch, _ = prompted
    ours = t5x.adapter.stack(trees.unflatten(params))
    tuned, frozen = registry.split(ours, registry.rules_of("prompt_tuning"))
    tx = optimizers.adafactor(0.3, **RECIPE)
    step = jax.jit(make_train_step(Model(model.module.wrapped), tx))
    state = TrainState.create({"prompt": tuned}, tx, jax.random.key(0))
    for theirs in trained:
        state, _ = step(state, frozen, batch)
        np.testing.assert_allclose(
            state.tuned["prompt"]["prompts"]["prompt"],
            theirs[f"target/{PROMPT}"],
            rtol=0,
            # A step is 0.3 of a gradient over its own size: where that is near zero,
            # its rounding shows (3e-6 in one of the 160 elements).
            atol=5e-6,
        )


def abstract_state(params, **changed):
    """A state as T5X describes it, with shapes for arrays."""
    shapes = {name: np.shape(leaf) for name, leaf in params.items()} | changed
    flat = {
        f"target/{name}": jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in shapes.items()
        if shape is not None
    }
    flat["state/step"] = jax.ShapeDtypeStruct((), np.int32)
    flat[f"state/param_states/{PROMPT}/v"] = jax.ShapeDtypeStruct((LENGTH, 32), "f4")
    return trees.unflatten(flat)


def test_only_the_prompt_may_start_anew(t5x, prompted):
    _, params, _, _ = prompted
    wanted = abstract_state(params)
    bare = abstract_state(params, **{PROMPT: None})
    found = trees.flatten(t5x.adapter.restored(bare, wanted))
    assert set(found) == {*(f"target/{n}" for n in params if n != PROMPT), "state/step"}
    # A prompt that a checkpoint has is not used unless it is asked for.
    assert set(trees.flatten(t5x.adapter.restored(wanted, wanted))) == set(found)
    whole = t5x.adapter.restored(wanted, wanted, new_prompt=False)
    assert trees.flatten(whole) == trees.flatten(wanted)
    # A run's own checkpoint is none of our business.
    assert t5x.adapter.restored(bare, wanted, is_resuming=True) == bare
    with pytest.raises(UserError, match=f"missing: {PROMPT};"):
        t5x.adapter.restored(bare, wanted, new_prompt=False)


def test_a_checkpoint_that_does_not_fit_is_refused_with_all_that_is_wrong(
    t5x, prompted
):
    _, params, _, _ = prompted
    bad = abstract_state(
        params,
        **{
            "encoder/layers_0/mlp/wo/kernel": None,
            "encoder/layers_1/mlp/wo/kernel": None,
            "encoder/layers_0/mlp/wi/kernel": (32, 64),
            "token_embedder/embedding": (256, 64),
        },
    )
    with pytest.raises(UserError) as caught:
        t5x.adapter.restored(bad, abstract_state(params))
    message = str(caught.value)
    assert "missing: encoder/layers_{0-1}/mlp/wo/kernel;" in message
    assert "unused: encoder/layers_{0}/mlp/wi/kernel;" in message
    assert "of another shape: token_embedder/embedding;" in message


def test_the_converter_writes_virtual_ids(t5x):
    config = T5Config(*SIZES)
    examples = seqio.utils.tf.data.Dataset.from_tensors(
        {"inputs": [10, 11, 1], "targets": [12, 1]}
    )
    lengths = {"inputs": 4, "targets": 3}
    options = {"config": config, "task_feature_lengths": lengths}
    converter = t5x.adapter.feature_converter(
        pack=False, **options, prompt_length=2, placement="append"
    )
    assert isinstance(converter, feature_converter.PromptFeatureConverter)
    (row,) = converter(examples, lengths).as_numpy_iterator()
    assert row["encoder_input_tokens"].tolist() == [10, 11, 1, 256, 257, 0]
    plain = t5x.adapter.feature_converter(pack=False, **options, prompt_length=0)
    (row,) = plain(examples, {"inputs": 9, "targets": 3}).as_numpy_iterator()
    assert row["encoder_input_tokens"].tolist() == [10, 11, 1, 0]
    with pytest.raises(UserError, match="use_custom_packing_ops = False"):
        t5x.adapter.feature_converter(True, True, **options, prompt_length=2)


def test_the_prompt_starts_from_the_checkpoints_table(t5x, t5x_checkpoints, golden):
    path = t5x_checkpoints / "t5x_native" / "t5_1_1" / "checkpoint_2"
    table = load(golden / "t5_1_1" / "adafactor_step2.npz")[
        "target/token_embedder/embedding"
    ]
    start = t5x.adapter.initial_prompt(
        prompt_starts.text_init("ab"), str(path), seqio.ByteVocabulary(), seed=3
    )
    module = t5x.adapter.Transformer(T5Config(*SIZES), LENGTH, start)
    ones = jnp.ones((1, 2), jnp.int32)
    init = jax.jit(lambda key: module.init(key, ones, ones, ones))
    prompt = init(jax.random.PRNGKey(0))["params"]["encoder"]["prompt"]["prompt"]
    prompt = np.asarray(prompt["prompt"])
    np.testing.assert_array_equal(prompt[:2], table[[ord("a") + 3, ord("b") + 3]])
    for row in prompt:
        assert (table == row).all(axis=1).any()


def test_a_saved_prompt_of_any_format(t5x, tmp_path):
    prompt = np.random.default_rng(0).normal(size=(LENGTH, 32)).astype(np.float32)
    np.save(tmp_path / "prompt.npy", prompt)
    init = t5x.adapter.saved_prompt(str(tmp_path / "prompt.npy"))
    np.testing.assert_array_equal(init(None, (LENGTH, 32), jnp.float32), prompt)
    assert t5x.adapter.saved_prompt(None) is None
    with pytest.raises(UserError, match="PROMPT_LENGTH=5"):
        init(None, (LENGTH + 1, 32), jnp.float32)


# T5X's commands.

TASK = """
from prompt_tuning.tasks import local_file

local_file.register(
    "t5x_reviews", {files!r}, "{{sentence}}", label_names=("good", "bad"),
    vocabulary="byt5",
)
"""
# The sizes of the checkpoint, over those of models/tiny.gin.
TINY = dict(zip(("vocab_size", "emb_dim", "num_heads"), SIZES)) | {
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "mlp_dim": 64,
}


class Commands:
    """Runs ``python -m t5x.COMMAND`` with our gin files."""

    def __init__(self, folder, files):
        self.folder = folder
        (folder / "t5x_reviews_task.py").write_text(TASK.format(files=files))

    def __call__(self, command, **macros):
        values = {
            "MIXTURE_OR_TASK_NAME": "t5x_reviews",
            "MIXTURE_OR_TASK_MODULE": "t5x_reviews_task",
            # The longest target, so that all commands decode as far.
            "TASK_FEATURE_LENGTHS": {"inputs": 24, "targets": 5},
            "PROMPT_LENGTH": LENGTH,
            "ACTIVATION_DTYPE": "float32",
            "BATCH_SIZE": 4,
            **{f"T5Config.{name}": value for name, value in TINY.items()},
            **macros,
        }
        return subprocess.run(
            [
                sys.executable,
                *("-m", f"t5x.{command}"),
                f"--gin_search_paths={ROOT / 'configs'}",
                f"--gin_file=t5x/{command}.gin",
                "--gin_file=models/tiny.gin",
                *(f"--gin.{name}={value!r}" for name, value in values.items()),
            ],
            env=os.environ | {"PYTHONPATH": str(self.folder), "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            check=False,
        )

    def must(self, command, **macros):
        done = self(command, **macros)
        assert done.returncode == 0, done.stderr[-4000:]


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_commands_of_t5x(t5x, t5x_checkpoints, tmp_path, reviews):
    base = t5x_checkpoints / "t5x_native" / "t5_1_1" / "checkpoint_2"
    run = Commands(tmp_path, reviews)
    macros = {
        "MODEL_DIR": str(tmp_path / "run"),
        "INITIAL_CHECKPOINT_PATH": str(base),
        "EVAL_PERIOD": 2,
        "CHECKPOINT_PERIOD": 2,
    }
    # Three steps, the last of them in a process that resumes.
    run.must("train", TRAIN_STEPS=4, **macros)
    run.must("train", TRAIN_STEPS=5, **macros)
    tuned = tmp_path / "run" / "checkpoint_5"
    before, after = map(t5x_native.open_checkpoint, (str(base), str(tuned)))
    assert after.specs == before.specs and set(after.prompts) == {PROMPT}
    for name in before.specs:
        np.testing.assert_array_equal(after.read(name), before.read(name), name)
    prompt, _ = prompt_formats.load(tuned)
    assert prompt.shape == (LENGTH, 32) and np.abs(prompt).max() > 0.5

    # The run's checkpoint, and the base model with the prompt from a file.
    np.save(tmp_path / "prompt.npy", prompt)
    pair = {"CHECKPOINT_PATH": str(base), "PROMPT_FILE": str(tmp_path / "prompt.npy")}
    run.must("eval", CHECKPOINT_PATH=str(tuned), EVAL_OUTPUT_DIR=str(tmp_path / "eval"))
    run.must("eval", **pair, EVAL_OUTPUT_DIR=str(tmp_path / "pair"))
    run.must("infer", **pair, INFER_OUTPUT_DIR=str(tmp_path / "infer"))
    answers = [
        [row["prediction"] for row in records(path)]
        for path in (
            tmp_path / "eval" / "inference_eval" / "t5x_reviews-000005.jsonl",
            tmp_path / "pair" / "inference_eval" / "t5x_reviews-000002.jsonl",
            *(tmp_path / "infer").glob("*predict.jsonl*0-of-00001"),
        )
    ]
    assert len(answers) == 3 and len(answers[0]) == 4
    assert answers[0] == answers[1] == answers[2]

    # Without its prompt the base model is no checkpoint to evaluate.
    done = run(
        "eval", CHECKPOINT_PATH=str(base), EVAL_OUTPUT_DIR=str(tmp_path / "none")
    )
    assert done.returncode != 0
    assert f"missing: {PROMPT};" in done.stderr
