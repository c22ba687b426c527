# SPDX-License-Identifier: Apache-2.0
"""Answers from a saved prompt need no TensorFlow, on the command line and served."""

import subprocess
import sys

import numpy as np
import pytest

from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.data import vocabularies

HEAVY = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio"}
INFER = """
import sys
from prompt_tuning import cli
assert cli.main([
    "infer", "--gin_file=models/tiny.gin", "--force",
    "--gin.INITIAL_CHECKPOINT_PATH={model}", "--gin.PROMPT_FILE={prompt}", "a film",
]) == 0
print(*{{name.split(".")[0] for name in sys.modules}})
"""
# All of `serve` but the socket.
SERVE = """
import sys
from prompt_tuning.checkpoints import base_models, formats
from prompt_tuning.commands import serve
from prompt_tuning.serving import app, batcher, metrics, server
checkpoint = base_models.open_checkpoint("{model}")
base = base_models.load(formats.architecture(checkpoint), checkpoint)
store = serve.PromptStore(base, 64, force=True)
store.load("{prompt}", "mood")
(answer,) = serve.Engine(base, store).answer([{{"prompt": "mood", "text": "a film"}}])
assert answer["answer"] in ("good", "bad")
print(*{{name.split(".")[0] for name in sys.modules}})
"""


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompt") / "mood.safetensors"
    card = {
        "labels": ["good", "bad"],
        "vocabulary": "mini",
        "vocabulary_fingerprint": vocabularies.load("mini").fingerprint,
    }
    prompt_file.save_prompt(path, np.ones((3, 16), np.float32), card)
    return path


@pytest.mark.parametrize("code", [INFER, SERVE], ids=["infer", "serve"])
def test_a_saved_prompt_needs_none(code, tiny_checkpoint, prompt):
    code = code.format(model=tiny_checkpoint, prompt=prompt)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "jax" in loaded and not loaded & HEAVY
