# SPDX-License-Identifier: Apache-2.0
"""The completion script, asked by a real bash."""

import shutil
import subprocess

import pytest

from prompt_tuning.command_line import arguments, gin_files
from prompt_tuning.command_line.table import COMMANDS

ASK = """
source {script}
COMP_WORDS=({words} "")
COMP_CWORD={last}
COMP_WORDS[COMP_CWORD]='{prefix}'
_shtab_prompt_tuning prompt-tuning '{prefix}' 2> /dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    from prompt_tuning.command_line import completion

    path = tmp_path_factory.mktemp("completion") / "bash"
    path.write_text(completion.script(arguments.whole_parser(), "bash"))
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "prefix", "found"),
    [
        ([], "", set(COMMANDS)),
        ([], "in", {"infer", "inspect"}),
        (["train"], "--learn", {"--learning_rate", "--learning_rate_factors"}),
        (["serve"], "--po", {"--port"}),
        (
            ["train", "--gin_file"],
            "opt",
            {name for name in gin_files.shipped() if name.startswith("optimizers/")},
        ),
    ],
)
def test_bash_completes(script, words, prefix, found):
    asked = ASK.format(
        script=script,
        words=" ".join(["prompt-tuning", *words]),
        last=len(words) + 1,
        prefix=prefix,
    )
    answer = subprocess.run(
        ["bash", "-c", asked], capture_output=True, text=True, check=True
    )
    assert set(answer.stdout.split()) == found


@pytest.mark.parametrize("shell", arguments.SHELLS)
def test_every_shell_gets_a_script(shell, capsys):
    with pytest.raises(SystemExit) as ended:
        arguments.parse(["--completion", shell])
    assert ended.value.code == 0
    assert "learning_rate" in capsys.readouterr().out
