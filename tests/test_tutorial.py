# SPDX-License-Identifier: Apache-2.0
"""The tutorial's files and commands work as they are printed, at a tiny size."""

import json
import pathlib
import re
import shlex
import shutil
import sys

import jax
import pytest

from prompt_tuning import cli, config
from prompt_tuning.checkpoints import model_file
from prompt_tuning.command_line import configuration
from prompt_tuning.data import vocabularies
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import Transformer

TUTORIAL = pathlib.Path(__file__).parents[1] / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What makes a command tiny: a model of random weights, two steps.
SMALL_MODEL = ("models/t5_1_1_mini.gin", "models/tiny.gin")
SMALL_RUN = ["--gin.TRAIN_STEPS=2", "--gin.EVAL_PERIOD=1", "--gin.PROMPT_LENGTH=3"]


def blocks(language):
    """(title, text) of the tutorial's blocks in a language."""
    found = BLOCK.findall(TUTORIAL.read_text())
    return [(title, text) for kind, title, text in found if kind == language]


def commands():
    """Arguments of every command that the tutorial prints."""
    found = []
    for _, text in blocks("bash"):
        words = shlex.split(text.replace("\\\n", " "))
        assert words[:3] == ["python", "-m", "prompt_tuning"], text
        found.append(words[3:])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tutorial's files beside a tiny model."""
    folder = tmp_path_factory.mktemp("tutorial")
    for language in ("tsv", "python"):
        for title, text in blocks(language):
            (folder / title).write_text(text)
    config.parse(configuration.parse(["models/tiny.gin"], []))
    model = Model(Transformer(config.configurable("T5Config")()))
    model_file.save_model(folder / "model", model.init(jax.random.key(0)), {})
    pieces = vocabularies.path_of(vocabularies.EMBEDDED)
    shutil.copyfile(pieces, folder / "model" / model_file.VOCABULARY)
    return folder


def run(arguments, folder, monkeypatch):
    """Runs a command in ``folder``, shrunk."""
    small = [word.replace(*SMALL_MODEL) for word in arguments]
    small.append("--gin.INITIAL_CHECKPOINT_PATH=model")
    if arguments[0] == "train":
        small += SMALL_RUN
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    assert cli.main(small) == 0, small


def test_the_task_takes_under_20_lines():
    ((title, text),) = blocks("python")
    lines = [line for line in text.splitlines() if line.strip()]
    assert title == "questions.py" and len(lines) < 20


def test_the_local_file(folder, monkeypatch, capsys):
    train, infer = commands()[:2]
    run(train, folder, monkeypatch)
    results = json.loads((folder / "runs/local/results.json").read_text())
    (member,) = results["members"]
    assert member["last_step"] == 2 and "accuracy" in member["validation"]
    capsys.readouterr()
    run(infer, folder, monkeypatch)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["input"] for answer in answers] == infer[-2:]
    assert {answer["answer"] for answer in answers} <= {"question", "statement"}


def test_the_registered_task(folder, monkeypatch):
    train, evaluate = commands()[2:]
    run(train, folder, monkeypatch)
    assert "questions" in sys.modules
    run(evaluate, folder, monkeypatch)
    results = json.loads(
        (folder / "runs/questions/validation/results.json").read_text()
    )
    assert results["examples"] == 4
    assert 0 <= results["metrics"]["accuracy"] <= 100
