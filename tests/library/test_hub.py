# SPDX-License-Identifier: Apache-2.0
"""Prompts on the hub: pushed and loaded through its client and a stand-in's HTTP API."""

import sys

import numpy as np
import pytest

from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.errors import UserError
from prompt_tuning.library.tuned_prompt import TunedPrompt, load_prompt

ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
CARD = {
    "method": "prompt_tuning",
    "placement": "prepend",
    "template": "premise: {premise} hypothesis: {hypothesis}",
    "task": "a | task\nof two lines",
    "labels": ["no", "yes"],
    "vocabulary": "mini",
    "base_model": {"name": "acme/tiny-t5", "fingerprint": "ab" * 32},
    "recipe": {"steps": 3, "batch_size": 2, "seed": 0},
    "metric": {"accuracy": 75.0},
}


def prompt(**card):
    return TunedPrompt("nli", ARRAY, {**CARD, "length": 3, "width": 4, **card})


def test_there_and_back(hub):
    where = prompt().push_to_hub("user/nli", private=True, token=hub.token)
    assert where == f"{hub.url}/user/nli"
    assert hub.private == {"user/nli": True}
    found = load_prompt("user/nli")
    assert found.name == "nli"
    np.testing.assert_array_equal(found.array, ARRAY)
    assert found.array.dtype == np.float32
    assert found.card == prompt().card


def test_the_repository_is_pefts_layout_with_a_readme(hub):
    prompt().push_to_hub("user/nli", token=hub.token)
    ((_, files),) = hub.repositories["user/nli"]
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    text = files["README.md"].decode()
    card = pytest.importorskip("huggingface_hub").ModelCard(text)
    assert card.data.base_model == "acme/tiny-t5" and card.data.library_name == "peft"
    assert card.data.tags == ["prompt-tuning", "soft-prompt", "t5"]
    assert "# A soft prompt for a \\| task of two lines\n" in text
    assert "| accuracy | 75 on validation |" in text
    assert 'pt.Predictor(base, ["user/nli"])([{"premise": "...", "hypothesis"' in text
    assert 'PeftModel.from_pretrained(base, "user/nli")' in text


def test_a_prompt_that_peft_has_no_place_for_goes_as_our_own_file(hub):
    pushed = prompt(placement="append")
    pushed.push_to_hub("user/behind", token=hub.token)
    ((_, files),) = hub.repositories["user/behind"]
    assert set(files) == {"README.md", "prompt.safetensors"}
    assert "peft" not in files["README.md"].decode().lower()
    assert load_prompt("user/behind").card == pushed.card


def test_a_second_push_is_a_second_commit_and_both_can_be_had(hub):
    prompt().push_to_hub("user/nli", token=hub.token)
    better = TunedPrompt("nli", ARRAY + 1, prompt(metric={"accuracy": 80.0}).card)
    better.push_to_hub("user/nli", token=hub.token, message="Train for longer")
    first = hub.repositories["user/nli"][0][0]
    np.testing.assert_array_equal(load_prompt("user/nli").array, ARRAY + 1)
    np.testing.assert_array_equal(load_prompt("user/nli", first).array, ARRAY)


def test_a_token_that_may_not_write(hub):
    with pytest.raises(
        UserError, match="does not take user/nli .*hf auth login"
    ) as said:
        prompt().push_to_hub("user/nli", token="hf_wrong")
    assert "\n" not in str(said.value)
    assert not hub.repositories


@pytest.mark.parametrize("name", ["a b", "a/b/c", "../a"])
def test_a_name_that_is_none(hub, name):
    with pytest.raises(UserError, match="does not take"):
        prompt().push_to_hub(name, token=hub.token)


def test_a_prompt_that_the_hub_does_not_have(hub):
    with pytest.raises(UserError, match="the Hugging Face hub gives no prompt of that"):
        load_prompt("user/none")


def test_a_prompt_of_a_file_a_folder_and_a_run(tmp_path):
    saved = prompt().save(tmp_path / "nli.safetensors")
    run = tmp_path / "runs" / "first"
    prompt().save(run / prompt_file.FILE)
    prompt().save(tmp_path / "as_peft", "peft")
    for path, name in (
        (saved, "nli"),
        (run, "first"),
        (tmp_path / "as_peft", "as_peft"),
    ):
        found = load_prompt(path)
        assert found.name == name
        np.testing.assert_array_equal(found.array, ARRAY)


def test_a_revision_of_a_file(tmp_path):
    path = prompt().save(tmp_path / "nli.safetensors")
    with pytest.raises(UserError, match="no name of the hub: leave 'revision' out"):
        load_prompt(path, revision="main")


@pytest.mark.parametrize("path", ["nowhere.safetensors/at/all", "/nowhere"])
def test_no_prompt(path):
    with pytest.raises(UserError, match="there is no prompt at"):
        load_prompt(path)


def test_a_prompt_says_what_it_is():
    assert repr(prompt()) == ("TunedPrompt('nli', 3 x 4, labels no, yes, accuracy 75)")


def test_without_the_hubs_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        prompt().push_to_hub("user/nli")
