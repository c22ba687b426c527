# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's folder names the model's vocabulary, or says that it does not."""

import json
import shutil

import pytest

from prompt_tuning.checkpoints import base_models, formats
from prompt_tuning.data import vocabularies
from prompt_tuning.errors import UserError


def test_the_embedded_model_names_its_own():
    source = base_models.open_checkpoint("embedded:t5_1_1_mini")
    found = formats.needed_vocabulary(source.path)
    assert (found.name, found.vocab_size) == ("mini", 8192)


def test_the_file_beside_the_weights(tmp_path):
    shutil.copyfile(vocabularies.path_of("mini"), tmp_path / "spiece.model")
    found = formats.needed_vocabulary(tmp_path)
    # A copy of the embedded one goes by its name: cards are to be read elsewhere.
    assert found.name == "mini"
    assert found.fingerprint == vocabularies.load("mini").fingerprint


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_byt5_has_bytes(name, tmp_path):
    (tmp_path / name).write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert formats.needed_vocabulary(tmp_path).name == "byt5"


@pytest.mark.parametrize("path", ["gs://bucket/model/checkpoint_1", None])
def test_none(path, tmp_path):
    assert formats.vocabulary(path or tmp_path) is None
    with pytest.raises(UserError, match=r"put the model's spiece\.model .* VOCABULARY"):
        formats.needed_vocabulary(path or tmp_path)


def test_tokenizer_json_alone(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(UserError, match=r"as tokenizer\.json alone.*spiece\.model"):
        formats.needed_vocabulary(tmp_path)


def test_a_damaged_file(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"{}")
    with pytest.raises(UserError, match="spiece.model is no SentencePiece model"):
        formats.vocabulary(tmp_path)
