# SPDX-License-Identifier: Apache-2.0
"""The network: what may depend on what, and options that must not change numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from prompt_tuning import trees
from prompt_tuning.devices import sharding
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer


@pytest.fixture(scope="module")
def logits(tiny_model):
    return jax.jit(tiny_model.logits)


@pytest.fixture(scope="module")
def plain(logits, tiny_params, tiny_batch):
    return np.asarray(logits(tiny_params, tiny_batch))


def test_unknown_rematerialisation_lists_the_choices(tiny_config):
    with pytest.raises(ValueError, match="remat='all' is not one of 'none', 'dots'"):
        dataclasses.replace(tiny_config, remat="all")


def test_a_config_from_a_file_is_hashable(tiny_config):
    sizes = dataclasses.asdict(tiny_config) | {"mlp_activations": ["gelu", "linear"]}
    assert T5Config(**sizes) == tiny_config
    assert hash(T5Config(**sizes)) == hash(tiny_config)


def test_a_target_depends_on_no_later_target(logits, plain, tiny_params, tiny_batch):
    changed = dict(tiny_batch)
    ids = tiny_batch["decoder_input_tokens"]
    changed["decoder_input_tokens"] = ids.at[:, 3].set((ids[:, 3] + 7) % 250 + 2)
    after = np.asarray(logits(tiny_params, changed))
    np.testing.assert_array_equal(after[:, :3], plain[:, :3])
    assert (after[0, 3:] != plain[0, 3:]).any(axis=-1).all()


def test_rows_do_not_see_each_other(logits, plain, tiny_params, tiny_batch):
    changed = dict(tiny_batch)
    changed["encoder_input_tokens"] = (
        tiny_batch["encoder_input_tokens"].at[0, :4].set(jnp.arange(20, 24))
    )
    after = np.asarray(logits(tiny_params, changed))
    np.testing.assert_array_equal(after[1:], plain[1:])
    assert (after[0] != plain[0]).any()


def test_padding_changes_nothing(tiny_model, plain, tiny_params, tiny_batch):
    longer = {k: jnp.pad(v, ((0, 0), (0, 3))) for k, v in tiny_batch.items()}
    after = jax.jit(tiny_model.logits)(tiny_params, longer)
    valid = np.asarray(tiny_batch["decoder_target_tokens"]) > 0
    np.testing.assert_allclose(
        np.asarray(after)[:, :6][valid], plain[valid], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "change", [{"unroll": 2}, {"remat": "dots"}, {"remat": "full"}]
)
def test_unrolling_and_rematerialising_keep_the_numbers(
    change, tiny_config, tiny_params, tiny_batch, plain
):
    model = Model(Transformer(dataclasses.replace(tiny_config, **change)))
    np.testing.assert_allclose(
        jax.jit(model.logits)(tiny_params, tiny_batch), plain, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialising_recomputes_in_the_backward_pass(
    remat, tiny_config, tiny_params, tiny_batch
):
    def products(config):
        model = Model(Transformer(config))
        grad = jax.grad(lambda p: model.loss(p, tiny_batch)[0])
        return str(jax.make_jaxpr(grad)(tiny_params)).count("dot_general")

    config = dataclasses.replace(tiny_config, remat=remat)
    # Attention's products have batch dimensions, which both policies recompute.
    assert products(config) > products(tiny_config)


def test_dropout_is_on_only_where_it_is_asked_for(tiny_config, tiny_params, tiny_batch):
    network = Transformer(dataclasses.replace(tiny_config, dropout_rate=0.3))
    tokens = tiny_batch["encoder_input_tokens"]

    @jax.jit
    def encode(key):
        return tuple(
            network.apply(
                {"params": tiny_params},
                tokens,
                enable_dropout=enable,
                method="encode",
                rngs={"dropout": key},
            )
            for enable in (False, True)
        )

    (off, on), (off_too, other), (_, same) = (
        encode(jax.random.key(i)) for i in (1, 2, 1)
    )
    np.testing.assert_array_equal(off, off_too)
    np.testing.assert_array_equal(on, same)
    assert (on != off).any() and (on != other).any()


def test_bfloat16_activations_give_float32_logits_near_those_of_float32(
    tiny_config, tiny_params, tiny_batch, plain
):
    config = dataclasses.replace(tiny_config, dtype="bfloat16")
    logits = jax.jit(Model(Transformer(config)).logits)(tiny_params, tiny_batch)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - plain).mean() < 0.03 * np.abs(plain).mean()


def test_a_decoder_prompt_is_an_id_in_the_decoders_input(
    tiny_config, tiny_params, tiny_batch, logits
):
    """A virtual row that equals a token's row does what the token does."""
    network = Transformer(tiny_config, (Prompt("p", 2),))
    table = tiny_params["token_embedder"]["embedding"]
    params = {**tiny_params, "prompts": {"p": table[jnp.array([40, 41])]}}
    virtual, real = dict(tiny_batch), dict(tiny_batch)
    for name in ("encoder_input_tokens", "decoder_input_tokens"):
        virtual[name] = tiny_batch[name].at[:, 1:3].set(jnp.array([256, 257]))
        real[name] = tiny_batch[name].at[:, 1:3].set(jnp.array([40, 41]))
    np.testing.assert_allclose(
        jax.jit(Model(network).logits)(params, virtual),
        logits(tiny_params, real),
        rtol=1e-6,
        atol=1e-6,
    )


