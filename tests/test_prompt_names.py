# SPDX-License-Identifier: Apache-2.0
"""One rule for what prompts are called, wherever they are named."""

import pytest

from prompt_tuning import prompt_names
from prompt_tuning.errors import UserError
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.training import prompt_lists


@pytest.mark.parametrize("name", ["boolq", "boolq v2", "été", "a.b-c_d=1", "x" * 200])
def test_names_that_files_can_have(name, tmp_path):
    assert prompt_names.check(name) == name
    (tmp_path / f"{name}.safetensors").touch()


@pytest.mark.parametrize(
    "name",
    ["", " ", "..", ".hidden", "dot.", " a", "a/b", "a\\b", "a\nb", "\0", "\ud800"]
    + ["x" * 201, None, 3, b"a"],
)
def test_names_that_they_cannot(name):
    with pytest.raises(UserError, match="must be a word that files can be called by"):
        prompt_names.check(name)


def test_a_long_name_is_not_repeated_whole():
    with pytest.raises(UserError) as refused:
        prompt_names.check("x" * 10_000)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("give", "says"),
    [
        (lambda: Prompt("a/b", 1), "name='a/b' must be a word"),
        (
            lambda: prompt_lists.expand([{"name": "x" * 300}], ["seed"]),
            "PROMPTS: name='xxx.*must be a word",
        ),
        (
            lambda: prompt_lists.expand([{"name": "a"}, {"name": "a"}], ["seed"]),
            "two of PROMPTS are called 'a': give each dict its own 'name'",
        ),
    ],
)
def test_all_who_name_prompts_ask(give, says):
    with pytest.raises(UserError, match=says):
        give()
