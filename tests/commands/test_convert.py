# SPDX-License-Identifier: Apache-2.0
"""Models and prompts from one format to another, and into a run from each of them."""

import json

import jax
import numpy as np
import pytest

from prompt_tuning import cli, dtypes, trees
from prompt_tuning.checkpoints import (
    base_models,
    formats,
    layout,
    model_file,
    prompt_file,
)
from prompt_tuning.commands import convert
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer

VARIANTS = {
    "t5_1_1": {},
    "t5_1_0": {"mlp_activations": ("relu",), "logits_via_embedding": True},
}


def place(format, folder):
    """Where a model of this format lies once it was written to ``folder``."""
    return folder / "checkpoint_0" if format == "t5x" else folder


@pytest.fixture(params=VARIANTS)
def config(request, tiny_config):
    return T5Config(**{**vars(tiny_config), **VARIANTS[request.param]})


@pytest.fixture
def params(config):
    return jax.jit(Model(Transformer(config)).init)(jax.random.key(3))


@pytest.fixture
def native(tmp_path, params):
    folder = tmp_path / "native"
    model_file.save_model(folder, params, {"note": "tiny"})
    (folder / "spiece.model").write_bytes(b"pieces")
    return folder


def same(a, b):
    a, b = trees.flatten(a), trees.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]))


@pytest.mark.parametrize("first", formats.FORMATS)
@pytest.mark.parametrize("second", formats.FORMATS)
def test_conversions_lose_no_bit(first, second, native, params, config, tmp_path):
    convert.convert(str(native), str(tmp_path / "a"), to=first)
    convert.convert(str(place(first, tmp_path / "a")), str(tmp_path / "b"), to=second)
    found = place(second, tmp_path / "b")
    source = formats.open_model(found)
    assert source.format == second
    assert formats.architecture(source) == config
    same(base_models.load(config, found, frozen_dtype="float32").params, params)
    # T5X's format has no place for a vocabulary, so it does not get through that one.
    assert (formats.find_vocabulary(found) is not None) == (
        "t5x" not in (first, second)
    )


def test_a_run_knows_a_model_whatever_its_format(native, config, tmp_path):
    prints = {base_models.load(config, native).fingerprint}
    for format in ("t5x", "huggingface"):
        for dtype in ("float32", "bfloat16"):
            folder = tmp_path / format / dtype
            convert.convert(str(native), str(folder), to=format, dtype=dtype)
            prints.add(base_models.load(config, place(format, folder)).fingerprint)
    assert len(prints) == 1


def test_bfloat16_halves_a_model(native, tmp_path):
    convert.convert(str(native), str(tmp_path / "half"), to="native", dtype="bfloat16")
    specs = formats.open_model(tmp_path / "half").specs
    assert {str(spec.dtype) for spec in specs.values()} == {"bfloat16"}


def test_the_embedded_model_goes_out_and_comes_back(tmp_path):
    out, back = tmp_path / "mini", tmp_path / "back"
    assert (
        cli.main(["convert", "embedded:t5_1_1_mini", str(out), "--to", "huggingface"])
        == 0
    )
    assert cli.main(["convert", str(out), str(back), "--to", "native"]) == 0
    mine = formats.open_model(base_models.ASSETS / "t5_1_1_mini")
    theirs = formats.open_model(back)
    assert mine.specs == theirs.specs
    for name in mine.specs:
        np.testing.assert_array_equal(mine.read(name), theirs.read(name))
    assert json.loads((out / "config.json").read_text())["d_model"] == 192


@pytest.mark.parametrize("format", ["npy", "peft"])
def test_prompts_go_out_and_come_back(format, tmp_path):
    array = 700 * np.random.default_rng(0).standard_normal((7, 32), np.float32)
    card = {"task": "t", "base_model": {"name": "google/t5", "fingerprint": "ab"}}
    prompt_file.save_prompt(tmp_path / "p.safetensors", array, card)
    out, back = str(tmp_path / "out"), str(tmp_path / "back.safetensors")
    assert (
        cli.main(["convert", str(tmp_path / "p.safetensors"), out, "--to", format]) == 0
    )
    assert cli.main(["convert", out, back, "--to", "native"]) == 0
    again, _ = prompt_file.load_prompt(back)
    np.testing.assert_array_equal(again, array)