def test_prompts_add_their_leaves_and_change_no_other(tiny_config, tiny_model):
    prompted = Model(Transformer(tiny_config, (Prompt("a", 5), Prompt("b", 1))))
    spec = lambda model: {
        name: (box.names, box.value.shape)
        for name, box in trees.flatten(model.abstract_params()).items()
    }
    added = dict(spec(prompted).items() - spec(tiny_model).items())
    assert added == {
        "prompts/a": (("prompt", "prompt_embed"), (5, 32)),
        "prompts/b": (("prompt", "prompt_embed"), (1, 32)),
    }


def test_packed_rows_cannot_be_decoded(tiny_model, tiny_params, tiny_batch):
    tokens = tiny_batch["encoder_input_tokens"]
    targets = tiny_batch["decoder_target_tokens"]
    with pytest.raises(ValueError, match="one example a row, not packed rows"):
        tiny_model.network.apply(
            {"params": tiny_params},
            jnp.zeros((*tokens.shape, 32)),
            tokens,
            targets,
            targets,
            encoder_segment_ids=tokens,
            enable_dropout=False,
            decode=True,
            method="decode",
        )


def bfloat16_and_batch(config, length: int, **changes):
    """A bfloat16 model with a prompt of 4, its shapes, two rows with padding."""
    prompts = (Prompt("p", 4),)
    params = jax.eval_shape(Model(Transformer(config, prompts)).init, jax.random.key(0))
    config = dataclasses.replace(config, **{"dtype": "bfloat16", **changes})
    model = Model(Transformer(config, prompts))
    tokens = jax.random.randint(jax.random.key(1), (2, length), 2, 256)
    tokens = tokens.at[:, :4].set(256 + jnp.arange(4)).at[1, 8:].set(0)
    targets = jax.random.randint(jax.random.key(2), (2, 5), 2, 256)
    batch = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": targets,
        "decoder_target_tokens": targets,
    }
    return model, params, batch


