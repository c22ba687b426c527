# SPDX-License-Identifier: Apache-2.0
"""A task and its model have one vocabulary: the model's."""

import pytest

from prompt_tuning import cli
from prompt_tuning.data import vocabularies
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.errors import UserError
from prompt_tuning.runs.task_data import TaskData

LENGTHS = {"inputs": 8, "targets": 8}


def opened(reviews, rows, models, own=None):
    """A local task of the vocabulary ``own`` on a model of another."""
    local = LocalTask(reviews, "{sentence}", vocabulary=own)
    known = models and vocabularies.load(models)
    return TaskData("one_vocabulary", None, local, LENGTHS, (), rows, "prepend", known)


@pytest.mark.parametrize("name", ["mini", "byt5"])
def test_local_files_are_written_in_the_models_vocabulary(reviews, name):
    assert opened(reviews, 8192, name).vocabulary_name == name


def test_the_same_pieces_are_the_same_whoever_names_them(reviews):
    path = vocabularies.path_of("mini")
    assert opened(reviews, 8192, "mini", path).vocabulary_name == path


def test_another_vocabulary_than_the_models_is_refused(reviews):
    with pytest.raises(
        UserError, match="written in the vocabulary mini, the model reads byt5: choose"
    ):
        opened(reviews, 8192, "byt5", "mini")


def test_without_a_word_of_the_model_its_rows_tell(reviews):
    """A table of T5's size beside the embedded model's 8,192 ids, and a padded one."""
    with pytest.raises(UserError, match="of 8192 ids, but the model has 32128 rows"):
        opened(reviews, 32128, None, "mini")
    assert opened(reviews, 8320, None, "mini").vocabulary_name == "mini"


def test_nothing_names_a_vocabulary(reviews):
    with pytest.raises(UserError, match=r"name the model's in VOCABULARY, or put its "):
        opened(reviews, 8192, None)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_commands_refuse_a_task_of_another(command, train_words, tmp_path, capsys):
    folder = tmp_path / "run"
    words = train_words(
        MIXTURE_OR_TASK_NAME="other_vocabulary", VOCABULARY="byt5", MODEL_DIR=folder
    )
    if command == "eval":
        left_out = ("methods/", "TRAIN_STEPS", ".BATCH_SIZE", "PROMPT_LENGTH")
        words = [
            word.replace("MODEL_DIR", "EVAL_OUTPUT_DIR")
            for word in words
            if not any(part in word for part in left_out)
        ]
    assert cli.main([command, *words[1:]]) == 2
    error = capsys.readouterr().err
    assert "the vocabulary byt5, the model reads mini: choose" in error
    assert not [*folder.glob("*.json*"), *folder.glob("*.safetensors")]