def test_a_config_of_another_size_names_both(native, config, tmp_path, capsys):
    convert.convert(str(native), str(tmp_path / "hf"), to="huggingface")
    wider = T5Config(**{**vars(config), "emb_dim": 64, "relpos_max_distance": 99})
    with pytest.raises(UserError) as caught:
        base_models.load(wider, tmp_path / "hf")
    assert "emb_dim is 32 there and 64 in the model file" in str(caught.value)
    assert "relpos_max_distance is 128 there and 99 in the" in str(caught.value)


def test_what_cannot_be_converted_is_one_line(native, tmp_path, capsys):
    prompt = tmp_path / "p.safetensors"
    prompt_file.save_prompt(prompt, np.ones((2, 32), np.float32), {})
    (tmp_path / "there").mkdir()
    (tmp_path / "notes").mkdir()
    for path, output, to, says in (
        (prompt, "x", "huggingface", "is a prompt, which --to huggingface cannot hold"),
        (native, "x", "npy", "is a model, which --to npy cannot hold"),
        (native, "x", "onnx", "choose one of native, t5x, huggingface"),
        (native, "there", "native", "exists already"),
        (native, "there", "huggingface", "exists already"),
        (tmp_path / "notes", "x", "native", "is no model that T5X, transformers or"),
        (tmp_path / "absent", "x", "native", "there is no folder"),
    ):
        arguments = ["convert", str(path), str(tmp_path / output), "--to", to]
        assert cli.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("format", ["t5x_native", "t5x_orbax", "t5x_native_bf16"])
def test_reference_checkpoints_hold_what_t5x_computed(
    format, variant, t5x_checkpoints, golden, tiny_config
):
    """The checkpoints are those of the reference after two Adafactor steps."""
    config = T5Config(**{**vars(tiny_config), **VARIANTS[variant]})
    loaded = base_models.load(
        config, t5x_checkpoints / format / variant, frozen_dtype="float32"
    )
    with np.load(golden / variant / "adafactor_step2.npz") as file:
        want = {
            name.removeprefix("target/"): file[name]
            for name in file
            if name.startswith("target/")
        }
    if format == "t5x_native_bf16":
        bfloat16 = dtypes.FLOATS["bfloat16"]
        want = {
            name: leaf.astype(bfloat16).astype(np.float32)
            for name, leaf in want.items()
        }
    same(loaded.params, trees.unflatten(layout.stack(want)))


def test_a_prompt_is_not_written_over_its_source(tmp_path):
    array = np.ones((2, 32), np.float32)
    prompt_file.save_prompt(tmp_path / "p", array, {})
    (tmp_path / "link").symlink_to("p")
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "p.npy", array)
    before = (tmp_path / "p").read_bytes()
    for path, output in (("p", "p"), ("p", "link"), ("folder", "folder/p.npy")):
        with pytest.raises(UserError, match="which is read"):
            convert.convert(str(tmp_path / path), str(tmp_path / output), to="npy")
    assert (tmp_path / "p").read_bytes() == before
    with pytest.raises(UserError, match="no file that can be replaced"):
        convert.convert(str(tmp_path / "p"), "/dev/full", to="npy")


def test_without_its_vocabulary_no_model_is_left(native, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for vocabulary in (tmp_path / "absent", tmp_path / "tokenizer.json"):
        for format in ("native", "huggingface", "t5x"):
            with pytest.raises(UserError):
                convert.convert(
                    str(native),
                    str(tmp_path / "out"),
                    to=format,
                    vocabulary=str(vocabulary),
                )
            assert not (tmp_path / "out").exists()
