# SPDX-License-Identifier: Apache-2.0
"""Every command's help lists all it takes, fits 80 columns, and is what is accepted."""

import re

import pytest

from prompt_tuning.command_line import arguments, gin_files, macros
from prompt_tuning.command_line.table import COMMANDS, CONFIGURABLES, load
from prompt_tuning.errors import UserError

GIN = [name for name, command in COMMANDS.items() if command.defaults]


@pytest.fixture
def help_of(capsys, monkeypatch):
    """What ``prompt-tuning WORDS --help`` prints in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def show(*words):
        with pytest.raises(SystemExit) as ended:
            arguments.parse([*words, "--help"])
        assert ended.value.code == 0
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_80_columns(command, help_of):
    text = help_of(*([command] if command else []))
    assert "usage: prompt-tuning" in text
    assert not [line for line in text.splitlines() if len(line) > 80]
    # No word is cut, and no line is empty but for a bracket.
    assert not re.search(r"^\s*\S?\]$|``|\(see ", text, re.MULTILINE)


@pytest.mark.parametrize("command", GIN)
def test_help_lists_every_macro_with_meaning_default_and_file(command, help_of):
    text = help_of(command)
    files = macros.related_files(COMMANDS[command])
    found = macros.macros_of(files)
    assert len(found) > 5
    for macro in found.values():
        assert macro.meaning, f"{macro.name}: its parameter has no docstring"
        assert re.search(rf"^  {macro.flag}\b", text, re.MULTILINE)
    for file in files:
        assert file.path.stem in text


def test_help_says_the_right_values(help_of):
    text = " ".join(help_of("train").split())
    assert (
        "--early_stopping_patience VALUE evaluations without a better metric after which "
        "training stops; 0 trains to the end [0]"
    ) in text
    assert (
        "[required; 0.3 in methods/prompt_tuning.gin; or by a file of methods/; or by a "
        "file of recipes/]"
    ) in text
    assert (
        "['constant'; 'constant * linear_warmup' in optimizers/adamw.gin; or by a file of "
        "recipes/]"
    ) in text
    assert "--gin_file=methods/NAME.gin brings METHOD" in text
    assert "ia3 IA3: keys, values and the hidden units of the MLPs are scaled" in text
    assert "--model_dir VALUE folder of the run [required]" in text
    assert (
        "``embedded:NAME`` [required; or by a file of models/]".replace("`", "") in text
    )
    assert "--port VALUE where to listen; 0 takes any free one [8000]" in " ".join(
        help_of("serve").split()
    )


def test_help_of_ones_own_file(help_of, tmp_path):
    (tmp_path / "mine.gin").write_text("MY_RATE = 7\nadamw.b1 = %MY_RATE\n")
    mine = f"--gin_file={tmp_path / 'mine.gin'}"
    text = help_of("train", mine, "--gin_file=methods/ia3.gin")
    assert re.search(r"--my_rate VALUE +how much of the mean .* \[7\]", text)
    assert "[0.003; 0.3 in methods/prompt_tuning.gin;" in " ".join(text.split())


@pytest.mark.parametrize(
    "words",
    [
        ["--learning_rate", "0.1"],
        ["--learning-rate=0.1"],
        ["--LEARNING_RATE", "0.1"],
        ["--gin.LEARNING_RATE=0.1"],
        ["--gin.LEARNING_RATE", "0.1"],
        ["--gin.LEARNING_RATE=0.3", "--learning_rate=0.1"],
        ["--learning_rate=0.3", "--gin.LEARNING_RATE=0.1"],
    ],
)
def test_plain_flags_are_macros(words):
    said = arguments.parse([*complete_training(), *words])
    assert said.configuration.value("LEARNING_RATE") == 0.1


def complete_training():
    return [
        "train",
        "--gin_file=models/t5_1_1_mini.gin",
        "--gin_file=methods/prompt_tuning.gin",
        "--model_dir=x",
        "--mixture_or_task_name=y",
        "--task_feature_lengths={'inputs': 8, 'targets': 4}",
    ]


def test_switches_and_numbers_below_zero():
    said = arguments.parse([*complete_training(), "--pack", "--seed", "-1"])
    assert said.configuration.value("PACK") is True
    assert said.configuration.value("SEED") == -1
    said = arguments.parse([*complete_training(), "--pack", "False"])
    assert said.configuration.value("PACK") is False


def test_texts_between_flags():
    words = ["infer", "one", "--force", "two", "--prompt_file", "p", "--", "--three"]
    said = arguments.parse(words)
    assert said.given == {"texts": ["one", "two", "--three"]}
    assert said.configuration.value("FORCE") is True


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "no command is called 'trian': did you mean train?"),
        (["train", "--lerning_rate", "1"], "did you mean --learning_rate"),
        (["infer", "--num_decodes=2"], "such as --gin_file=decoding/beam.gin"),
        (["train", "--seed"], "--seed lacks a value"),
        (["train", "stray"], "stray"),
        (["train", "--gin.MODEL_DIR"], "MODEL_DIR lacks a value"),
        (["serve"], "--model"),
        (["serve", "--model=x", "--prot", "3"], "did you mean --port"),
        (["serve", "--model=x", "--gin.SEED=3"], "serve takes no --gin.SEED"),
        (["inspect"], "path"),
        (["inspect", "a", "b"], "b"),
        (["convert", "a", "b"], "--to"),
    ],
)
def test_what_is_refused(words, says):
    with pytest.raises(UserError) as error:
        arguments.parse(words)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_version(capsys):
    with pytest.raises(SystemExit):
        arguments.parse(["--version"])
    assert re.fullmatch(r"prompt-tuning \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_the_table_names_what_there_is():
    for place in {*CONFIGURABLES.values(), *(c.function for c in COMMANDS.values())}:
        assert callable(load(place))
    for command in COMMANDS.values():
        for target, file in command.defaults.items():
            assert target in {b.target for b in gin_files.read(file).bindings}
