# SPDX-License-Identifier: Apache-2.0
"""Saved prompts that others are mixed with."""

import numpy as np
import pytest

from prompt_tuning.checkpoints import base_models
from prompt_tuning.checkpoints.prompt_file import save_prompt
from prompt_tuning.errors import UserError
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.training import prompt_starts


def test_prompts_of_another_model_are_not_mixed(tiny_checkpoint, tmp_path):
    base = base_models.load(T5Config(8192, 16, 2, 1, 1, 8, 32), tiny_checkpoint)
    rows = np.ones((4, 16), np.float32)
    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    save_prompt(own, rows, {"base_model": base.identity})
    save_prompt(other, rows, {"base_model": {"name": "big", "fingerprint": "0" * 64}})
    np.save(tmp_path / "bare.npy", rows)
    for path in (own, tmp_path / "bare.npy"):
        np.testing.assert_array_equal(prompt_starts.rows_of(path, base), rows)
    with pytest.raises(UserError, match="other.safetensors was tuned on big .*not on"):
        prompt_starts.rows_of(other, base)
