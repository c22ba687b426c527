# SPDX-License-Identifier: Apache-2.0
"""Vocabularies without TensorFlow give seqio's ids, texts and fingerprints."""

import pathlib
import random
import subprocess
import sys

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from prompt_tuning.data import vocabularies
from prompt_tuning.errors import UserError
from prompt_tuning.tasks import features

TEXTS = [
    "",
    " ",
    "\n\t",
    "a fine film",
    "  spaces   around  ",
    "A Fine Film, isn't it? $3.50",
    "<extra_id_0> and <extra_id_99>, <extra_id_100>",
    "in<extra_id_1>side",
    "</s> <pad> <unk>",
    "naïve café Ünïcödé ﬁ ½ ²",
    "שלום עולם",
    "你好，世界",
    "🎬👩‍👩‍👧 ☃",
    "e\u0301 a\u00a0b\u200b c\ufeff",
    "\x00\x01 control",
    "x" * 500,
]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Every kind of file: with sentinels after it, with them inside, and bytes."""
    folder = tmp_path_factory.mktemp("pieces")
    mini = pathlib.Path(vocabularies.path_of("mini"))
    (folder / "renamed.100extra.model").write_bytes(mini.read_bytes())
    model = sentencepiece_model_pb2.ModelProto.FromString(mini.read_bytes())
    for i in reversed(range(100)):
        model.pieces.add(piece=f"▁<extra_id_{i}>", score=0.0, type=4)
    (folder / "whole.model").write_bytes(model.SerializeToString())
    return {
        "mini": "mini",
        "byt5": "byt5",
        "renamed": str(folder / "renamed.100extra.model"),
        "whole": str(folder / "whole.model"),
    }


@pytest.mark.parametrize("key", ["mini", "byt5", "renamed", "whole"])
def test_ids_and_texts_are_those_of_seqio(key, names):
    ours, theirs = vocabularies.load(names[key]), features.vocabulary(names[key])
    for attribute in ("vocab_size", "pad_id", "eos_id", "unk_id"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert ours.fingerprint == features.fingerprint(theirs)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == list(theirs.encode(text)), text
        assert ids == theirs.encode_tf(text).numpy().tolist(), text
        assert ours.decode(ids) == theirs.decode(ids)
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(ours.vocab_size + 50) for _ in range(12)]
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode([ours.vocab_size - 1, 0, 5, 1, 7]) == theirs.decode(
        [ours.vocab_size - 1, 0, 5, 1, 7]
    )


def test_sentinels_are_judged_by_content(names):
    sizes = {key: vocabularies.load(name).vocab_size for key, name in names.items()}
    assert sizes == {"mini": 8192, "byt5": 384, "renamed": 8192, "whole": 8192}
    for name in ("mini", names["renamed"], names["whole"]):
        assert vocabularies.load(name).encode("<extra_id_0>") == [8191]


def test_fingerprints_of_saved_prompts_stay():
    assert vocabularies.load("mini").fingerprint == (
        "95c9bbdadbae78e660988bbb8fa4302b61787db68d020f96d7f6ee618258c6a9"
    )
    assert vocabularies.load("byt5").fingerprint == (
        "04e71e28007dffba4658a3aeb27dd35393918612cf5ec36c7049213487b87bc3"
    )


def test_t5s_own_pieces(shared):
    path = str(shared / "checkpoints" / "t5_sentencepiece.model")
    ours = vocabularies.load(path)
    assert ours.vocab_size == 32100
    assert ours.fingerprint == features.fingerprint(features.vocabulary(path))
    for text in TEXTS:
        assert ours.encode(text) == list(features.vocabulary(path).encode(text))


def test_pieces_tell_vocabularies_apart(names, shared):
    same = {
        vocabularies.load(names[key]).pieces for key in ("mini", "renamed", "whole")
    }
    other = shared / "checkpoints" / "t5_sentencepiece.model"
    assert len(same) == 1
    others = {vocabularies.load(name).pieces for name in ("byt5", str(other))}
    assert len(same | others) == 3


@pytest.mark.parametrize("name", ["mini", "byt5"])
def test_plain_is_the_same_vocabulary(name):
    found = features.plain(features.vocabulary(name))
    assert found is not None
    assert found.fingerprint == vocabularies.load(name).fingerprint
    assert found.pieces == vocabularies.load(name).pieces
    assert found.name == name


def test_the_embedded_vocabulary_has_its_name_by_path_too():
    assert vocabularies.load(vocabularies.path_of("mini")).name == "mini"


@pytest.mark.parametrize("content", [b"", b'{"model": {"vocab": []}}', b"\xff" * 99])
def test_other_files_are_refused_in_one_line(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    for load in (vocabularies.load, features.vocabulary):
        with pytest.raises(UserError, match="no SentencePiece model: give .*spiece"):
            load(str(path))


def test_a_vocabulary_without_padding_at_0_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "other"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="padding has id -1, not 0"):
        vocabularies.load(str(tmp_path / "other.model"))


def test_unknown_names_and_files_that_are_gone(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="'t6': choose one of mini, t5, mt5, byt5"):
        vocabularies.load("t6")
    monkeypatch.setenv("T5_VOCABULARY", str(tmp_path / "no.model"))
    with pytest.raises(UserError, match="cannot be read .* T5_VOCABULARY"):
        vocabularies.load("t5")


def test_it_loads_no_tensorflow():
    code = (
        "import sys; from prompt_tuning.data import vocabularies as v;"
        "assert v.load('mini').decode(v.load('mini').encode('a film')) == 'a film';"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"tensorflow", "tensorflow_text", "seqio"}
