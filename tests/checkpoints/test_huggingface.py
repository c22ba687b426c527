# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders, made by hand: every name, orientation, alias and mistake."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import weakref

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from prompt_tuning import files, trees
from prompt_tuning.checkpoints import huggingface, layout
from prompt_tuning.checkpoints.source import from_params
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HEAD = "decoder/logits_dense/kernel"
# No two widths are equal, heads do not add up to d_model, the decoder is shallower.
CONFIG = {
    "model_type": "t5",
    "vocab_size": 40,
    "d_model": 12,
    "num_heads": 3,
    "d_kv": 5,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "transformers_version": "4.12.0",
}
SIZES = {
    "vocab_size": 40,
    "emb_dim": 12,
    "num_heads": 3,
    "num_encoder_layers": 2,
    "num_decoder_layers": 1,
    "head_dim": 5,
    "mlp_dim": 20,
    "mlp_activations": ("gelu", "linear"),
    "dropout_rate": 0.1,
    "logits_via_embedding": False,
    "relpos_buckets": 8,
    "relpos_max_distance": 16,
}


def tensors(gated=True, head=True, dtype=np.float32):
    """What transformers saves of `CONFIG`'s model, with random numbers."""
    shapes = {"shared.weight": (40, 12)}
    for side, depth in (("encoder", 2), ("decoder", 1)):
        shapes[f"{side}.final_layer_norm.weight"] = (12,)
        shapes[
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ] = (8, 3)
        parts = ["SelfAttention", "EncDecAttention"][: 1 + (side == "decoder")]
        for block in range(depth):
            prefix = f"{side}.block.{block}.layer"
            for i, part in enumerate(parts):
                shapes[f"{prefix}.{i}.layer_norm.weight"] = (12,)
                for letter in "qkv":
                    shapes[f"{prefix}.{i}.{part}.{letter}.weight"] = (15, 12)
                shapes[f"{prefix}.{i}.{part}.o.weight"] = (12, 15)
            mlp = f"{prefix}.{len(parts)}"
            shapes[f"{mlp}.layer_norm.weight"] = (12,)
            for leaf in ("wi_0", "wi_1") if gated else ("wi",):
                shapes[f"{mlp}.DenseReluDense.{leaf}.weight"] = (20, 12)
            shapes[f"{mlp}.DenseReluDense.wo.weight"] = (12, 20)
    if head:
        shapes["lm_head.weight"] = (40, 12)
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=size).astype(dtype) for name, size in shapes.items()}


