# SPDX-License-Identifier: Apache-2.0
"""The probe: means are over a row's own tokens, and its accuracy is that of the test part."""

import json

import numpy as np
import pytest
import sentencepiece

from prompt_tuning.errors import UserError
from prompt_tuning.training import probing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A vocabulary, and a task whose words tell the label."""
    folder = tmp_path_factory.mktemp("arrays")
    words = [f"{kind} {number}" for kind in ("warm", "cold") for number in range(40)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 5),
        model_prefix=str(folder / "spiece"),
        vocab_size=30,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    rows = [
        {
            "text": text,
            "label": "yes" if text.startswith("warm") else "no",
            "split": "test" if number % 4 == 0 else "train",
        }
        for number, text in enumerate(words)
    ]
    (folder / "probe").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "probe" / "heat.jsonl").write_text(lines)
    return folder


def test_means_are_over_a_rows_own_tokens(tiny_model, tiny_params):
    rows = [np.array(row, np.int32) for row in ([5, 1], [7, 8, 9, 1], [*[4] * 40, 1])]
    encoder = probing.Encoder(tiny_model)
    encoded, embedded = encoder(tiny_params, rows)
    table = np.asarray(tiny_params["token_embedder"]["embedding"], np.float32)
    for place, row in enumerate(rows):
        np.testing.assert_allclose(embedded[place], table[row].mean(0), rtol=1e-5)
        # A row by itself is padded to another length and stands elsewhere in its batch.
        alone, _ = encoder(tiny_params, [row])
        np.testing.assert_allclose(encoded[place], alone[0], rtol=2e-5, atol=1e-6)


def test_a_probe_finds_what_the_embeddings_tell(folder, tiny_model, tiny_params):
    (task,) = probing.load(folder / "probe", folder / "spiece.model")
    assert (task.name, task.labels) == ("heat", ("no", "yes"))
    assert (len(task.train.texts), len(task.test.texts)) == (60, 20)
    found = probing.probe(probing.Encoder(tiny_model), tiny_params, task)
    assert found["embeddings"] == 1.0 and set(found) == {"states", "embeddings"}


def test_accuracy_is_the_test_parts():
    train = np.array([[-1.0], [-2.0], [1.0], [2.0]])
    labels = np.array([0, 0, 1, 1])
    test = np.array([[-3.0], [3.0], [5.0], [-5.0]])
    found = probing.linear_accuracy(train, labels, test, np.array([0, 1, 1, 1]))
    assert found == 0.75


def test_what_is_missing_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="holds no task to probe"):
        probing.load(tmp_path, folder / "spiece.model")
    with pytest.raises(UserError, match="probed texts are encoded by it"):
        probing.load(folder / "probe", tmp_path / "spiece.model")
