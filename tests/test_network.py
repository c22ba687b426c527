# SPDX-License-Identifier: Apache-2.0
"""The network: what may depend on what, and options that must not change numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import trees
from prompt_tuning.model import Model
from prompt_tuning.network import T5Config, Transformer
from prompt_tuning.prompts import Prompt


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
