# SPDX-License-Identifier: Apache-2.0
"""The command ``infer``: texts for one prompt, or a file of rows for many."""

import json

import numpy as np
import pytest

from prompt_tuning import cli
from prompt_tuning.checkpoints import base_models, prompt_file
from prompt_tuning.network.transformer import T5Config


@pytest.fixture(scope="module")
def prompts(tiny_checkpoint, tmp_path_factory):
    """A folder with prompts of two tasks and one of another model."""
    source = base_models.load(T5Config(8192, 16, 2, 1, 1, 8, 32), tiny_checkpoint)
    folder = tmp_path_factory.mktemp("prompts")
    rng = np.random.default_rng(0)
    cards = {
        "mood": {"labels": ["good", "bad"]},
        "next": {"template": "{first} then {second}"},
        "other": {"base_model": {"name": "other", "fingerprint": "0" * 64}},
    }
    for length, (name, card) in enumerate(cards.items(), start=3):
        array = rng.normal(scale=3, size=(length, 16)).astype(np.float32)
        card = {"vocabulary": "mini", "base_model": source.identity, **card}
        prompt_file.save_prompt(folder / f"{name}.safetensors", array, card)
    return folder


@pytest.fixture
def infer(tiny_checkpoint):
    def run(*words):
        return cli.main(
            [
                "infer",
                "--gin_file=models/tiny.gin",
                f"--gin.INITIAL_CHECKPOINT_PATH={tiny_checkpoint}",
                "--gin.INFER_BATCH_SIZE=4",
                *words,
            ]
        )

    return run


def printed(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_texts_and_files_of_texts_are_answered_alike(infer, prompts, capsys, tmp_path):
    prompt = f"--gin.PROMPT_FILE={prompts / 'mood.safetensors'}"
    texts = ["a fine film", "dull", "what a story this is"]
    assert infer(prompt, *texts) == 0
    rows = printed(capsys)
    assert [row["input"] for row in rows] == texts
    for row in rows:
        assert set(row) == {"input", "answer", "scores"}
        assert row["answer"] == max(row["scores"], key=row["scores"].get)
        assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-3)
    (tmp_path / "texts.txt").write_text("\n\n".join(texts) + "\n")
    output = tmp_path / "answers.jsonl"
    files = [
        f"--gin.INPUT_FILE={tmp_path / 'texts.txt'}",
        f"--gin.OUTPUT_FILE={output}",
    ]
    assert infer(prompt, *files) == 0
    assert printed(capsys) == rows
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    assert infer(prompt, *texts[1:2]) == 0
    assert printed(capsys) == rows[1:2]


def test_without_labels_answers_are_decoded(infer, prompts, capsys, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"first": "a", "second": "b"}\n')
    output = tmp_path / "out.jsonl"
    prompt = f"--gin.PROMPT_FILE={prompts / 'next.safetensors'}"
    files = [f"--gin.INPUT_FILE={path}", f"--gin.OUTPUT_FILE={output}"]
    assert infer(prompt, *files, "--gin.MAX_DECODE_LENGTH=3") == 0
    assert not printed(capsys)
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert set(row) == {"line", "prompt", "answer"}
    assert row["prompt"] == "next" and isinstance(row["answer"], str)


def test_rows_of_many_prompts(infer, prompts, tiny_checkpoint, capsys, tmp_path):
    rows = [
        {"prompt": "mood", "text": "fine", "id": 7},
        {"prompt": "next", "first": "a", "second": "b", "labels": ["yes", "no"]},
        {"prompt": "other", "text": "x"},
        {"prompt": "next", "text": "x"},
        {"prompt": ["mood", "next"], "text": "x", "first": "a", "second": "b"}
        | {"labels": ["yes", "no"]},
    ]
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    words = (
        f"--gin.PROMPTS={prompts}",
        f"--gin.INPUT_FILE={path}",
        f"--gin.OUTPUT_FILE={output}",
        "--gin.MAX_DECODE_LENGTH=3",
    )
    assert infer(*words) == 3
    told = capsys.readouterr()
    assert "other.safetensors: the prompt was tuned on other" in told.err
    assert "answered 3 rows" in told.err
    assert "3 of 6 rows could not be answered" in told.err.splitlines()[-1]
    assert str(tmp_path / "out.rejected.jsonl") in told.err.splitlines()[-1]
    answered = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["line"] for row in answered] == [1, 2, 5]
    assert answered[0]["id"] == 7 and set(answered[1]["scores"]) == {"yes", "no"}
    assert [row["prompt"] for row in answered[2]["answers"]] == ["mood", "next"]
    text = (tmp_path / "out.rejected.jsonl").read_text()
    rejected = [json.loads(line) for line in text.splitlines()]
    assert [row["line"] for row in rejected] == [3, 4, 6]
    assert "was refused" in rejected[0]["error"] and "other" in rejected[0]["error"]
    assert "no column 'first'" in rejected[1]["error"]
    # Over their own input they are not written, whatever the output is called.
    (tmp_path / "link.jsonl").symlink_to(path)
    for name in ("in.jsonl", "link.jsonl"):
        refused = (*words[:2], f"--gin.OUTPUT_FILE={tmp_path / name}")
        before = path.read_bytes()
        assert infer(*refused) == 2
        assert "which is read" in capsys.readouterr().err
        assert path.read_bytes() == before
    # Nor over the prompts, or over what the model is read from.
    weights = tiny_checkpoint / "model.safetensors"
    for output in (
        prompts / "mood.safetensors",
        weights,
        weights.with_name("spiece.model"),
    ):
        before = output.read_bytes()
        for given in (
            words[:2],
            (f"--gin.PROMPT_FILE={prompts / 'mood.safetensors'}", "x"),
        ):
            assert infer(*given, f"--gin.OUTPUT_FILE={output}") == 2
            assert "which is read" in capsys.readouterr().err
        assert output.read_bytes() == before
    # The same command with the rows put right.
    path.write_text(json.dumps(rows[0]) + "\n")
    assert infer(*words) == 0
    assert not (tmp_path / "out.rejected.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["text"], "give either PROMPT_FILE"),
        (["--gin.PROMPT_FILE=a", "--gin.PROMPTS=b", "text"], "give either PROMPT_FILE"),
        (["--gin.PROMPTS=a", "text"], "texts do not say which"),
        (["--gin.PROMPTS=a"], "no text to answer"),
        (["--gin.PROMPTS=a", "--gin.INPUT_FILE=/no.jsonl"], "cannot read /no.jsonl"),
        (["--gin.PROMPTS=a", "--gin.INPUT_FILE=a.json"], "one object a line"),
        (["--gin.PROMPTS=a", "--gin.INPUT_FILE=rows"], "call it *.tsv or *.csv"),
        (["--gin.PROMPTS=a", "--gin.INPUT_FILE=a.jsonl", "text"], "no texts beside"),
        (["--gin.PROMPT_FILE=/nowhere", "text"], "there is no prompt at /nowhere"),
    ],
)
def test_what_is_refused(words, says, infer, capsys):
    assert infer(*words) == 2
    assert says in capsys.readouterr().err


def test_a_text_that_is_too_long_is_named(infer, prompts, capsys):
    prompt = f"--gin.PROMPT_FILE={prompts / 'mood.safetensors'}"
    assert infer(prompt, "--gin.MAX_INPUT_LENGTH=16", "fine", "film " * 20) == 2
    assert "text 2: the text has 21 tokens" in capsys.readouterr().err