def save(folder, arrays, shards=1, **changes):
    """Writes a folder; a change of None takes the field out of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(arrays, folder / "model.safetensors")
        return folder
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: arrays[name] for name in list(arrays)[number::shards]}
        safetensors.numpy.save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    write_index(folder, places)
    return folder


def write_index(folder, places):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))


def read_all(source):
    return {name: source.read(name) for name in source.specs}


def network_shapes(config):
    """T5X names and shapes of the network of these sizes."""
    params = nn.meta.unbox(Model(Transformer(config)).abstract_params())
    return layout.shapes(trees.flatten(params))


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


# Reading.


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "relu"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_tree_is_the_networks(tmp_path, gated, tied):
    save(
        tmp_path,
        tensors(gated, head=not tied),
        tie_word_embeddings=tied,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    source = huggingface.open_checkpoint(tmp_path)
    config = T5Config(**source.sizes)
    assert config.logits_via_embedding == tied
    assert {k: v.shape for k, v in source.specs.items()} == network_shapes(config)
    assert source.unknown == ()
    for name, spec in source.specs.items():
        array = source.read(name)
        assert (array.shape, array.dtype) == (spec.shape, spec.dtype)


@pytest.mark.parametrize(
    ("prefix", "there", "leaves"),
    [
        ("", "", {HEAD: "lm_head"}),
        (
            "encoder/layers_1/attention/",
            "encoder.block.1.layer.0.SelfAttention.",
            {"query/kernel": "q", "key/kernel": "k", "value/kernel": "v"},
        ),
        (
            "decoder/layers_0/",
            "decoder.block.0.layer.",
            {
                "self_attention/query/kernel": "0.SelfAttention.q",
                "encoder_decoder_attention/out/kernel": "1.EncDecAttention.o",
                "mlp/wi_0/kernel": "2.DenseReluDense.wi_0",
                "mlp/wi_1/kernel": "2.DenseReluDense.wi_1",
                "mlp/wo/kernel": "2.DenseReluDense.wo",
            },
        ),
        (
            "",
            "",
            {
                f"{side}/relpos_bias/rel_embedding": f"{side}.block.0.layer.0."
                "SelfAttention.relative_attention_bias"
                for side in ("encoder", "decoder")
            },
        ),
    ],
)
def test_kernels_are_transposed(tmp_path, prefix, there, leaves):
    arrays = tensors()
    source = huggingface.open_checkpoint(save(tmp_path, arrays))
    for leaf, name in leaves.items():
        want = arrays[f"{there}{name}.weight"].T
        np.testing.assert_array_equal(source.read(f"{prefix}{leaf}"), want)


@pytest.mark.parametrize(
    ("t5x_name", "name"),
    [
        ("token_embedder/embedding", "shared"),
        ("encoder/encoder_norm/scale", "encoder.final_layer_norm"),
        ("decoder/decoder_norm/scale", "decoder.final_layer_norm"),
        (
            "encoder/layers_1/pre_mlp_layer_norm/scale",
            "encoder.block.1.layer.1.layer_norm",
        ),
        *(
            (
                f"decoder/layers_0/pre_{part}_layer_norm/scale",
                f"decoder.block.0.layer.{index}.layer_norm",
            )
            for index, part in enumerate(("self_attention", "cross_attention", "mlp"))
        ),
    ],
)
def test_table_and_norms_are_not_transposed(tmp_path, t5x_name, name):
    arrays = tensors()
    source = huggingface.open_checkpoint(save(tmp_path, arrays))
    np.testing.assert_array_equal(source.read(t5x_name), arrays[f"{name}.weight"])


def test_sizes_and_metadata(tmp_path):
    source = huggingface.open_checkpoint(save(tmp_path, tensors()))
    assert source.format == "huggingface"
    assert source.sizes == SIZES
    assert source.metadata == {"model_type": "t5", "transformers_version": "4.12.0"}


def test_defaults_of_early_configs(tmp_path):
    # google-t5/t5-base: no MLP, no maximal distance, no depth of the decoder, not tied.
    arrays = {k.replace("wi_0", "wi"): v for k, v in tensors(head=False).items()}
    arrays = {k: v for k, v in arrays.items() if "wi_1" not in k}
    missing = dict.fromkeys(
        ("feed_forward_proj", "tie_word_embeddings", "relative_attention_max_distance")
    )
    source = huggingface.open_checkpoint(save(tmp_path, arrays, **missing))
    assert source.sizes["mlp_activations"] == ("relu",)
    assert source.sizes["logits_via_embedding"] is True
    assert source.sizes["relpos_max_distance"] == 128


def test_an_absent_decoder_depth_is_that_of_the_encoder(tmp_path):
    with pytest.raises(UserError, match="num_decoder_layers is 2 in config.json, 1 in"):
        save(tmp_path, tensors(), num_decoder_layers=None)
        huggingface.open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("fields", "activations"),
    [
        ({"feed_forward_proj": "gated-silu"}, ("silu", "linear")),
        ({"feed_forward_proj": "gated-gelu_new"}, ("gelu", "linear")),
        ({"dense_act_fn": "silu", "is_gated_act": True}, ("silu", "linear")),
        ({"feed_forward_proj": None, "model_type": "mt5"}, ("gelu", "linear")),
    ],
)
def test_activations(tmp_path, fields, activations):
    source = huggingface.open_checkpoint(save(tmp_path, tensors(), **fields))
    assert source.sizes["mlp_activations"] == activations


def test_bfloat16_stays_to_the_bit(tmp_path):
    arrays = tensors(dtype=BFLOAT16)
    source = huggingface.open_checkpoint(save(tmp_path, arrays))
    assert {spec.dtype for spec in source.specs.values()} == {BFLOAT16}
    got = source.read("token_embedder/embedding")
    assert got.tobytes() == arrays["shared.weight"].tobytes()


def test_float16_becomes_float32_without_loss(tmp_path):
    arrays = tensors(dtype=np.float16)
    source = huggingface.open_checkpoint(save(tmp_path, arrays))
    assert {spec.dtype for spec in source.specs.values()} == {np.dtype(np.float32)}
    got = source.read(HEAD)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.astype(np.float16), arrays["lm_head.weight"].T)


def test_shards_hold_the_same_model(tmp_path):
    whole = huggingface.open_checkpoint(save(tmp_path / "one", tensors()))
    sharded = huggingface.open_checkpoint(save(tmp_path / "many", tensors(), shards=3))
    assert_same(read_all(sharded), read_all(whole))


def test_tensors_are_read_when_they_are_asked_for(tmp_path):
    save(tmp_path, tensors(), shards=2)
    source = huggingface.open_checkpoint(tmp_path)
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / places["weight_map"]["lm_head.weight"]).unlink()
    assert (
        places["weight_map"]["shared.weight"] != places["weight_map"]["lm_head.weight"]
    )
    assert source.read("token_embedder/embedding").shape == (40, 12)
    with pytest.raises(UserError, match="there is no file"):
        source.read(HEAD)


# Names of one tensor, and what is left out.


def test_copies_of_the_table_are_dropped(tmp_path):
    arrays = tensors()
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        arrays[name] = arrays["shared.weight"].copy()
    source = huggingface.open_checkpoint(save(tmp_path / "with", arrays))
    plain = huggingface.open_checkpoint(save(tmp_path / "without", tensors()))
    assert_same(read_all(source), read_all(plain))
    assert source.unknown == ()


def test_the_table_under_another_name(tmp_path):
    arrays = tensors()
    table = arrays["encoder.embed_tokens.weight"] = arrays.pop("shared.weight")
    source = huggingface.open_checkpoint(save(tmp_path, arrays))
    np.testing.assert_array_equal(source.read("token_embedder/embedding"), table)


@pytest.mark.parametrize("row", [0, 39])
def test_a_copy_that_differs_is_refused(tmp_path, monkeypatch, row):
    monkeypatch.setattr(huggingface, "PIECE", 12 * 7)  # Six pieces, the last is short.
    arrays = tensors()
    copy = arrays["decoder.embed_tokens.weight"] = arrays["shared.weight"].copy()
    copy[row, -1] += 1
    with pytest.raises(
        UserError, match="decoder.embed_tokens.weight and shared.weight"
    ):
        huggingface.open_checkpoint(save(tmp_path, arrays))


def test_an_unused_bias_of_early_versions_is_dropped(tmp_path):
    arrays = tensors()
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    arrays[name] = np.ones((8, 3), np.float32)
    source = huggingface.open_checkpoint(save(tmp_path, arrays))
    assert source.unknown == ()
    assert len(source.specs) == len(arrays) - 1


def test_what_is_no_t5s_is_named(tmp_path):
    arrays = tensors() | {"adapter.weight": np.ones(2, np.float32)}
    source = huggingface.open_checkpoint(save(tmp_path, arrays))
    assert source.unknown == ("adapter.weight",)


# Which output layer: `tie_word_embeddings` changed its meaning with transformers 5.
TIED, OWN, ABSENT = "the table", "its own", "absent"


@pytest.mark.parametrize(
    ("fields", "head", "tied_network", "kernel"),
    [
        # T5 1.0; the output layer is saved or not.
        ({"tie_word_embeddings": None}, None, True, ABSENT),
        ({"tie_word_embeddings": None}, TIED, True, ABSENT),
        ({"tie_word_embeddings": True}, None, True, ABSENT),
        (
            {"tie_word_embeddings": True, "scale_decoder_outputs": True},
            None,
            True,
            ABSENT,
        ),
        # T5 1.1 as published, and saved again by version 5.
        ({"tie_word_embeddings": False}, OWN, False, OWN),
        (
            {"tie_word_embeddings": True, "scale_decoder_outputs": False},
            OWN,
            False,
            OWN,
        ),
        # Made by version 5: tied, yet without T5 1.0's rescaling.
        (
            {"tie_word_embeddings": True, "scale_decoder_outputs": False},
            None,
            False,
            TIED,
        ),
        # A head is missing: for the loader to complain about.
        ({"tie_word_embeddings": False}, None, False, ABSENT),
        # mT5 as published, with an early silent config, and saved again by version 5.
        ({"model_type": "mt5"}, OWN, False, OWN),
        ({"model_type": "mt5", "tie_word_embeddings": None}, OWN, False, OWN),
        (
            {
                "model_type": "mt5",
                "tie_word_embeddings": True,
                "transformers_version": "5.23.0",
            },
            OWN,
            False,
            OWN,
        ),
        # Made by version 5, which never rescales mT5; made by version 4, which does.
        (
            {
                "model_type": "mt5",
                "tie_word_embeddings": True,
                "transformers_version": "5.23.0",
            },
            None,
            False,
            TIED,
        ),
        ({"model_type": "mt5", "tie_word_embeddings": True}, None, True, ABSENT),
    ],
)
def test_the_output_layer(tmp_path, fields, head, tied_network, kernel):
    arrays = tensors(head=False)
    heads = {TIED: arrays["shared.weight"], OWN: tensors()["lm_head.weight"]}
    if head is not None:
        arrays["lm_head.weight"] = heads[head].copy()
    source = huggingface.open_checkpoint(save(tmp_path, arrays, **fields))
    assert source.sizes["logits_via_embedding"] is tied_network
    assert (HEAD in source.specs) == (kernel != ABSENT)
    if kernel != ABSENT:
        np.testing.assert_array_equal(source.read(HEAD), heads[kernel].T)


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": None},
        # What version 5.0.0 made of a T5 1.1.
        {"tie_word_embeddings": True, "scale_decoder_outputs": True},
        {"model_type": "mt5", "tie_word_embeddings": True},
    ],
)
def test_a_tied_config_with_another_output_layer_is_refused(tmp_path, fields):
    with pytest.raises(UserError, match="lm_head.weight and shared.weight differ"):
        huggingface.open_checkpoint(save(tmp_path, tensors(), **fields))


# Mistakes.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "umt5"}, "'umt5', whose layers each have a bias"),
        ({"model_type": "bert"}, "'bert', which is no T5; give a T5, mT5 or ByT5"),
        ({"model_type": None}, "model_type None"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05, which must be 1e-06"),
        ({"feed_forward_proj": "gelu"}, "dense_act_fn='gelu', which must be one of"),
        ({"dense_act_fn": ["relu"]}, "dense_act_fn=.'relu'., which must be one of"),
        ({"d_model": None}, "d_model=None, which must be a whole number"),
        ({"d_model": "12"}, "d_model='12', which must be a whole number"),
        ({"num_heads": 0}, "num_heads=0, which must be a whole number"),
        ({"num_layers": True}, "num_layers=True, which must be a whole number"),
        ({"dropout_rate": 1}, "dropout_rate=1, which must be a number from 0"),
        ({"d_model": 16}, "emb_dim is 16 in config.json, 12 in the weights"),
        ({"num_layers": 3}, "num_encoder_layers is 3 in config.json, 2 in the weights"),
    ],
)
def test_configs_that_are_refused(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        huggingface.open_checkpoint(save(tmp_path, tensors(), **fields))


def test_weights_of_another_dtype_are_refused(tmp_path):
    with pytest.raises(UserError, match="lm_head.weight in .* is stored as F64"):
        arrays = tensors()
        arrays["lm_head.weight"] = arrays["lm_head.weight"].astype(np.float64)
        huggingface.open_checkpoint(save(tmp_path, arrays))


def test_which_folders_are_hugging_faces(tmp_path):
    assert huggingface.is_checkpoint(save(tmp_path / "t5", tensors()))
    # Recognised, so that the error names what it is.
    assert huggingface.is_checkpoint(save(tmp_path / "bert", {}, model_type="bert"))
    assert not huggingface.is_checkpoint(save(tmp_path / "other", {}, model_type=None))
    assert not huggingface.is_checkpoint(tmp_path)
    assert not huggingface.is_checkpoint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    assert huggingface.is_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\udcff", "[" * 100_000])
def test_a_damaged_config(tmp_path, content):
    save(tmp_path, tensors())
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="config.json.*copy (it|or write it) again"):
        huggingface.open_checkpoint(tmp_path)


def test_files_of_pytorch_need_a_conversion(tmp_path):
    save(tmp_path, {})
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="save_pretrained.*safe_serialization=True"):
        huggingface.open_checkpoint(tmp_path)


def test_a_truncated_file(tmp_path):
    save(tmp_path, tensors())
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(UserError, match="is cut short"):
            huggingface.open_checkpoint(tmp_path)


def test_a_missing_shard(tmp_path):
    save(tmp_path, tensors(), shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="no file .*model-00002-of-00002.safetensors"):
        huggingface.open_checkpoint(tmp_path)


def change_index(folder, change):
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    change(places)
    write_index(folder, places)


@pytest.mark.parametrize(
    "change",
    [
        lambda places: places.update(more="model-00001-of-00002.safetensors"),
        lambda places: places.pop("shared.weight"),
        lambda places: places.update(
            {"shared.weight": "model-00002-of-00002.safetensors"}
        ),
    ],
    ids=["names too much", "names too little", "names the wrong file"],
)
def test_an_index_that_does_not_agree_with_the_shards(tmp_path, change):
    save(tmp_path, tensors(), shards=2)
    change_index(tmp_path, change)
    with pytest.raises(UserError, match="disagree on (more|shared.weight)"):
        huggingface.open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_tensors(tmp_path, content):
    save(tmp_path, tensors(), shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="names no tensors"):
        huggingface.open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "{}/outside.safetensors", "..", "a\0b", ""]
)
def test_an_index_that_leads_out_of_the_folder(tmp_path, place):
    folder = save(tmp_path / "model", tensors(), shards=2)
    safetensors.numpy.save_file(tensors(), tmp_path / "outside.safetensors")
    place = place.format(tmp_path)
    change_index(folder, lambda places: places.update(dict.fromkeys(places, place)))
    with pytest.raises(UserError, match="leads out of it"):
        huggingface.open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_that_leads_out_of_the_folder(tmp_path, name):
    folder = save(tmp_path / "model", tensors())
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match=f"'{name}', which leads out of it"):
        huggingface.open_checkpoint(folder)


def test_mutated_headers_raise_nothing_else(tmp_path):
    """Flipped bytes of header and config: an error of one line, or the same model."""
    save(tmp_path, tensors())
    want = read_all(huggingface.open_checkpoint(tmp_path))
    rng = np.random.default_rng(0)
    refused = 0
    for name, length in (("model.safetensors", 3000), ("config.json", 400)):
        file = tmp_path / name
        content = file.read_bytes()
        for _ in range(150):
            changed = bytearray(content)
            changed[rng.integers(min(length, len(content)))] ^= 1 << rng.integers(8)
            file.write_bytes(changed)
            try:
                source = huggingface.open_checkpoint(tmp_path)
                T5Config(**source.sizes)
                whole = not source.unknown and source.specs.keys() == want.keys()
                got = read_all(source)
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
                continue
            # Two names that changed places, say, are for a checksum to find.
            assert not whole or {k: v.shape for k, v in got.items()} == {
                k: v.shape for k, v in want.items()
            }
        file.write_bytes(content)
    assert refused > 100


# The hub.

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lay_out_cache(cache, arrays):
    """What the hub's client leaves of ``acme/tiny-t5``: links to blobs."""
    model = cache / "models--acme--tiny-t5"
    made = save(cache / "made", arrays)
    snapshot = model / "snapshots" / COMMIT
    for folder in (snapshot, model / "blobs", model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(made.iterdir())):
        blob = model / "blobs" / f"{number:040x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def run_offline(code, cache):
    """Standard output of a fresh interpreter that may use the cache only."""
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_folder_is_itself(tmp_path):
    assert huggingface.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["a/b/c", "/nowhere", "../nowhere", "gs://a/b", "a b"])
