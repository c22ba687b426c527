# SPDX-License-Identifier: Apache-2.0
"""A task and its model have one vocabulary, the model's, and what it lacks is said."""

import pytest
import seqio

from prompt_tuning import cli
from prompt_tuning.data import metrics, vocabularies
from prompt_tuning.data.local_task import LocalTask
from prompt_tuning.errors import UserError
from prompt_tuning.runs.task_data import TaskData
from prompt_tuning.tasks import features, sources

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


@pytest.fixture
def someones_task():
    """A task that somebody registered: one of three targets has no pieces, nor a text."""
    words = {
        "inputs": ["good", "bad", "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd"],
        "targets": ["yes", "no", "two\nlines"],
    }

    def add(name, **options):
        return seqio.TaskRegistry.add(
            name,
            source=sources.Rows(lambda split: words, ["train"]),
            preprocessors=[
                seqio.preprocessors.tokenize,
                seqio.preprocessors.append_eos,
            ],
            output_features=features.output_features("mini"),
            **options,
        )

    yield add
    for name in [name for name in seqio.TaskRegistry.names() if "someones" in name]:
        seqio.TaskRegistry.remove(name)


def told(name, capsys):
    """What is said of a task's training split, twice looked at."""
    data = TaskData(name, None, None, LENGTHS, (), 8192)
    for pack in (False, True, False):
        data.check("train", pack=pack)
    return [line for line in capsys.readouterr().err.splitlines() if "someones" in line]


def test_what_the_vocabulary_lacks_of_somebodys_task_is_said_once(
    someones_task, capsys
):
    someones_task("someones", metric_fns=metrics.by_name(["accuracy"], None))
    texts, targets = told("someones", capsys)
    assert "pieces of 1 of 3 texts are unknown" in texts
    assert (
        "someones, train: the vocabulary cannot write 1 of 3 targets, such as 'two\\nlines'"
        in targets
    )


def test_targets_that_nothing_is_compared_with_need_not_be_reached(
    someones_task, capsys
):
    someones_task("someones_own")
    (texts,) = told("someones_own", capsys)
    assert "texts are unknown" in texts
