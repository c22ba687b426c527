# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints are refused in one line, or hold what was written.

Every mutant is made by a seed. A mutation that a format cannot notice (a changed number
in a file without checksums) is not made; one that changes nothing that is read, such as
another space in a JSON file, may load, if every bit that was written comes back.
"""

import os
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from prompt_tuning import trees
from prompt_tuning.checkpoints import (
    base_models,
    model_file,
    prompt_file,
    prompt_formats,
)
from prompt_tuning.commands import convert
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer

MUTANTS = 110
CONFIG = T5Config(64, 8, 2, 2, 1, 4, 16)
CARD = {"method": "prompt_tuning", "task": "t", "base_model": {"name": "tiny"}}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A model and a prompt in every format, and what they hold."""
    folder = tmp_path_factory.mktemp("originals")
    params = jax.jit(Model(Transformer(CONFIG)).init)(jax.random.key(0))
    model_file.save_model(folder / "native", params, {"note": "tiny"})
    for format in ("t5x", "huggingface"):
        convert.convert(str(folder / "native"), str(folder / format), to=format)
    array = np.random.default_rng(0).standard_normal((4, 8), np.float32)
    for format in prompt_formats.FORMATS:
        # In a folder each, so that every mutant is a copy of a folder.
        (folder / f"prompt-{format}").mkdir()
        path = folder / f"prompt-{format}" / "prompt.safetensors"
        prompt_formats.save(path, array, CARD, format)
    return folder, trees.flatten(params), array


def read_model(path):
    config_file = path / "config.json"
    found = base_models.load(CONFIG, path, frozen_dtype="float32")
    assert found.config == CONFIG or config_file.exists()
    return {
        name: np.asarray(leaf) for name, leaf in trees.flatten(found.params).items()
    }


def read_prompt(path):
    array, _ = prompt_formats.load(path / "prompt.safetensors")
    return {"prompt": array}


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def header_end(path: pathlib.Path, content: bytes) -> int:
    """Where the part of a file ends whose every bit a reader can check."""
    if content[:6] == b"\x93NUMPY":
        return 10 + int.from_bytes(content[8:10], "little")
    if path.suffix == ".safetensors":
        return 8 + int.from_bytes(content[:8], "little")
    return len(content)


def mutate(folder: pathlib.Path, chance: random.Random, checked: bool) -> str:
    """Damages one file of a checkpoint; returns what was done.

    Args:
      folder: the checkpoint.
      chance: decides all.
      checked: whether the format has checksums of its numbers.
    """
    path = chance.choice(files_of(folder))
    content = path.read_bytes()
    end = len(content) if checked else header_end(path, content)
    kind = chance.choice(["flip", "flip", "cut", "drop", "splice", "fill", "link"])
    at = chance.randrange(end)
    if kind == "flip":
        changed = content[at] ^ (1 << chance.randrange(8))
        path.write_bytes(content[:at] + bytes([changed]) + content[at + 1 :])
    elif kind == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    elif kind == "drop":
        path.unlink()
    elif kind == "splice":
        other = chance.randrange(at + 1)
        path.write_bytes(content[:other] + content[at:])
    elif kind == "fill":
        length = chance.randrange(1, 9)
        noise = bytes(chance.randrange(256) for _ in range(length))
        stop = min(at + length, end)
        path.write_bytes(content[:at] + noise[: stop - at] + content[stop:])
    else:
        # The same bytes, from outside of the checkpoint.
        outside = folder.parent / "outside"
        shutil.copyfile(path, outside)
        path.unlink()
        path.symlink_to(outside)
    return f"{kind} {path.relative_to(folder)} at {at}"


CHECKED = {"native", "t5x", "prompt-native", "prompt-peft", "prompt-peft-doubled"}
FORMATS = ["native", "t5x", "huggingface"]
FORMATS += [f"prompt-{format}" for format in prompt_formats.FORMATS]


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_checkpoint_never_loads_as_another(format, originals, tmp_path):
    folder, params, array = originals
    prompt = format.startswith("prompt-")
    want = {"prompt": array} if prompt else params
    read = read_prompt if prompt else read_model
    refused = 0
    for seed in range(MUTANTS):
        chance = random.Random(f"{format} {seed}")
        mutant = tmp_path / str(seed) / "checkpoint"
        shutil.copytree(folder / format, mutant)
        done = mutate(mutant, chance, format in CHECKED)
        where = mutant / "checkpoint_0" if format == "t5x" else mutant
        try:
            found = read(where)
        except UserError as error:
            assert "\n" not in str(error), done
            refused += 1
            continue
        assert found.keys() == want.keys(), done
        for name in want:
            np.testing.assert_array_equal(found[name], want[name], err_msg=done)
        shutil.rmtree(mutant.parent)
    assert refused > MUTANTS / 2


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.safetensors"])
def test_an_index_cannot_name_files_outside(name, originals, tmp_path):
    import json

    folder, _, _ = originals
    shutil.copytree(folder / "huggingface", tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    os.replace(weights, tmp_path / "outside.safetensors")
    with open(tmp_path / "outside.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    index = {"weight_map": {key: name for key in header if key != "__metadata__"}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        base_models.load(CONFIG, tmp_path / "hf")
    assert "\n" not in str(caught.value)


def test_a_prompt_is_no_model_and_a_model_no_prompt(originals):
    folder, _, _ = originals
    for path, read in (
        (folder / "prompt-native", base_models.open_checkpoint),
        (folder / "native" / "model.safetensors", prompt_file.load_prompt),
        (folder / "huggingface", prompt_formats.load),
    ):
        with pytest.raises(UserError):
            read(path)
