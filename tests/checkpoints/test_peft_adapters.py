# SPDX-License-Identifier: Apache-2.0
"""Adapters in PEFT's folders: out and in to the last bit, and what is refused.

That PEFT computes the same with them is in `test_peft_parity`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning import cli, trees
from prompt_tuning.checkpoints import adapter_file, peft_adapters, prompt_formats
from prompt_tuning.checkpoints.prompt_formats import Saved
from prompt_tuning.errors import UserError
from prompt_tuning.methods.decoder_prefix import DecoderPrefix
from prompt_tuning.methods.ia3 import IA3
from prompt_tuning.methods.lora import LoRA
from prompt_tuning.methods.method import Start

METHODS = [LoRA(rank=3, targets=("query", "wo")), IA3()]
CARD = {"method": "x", "base_model": {"name": "tiny", "fingerprint": "0" * 64}}


def saved(method, params):
    """An adapter of random numbers."""
    start = Start(jnp.zeros((0, 32)), params["token_embedder"]["embedding"], params)
    leaves = method.init(jax.random.key(0), start)
    rng = np.random.default_rng(0)
    leaves = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), leaves)
    card = {**CARD, "method": method.describe()}
    rows = np.zeros((0, 32), np.float32)
    return Saved(rows, card, method.slots(leaves, params))


def tensors(found):
    return trees.flatten(adapter_file.tensors_of(found.array, found.slots))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_out_and_in_is_the_same_to_the_last_bit(method, tiny_params, tmp_path):
    ours, folder = saved(method, tiny_params), tmp_path / "peft"
    own = tmp_path / "a.safetensors"
    adapter_file.save(own, ours.array, ours.slots, dict(ours.card))
    words = ["convert", str(own), str(folder), "--to=peft"]
    assert cli.main(words) == 0
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    again = tmp_path / "b.safetensors"
    assert cli.main(["convert", str(folder), str(again), "--to=native"]) == 0
    assert again.read_bytes() == own.read_bytes()
    # What PEFT itself would write has no card of ours.
    path = folder / "adapter_model.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path)
    found = prompt_formats.load_with_slots(folder)
    assert found.card["method"] == method.kind and found.card["notes"]
    wanted, theirs = tensors(ours), tensors(found)
    del wanted["rows"], theirs["rows"]
    jax.tree.map(np.testing.assert_array_equal, theirs, wanted)
    adapter_file.check_fits(found.slots, tiny_params)


@pytest.fixture
def folder(tiny_params, tmp_path):
    ours = saved(METHODS[0], tiny_params)
    peft_adapters.save(tmp_path / "lora", ours.array, ours.slots, dict(ours.card))
    return tmp_path / "lora"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora True, for which our layers have no place"),
        ({"bias": "all"}, "has bias 'all'"),
        ({"rank_pattern": {"q": 2}}, "has rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights 'pissa"),
        ({"r": 4}, "its rank is 4, that of .* 3 and 3"),
        ({"r": "3"}, "has r '3' where a number above 0 belongs"),
        ({"lora_alpha": float("nan")}, "has lora_alpha nan where"),
        ({"lora_alpha": float("inf")}, "values that are not finite"),
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'"),
    ],
)
def test_configurations_that_are_refused(folder, change, message):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        prompt_formats.load_with_slots(folder)


FIRST = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST), "lacks layers of|one of the two|several sizes"),
        (lambda t: t.update(other=np.ones((2, 2))), "holds other, which is no LoRA"),
        (lambda t: t.update({FIRST: np.ones(3)}), "a tensor that is no matrix"),
        (lambda t: t.update({FIRST: np.ones((2, 2))}), "several sizes"),
    ],
)
def test_tensors_that_are_refused(folder, change, message):
    path = folder / "adapter_model.safetensors"
    found = safetensors.numpy.load_file(path)
    change(found)
    safetensors.numpy.save_file(
        {name: array.astype(np.float32) for name, array in found.items()}, path
    )
    with pytest.raises(UserError, match=message):
        prompt_formats.load_with_slots(folder)


def test_a_number_that_changed_is_noticed(folder):
    path = folder / "adapter_model.safetensors"
    found = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    safetensors.numpy.save_file({**found, FIRST: found[FIRST] + 1}, path, metadata)
    with pytest.raises(UserError, match="is damaged: its numbers are not those"):
        prompt_formats.load_with_slots(folder)


def test_what_has_no_form_in_peft(tiny_params, folder, tmp_path):
    ours = saved(DecoderPrefix(3), tiny_params)
    with pytest.raises(UserError, match="hold LoRA or IA3 alone.* has Prefix"):
        prompt_formats.save_as(tmp_path / "prefix", ours, "peft")
    with pytest.raises(UserError, match="the format 'npy' is for prompts"):
        prompt_formats.save_as(tmp_path / "prefix", ours, "npy")
    lora = prompt_formats.load_with_slots(folder)
    with pytest.raises(UserError, match="a prompt of 2 rows beside them"):
        prompt_formats.save_as(
            tmp_path / "both", lora._replace(array=np.ones((2, 32), np.float32)), "peft"
        )
    before = (folder / "adapter_config.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        prompt_formats.save_as(folder, lora, "peft")
    assert (folder / "adapter_config.json").read_bytes() == before