@pytest.fixture
def lowered_for_cuda(monkeypatch):
    """Lets a machine without cuDNN lower programs that use it."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    if not hasattr(fused, "check_cudnn_version"):
        pytest.skip("this version of JAX looks for cuDNN in another way")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_the_encoder_alone_calls_cudnn_with_logits_as_they_are(
    lowered_for_cuda, tiny_config
):
    model, params, batch = bfloat16_and_batch(tiny_config, 12, attention="cudnn")
    gradient = jax.jit(jax.grad(lambda params: model.loss(params, batch)[0]))
    text = gradient.trace(params).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$fmha" in line]
    # The layers of the encoder are one scan forward and one back.
    assert len(calls) == 2
    assert "fmhaScaleBiasSoftmaxBackward" in calls[1]
    for call in calls:
        assert r"\22fmha_scale\22: 1.0" in call and "tensor<2x4x12x12xbf16>" in call


@pytest.mark.parametrize(
    ("change", "length", "says"),
    [
        ({}, 13, "an even number of tokens, not 13"),
        ({"dtype": "float32"}, 12, "16 bits, not in float32; set ACTIVATION_DTYPE"),
        ({"dropout_rate": 0.1}, 12, "no dropout of .* set DROPOUT_RATE"),
    ],
)
def test_what_cudnn_cannot_do_is_said_in_one_line(
    change, length, says, lowered_for_cuda, tiny_config
):
    model, params, batch = bfloat16_and_batch(
        tiny_config, length, attention="cudnn", **change
    )
    with pytest.raises(UserError, match=says):
        jax.eval_shape(model.loss, params, batch, jax.random.key(0))


def test_other_machines_refuse_cudnn(tiny_config):
    if jax.default_backend() == "gpu":
        pytest.skip("this machine is none of them")
    model, params, batch = bfloat16_and_batch(tiny_config, 12, attention="cudnn")
    with pytest.raises(UserError, match="needs an NVIDIA GPU, and this is a CPU"):
        jax.eval_shape(model.loss, params, batch)
    with pytest.raises(UserError, match="attention='flash' is not 'einsum' or 'cudnn'"):
        dataclasses.replace(tiny_config, attention="flash")


@pytest.mark.gpu
def test_cudnn_computes_what_einsum_computes(tiny_config):
    def computed(attention):
        model, _, batch = bfloat16_and_batch(tiny_config, 12, attention=attention)
        params = jax.jit(model.init)(jax.random.key(0))
        gradient = jax.jit(jax.grad(lambda params: model.loss(params, batch)[0]))
        logits = jax.jit(model.logits)(params, batch)
        return logits, gradient(params)["prompts"]["p"]

    for einsum, cudnn in zip(computed("einsum"), computed("cudnn"), strict=True):
        largest = float(jnp.max(jnp.abs(einsum)))
        np.testing.assert_allclose(cudnn, einsum, rtol=0.02, atol=0.02 * largest)


OBJECTIVES = {
    "plain": {},
    "all at once": {
        "z_loss": 0.01,
        "label_smoothing": 0.1,
        "loss_normalizing_factor": "AVERAGE_PER_SEQUENCE",
    },
}


def packed(batch):
    """Two segments a row, and weights that are neither 0 nor 1."""
    columns = jnp.arange(6)
    return {
        **batch,
        "encoder_segment_ids": jnp.tile(jnp.where(jnp.arange(10) > 3, 2, 1), (3, 1)),
        "decoder_segment_ids": jnp.tile(jnp.where(columns > 2, 2, 1), (3, 1)),
        "decoder_loss_weights": batch["decoder_loss_weights"] * (1 + columns / 4)[None],
    }


@pytest.mark.parametrize(
    ("positions", "objective", "tied"),
    [
        pytest.param(4, "plain", False, marks=pytest.mark.slow),
        (1, "all at once", False),
        pytest.param(2, "all at once", True, marks=pytest.mark.slow),
    ],
)
def test_chunks_of_logits_change_no_number(
    positions, objective, tied, tiny_config, tiny_params, tiny_batch
):
    network = Transformer(dataclasses.replace(tiny_config, logits_via_embedding=tied))
    params = trees.flatten(tiny_params)
    if tied:
        del params["decoder/logits_dense/kernel"]
    params = trees.unflatten(params)
    batch = packed(tiny_batch) if objective == "all at once" else tiny_batch
    found = []
    for limit in (2**30, 4 * 256 * 3 * positions):
        model = Model(network, **OBJECTIVES[objective], max_logit_bytes=limit)
        value = jax.value_and_grad(model.loss, has_aux=True)
        score = jax.jit(model.score)(params, batch)
        found.append((*jax.jit(value)(params, batch), score))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *found
    )


def logit_positions(function, *args) -> int:
    """The most positions whose logits an array in a traced program holds."""
    most = 0

    def visit(jaxpr):
        nonlocal most
        for eqn in jaxpr.eqns:
            for var in eqn.outvars:
                shape = var.aval.shape
                if len(shape) >= 3 and shape[-1] == 256:
                    most = max(most, int(np.prod(shape[:-1])))
            for inner in jaxprs_in_params(eqn.params):
                visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return most


def test_no_program_holds_more_logits_than_the_limit(
    tiny_config, tiny_params, tiny_batch
):
    for positions in (1, 2, 6):
        limit = 4 * 256 * 3 * positions + 100
        model = Model(Transformer(tiny_config), max_logit_bytes=limit)
        gradient = jax.grad(
            lambda params, model=model: model.loss(params, tiny_batch)[0]
        )
        assert logit_positions(gradient, tiny_params) == 3 * positions
        score = lambda params, model=model: model.score(params, tiny_batch)
        assert logit_positions(score, tiny_params) == 3 * positions
    # The least there is: one position of every row.
    model = Model(Transformer(tiny_config), max_logit_bytes=1)
    assert logit_positions(lambda p: model.score(p, tiny_batch), tiny_params) == 3


def test_the_limit_is_that_of_one_device(tiny_config, tiny_params, tiny_batch):
    batch = {name: jnp.tile(rows, (4, 1))[:8] for name, rows in tiny_batch.items()}
    model = Model(Transformer(tiny_config), max_logit_bytes=4 * 256 * 8)
    gradient = jax.grad(lambda params: model.loss(params, batch)[0])
    assert logit_positions(gradient, tiny_params) == 8
    mesh = sharding.make_mesh(2)
    with sharding.partitioned(mesh, sharding.logical_axis_rules()):
        # Four devices share the rows and two the vocabulary: all of 6 targets fit.
        fresh = jax.grad(lambda params: model.loss(params, batch)[0])
        assert logit_positions(fresh, tiny_params) == 8 * 6


def test_chunks_on_a_mesh_gather_no_rows(tiny_config, tiny_params, tiny_batch):
    batch = {name: jnp.tile(rows, (4, 1))[:8] for name, rows in tiny_batch.items()}
    model = Model(Transformer(tiny_config), max_logit_bytes=4 * 256)
    mesh = sharding.make_mesh(1)
    expected = jax.jit(model.loss)(tiny_params, batch)
    with sharding.partitioned(mesh, sharding.logical_axis_rules()):
        placed = sharding.shard_batch(batch, mesh)
        params = sharding.replicate(tiny_params, mesh)
        loss = jax.jit(lambda params, batch: model.loss(params, batch))
        program = loss.lower(params, placed).compile()
        found = program(params, placed)
    assert "all-gather" not in program.as_text()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected
    )
