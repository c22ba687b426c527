# SPDX-License-Identifier: Apache-2.0
"""Prompts move between formats without the loss of a bit, or not at all."""

import itertools
import json
import os
import pickle
import resource
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.serialization import msgpack_restore, msgpack_serialize

from prompt_tuning.checkpoints import cards, peft, prompt_file, prompt_formats
from prompt_tuning.errors import UserError

CARD = {
    "method": "prompt_tuning",
    "length": 5,
    "width": 32,
    "placement": "prepend",
    "template": "review: {sentence}",
    "task": "sentiment",
    "base_model": {"name": "t5_1_1_mini", "fingerprint": "f" * 64},
    "metric": {"accuracy": 0.75},
}
# What PEFT 0.21 writes for a prompt of five tokens, with its defaults.
PEFT_CONFIG = {
    "auto_mapping": None,
    "base_model_name_or_path": "google/t5-v1_1-small",
    "inference_mode": True,
    "modules_to_save": None,
    "num_attention_heads": 4,
    "num_layers": 2,
    "num_transformer_submodules": 2,
    "num_virtual_tokens": 5,
    "peft_type": "PROMPT_TUNING",
    "peft_version": "0.21.2",
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "revision": None,
    "task_type": "SEQ_2_SEQ_LM",
    "token_dim": 32,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": None,
}


@pytest.fixture(scope="module")
def prompt():
    """Values as large as tuned prompts have, and the corners of float32."""
    array = np.random.default_rng(0).normal(scale=750, size=(5, 32)).astype(np.float32)
    info = np.finfo(np.float32)
    corners = [0.0, -0.0, info.max, -info.max, info.tiny, info.smallest_subnormal]
    array[0, : len(corners)] = corners
    array[1] = array[1] * np.float32(1e-43)
    assert 0 < np.abs(array[1]).max() < info.tiny
    return array


