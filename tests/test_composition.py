# SPDX-License-Identifier: Apache-2.0
"""The compositions of docs/methods.md, command by command, at a tiny size."""

import pathlib
import re
import shlex

import numpy as np
import pytest

from prompt_tuning import cli
from prompt_tuning.checkpoints import base_models, prompt_formats
from prompt_tuning.network.transformer import T5Config

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "methods.md"
CONFIG = T5Config(8192, 16, 2, 1, 1, 8, 32)


def commands(heading):
    """The words of each command in the block below a heading."""
    text = PAGE.read_text().partition(f"**{heading}.**")[2]
    block = re.search(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = block[1].replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture
def run(tiny_checkpoint, reviews, tmp_path, monkeypatch):
    """Runs what the page says, on a tiny model and few rows."""
    monkeypatch.chdir(tmp_path)

    def shrunk(words):
        for word in words:
            if word == "--gin_file=models/t5_1_1_mini.gin":
                yield from ("--gin_file=models/tiny.gin",)
                if not any(x.startswith("--initial_checkpoint") for x in words):
                    yield f"--initial_checkpoint_path={tiny_checkpoint}"
            elif word == "embedded:t5_1_1_mini":
                yield str(tiny_checkpoint)
            elif word == "--mixture_or_task_name=rotten_tomatoes":
                yield "--mixture_or_task_name=composition_reviews"
                yield "--gin_file=tasks/local_file.gin"
                yield f"--task_files={reviews}"
                yield "--template={sentence}"
                yield "--label_names=['good', 'bad']"
                yield from ("--train_steps=3", "--batch_size=8", "--eval_batch_size=8")
                if "--gin_file=methods/lora.gin" not in words:
                    yield "--prompt_length=3"
            else:
                yield word

    def all_of(heading):
        found = commands(heading)
        for words in found:
            assert cli.main(list(shrunk(words))) == 0, words
        return found

    return all_of


@pytest.mark.slow
def test_a_prompt_first_and_weights_afterwards(run):
    assert len(run("A prompt first, weights afterwards")) == 2
    first = prompt_formats.load_with_slots("runs/prompt/prompt.safetensors")
    both = prompt_formats.load_with_slots("runs/prompt_then_lora/prompt.safetensors")
    np.testing.assert_array_equal(both.array, first.array)
    assert not first.slots and both.slots
    outputs = [np.asarray(slot.b) for slot in both.slots.values()]
    # LoRA's second factor is zero where nothing has moved it.
    assert all(np.any(b != 0) for b in outputs)


@pytest.mark.slow
def test_a_prompt_on_top_of_a_merged_lora(run, tiny_checkpoint):
    assert [words[0] for words in run("A prompt on top of a merged LoRA")] == [
        "train",
        "convert",
        "train",
    ]
    plain = base_models.load(CONFIG, tiny_checkpoint)
    merged = base_models.load(CONFIG, "runs/merged")
    saved = prompt_formats.load_with_slots("runs/prompt_on_lora/prompt.safetensors")
    assert merged.fingerprint != plain.fingerprint and not saved.slots
    assert saved.card["base_model"]["fingerprint"] == merged.fingerprint
    assert saved.array.shape == (3, 16)
