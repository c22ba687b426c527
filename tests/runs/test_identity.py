# SPDX-License-Identifier: Apache-2.0
"""A run that is resumed is the same run, or says what was changed."""

import json
import pathlib
import shutil

import optax
import pytest

from prompt_tuning import cli
from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.runs import identity
from prompt_tuning.training import optimizers, prompt_starts


@pytest.fixture(scope="module")
def own_reviews(tmp_path_factory, reviews):
    """Files of the run's task that a test may change, by their splits."""
    folder = tmp_path_factory.mktemp("reviews")
    return {split: shutil.copy(path, folder) for split, path in reviews.items()}


@pytest.fixture(scope="module")
def words(train_words, own_reviews):
    """The words of a small run in a folder, with some values changed."""
    return lambda folder, **values: train_words(
        **{
            "MODEL_DIR": folder,
            "MIXTURE_OR_TASK_NAME": "identity_reviews",
            "TASK_FILES": own_reviews,
            "LEARNING_RATE": 0.1,
            **values,
        }
    )


@pytest.fixture(scope="module")
def first(words, tmp_path_factory):
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("first") / "run"
    assert cli.main(words(folder)) == 0
    return folder


@pytest.fixture
def folder(first, tmp_path):
    return shutil.copytree(first, tmp_path / "run")


def content(folder):
    """Every file, to the byte."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"LEARNING_RATE": 0.2},
            "members/prompt/learning_rate is 0.2 and was 0.1",
        ),
        ({"SEED": 3}, "seed is 3 and was 0"),
        ({"BATCH_SIZE": 16}, "batch_size is 16 and was 8"),
        ({"TRAIN_STEPS": 3}, "steps is 3 and was 4"),
        ({"TEMPLATE": "film: {sentence}"}, "template is 'film: {sentence}'"),
        ({"PROMPTS": "[{'seed': [0, 1]}]"}, "members/seed_1/"),
        ({"adafactor.decay_rate": 0.9}, "optimizer/decay_rate is 0.9 and was 0.8"),
        ({"Objective.z_loss": 0.0}, "objective/z_loss is 0.0 and was 0.0001"),
    ],
)
def test_another_run_is_refused_and_nothing_changes(
    change, says, words, folder, capsys
):
    before = content(folder)
    assert cli.main(words(folder, **change)) == 2
    (line,) = (
        x for x in capsys.readouterr().err.splitlines() if x.startswith("prompt-tuning")
    )
    assert says in line and "holds step 4 of another run" in line
    assert "ALLOW_CHANGES=True" in line
    assert content(folder) == before


def test_other_data_under_the_same_name_are_another_run(
    words, own_reviews, folder, capsys
):
    path = pathlib.Path(own_reviews["train"])
    text = path.read_text()
    path.write_text(text.replace("dull", "slow"))
    try:
        before = content(folder)
        assert cli.main(words(folder)) == 2
        assert "members/prompt/content/train is" in capsys.readouterr().err
        assert content(folder) == before
    finally:
        path.write_text(text)


@pytest.mark.slow
def test_what_is_changed_all_the_same_is_on_record(words, folder):
    changed = words(folder, LEARNING_RATE=0.2, TRAIN_STEPS=6, ALLOW_CHANGES=True)
    assert cli.main(changed) == 0
    change = {
        "value": "members/prompt/learning_rate",
        "was": 0.1,
        "now": 0.2,
        "step": 4,
    }
    results = json.loads((folder / "results.json").read_text())
    assert results["changes"] == [change]
    assert results["members"][0]["last_step"] == 6
    _, card = prompt_file.load_prompt(folder / "prompt.safetensors")
    assert card["changes"] == [change]
    # From now on that is the run, and its past is not forgotten.
    assert cli.main(words(folder, LEARNING_RATE=0.2, TRAIN_STEPS=8)) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["changes"] == [change]


def test_more_steps_are_the_same_run(words, folder):
    assert cli.main(words(folder, TRAIN_STEPS=6)) == 0
    results = json.loads((folder / "results.json").read_text())
    assert "changes" not in results and results["members"][0]["last_step"] == 6


def test_optimizers_of_optax_say_nothing_of_themselves():
    assert identity.describe_optimizer(optax.sgd(0.1)) == {}
    found = identity.describe_optimizer(
        optimizers.adamw(
            optimizers.learning_rate_schedule("constant * linear_warmup", 0.5, 100)
        )
    )
    assert found["learning_rate"] == [1e-8, 0.05, 0.5, 0.5, 0.5, 0.5]
    assert found["optimizer"]["name"] == "adamw"


def test_starts_are_told_by_what_they_are_made_of():
    one, two = (prompt_starts.class_labels_init(["a", name]) for name in "bc")
    assert identity.describe_init(one) != identity.describe_init(two)
    assert identity.describe_init("text:good") == "text:good"