def test_what_is_no_name_of_the_hub(name):
    with pytest.raises(UserError, match="there is no folder .*give the folder"):
        huggingface.resolve(name)


def test_without_the_hubs_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        huggingface.resolve("acme/tiny-t5")


def test_a_snapshot_in_the_cache_is_links_into_it(tmp_path):
    snapshot = lay_out_cache(tmp_path, tensors())
    source = huggingface.open_checkpoint(snapshot)
    np.testing.assert_array_equal(source.read(HEAD), tensors()["lm_head.weight"].T)


def test_the_hubs_cache_works_offline(tmp_path):
    pytest.importorskip("huggingface_hub")
    snapshot = lay_out_cache(tmp_path, tensors())
    code = """
    from prompt_tuning.checkpoints import huggingface
    print(huggingface.resolve("acme/tiny-t5"))
    """
    assert run_offline(code, tmp_path) == str(snapshot)


def test_a_model_that_the_hub_does_not_give(tmp_path):
    pytest.importorskip("huggingface_hub")
    code = """
    from prompt_tuning.checkpoints import huggingface
    from prompt_tuning.errors import UserError
    try:
        huggingface.resolve("acme/tiny-t5")
    except UserError as error:
        print(error)
    """
    said = run_offline(code, tmp_path)
    assert said.startswith("there is no folder acme/tiny-t5, and the Hugging Face hub")
    assert "\n" not in said


