# SPDX-License-Identifier: Apache-2.0
"""A user's mistake is one clear line and exit code 2, with nothing half-written."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from prompt_tuning import cli, config
from prompt_tuning.checkpoints import model_file, prompt_file
from prompt_tuning.command_line import configuration, gin_files
from prompt_tuning.command_line.table import COMMANDS
from prompt_tuning.errors import UserError
from prompt_tuning.network.model import Model
from prompt_tuning.network.transformer import T5Config, Transformer

TRAIN = COMMANDS["train"].defaults


@pytest.fixture
def good(tmp_path, reviews, tiny_checkpoint):
    """Values of a run that would work: NAME -> value, and the gin files."""
    return {
        "gin_file": [
            "models/tiny.gin",
            "methods/prompt_tuning.gin",
            "tasks/local_file.gin",
        ],
        "MODEL_DIR": str(tmp_path / "run"),
        "MIXTURE_OR_TASK_NAME": "cli_reviews",
        "TASK_FILES": reviews,
        "TEMPLATE": "{sentence}",
        "LABEL_NAMES": ["good", "bad"],
        "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4},
        "TRAIN_STEPS": 2,
        "BATCH_SIZE": 8,
        "EVAL_BATCH_SIZE": 8,
        "PROMPT_LENGTH": 3,
        "INITIAL_CHECKPOINT_PATH": str(tiny_checkpoint),
    }


def arguments(values):
    files = [f"--gin_file={name}" for name in values["gin_file"]]
    return files + [
        f"--gin.{name}={value}" for name, value in values.items() if name != "gin_file"
    ]


def refused(words, capsys, tmp_path):
    """Runs a command that must fail and leave no trace; gives its one line."""
    tree = lambda: {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    before = tree()
    code = cli.main(words)
    captured = capsys.readouterr()
    lines = [x for x in captured.err.splitlines() if x.startswith("prompt-tuning:")]
    assert code == 2 and len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert tree() == before
    return lines[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"MODEL_DIR": None}, "not set: --gin.MODEL_DIR=..."),
        ({"TRAIN_STPES": 3}, "TRAIN_STPES sets nothing: did you mean TRAIN_STEPS"),
        ({"train.colour": 3}, "colour"),
        ({"trian.seed": 3}, "trian"),
        ({"gin_file": ["models/tiny.gin"]}, "--gin_file=methods/prompt_tuning.gin"),
        ({"gin_file": ["models/tinny.gin"]}, "did you mean models/tiny.gin"),
        ({"TEMPLATE": "{review}"}, "review"),
        ({"LABEL_NAMES": ["good", "fair"]}, "bad"),
        ({"LABEL_NAMES": {"good": "☃☃", "bad": "bad"}}, "vocabulary"),
        ({"EVAL_SPLIT": "dev"}, "train, validation, test; EVAL_SPLIT=None tunes"),
        ({"TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 1}}, "TASK_FEATURE_LENGTHS"),
        ({"TASK_FILES": {"train": "nowhere.tsv"}}, "nowhere.tsv"),
        ({"T5Config.emb_dim": 24}, "24"),
        ({"INITIAL_CHECKPOINT_PATH": "/nowhere"}, "there is no folder /nowhere"),
        ({"INITIAL_CHECKPOINT_PATH": "embedded:t5"}, "t5_1_1_mini"),
        ({"INITIAL_CHECKPOINT_PATH": "None"}, "one is, --initial_checkpoint_path=PATH"),
        ({"MIXTURE_OR_TASK_MODULE": "my.tasks"}, "MODULE='my.tasks' registers nothing"),
        ({"MODEL_DIR": "/dev/null/run"}, "cannot write to /dev/null/run"),
        ({"MODEL_DIR": "gs://bucket/run"}, "mount the bucket"),
        ({"PROMPT_PLACEMENT": "infix"}, "infix"),
        ({"PROMPT_LENGTH": -1}, "PROMPT_LENGTH=-1 must be a whole number from 0"),
        ({"FROZEN_DTYPE": "int3"}, "int3"),
        ({"BATCH_SIZE": 0}, "BATCH_SIZE"),
        ({"LEARNING_RATE_FACTORS": "constant * magic"}, "magic"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_train_refuses(change, says, good, capsys, tmp_path):
    values = {**good, **change}
    values = {name: value for name, value in values.items() if value is not None}
    if "gin_file" in change:
        # Values that no file reads are refused first; they are not what is tested.
        values = {"gin_file": change["gin_file"]}
        if "tinny" not in change["gin_file"][0]:
            values |= {
                name: good[name]
                for name in (
                    "MODEL_DIR",
                    "TASK_FEATURE_LENGTHS",
                    "INITIAL_CHECKPOINT_PATH",
                    "MIXTURE_OR_TASK_NAME",
                )
            }
    assert says in refused(["train", *arguments(values)], capsys, tmp_path)


def test_a_misspelt_task_gets_its_neighbours(good, capsys, tmp_path):
    values = {name: good[name] for name in ("MODEL_DIR", "TASK_FEATURE_LENGTHS")}
    values |= {
        "gin_file": good["gin_file"][:2],
        "MIXTURE_OR_TASK_NAME": "roten_tomatoes",
        "INITIAL_CHECKPOINT_PATH": good["INITIAL_CHECKPOINT_PATH"],
    }
    line = refused(["train", *arguments(values)], capsys, tmp_path)
    assert "rotten_tomatoes" in line


def test_an_empty_split(good, capsys, tmp_path, reviews):
    empty = tmp_path / "empty.tsv"
    empty.write_text("sentence\tlabel\n")
    good["TASK_FILES"] = {**reviews, "train": str(empty)}
    good["MIXTURE_OR_TASK_NAME"] = "cli_empty"
    assert "empty" in refused(["train", *arguments(good)], capsys, tmp_path)


@pytest.fixture
def prompt_of_another(tmp_path):
    """A prompt whose card names another base model."""
    path = tmp_path / "other.safetensors"
    card = {
        "base_model": {"name": "other", "fingerprint": "0" * 64},
        "vocabulary": "mini",
    }
    prompt_file.save_prompt(path, np.zeros((3, 16), np.float32), card)
    return path


def infer(prompt, checkpoint, *rest):
    return [
        "infer",
        "--gin_file=models/tiny.gin",
        f"--gin.INITIAL_CHECKPOINT_PATH={checkpoint}",
        f"--gin.PROMPT_FILE={prompt}",
        *rest,
    ]


def test_a_prompt_of_another_model(
    prompt_of_another, tiny_checkpoint, capsys, tmp_path
):
    line = refused(infer(prompt_of_another, tiny_checkpoint, "text"), capsys, tmp_path)
    assert "was tuned on other" in line and "--force" in line


def test_force_takes_a_prompt_of_another_model(
    prompt_of_another, tiny_checkpoint, capsys
):
    arguments = infer(prompt_of_another, tiny_checkpoint, "--force", "text")
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["input"] == "text"


def test_the_model_is_that_of_the_prompts_card(capsys, tmp_path):
    path = tmp_path / "prompt.safetensors"
    card = {
        "base_model": {"name": "t5_1_1_mini", "fingerprint": "unknown"},
        "labels": ["good", "bad"],
        "vocabulary": "mini",
        "template": "{text}",
    }
    prompt_file.save_prompt(path, np.zeros((3, 192), np.float32), card)
    words = ["infer", f"--prompt_file={path}", "--max_input_length=32", "text"]
    assert "--force" in refused(words, capsys, tmp_path)
    assert cli.main([*words, "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] in card["labels"]


def test_a_prompt_of_another_width(tiny_checkpoint, capsys, tmp_path):
    path = tmp_path / "wide.safetensors"
    prompt_file.save_prompt(path, np.zeros((3, 24), np.float32), {})
    line = refused(infer(path, tiny_checkpoint, "text"), capsys, tmp_path)
    assert "width 24" in line and "width 16" in line


def test_infer_refuses_what_it_cannot_answer(
    prompt_of_another, tiny_checkpoint, capsys, tmp_path
):
    for words, says in (
        ([], "no text to answer"),
        (["fine", " "], "text 2 is empty"),
        (["--gin.INPUT_FILE=/nowhere.txt"], "cannot read /nowhere.txt"),
    ):
        line = refused(
            infer(prompt_of_another, tiny_checkpoint, *words), capsys, tmp_path
        )
        assert says in line


def test_a_checkpoint_of_another_size(good, capsys, tmp_path):
    sizes = T5Config(8192, 24, 2, 1, 1, 8, 32)
    model = Model(Transformer(sizes))
    model_file.save_model(tmp_path / "wide", model.init(jax.random.key(0)), {})
    good |= {"INITIAL_CHECKPOINT_PATH": str(tmp_path / "wide"), "VOCABULARY": "mini"}
    line = refused(["train", *arguments(good)], capsys, tmp_path)
    assert "24" in line and "16" in line


def test_inspect_refuses_other_files(capsys, tmp_path):
    (tmp_path / "notes").write_text("hello")
    refused(["inspect", str(tmp_path / "notes")], capsys, tmp_path)
    refused(["inspect", str(tmp_path / "missing")], capsys, tmp_path)


@pytest.mark.parametrize(
    "command", ["train", "eval", "infer", "pretrain", "plan", "inspect", "convert"]
)
def test_help_helps(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    assert "usage: prompt-tuning" in capsys.readouterr().out


def test_values_need_no_quotes():
    binding = configuration.binding
    assert binding("MODEL_DIR=/tmp/a b") == "MODEL_DIR = '/tmp/a b'"
    assert binding("MODEL_DIR='/tmp/a'") == "MODEL_DIR = '/tmp/a'"
    assert binding("X=None") == "X = None"
    assert binding("train.optimizer=@adamw()") == "train.optimizer = @adamw()"
    with pytest.raises(UserError, match="lacks a value"):
        binding("MODEL_DIR")


def test_two_files_may_not_define_the_same_macro(tmp_path):
    paths = []
    for name, steps in ("one", 5), ("two", 6):
        paths.append(tmp_path / f"{name}.gin")
        paths[-1].write_text(f"TRAIN_STEPS = {steps}\n")
    with pytest.raises(UserError, match="both .*one.gin and .*two.gin define TRAIN"):
        configuration.parse(["runs/train.gin", *map(str, paths)], [])


def test_search_paths(tmp_path):
    (tmp_path / "mine.gin").write_text("T5Config.emb_dim = 5\n")
    found = gin_files.find("mine.gin", [str(tmp_path)])
    assert found == tmp_path / "mine.gin"


def test_the_written_config_gives_the_same_run(good, tmp_path):
    assert cli.main(["train", *arguments(good)]) == 0
    first = json.loads((tmp_path / "run/results.json").read_text())
    text = (tmp_path / "run" / "config.gin").read_text()
    again = tmp_path / "again.gin"
    again.write_text(text.replace(str(tmp_path / "run"), str(tmp_path / "run2")))
    assert cli.main(["train", f"--gin_file={again}"]) == 0
    second = json.loads((tmp_path / "run2/results.json").read_text())
    for measured in ("pace", "cost"):
        assert first.pop(measured).keys() == second.pop(measured).keys()
    assert first == second
    prompts = [
        prompt_file.load_prompt(tmp_path / name / "prompt.safetensors")[0]
        for name in ("run", "run2")
    ]
    np.testing.assert_array_equal(*prompts)


def test_the_tiny_model_of_the_tests_is_that_of_the_configs():
    config.parse(configuration.parse(["models/tiny.gin"], []))
    sizes = dataclasses.asdict(config.configurable("T5Config")())
    assert (sizes["vocab_size"], sizes["emb_dim"]) == (8192, 16)


def test_what_is_quoted_moves_no_cursor(capsys):
    assert cli.main(["train", "--gin_file=no\x1b[31m\u202efile.gin"]) == 2
    error = capsys.readouterr().err
    assert "no\\x1b[31m\\u202efile.gin" in error and "\x1b" not in error
