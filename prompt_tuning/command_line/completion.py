# SPDX-License-Identifier: Apache-2.0
"""Shell completion: a script of all commands, their flags and the package's gin files.

The parsers of ``--help`` are read by shtab, so that both say the same.
"""

import argparse
from typing import Any

import shtab

from prompt_tuning.command_line import gin_files

# Files of one's own and those of the package, which are named by kind.
_GIN_FILES = {
    "bash": "_prompt_tuning_gin_files",
    "zsh": "_prompt_tuning_gin_files",
    "tcsh": "f",
}


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What the shell has to read: ``eval "$(prompt-tuning --completion bash)"``.

    Args:
      parser: of the program, with those of all commands in it.
      shell: 'bash', 'zsh' or 'tcsh'.
    """
    (commands,) = (a.choices for a in parser._actions if isinstance(a.choices, dict))
    for command in commands.values():
        for action in command._actions:
            action.complete = _answers(action)
    names = " ".join(gin_files.shipped())
    preamble = {
        "bash": f"""_prompt_tuning_gin_files() {{
  compgen -W '{names}' -- "$1"
  compgen -f -X '!*.gin' -- "$1"
  compgen -d -- "$1"
}}""",
        "zsh": f"""_prompt_tuning_gin_files() {{
  compadd {names}
  _files -g '*.gin'
}}""",
    }
    return shtab.complete(
        parser,
        shell=shell,
        root_prefix="prompt_tuning",
        preamble=preamble,  # pyright: ignore[reportArgumentType]
    )


def _answers(action: argparse.Action) -> Any:
    """What a flag is completed with: gin files, or any path."""
    return _GIN_FILES if "--gin_file" in action.option_strings else shtab.FILE