# Writing.


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 3000, 1])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_there_and_back_is_the_same_to_the_bit(tmp_path, dtype, shard_bytes):
    arrays = tensors(dtype=dtype)
    first = huggingface.open_checkpoint(save(tmp_path / "first", arrays, shards=2))
    huggingface.write_checkpoint(
        tmp_path / "second", first, sizes=first.sizes, shard_bytes=shard_bytes
    )
    written = {}
    shards = sorted((tmp_path / "second").glob("*.safetensors"))
    for shard in shards:
        with safetensors.safe_open(shard, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
        part = safetensors.numpy.load_file(shard)
        data = sum(array.nbytes for array in part.values())
        assert data <= shard_bytes or len(part) == 1
        written |= part
    assert len(shards) == {5 * 10**9: 1, 1: len(arrays)}.get(shard_bytes, len(shards))
    assert (tmp_path / "second/model.safetensors.index.json").exists() == (
        len(shards) > 1
    )
    assert_same(written, arrays)
    second = huggingface.open_checkpoint(tmp_path / "second")
    assert second.sizes == first.sizes
    assert_same(read_all(second), read_all(first))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_another_formats_weights_come_back_to_the_bit(tmp_path, tiny_config, tied):
    config = dataclasses.replace(
        tiny_config,
        logits_via_embedding=tied,
        mlp_activations=("relu",) if tied else ("gelu", "linear"),
        num_decoder_layers=3,
    )
    params = jax.jit(Model(Transformer(config)).init)(jax.random.key(0))
    source = from_params(params)
    sizes = dataclasses.asdict(config)
    huggingface.write_checkpoint(tmp_path / "model", source, sizes=sizes)
    back = huggingface.open_checkpoint(tmp_path / "model")
    assert_same(read_all(back), read_all(source))
    assert back.sizes == {name: sizes[name] for name in back.sizes}
    ways = {"attention", "dtype", "int8_products", "remat", "unroll"}
    assert {*sizes} - {*back.sizes} == ways


def written_config(folder, source, **options):
    sizes = {**source.sizes, **options.pop("sizes", {})}
    huggingface.write_checkpoint(folder, source, sizes=sizes, **options)
    return json.loads((folder / "config.json").read_text())


def test_the_config_that_is_written(tmp_path):
    source = huggingface.open_checkpoint(save(tmp_path / "model", tensors()))
    assert written_config(tmp_path / "copy", source) == {
        **{k: v for k, v in CONFIG.items() if k != "transformers_version"},
        "architectures": ["T5ForConditionalGeneration"],
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": True,
        "use_cache": True,
        "torch_dtype": "float32",
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    generation = json.loads((tmp_path / "copy/generation_config.json").read_text())
    assert generation["decoder_start_token_id"] == 0


def test_mt5_stays_mt5_unless_it_is_tied(tmp_path):
    fields = {"model_type": "mt5"}
    untied = huggingface.open_checkpoint(save(tmp_path / "a", tensors(), **fields))
    config = written_config(tmp_path / "a_copy", untied)
    assert config["model_type"] == "mt5"
    assert config["architectures"] == ["MT5ForConditionalGeneration"]
    fields["tie_word_embeddings"] = True
    arrays = tensors(head=False)
    tied = huggingface.open_checkpoint(save(tmp_path / "b", arrays, **fields))
    config = written_config(tmp_path / "b_copy", tied)
    assert (config["model_type"], config["tie_word_embeddings"]) == ("t5", True)


def test_a_smaller_dtype(tmp_path):
    source = huggingface.open_checkpoint(save(tmp_path / "model", tensors()))
    config = written_config(tmp_path / "copy", source, dtype="bfloat16")
    assert config["torch_dtype"] == "bfloat16"
    got = safetensors.numpy.load_file(tmp_path / "copy/model.safetensors")
    assert_same(got, {k: v.astype(BFLOAT16) for k, v in tensors().items()})


def test_the_vocabulary_and_the_progress(tmp_path):
    vocabulary = tmp_path / "some.model"
    vocabulary.write_bytes(b"pieces")
    source = huggingface.open_checkpoint(save(tmp_path / "model", tensors()))
    seen = []
    written_config(
        tmp_path / "copy", source, vocabulary=vocabulary, progress=seen.append
    )
    assert (tmp_path / "copy/spiece.model").read_bytes() == b"pieces"
    assert sorted(seen) == sorted(source.specs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": {"emb_dim": 16}}, r"encoder/layers_\{0-1\}/attention/query/kernel"),
        ({"sizes": {"num_decoder_layers": 2}}, r"decoder/layers_\{1\}/mlp/wo/kernel"),
        ({"sizes": {"logits_via_embedding": True}}, "shape: decoder/logits_dense/k"),
        ({"sizes": {"mlp_activations": ("tanh", "linear")}}, "tanh.*has no name in"),
        ({"sizes": {"mlp_activations": ("gelu", "gelu")}}, "followed by linear"),
        ({"dtype": "float16"}, "dtype 'float16' is not"),
        ({"vocabulary": "nowhere.model"}, "there is no vocabulary nowhere.model"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, options, message):
    source = huggingface.open_checkpoint(save(tmp_path / "model", tensors()))
    with pytest.raises(UserError, match=message):
        written_config(tmp_path / "copies" / "one", source, **options)
    assert not (tmp_path / "copies").exists()


@pytest.mark.slow
def test_an_mlp_that_transformers_lacks(tmp_path, tiny_config):
    activations = ("gelu", "linear", "linear")
    config = dataclasses.replace(tiny_config, mlp_activations=activations)
    source = from_params(Model(Transformer(config)).init(jax.random.key(0)))
    with pytest.raises(UserError, match="mlp_activations=.* has no name"):
        written_config(tmp_path / "copy", source, sizes=dataclasses.asdict(config))


def test_unknown_tensors_are_not_dropped(tmp_path):
    arrays = tensors() | {"adapter.weight": np.ones(2, np.float32)}
    source = huggingface.open_checkpoint(save(tmp_path / "model", arrays))
    with pytest.raises(UserError, match="unused or of another shape: adapter.weight"):
        written_config(tmp_path / "copy", source)


def test_an_existing_folder_is_refused(tmp_path):
    source = huggingface.open_checkpoint(save(tmp_path / "model", tensors()))
    (tmp_path / "empty").mkdir()
    for name in ("model", "empty"):
        with pytest.raises(UserError, match="exists already"):
            written_config(tmp_path / name, source)


def test_a_source_that_fails_half_way_leaves_nothing(tmp_path):
    save(tmp_path / "model", tensors(), shards=2)
    source = huggingface.open_checkpoint(tmp_path / "model")
    (tmp_path / "model/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="there is no file"):
        written_config(tmp_path / "copy", source)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Files written tensor by tensor.


def test_a_stream_of_tensors(tmp_path):
    arrays = {
        "odd": np.arange(3, dtype=BFLOAT16),
        "wide": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "empty": np.zeros((0, 4), np.float32),
    }
    specs = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in arrays.items()}
    path = tmp_path / "some.safetensors"
    files.write_stream(path, specs, arrays.__getitem__, {"format": "pt"})
    assert_same(safetensors.numpy.load_file(path), arrays)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    # Readers that map a file into memory want numbers at multiples of their size.
    assert length % 8 == 0
    assert header["wide"]["data_offsets"][0] % 4 == 0


def test_a_stream_holds_one_tensor_at_a_time(tmp_path):
    specs = {f"t{i}": jax.ShapeDtypeStruct((100,), np.float32) for i in range(5)}
    given = []

    def read(name):
        # The tensor before the last may still wait for its variable to be overwritten.
        assert sum(reference() is not None for reference in given) <= 1
        array = np.full(100, int(name[1:]), np.float32)
        given.append(weakref.ref(array))
        return array

    files.write_stream(tmp_path / "some.safetensors", specs, read, {})
    assert len(given) == 5


@pytest.mark.parametrize("array", [np.zeros(3, np.float32), np.zeros(2, BFLOAT16)])
def test_a_stream_that_is_not_as_announced(tmp_path, array):
    specs = {"t": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(ValueError, match="t is "):
        files.write_stream(tmp_path / "a.safetensors", specs, lambda _: array, {})
    assert not list(tmp_path.iterdir())
