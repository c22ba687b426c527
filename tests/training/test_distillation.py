# SPDX-License-Identifier: Apache-2.0
"""Distillation: vectors stay with their sentences, and the loss sees their direction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import trees
from prompt_tuning.data import span_corruption
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer
from prompt_tuning.training import distillation, pretraining


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """128 sentences of 3 to 9 tokens; sentence i is made of the id 10 + i."""
    file = tmp_path_factory.mktemp("arrays") / "sentences.npz"
    lengths = np.arange(128) % 7 + 3
    np.savez(
        file,
        ids=np.repeat(np.arange(128) + 10, lengths).astype(np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        vectors=np.eye(128, dtype=np.float16),
    )
    return file


def test_every_vector_stands_where_its_sentence_does(path):
    mixture = pretraining.Mixture(
        np.arange(3000) % 150 + 10,
        None,
        vocab_size=300,
        batch_size=4,
        inputs_length=40,
        targets_length=24,
        span_corruption=0.25,
        prefix_lm=0.0,
        distilled=0.75,
        sentences=distillation.Sentences.load(path, held_out=False),
    )
    batch = mixture.batch(0)
    vectors = batch[distillation.VECTORS]
    assert vectors.shape == (4, 5, 128) and not vectors[0].any()
    seen = 0
    for row in range(1, 4):
        for place in np.flatnonzero(vectors[row].any(-1)):
            number = int(vectors[row, place].argmax())
            tokens = batch["encoder_input_tokens"][row]
            own = tokens[batch["encoder_segment_ids"][row] == place + 1]
            assert set(own[own < 200]) == {number + 10, span_corruption.EOS_ID}
            seen += 1
    assert seen > 6


def test_parts_share_no_sentence(path):
    train = distillation.Sentences.load(path, held_out=False).chosen
    held_out = distillation.Sentences.load(path, held_out=True).chosen
    assert set(train).isdisjoint(held_out) and len(train) + len(held_out) == 128


def test_missing_vectors_are_one_line(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        distillation.Sentences.load(tmp_path / "sentences.npz", held_out=False)


def test_cosines_are_those_of_mean_states():
    rng = np.random.default_rng(0)
    encoded = rng.normal(size=(1, 6, 4)).astype(np.float32)
    vectors = np.zeros((1, 3, 5), np.float32)
    vectors[0, :2] = rng.normal(size=(2, 5))
    vectors[0, :2] /= np.linalg.norm(vectors[0, :2], axis=-1, keepdims=True)
    kernel = rng.normal(size=(4, 5)).astype(np.float32)
    batch = {
        "encoder_segment_ids": jnp.array([[1, 1, 2, 2, 2, 0]]),
        distillation.VECTORS: jnp.array(vectors),
    }
    total, count = distillation.cosines(jnp.array(kernel), jnp.array(encoded), batch)
    expected = 0.0
    for part, vector in ((slice(0, 2), vectors[0, 0]), (slice(2, 5), vectors[0, 1])):
        mapped = encoded[0, part].mean(0) @ kernel
        expected += mapped @ vector / np.linalg.norm(mapped)
    assert float(count) == 2
    np.testing.assert_allclose(float(total), expected, rtol=1e-5)


def test_reduced_table_keeps_what_lies_in_few_dimensions():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 8))
    reduced = distillation.reduced_table(flat, 3)
    np.testing.assert_allclose(np.mean(reduced**2), 1.0, rtol=1e-5)
    distance = lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)
    ratio = distance(reduced)[0, 1:] / distance(flat)[0, 1:]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    with pytest.raises(UserError, match="cannot start"):
        distillation.reduced_table(flat, 9)


@pytest.mark.parametrize("tied", [True, False])
def test_word_vectors_start_table_and_output_alike(tmp_path, tied):
    config = T5Config(
        vocab_size=20,
        emb_dim=4,
        num_heads=1,
        num_encoder_layers=1,
        num_decoder_layers=1,
        head_dim=4,
        mlp_dim=8,
        logits_via_embedding=tied,
    )
    params = Model(Transformer(config)).init(jax.random.key(0))
    path = tmp_path / "table.npy"
    with pytest.raises(UserError, match="is missing"):
        distillation.start_from(path, params)
    np.save(path, np.random.default_rng(0).normal(size=(15, 6)))
    before, after = trees.flatten(params), distillation.start_from(path, params)
    changed = trees.flatten(after)
    table = changed.pop("token_embedder/embedding")
    np.testing.assert_array_equal(table[15:], before["token_embedder/embedding"][15:])
    np.testing.assert_allclose(np.mean(table[:15] ** 2), 1.0, rtol=1e-5)
    if not tied:
        name = "decoder/logits_dense/kernel"
        kernel = changed.pop(name)
        np.testing.assert_allclose(kernel[:, :15], table[:15].T / 2, rtol=1e-6)
        np.testing.assert_array_equal(kernel[:, 15:], before[name][:, 15:])
    for name, leaf in changed.items():
        np.testing.assert_array_equal(leaf, before[name])
    np.save(path, np.random.default_rng(0).normal(size=(21, 6)))
    with pytest.raises(UserError, match="21 rows"):
        distillation.start_from(path, params)
