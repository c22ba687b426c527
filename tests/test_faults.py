# SPDX-License-Identifier: Apache-2.0
"""Small inputs of people that once went wrong: each is read right, or refused in a line.

Those that cannot be written here in a few characters are read from the shared folder.
"""

import pytest

from prompt_tuning import cli
from prompt_tuning.checkpoints import base_models, prompt_formats
from prompt_tuning.data import vocabularies
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.errors import UserError
from prompt_tuning.network.transformer import T5Config
from prompt_tuning.runs.task_data import TaskData

LABELS = ("question", "statement")
LENGTHS = {"inputs": 16, "targets": 8}


@pytest.fixture(scope="module")
def faults(shared):
    return shared / "faults"


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail; gives its line."""

    def run(*words):
        assert cli.main(list(map(str, words))) == 2
        error = capsys.readouterr().err
        lines = [x for x in error.splitlines() if x.startswith("prompt-tuning:")]
        assert len(lines) == 1 and "Traceback" not in error, error
        return lines[0]

    return run


def task(path, template="{sentence}", labels=LABELS, **options):
    return LocalTask({"train": str(path)}, template, label_names=labels, **options)


@pytest.mark.parametrize("number", [1, 2])
def test_a_config_that_is_no_text(number, faults, refused):
    path = faults / f"config_gin_TRACEBACK_{number}.gin"
    assert f"{path} is not UTF-8" in refused("train", f"--gin_file={path}")


@pytest.mark.parametrize("number", [1, 2])
def test_numbers_without_a_checksum_are_said_to_have_none(number, faults):
    path = faults / f"prompt_npy_SILENT_{number}.npy"
    _, card = prompt_formats.load(path)
    assert "without checksums" in card["notes"][0]


def test_weights_without_a_checksum_are_said_to_have_none(faults, capsys):
    path = faults / "model_huggingface_SILENT_1"
    base_models.load(T5Config(8192, 16, 2, 1, 1, 8, 32), path)
    assert "in a format without checksums" in capsys.readouterr().err


def test_an_input_is_not_written_over(faults, tmp_path, refused):
    before = (faults / "inout" / "rows.before.jsonl").read_bytes()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(before)
    prompt = faults / "field" / "base_prompt.safetensors"
    words = ["--gin_file=models/tiny.gin", f"--gin.PROMPT_FILE={prompt}"]
    words += [f"--gin.INPUT_FILE={path}", f"--gin.OUTPUT_FILE={path}"]
    words += ["--gin.INITIAL_CHECKPOINT_PATH=embedded:t5_1_1_mini"]
    assert "which is read" in refused("infer", *words)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_card_moves_no_cursor(faults, capsys):
    path = faults / "prompt_card_ansi.safetensors"
    assert cli.main(["inspect", str(path)]) == 0
    shown = "".join(capsys.readouterr())
    assert "\\x1b" in shown and "\x1b" not in shown


@pytest.mark.parametrize(
    "name, says",
    [
        ("deep", "line 1: the line is not JSON that can be read"),
        ("bigint", "line 1: the line is not JSON that can be read"),
        ("surrogate", "line 1: column 'sentence' holds half a character"),
    ],
)
def test_hard_lines_of_json(name, says, faults):
    path = faults / "field" / "jsonl_hard_lines" / f"{name}.jsonl"
    with pytest.raises(UserError) as caught:
        task(path).read("train")
    assert str(caught.value).startswith(f"{path}, {says}")


def test_labels_of_stars(faults):
    path = faults / "field" / "numeric_label_names" / "stars.jsonl"
    stars = ["1", "2", "3", "4", "5"]
    for labels, says in [
        (stars, "'1' by its name or '2' by its index"),
        ([1, 2, 3, 4, 5], "LABEL_NAMES has 1, which is no text"),
        ({0: ["no"], 1: ["yes"]}, r"LABEL_NAMES has \['no'\]"),
    ]:
        with pytest.raises(UserError, match=says):
            task(path, labels=labels).read("train")
    assert task(path, labels=dict(enumerate(stars))).read("train")[1] == stars


def test_lists_keep_their_letters(faults):
    path = faults / "field" / "list_columns_escaped" / "list.jsonl"
    assert task(path).read("train") == ([['["café", "déjà"]']], ["question"])


def test_small_files(tmp_path):
    quoted = tmp_path / "q.tsv"
    quoted.write_text('sentence\tlabel\n"He said ""hi"""\tquestion\n')
    assert task(quoted).read("train") == ([['He said "hi"']], ["question"])
    for row, says in [
        ('{"sentence": "x", "label": null}', "line 1: there is no column 'label'"),
        ('{"prompt": "x", "label": "question"}', "give a column of that name another"),
    ]:
        path = tmp_path / "rows.jsonl"
        path.write_text(row + "\n")
        template = "{prompt}" if "prompt" in row else "{sentence}"
        with pytest.raises(UserError, match=says):
            task(path, template).read("train")


def test_a_tokenizer_of_another_kind(faults):
    path = str(faults / "field" / "tokenizer_json" / "tokenizer.json")
    with pytest.raises(UserError, match="SentencePiece") as caught:
        vocabularies.load(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def opened(path, **options):
    local = task(path, **options)
    return TaskData("faults", None, local, LENGTHS, (), 8192)


def test_what_a_vocabulary_cannot_say_is_said(faults, capsys):
    folder = faults / "field" / "unknown_pieces"
    opened(folder / "emoji.tsv", vocabulary="mini")
    shown = capsys.readouterr().err
    assert "half or more of the pieces of 2 of 3 texts are unknown" in shown
    opened(folder / "code.tsv", labels=None, vocabulary="mini")
    shown = capsys.readouterr().err
    assert "the vocabulary cannot write 2 of 4 targets, such as '~tilde'" in shown


def test_the_vocabulary_is_that_of_the_model(faults):
    folder = faults / "field" / "wrong_vocabulary"
    models = vocabularies.load(str(folder / "spiece.model"))
    local = task(folder / "train.tsv", vocabulary="mini")
    with pytest.raises(UserError, match="in the vocabulary mini, the model reads"):
        TaskData("faults", None, local, LENGTHS, (), 8192, models_vocabulary=models)
