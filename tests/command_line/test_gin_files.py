# SPDX-License-Identifier: Apache-2.0
"""gin files are read as data: order, what wins, and every way to be no gin file."""

import os

import pytest

from prompt_tuning.command_line import configuration, gin_files
from prompt_tuning.command_line.table import COMMANDS
from prompt_tuning.errors import UserError

TRAIN = COMMANDS["train"].defaults


def write(folder, **texts):
    """Writes ``NAME.gin`` files; gives their paths."""
    for name, text in texts.items():
        (folder / f"{name}.gin").write_text(text)
    return [str(folder / f"{name}.gin") for name in texts]


def test_two_files_of_one_rank_may_not_differ(tmp_path):
    paths = write(tmp_path, one="TRAIN_STEPS = 5", two="TRAIN_STEPS = 6")
    with pytest.raises(UserError, match=r"both .*one.gin and .*two.gin define TRAIN"):
        configuration.parse(["runs/train.gin", *paths], [])


def test_the_order_of_files_does_not_matter_their_kinds_do(tmp_path):
    files = [
        *write(tmp_path, mine="TRAIN_STEPS = 5\nPROMPT_LENGTH = 7\n"),
        "optimizers/adamw.gin",
        "methods/prompt_tuning.gin",
    ]
    for order in files, files[::-1]:
        found = configuration.parse(order, ["DECAY_STEPS=9"], defaults=TRAIN)
        assert found.value("Schedule.steps") == 5  # not the run's 30,000
        assert found.value("LEARNING_RATE") == 0.3  # the method's
        assert found.value("WARMUP_STEPS") == 100  # not the run's 1,000
        assert found.value("Tuning.prompt_length") == 7  # not the method's 100
        assert found.value("learning_rate_schedule.decay_steps") == 9
        assert found.value("Tuning.optimizer").name == "adamw"


def test_a_run_of_before_is_a_run_file(tmp_path):
    (path,) = write(tmp_path, config="Base.config = @T5Config()\nLEARNING_RATE = 1\n")
    found = configuration.parse([path, "methods/model_tuning.gin"], [], defaults=TRAIN)
    names = [file.path.name for file in found.files]
    assert "train.gin" not in names
    assert names.index("config.gin") < names.index("model_tuning.gin")
    assert found.value("LEARNING_RATE") == 0.001


def test_what_the_user_writes_to_set_a_parameter():
    found = configuration.parse(["runs/train.gin"], ["Schedule.log_period=3"])
    assert found.said_as("Schedule.patience") == "EARLY_STOPPING_PATIENCE"
    assert found.said_as("Schedule.log_period") == "Schedule.log_period"


def test_includes_stand_in_their_place(tmp_path):
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", inner="A = 1\nB = 1\n")
    (path,) = write(tmp_path, outer="A = 0\ninclude 'below/inner.gin'\nB = 2\n")
    found = configuration.parse([path], [])
    assert (found.value("A"), found.value("B")) == (1, 2)
    assert "include" not in found.files[0].text


def test_includes_in_a_circle(tmp_path):
    a, _ = write(tmp_path, a="include 'b.gin'\n", b="\n\ninclude 'a.gin'\n")
    with pytest.raises(UserError, match=r"circle: .*a.gin -> .*b.gin -> .*a.gin"):
        configuration.parse([a], [])


def test_includes_that_multiply(tmp_path):
    long = f"#{'x' * 200_000}\n"
    first, *_ = write(tmp_path, first="include 'second.gin'\n" * 10, second=long)
    with pytest.raises(UserError, match="includes more than"):
        configuration.parse([first], [])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"A = 1\n\xff\xfe", r"not UTF-8 text \(byte 6\)"),
        (bytes(range(256)) * 4, "not UTF-8"),
        (b"A = [\n", "not gin"),
        (b"A = " + b"[" * 5000, "not gin"),
        (b"A\0 = 1", "not gin"),
        (b"A = {[]: 1}", "not gin"),
        (b"hello world", "line 1: not gin"),
        (b"A = 1\n" * 200_000, "bytes: it is no gin file"),
        (b"include 'nowhere.gin'", "no gin file nowhere.gin"),
        (b"A = %B\nB = %A\nX = %A", "circle"),
    ],
)
def test_what_is_no_gin_file(content, says, tmp_path):
    path = tmp_path / "odd.gin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        configuration.parse([str(path)], []).value("X")
    assert "\n" not in str(error.value)


def test_faults(shared):
    for path in sorted((shared / "faults").glob("config_gin_*")):
        with pytest.raises(UserError, match="is not UTF-8 text"):
            configuration.parse([str(path)], [])


def test_what_cannot_be_a_file(tmp_path):
    pipe = tmp_path / "pipe.gin"
    os.mkfifo(pipe)
    for name, says in (
        ("nowhere.gin", "no gin file nowhere.gin; did you mean"),
        (str(tmp_path), "is a folder"),
        (str(pipe), "no gin file"),
        ("/dev/null", "no gin file"),
        ("x" * 300, "can be called"),
        ("a\0b", "no gin file"),
    ):
        with pytest.raises(UserError, match=says):
            gin_files.find(name)


def test_reading_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    module = tmp_path / "evil_module_of_a_gin_file.py"
    module.write_text(f"open({str(marker)!r}, 'w')\n")
    (path,) = write(tmp_path, evil=f"import {module.stem}\nTRAIN_STEPS = 3\n")
    found = configuration.parse([path], [])
    assert found.value("TRAIN_STEPS") == 3 and not marker.exists()


def test_missing_macros_name_the_files_that_set_them():
    found = configuration.parse([], [], defaults=TRAIN)
    with pytest.raises(UserError) as error:
        configuration.check_macros(found)
    text = str(error.value)
    assert text.startswith("not set: --gin.MIXTURE_OR_TASK_NAME=... --gin.MODEL_DIR=")
    assert "METHOD, PROMPT_LENGTH" in text
    assert "--gin_file=methods/prompt_tuning.gin" in text
    assert "INITIAL_CHECKPOINT_PATH (e.g. by --gin_file=models/" in text
