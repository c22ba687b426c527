# SPDX-License-Identifier: Apache-2.0
"""Base models on disk: exact, under T5X's names, and loud about every gap."""

import json
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning import trees
from prompt_tuning.checkpoints import loading, model_file
from prompt_tuning.devices import sharding
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer

METADATA = {"name": "tiny", "steps": 3, "loss": {"train": 1.5}}


@pytest.fixture
def folder(tmp_path, tiny_params):
    model_file.save_model(tmp_path / "tiny", tiny_params, METADATA)
    return tmp_path / "tiny"


def load(folder, *args):
    return loading.load_params(model_file.open_checkpoint(folder), *args)


def equal(a, b):
    a, b = trees.flatten(a), trees.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]))


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_model_comes_back_bit_for_bit(folder, tiny_model, tiny_params):
    loaded = load(folder, tiny_model.abstract_params(), "float32")
    equal(loaded, tiny_params)
    assert trees.fingerprint(loaded) == trees.fingerprint(tiny_params)
    assert model_file.open_checkpoint(folder).metadata == METADATA


def test_the_file_has_t5x_names_and_shapes(folder, golden):
    tree = json.loads((golden / "t5_1_1" / "param_tree.json").read_text())
    specs = model_file.open_checkpoint(folder).specs
    assert {name: list(spec.shape) for name, spec in specs.items()} == {
        name: leaf["shape"] for name, leaf in tree.items()
    }
    assert {spec.dtype for spec in specs.values()} == {np.dtype(np.float32)}


def test_bfloat16_on_disk_and_in_memory(tmp_path, folder, tiny_model, tiny_params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_params)
    model_file.save_model(tmp_path / "half", tiny_params, {}, dtype="bfloat16")
    abstract = tiny_model.abstract_params()
    equal(load(tmp_path / "half", abstract, "bfloat16"), half)
    equal(load(folder, abstract, "bfloat16"), half)
    equal(
        load(tmp_path / "half", abstract, "float32"),
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half),
    )
    sizes = [os.path.getsize(path / "model.safetensors") for path in tmp_path.iterdir()]
    assert 1.8 < max(sizes) / min(sizes) < 2
    table = model_file.open_checkpoint(tmp_path / "half").read(
        "token_embedder/embedding"
    )
    np.testing.assert_array_equal(table, half["token_embedder"]["embedding"])


def test_prompts_are_neither_written_nor_looked_for(
    tmp_path, folder, tiny_config, tiny_params
):
    prompted = Model(Transformer(tiny_config, (Prompt("task", 3),)))
    loaded = load(folder, prompted.abstract_params(), "float32")
    equal(loaded, tiny_params)
    with_prompt = {**tiny_params, "prompts": {"task": jnp.zeros((3, 32))}}
    with pytest.raises(ValueError, match="holds no prompts: prompts/task"):
        model_file.save_model(tmp_path / "no", with_prompt, {})


def test_leaves_are_placed_where_asked(folder, tiny_model, tiny_params):
    abstract = tiny_model.abstract_params()
    shardings = sharding.param_shardings(
        abstract, sharding.make_mesh(4), sharding.logical_axis_rules()
    )
    loaded = load(folder, abstract, "float32", shardings)
    equal(loaded, tiny_params)
    table = loaded["token_embedder"]["embedding"]
    assert table.sharding == shardings["token_embedder"]["embedding"]
    assert table.addressable_shards[0].data.shape == (64, 32)


def test_all_gaps_are_listed_at_once(tmp_path, folder, tiny_model):
    path = folder / "model.safetensors"
    flat = safetensors.numpy.load_file(path)
    for index in (0, 1):
        del flat[f"encoder/layers_{index}/mlp/wo/kernel"]
        flat[f"encoder/layers_{index}/lora/a"] = np.zeros(2, np.float32)
    flat["decoder/decoder_norm/scale"] = np.zeros(31, np.float32)
    safetensors.numpy.save_file(flat, path)
    with pytest.raises(UserError) as caught:
        load(folder, tiny_model.abstract_params(), "float32")
    message = one_line(caught)
    assert "missing: encoder/layers_{0-1}/mlp/wo/kernel" in message
    assert "unused: encoder/layers_{0-1}/lora/a" in message
    assert "shape [31] instead of [32]: decoder/decoder_norm/scale" in message
    assert "another size" not in message


def test_a_checkpoint_of_another_size_names_the_sizes(folder, tiny_config):
    kwargs = {**vars(tiny_config), "emb_dim": 48, "num_decoder_layers": 3}
    wider = Model(Transformer(T5Config(**kwargs)))
    with pytest.raises(UserError) as caught:
        load(folder, wider.abstract_params(), "float32")
    message = one_line(caught)
    assert "another size (emb_dim 32 in the file, 48 in the model;" in message
    assert "num_decoder_layers 2 in the file, 3 in the model)" in message
    assert "missing: decoder/layers_{2}/" in message
    assert "shape [256, 32] instead of [256, 48]: token_embedder/embedding" in message
    assert message.endswith("of one and the same size and architecture")


def test_missing_truncated_and_foreign_files_are_one_line(folder, tiny_model, tmp_path):
    abstract = tiny_model.abstract_params()
    with pytest.raises(UserError, match="there is no file .*model.safetensors"):
        load(tmp_path / "nowhere", abstract, "float32")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-7], whole[:100], b"", b"PK\x03\x04 something else"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cut short .*copy or write it again") as e:
            load(folder, abstract, "float32")
        assert str(path) in one_line(e)
    safetensors.numpy.save_file({"a": np.zeros(2, np.int32)}, path)
    with pytest.raises(UserError, match="a is stored as I32"):
        load(folder, abstract, "float32")
    path.write_bytes(whole)
    with pytest.raises(UserError, match="'int8' is not one of float32, bfloat16"):
        load(folder, abstract, "int8")


def test_a_flipped_bit_is_noticed(folder, tiny_model):
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1000] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="damaged: .* is not what was written"):
        load(folder, tiny_model.abstract_params(), "float32")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path, folder, tiny_model, tiny_params
):
    other = jax.tree.map(lambda leaf: leaf + 1, tiny_params)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        for target in (folder, tmp_path / "new" / "model"):
            with pytest.raises(UserError, match="cannot write .*disk with room") as e:
                model_file.save_model(target, other, {})
            one_line(e)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(folder) == ["model.safetensors"]
    assert os.listdir(tmp_path) == ["tiny"]
    equal(
        load(folder, tiny_model.abstract_params(), "float32"),
        tiny_params,
    )


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, tiny_params):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write") as caught:
        model_file.save_model(tmp_path / "file" / "model", tiny_params, {})
    one_line(caught)
