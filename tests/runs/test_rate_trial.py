# SPDX-License-Identifier: Apache-2.0
"""Learning rates that a run tries before it begins, by successive halving."""

import numpy as np
import pytest

from prompt_tuning import cli, files
from prompt_tuning.checkpoints import prompt_file
from prompt_tuning.runs import rate_trial


@pytest.mark.parametrize("count", range(2, 20))
def test_all_rates_together_read_no_more_than_the_run(count):
    steps = 10_000
    ends = rate_trial.rungs(steps, count)
    left, before, rows = count, 0, 0
    for end in ends:
        rows, left, before = rows + left * (end - before), left - left // 2, end
    assert left == 1
    assert 0.45 * steps < rows <= steps
    assert ends[-1] <= steps / 4


@pytest.fixture(scope="module")
def words(train_words):
    return lambda folder, **values: train_words(
        MODEL_DIR=folder, MIXTURE_OR_TASK_NAME="rate_reviews", TRAIN_STEPS=16, **values
    )


@pytest.fixture(scope="module")
def chosen(words, tmp_path_factory):
    """The folder of a run that chose its rate."""
    folder = tmp_path_factory.mktemp("rates") / "run"
    assert cli.main(words(folder, LEARNING_RATE="(1e-6, 0.3, 1e-5)")) == 0
    return folder


def test_the_best_rate_is_taken_and_its_run_is_as_alone(
    chosen, words, tmp_path, capsys
):
    found = files.read_json(chosen / "results.json")["learning_rate"]
    assert found["chosen"] == 0.3
    assert {rate: each["steps"] for rate, each in found["tried"].items()} == {
        "1e-06": 2,
        "0.3": 4,
        "1e-05": 4,
    }
    assert found["share_of_run"] == 10 / 16
    best = max(each["log_likelihood"] for each in found["tried"].values())
    assert found["tried"]["0.3"]["log_likelihood"] == best
    prompt, card = prompt_file.load_prompt(chosen / "prompt.safetensors")
    assert card["recipe"]["learning_rate"] == found
    assert cli.main(words(tmp_path, LEARNING_RATE=0.3)) == 0
    alone, _ = prompt_file.load_prompt(tmp_path / "prompt.safetensors")
    np.testing.assert_array_equal(alone, prompt)
    assert cli.main(words(tmp_path, LEARNING_RATE="auto")) == 2
    assert "a run whose learning rate was given" in capsys.readouterr().err


def test_what_it_wrote_goes_on_with_it_and_tries_nothing(chosen, words, capsys):
    before = files.read_json(chosen / "results.json")
    assert cli.main(["train", f"--gin_file={chosen / 'config.gin'}"]) == 0
    assert "trying the learning rates" not in capsys.readouterr().err
    assert files.read_json(chosen / "results.json")["members"] == before["members"]
    # Before the run's own first checkpoint the trial is what is known.
    for path in sorted((chosen / "checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert cli.main(words(chosen, LEARNING_RATE="(1e-6, 0.3)")) == 2
    assert "another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"LEARNING_RATE": "automatic"}, "LEARNING_RATE='automatic' must be a number"),
        ({"LEARNING_RATE": "(0.1, 0.1)"}, "a list of several different numbers"),
        ({"LEARNING_RATE": "[0.1]"}, "a list of several different numbers"),
        ({"LEARNING_RATE": "(0.1, -1)"}, "a list of several different numbers"),
        (
            {"LEARNING_RATE": "auto", "METHOD": "model_tuning", "PROMPT_LENGTH": 0},
            "model_tuning moves the model: give one rate",
        ),
        (
            {"LEARNING_RATE": "auto", "PROMPTS": [{"learning_rate": 0.1}]},
            "nothing to choose among",
        ),
        (
            {"LEARNING_RATE": "auto", "adafactor.learning_rate": 0.1},
            "uses no LEARNING_RATE",
        ),
    ],
)
def test_what_is_refused_before_anything_is_written(
    words, values, message, tmp_path, capsys
):
    assert cli.main(words(tmp_path / "run", **values)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_commands_want_a_number(capsys):
    words = ["plan", "--gin_file=models/t5_1_1_small.gin", "--topology=local"]
    words += ["--task_feature_lengths={'inputs': 8, 'targets': 4}"]
    words += ["--gin_file=methods/prompt_tuning.gin", "--learning_rate=auto"]
    assert cli.main(words) == 2
    assert "is for train, which tries rates" in capsys.readouterr().err