def assert_same_bits(got, want):
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def write_peft(folder, rows, tensors=(), **config):
    """A folder as PEFT writes it; fields that are given as None become null."""
    folder.mkdir()
    text = json.dumps({**PEFT_CONFIG, **config})
    (folder / "adapter_config.json").write_text(text)
    safetensors.numpy.save_file(
        {"prompt_embeddings": rows, **dict(tensors)},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    return folder


def write_npy(path, array, **kwargs):
    """A NumPy file under exactly this name."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        np.save(file, array, **kwargs)
    return path


def message(path) -> str:
    """The one line that refuses to load ``path``."""
    with pytest.raises(UserError) as caught:
        prompt_formats.load(path)
    text = str(caught.value)
    assert "\n" not in text and os.path.basename(path) in text
    return text


@pytest.mark.parametrize(
    "first, second", itertools.product(prompt_formats.FORMATS, repeat=2)
)
def test_a_prompt_goes_through_two_formats_unchanged(tmp_path, prompt, first, second):
    prompt_formats.save(tmp_path / "one", prompt, CARD, first)
    array, card = prompt_formats.load(tmp_path / "one")
    assert_same_bits(array, prompt)
    prompt_formats.save(tmp_path / "two", array, card, second)
    array, card = prompt_formats.load(tmp_path / "two")
    assert_same_bits(array, prompt)
    assert prompt_formats.detect(tmp_path / "two") == second.removesuffix("-doubled")
    if "npy" not in (first, second):
        assert card == CARD
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_numbers_without_a_card_get_one(tmp_path, prompt):
    prompt_formats.save(tmp_path / "encoder.prompt", prompt, CARD, "npy")
    _, card = prompt_formats.load(tmp_path / "encoder.prompt")
    assert card == {
        "method": "prompt_tuning",
        "length": 5,
        "width": 32,
        "source": {"format": "npy", "path": "encoder.prompt"},
        "base_model": {},
        "notes": [cards.NO_CHECKSUM],
    }
    with pytest.raises(UserError, match="does not say which base model"):
        prompt_file.check_compatible(card, "f" * 64, 32)


# The original project.


def test_released_prompts(tmp_path, shared):
    means = []
    for path in sorted((shared / "released_prompts").glob("*.npy")):
        array, card = prompt_formats.load(path)
        assert_same_bits(array, np.load(path))
        assert (card["length"], card["width"]) == array.shape == (100, 768)
        means.append(np.linalg.norm(array, axis=1).mean())
        for format in prompt_formats.FORMATS:
            target = tmp_path / f"{path.name}-{format}"
            prompt_formats.save(target, array, card, format)
            assert_same_bits(prompt_formats.load(target)[0], array)
            if format == "npy":
                assert target.read_bytes() == path.read_bytes()
    assert [round(float(mean)) for mean in sorted(means)] == [868, 903, 1385]


def test_a_folder_of_the_original_project(tmp_path, prompt):
    folder = tmp_path / "checkpoint_1150000"
    write_npy(folder / "encoder.prompt.prompt.prompt", prompt)
    (folder / "README").write_text("not a prompt")
    assert prompt_formats.detect(folder) == "npy"
    array, card = prompt_formats.load(folder)
    assert_same_bits(array, prompt)
    assert card["source"] == {"format": "npy", "path": "encoder.prompt.prompt.prompt"}
    write_npy(folder / "decoder.prompt.prompt.prompt", prompt)
    text = message(folder)
    assert "2 prompts" in text
    assert "encoder.prompt.prompt.prompt" in text
    assert "decoder.prompt.prompt.prompt" in text


def test_a_prompt_inside_a_t5x_checkpoint(tmp_path, t5x_checkpoints, golden):
    path = t5x_checkpoints / "t5x_native" / "prompt" / "checkpoint_3"
    assert prompt_formats.detect(path) == "t5x"
    array, card = prompt_formats.load(path)
    assert_same_bits(array, np.load(golden / "prompt" / "prompt_after_step3.npy"))
    assert card == {
        "method": "prompt_tuning",
        "length": 5,
        "width": 32,
        "source": {
            "format": "t5x",
            "path": "checkpoint_3",
            "parameter": "encoder/prompt/prompt/prompt",
        },
        "base_model": {},
    }
    for format in prompt_formats.FORMATS:
        prompt_formats.save(tmp_path / format, array, card, format)
        assert_same_bits(prompt_formats.load(tmp_path / format)[0], array)


@pytest.mark.parametrize("format", ["t5x_native", "t5x_orbax"])
def test_a_t5x_checkpoint_without_a_prompt(t5x_checkpoints, format):
    path = t5x_checkpoints / format / "t5_1_1" / "checkpoint_2"
    assert prompt_formats.detect(path) is None
    assert "there is no prompt" in message(path)


def test_a_t5x_checkpoint_of_several_prompts(tmp_path, t5x_checkpoints, prompt):
    original = t5x_checkpoints / "t5x_native" / "prompt" / "checkpoint_3"
    path = tmp_path / "checkpoint_3"
    shutil.copytree(original, path, copy_function=shutil.copyfile)
    state = msgpack_restore((path / "checkpoint").read_bytes())
    # Small arrays lie in the index itself.
    state["optimizer"]["target"]["decoder"]["prompt"] = {"prompt": {"prompt": prompt}}
    (path / "checkpoint").write_bytes(msgpack_serialize(state))
    text = message(path)
    assert "2 prompts" in text
    assert "decoder/prompt/prompt/prompt, encoder/prompt/prompt/prompt" in text


# Bare NumPy files.


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, np.longdouble, ml_dtypes.bfloat16]
)
def test_other_dtypes_are_taken_where_nothing_is_rounded(tmp_path, prompt, dtype):
    exact = prompt.astype(ml_dtypes.bfloat16)[2:].astype(dtype)
    if dtype == ml_dtypes.bfloat16:
        # NumPy writes it as two bytes that may mean anything.
        text = message(write_npy(tmp_path / "p", exact))
        assert "|V2" in text
        return
    array, _ = prompt_formats.load(write_npy(tmp_path / "p", exact))
    assert_same_bits(array, exact.astype(np.float32))
    if dtype != np.float16:
        rounded = exact + np.asarray(1e-7, dtype)
        assert "rounded to float32" in message(write_npy(tmp_path / "p", rounded))
        huge = np.full((2, 3), 1e300, dtype)
        assert "rounded to float32" in message(write_npy(tmp_path / "p", huge))


def test_columns_first_are_the_same_array(tmp_path, prompt):
    write_npy(tmp_path / "p", np.asfortranarray(prompt))
    assert_same_bits(prompt_formats.load(tmp_path / "p")[0], prompt)


@pytest.mark.parametrize(
    "array, what",
    [
        (np.zeros(32, np.float32), r"float32 array [32]"),
        (np.zeros((2, 5, 32), np.float32), r"float32 array [2, 5, 32]"),
        (np.zeros((0, 32), np.float32), r"float32 array [0, 32]"),
        (np.zeros((5, 32), np.int32), "int32 array"),
        (np.zeros((5, 32), np.complex64), "complex64 array"),
        (np.zeros((5, 32), ">f4"), ">f4 array"),
        (np.full((5, 32), np.nan, np.float32), "160 values that are not finite"),
        (np.full((5, 32), np.inf, np.float64), "160 values that are not finite"),
    ],
)
def test_arrays_that_are_no_prompts(tmp_path, array, what):
    assert what in message(write_npy(tmp_path / "p.npy", array))


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_is_unpickled(tmp_path, prompt):
    bomb = Bomb(tmp_path / "boom")
    objects = np.full((64, 64), bomb, dtype=object)
    path = write_npy(tmp_path / "p.npy", objects, allow_pickle=True)
    header = path.read_bytes().index(b"\n") + 1
    # As long as the header says, so that the length does not give it away.
    os.truncate(path, header + objects.size * objects.itemsize)
    assert "Object arrays cannot be loaded" in message(path)
    folder = write_peft(tmp_path / "adapter", prompt)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(bomb))
    assert "safe_serialization=True" in message(folder)
    assert not bomb.path.exists()
    pickle.loads((folder / "adapter_model.bin").read_bytes()).close()
    assert bomb.path.exists()


def test_a_numpy_file_that_is_cut_short_or_too_long(tmp_path, prompt):
    path = write_npy(tmp_path / "p.npy", prompt)
    whole = path.read_bytes()
    for size in (7, 9, 50, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "damaged" in message(path)
    path.write_bytes(whole + b"\0")
    assert "says that it is 768 bytes long" in message(path)


def test_a_flipped_bit_in_a_numpy_header_is_never_misread(tmp_path, prompt):
    path = write_npy(tmp_path / "p.npy", prompt)
    whole = path.read_bytes()
    header = len(whole) - prompt.nbytes
    refused = 0
    for bit in range(8 * header):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            array, _ = prompt_formats.load(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert_same_bits(array, prompt)
    assert refused > 300


# PEFT.


@pytest.mark.parametrize("submodules", [2, None])
def test_the_half_that_peft_does_not_use_is_left_out(tmp_path, prompt, submodules):
    rows = np.concatenate([prompt, np.ones_like(prompt)])
    folder = write_peft(tmp_path / "a", rows, num_transformer_submodules=submodules)
    array, card = prompt_formats.load(folder)
    assert_same_bits(array, prompt)
    kept = {"num_transformer_submodules": submodules} if submodules else {}
    assert card == {
        "method": "prompt_tuning",
        "placement": "prepend",
        "length": 5,
        "width": 32,
        "base_model": {"name": "google/t5-v1_1-small"},
        "source": {"format": "peft", "path": "a"},
        "peft": {
            **kept,
            "num_attention_heads": 4,
            "num_layers": 2,
            "peft_version": "0.21.2",
            "prompt_tuning_init": "RANDOM",
            "unused_rows": 5,
        },
        "notes": [
            cards.NO_CHECKSUM,
            "PEFT saved 10 rows and uses the first 5; the other 5 were left out",
        ],
    }


def test_what_only_peft_knows_survives_our_format(tmp_path, prompt):
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Say if"}
    folder = write_peft(
        tmp_path / "peft",
        prompt,
        num_transformer_submodules=1,
        tokenizer_name_or_path="google/t5-v1_1-small",
        revision="main",
        **text,
    )
    array, card = prompt_formats.load(folder)
    assert card["notes"] == [cards.NO_CHECKSUM] and card["peft"]["unused_rows"] == 0
    prompt_formats.save(tmp_path / "ours", array, card, "native")
    prompt_formats.save(
        tmp_path / "out", *prompt_formats.load(tmp_path / "ours"), "peft"
    )
    read = lambda path: json.loads((path / "adapter_config.json").read_text())
    ours, theirs = read(tmp_path / "out"), read(folder)
    assert {key: theirs[key] for key in ours} == ours
    assert theirs.keys() - ours.keys() == {
        "peft_version",
        "tokenizer_kwargs",
        "modules_to_save",
    }


def test_what_is_written_for_peft(tmp_path, prompt):
    for format, runs in (("peft", 1), ("peft-doubled", 2)):
        folder = tmp_path / format
        prompt_formats.save(folder, prompt, CARD, format)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["num_transformer_submodules"] == runs
        assert (config["num_virtual_tokens"], config["token_dim"]) == (5, 32)
        assert config["base_model_name_or_path"] == "t5_1_1_mini"
        tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        (rows,) = tensors.values()
        assert_same_bits(rows[:5], prompt)
        assert rows.shape == (5 * runs, 32) and not rows[5:].any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_are_widened(tmp_path, dtype):
    rows = np.random.default_rng(1).normal(size=(10, 32)).astype(dtype)
    array, _ = prompt_formats.load(write_peft(tmp_path / "a", rows))
    assert_same_bits(array, rows[:5].astype(np.float32))


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"peft_type": "LORA"}, "peft_type 'LORA'"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING'"),
        ({"peft_type": "P_TUNING"}, "peft_type 'P_TUNING'"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "num_tasks None, and a prompt is"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 1}, "task_cols' and"),
        ({"peft_type": None}, "peft_type None"),
        ({"task_type": "CAUSAL_LM"}, "task_type 'CAUSAL_LM'"),
        ({"num_virtual_tokens": "5"}, "num_virtual_tokens '5'"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens 0"),
        ({"token_dim": None}, "token_dim None"),
        ({"num_virtual_tokens": 10}, "2 x 10 rows of width 32"),
        ({"token_dim": 16}, "2 x 5 rows of width 16"),
        ({"num_transformer_submodules": 1}, "1 x 5 rows"),
        ({"num_transformer_submodules": "2"}, "2 x 5 rows"),
        ({"tensors": {"lm_head.weight": np.zeros(2)}}, "lm_head.weight"),
        ({"rows": np.zeros((10, 32), np.int64)}, "type I64"),
        ({"rows": np.full((10, 32), np.inf, np.float32)}, "160 values"),
    ],
)
def test_folders_of_peft_that_are_no_prompts(tmp_path, changes, what):
    rows = np.zeros((10, 32), np.float32)
    folder = write_peft(tmp_path / "adapter", **{"rows": rows, **changes})
    assert prompt_formats.detect(folder) == "peft"
    assert what in message(folder)


def write_multitask(path, shared, left, right, **changes):
    tensors = {"prefix_task_cols": left, "prefix_task_rows": right}
    kind = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 1, **changes}
    return write_peft(path, shared, tensors, **kind)


def test_a_multitask_prompt_of_peft_is_its_product(tmp_path):
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    shared, left, right = draw(10, 32), draw(1, 10, 2), draw(1, 2, 32)
    start = {"prompt_tuning_init": "ONLY_SOURCE_SHARED"}
    folder = write_multitask(tmp_path / "one", shared, left, right, **start)
    array, card = prompt_formats.load(folder)
    np.testing.assert_allclose(array, (shared * (left[0] @ right[0]))[:5], rtol=1e-6)
    assert card["method"] == "multitask_prompt"
    # It goes out as a plain prompt, without the start that those do not have.
    prompt_formats.save(tmp_path / "out", array, card, "peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PROMPT_TUNING"
    assert config["prompt_tuning_init"] == "RANDOM"
    assert_same_bits(prompt_formats.load(tmp_path / "out")[0], array)
    for number, wrong in enumerate(
        [
            (shared, left[0], right),
            (shared, left[:, :5], right),
            (shared, left, right[:, :1]),
            (shared, draw(2, 10, 2), draw(2, 2, 32)),
        ]
    ):
        folder = write_multitask(tmp_path / f"wrong_{number}", *wrong)
        assert "contradicts itself: its arrays are [10, 32]" in message(folder)
    folder = write_multitask(tmp_path / "two", shared, left, right, num_tasks=2)
    assert "EXACT_SOURCE_TASK" in message(folder)


def test_damaged_folders_of_peft(tmp_path, prompt):
    folder = tmp_path / "adapter"
    prompt_formats.save(folder, prompt, CARD, "peft")
    tensors, config = (
        folder / "adapter_model.safetensors",
        folder / "adapter_config.json",
    )
    whole, text = tensors.read_bytes(), config.read_text()
    tensors.write_bytes(whole[:-1])
    assert "cut short" in message(tensors.parent)
    tensors.unlink()
    assert "there is no file" in message(folder)
    tensors.write_bytes(whole.replace(rb"\"length\": 5", rb"\"length\": 6"))
    assert "damaged card" in message(folder)
    tensors.write_bytes(whole.replace(rb"{\"method\"", rb"[\"method\""))
    assert "damaged card" in message(folder)
    tensors.write_bytes(whole)
    for bad in (text[:-3], "[]", "[" * 100_000, '{"token_dim": ' + 5000 * "9" + "}"):
        config.write_text(bad)
        assert "damaged JSON" in message(folder)
    config.write_bytes(b"\xff")
    assert "cannot read" in message(folder)


def test_links_of_a_folder_of_peft(tmp_path, prompt):
    folder = tmp_path / "hub" / "snapshots" / "abc"
    folder.parent.mkdir(parents=True)
    write_peft(folder, np.concatenate([prompt, prompt]))
    tensors = folder / "adapter_model.safetensors"
    (tmp_path / "hub" / "blobs").mkdir()
    tensors.rename(tmp_path / "hub" / "blobs" / "1")
    # As the hub's cache has it.
    tensors.symlink_to("../../blobs/1")
    assert_same_bits(prompt_formats.load(folder)[0], prompt)
    outside = (tmp_path / "hub" / "blobs" / "1").rename(tmp_path / "secret")
    tensors.unlink()
    tensors.symlink_to(outside)
    assert "which leads out of it" in message(folder)
    outside = (folder / "adapter_config.json").rename(tmp_path / "config")
    (folder / "adapter_config.json").symlink_to(outside)
    assert "which leads out of it" in message(folder)


def test_prompts_that_would_be_others_in_peft(tmp_path, prompt):
    cards = [
        {"placement": "append"},
        {"template": "{sentence} {prompt}"},
        {"template": "{prompt:0:2} premise: {premise} {prompt:2:5}"},
    ]
    for changes in cards:
        with pytest.raises(UserError, match="in front of the text"):
            prompt_formats.save(tmp_path / "p", prompt, {**CARD, **changes}, "peft")
    assert not os.listdir(tmp_path)
    # Whatever a prompt was made of, it is a prompt.
    template = {"template": "{prompt} review: {sentence}"}
    card = {**CARD, "method": "residual_prompt", **template}
    prompt_formats.save(tmp_path / "p", prompt, card, "peft")


def test_a_folder_that_exists(tmp_path, prompt):
    (tmp_path / "empty").mkdir()
    prompt_formats.save(tmp_path / "empty", prompt, CARD, "peft")
    before = os.stat(tmp_path / "empty" / "adapter_config.json").st_mtime_ns
    with pytest.raises(UserError, match="exists already"):
        prompt_formats.save(tmp_path / "empty", prompt, CARD, "peft")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        prompt_formats.save(tmp_path / "file", prompt, CARD, "peft")
    assert (tmp_path / "file").read_text() == "mine"
    assert os.stat(tmp_path / "empty" / "adapter_config.json").st_mtime_ns == before


# Writing.


@pytest.mark.parametrize("format", prompt_formats.FORMATS)
def test_a_full_disk_leaves_nothing_behind(tmp_path, prompt, format):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match="cannot write .*disk with room"):
            prompt_formats.save(tmp_path / "new" / "p", prompt, CARD, format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("format", prompt_formats.FORMATS)
def test_what_is_no_prompt_is_not_written(tmp_path, prompt, format):
    path = tmp_path / "p"
    with pytest.raises(UserError, match=r"float32 array \[32\]"):
        prompt_formats.save(path, prompt[0], CARD, format)
    with pytest.raises(UserError, match="160 values that are not finite"):
        prompt_formats.save(path, prompt * np.float32(np.nan), CARD, format)
    with pytest.raises(ValueError, match=r"other sizes than \[4, 32\]"):
        prompt_formats.save(path, prompt[:4], CARD, format)
    assert not os.listdir(tmp_path)


def test_an_unknown_format(tmp_path, prompt):
    with pytest.raises(UserError, match="'onnx'; choose one of native, npy, peft, "):
        prompt_formats.save(tmp_path / "p", prompt, CARD, "onnx")
    assert not os.listdir(tmp_path)


def test_what_holds_no_prompt(tmp_path):
    (tmp_path / "text").write_text("words")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    model = {"token_embedder/embedding": np.zeros((4, 2), np.float32)}
    safetensors.numpy.save_file(model, tmp_path / "model.safetensors")
    for name, what in {
        "text": "is not a prompt file",
        "empty": "is not a prompt file",
        "folder": "there is no prompt",
        "absent": "there is no prompt",
        "model.safetensors": "is no prompt file",
    }.items():
        assert prompt_formats.detect(tmp_path / name) is None
        assert what in message(tmp_path / name)
    assert not peft.is_prompt(tmp_path / "text")
