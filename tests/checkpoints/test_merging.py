# SPDX-License-Identifier: Apache-2.0
"""A merged model answers as the base and the adapter do, without the adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import cli, trees
from prompt_tuning.checkpoints import (
    adapter_file,
    base_models,
    loading,
    merging,
    prompt_file,
)
from prompt_tuning.errors import UserError
from prompt_tuning.methods.ia3 import IA3
from prompt_tuning.methods.lora import LoRA
from prompt_tuning.methods.method import COLLECTION, Start, assemble
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer

CONFIG = T5Config(8192, 16, 2, 1, 1, 8, 32)


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return base_models.load(
        CONFIG, tiny_checkpoint, frozen_dtype="float32", activation_dtype="float32"
    )


def adapter_of(method, base, path, **card):
    """Writes one that is not at its start; returns the network's parameters with it."""
    start = Start(jnp.zeros((0, CONFIG.emb_dim)), base.table, base.params)
    leaves = method.init(jax.random.key(0), start)
    leaves = jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape), leaves
    )
    part = method.materialize(method.place("a", leaves), base.params)
    card = {"base_model": base.identity, "method": method.describe(), **card}
    adapter_file.save(path, start.rows, part[COLLECTION], card)
    return trees.merge(assemble({"a": part}, ["a"]), base.params)


@pytest.mark.parametrize(
    "method", [LoRA(rank=3, targets=("query", "value", "wo")), IA3()], ids=str
)
def test_the_merged_model_answers_alike(
    method, base, tiny_checkpoint, tiny_batch, tmp_path, capsys
):
    params = adapter_of(method, base, tmp_path / "adapter.safetensors")
    words = ["convert", str(tiny_checkpoint), str(tmp_path / "merged"), "--to=native"]
    assert cli.main([*words, f"--adapter={tmp_path / 'adapter.safetensors'}"]) == 0
    capsys.readouterr()
    merged = base_models.load(
        CONFIG,
        tmp_path / "merged",
        frozen_dtype="float32",
        activation_dtype="float32",
    )
    logits = jax.jit(Model(Transformer(CONFIG)).logits)
    plain, wanted, found = (
        np.asarray(logits(tree, tiny_batch))
        for tree in (base.params, params, merged.params)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(plain - wanted).max() > 0.1
    assert merged.fingerprint != base.fingerprint


def test_a_source_has_the_fingerprint_of_the_loaded_model(base, tiny_checkpoint):
    source = base_models.open_checkpoint(tiny_checkpoint)
    assert loading.fingerprint(source) == base.fingerprint


def test_what_weights_cannot_hold_is_refused(base, tiny_checkpoint, tmp_path, capsys):
    source = base_models.open_checkpoint(tiny_checkpoint)
    prompt = tmp_path / "prompt.safetensors"
    card = {"base_model": base.identity}
    prompt_file.save_prompt(prompt, np.ones((2, 16), np.float32), card)
    with pytest.raises(UserError, match="is no adapter: give the adapter.safetensors"):
        merging.merge(source, prompt)
    other = tmp_path / "other.safetensors"
    adapter_of(IA3(), base, other, base_model={"name": "b", "fingerprint": "0" * 64})
    with pytest.raises(UserError, match=r"was tuned on b \(fingerprint 0000"):
        merging.merge(source, other)
    words = ["convert", str(prompt), str(tmp_path / "out"), "--to=npy"]
    assert cli.main([*words, f"--adapter={other}"]) == 2
    assert "are for models, not for prompts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
