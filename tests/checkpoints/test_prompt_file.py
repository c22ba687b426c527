# SPDX-License-Identifier: Apache-2.0
"""Prompt files: float32 to the last bit, with a card, and never for another model."""

import json
import os
import resource

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.errors import UserError

CARD = {
    "method": "prompt_tuning",
    "placement": "prefix",
    "task": "sentiment",
    "base_model": {"name": "t5_1_1_mini", "fingerprint": "f" * 64},
    "metric": {"accuracy": 0.75},
}


@pytest.fixture
def prompt():
    return 750 * np.asarray(jax.random.normal(jax.random.key(0), (5, 32)))


@pytest.fixture
def path(tmp_path, prompt):
    prompt_file.save_prompt(tmp_path / "p.safetensors", prompt, CARD)
    return tmp_path / "p.safetensors"


def test_array_and_card_come_back(path, prompt):
    array, card = prompt_file.load_prompt(path)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, prompt)
    assert card == {**CARD, "length": 5, "width": 32}
    assert os.listdir(path.parent) == ["p.safetensors"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_only_float32_is_written(tmp_path, prompt, dtype):
    with pytest.raises(ValueError, match="float32"):
        prompt_file.save_prompt(tmp_path / "p", jnp.asarray(prompt, dtype), CARD)
    with pytest.raises(ValueError, match=r"not \[32\]"):
        prompt_file.save_prompt(tmp_path / "p", prompt[0], CARD)
    assert not os.listdir(tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path, prompt):
    bad = prompt.copy()
    bad[1, 2], bad[3, 4] = np.nan, np.inf
    with pytest.raises(UserError, match="2 values that are not finite"):
        prompt_file.save_prompt(tmp_path / "p", bad, CARD)
    assert not os.listdir(tmp_path)
    card = json.dumps({**CARD, "length": 5, "width": 32})
    safetensors.numpy.save_file({"prompt": bad}, tmp_path / "p", {"card": card})
    with pytest.raises(UserError, match="2 values that are not finite"):
        prompt_file.load_prompt(tmp_path / "p")


def test_a_card_that_contradicts_the_array_is_refused(tmp_path, prompt):
    with pytest.raises(ValueError, match="card says length 4, the array has 5"):
        prompt_file.save_prompt(tmp_path / "p", prompt, {**CARD, "length": 4})
    card = json.dumps({**CARD, "length": 4, "width": 32})
    safetensors.numpy.save_file({"prompt": prompt}, tmp_path / "p", {"card": card})
    with pytest.raises(UserError, match="contradicts itself: its card says length 4"):
        prompt_file.load_prompt(tmp_path / "p")


def test_other_files_are_one_line_with_a_cure(tmp_path, path, prompt):
    def message(file) -> str:
        with pytest.raises(UserError) as caught:
            prompt_file.load_prompt(file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no file" in message(tmp_path / "absent")
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut short" in message(path)
    np.save(tmp_path / "p.npy", prompt)
    assert "is not a prompt file" in message(tmp_path / "p.npy")
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"prompt": prompt}, other)
    assert "is no prompt file" in message(other)
    safetensors.numpy.save_file({"prompt": prompt}, other, {"card": "{'a"})
    assert "damaged card" in message(other)
    half = {"prompt": prompt.astype(ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(half, other, {"card": "{}"})
    assert "holds a bfloat16 array" in message(other)


def test_a_flipped_bit_is_noticed(path):
    whole = bytearray(path.read_bytes())
    whole[-4] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="damaged: its numbers are not those"):
        prompt_file.load_prompt(path)


def test_a_prompt_of_another_vocabulary_is_refused(path):
    _, card = prompt_file.load_prompt(path)
    prompt_file.check_vocabulary(card, "a" * 64)
    card |= {"vocabulary": "mini", "vocabulary_fingerprint": "a" * 64}
    prompt_file.check_vocabulary(card, "a" * 64)
    with pytest.raises(UserError, match="vocabulary mini .a{12}., this is .*b{12}"):
        prompt_file.check_vocabulary(card, "b" * 64)
    prompt_file.check_vocabulary(card, "b" * 64, force=True)


def test_a_prompt_of_another_base_model_is_refused(path):
    _, card = prompt_file.load_prompt(path)
    prompt_file.check_compatible(card, "f" * 64, 32)
    with pytest.raises(UserError, match="t5_1_1_mini .fingerprint f{12}., not .*e{12}"):
        prompt_file.check_compatible(card, "e" * 64, 32)
    prompt_file.check_compatible(card, "e" * 64, 32, force=True)
    for force in (False, True):
        with pytest.raises(UserError, match="width 32, the model has width 48; use"):
            prompt_file.check_compatible(card, "f" * 64, 48, force=force)
    nameless = {**card, "base_model": None}
    with pytest.raises(UserError, match="does not say which base model"):
        prompt_file.check_compatible(nameless, "f" * 64, 32)
    prompt_file.check_compatible(nameless, "f" * 64, 32, force=True)


def test_a_full_disk_keeps_the_old_prompt(path, prompt):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(UserError, match="cannot write .*disk with room"):
            prompt_file.save_prompt(path, prompt + 1, CARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    np.testing.assert_array_equal(prompt_file.load_prompt(path)[0], prompt)
    assert os.listdir(path.parent) == ["p.safetensors"]
