# SPDX-License-Identifier: Apache-2.0
"""The command line: ``prompt-tuning COMMAND --gin_file=... --gin.NAME=value``."""

import contextlib
import importlib
import io
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning.command_line import arguments
from prompt_tuning.command_line.table import COMMANDS, Command, Processes, load
from prompt_tuning.errors import UserError, printable


def run(words: Sequence[str]) -> None:
    """Runs one command; errors are exceptions."""
    if _may_be_several() and not arguments.only_asks(words) and words[0] in COMMANDS:
        # First of all, so that what one process fails at ends the others, too.
        _find_company(words[0])
    said = arguments.parse(words)
    command = COMMANDS[said.command]
    # Imported late: --help and a misspelt command should answer at once.
    from absl import logging

    from prompt_tuning import processes

    logging.set_verbosity(logging.ERROR)
    if command.loads_tensorflow:
        from prompt_tuning import report

        with report.doing("loading TensorFlow, which reads the data"):
            _import_quietly("seqio")
    if command.compiles:
        from prompt_tuning.devices import compilation_cache

        compilation_cache.use()
    with contextlib.ExitStack() as stack:
        if not processes.is_first():
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        _show(command, _result(said))


def _may_be_several() -> bool:
    """Whether it is worth the time of importing `processes` to ask it."""
    return any(
        name.startswith(("JAX_", "SLURM_", "TPU_", "MEGASCALE_")) for name in os.environ
    )


def _find_company(name: str) -> None:
    """Joins the other processes of a command, if there are any.

    Raises:
      UserError: the command runs in one process, or the others cannot be joined.
    """
    from prompt_tuning import processes

    if COMMANDS[name].processes is Processes.JOINED:
        processes.join()
    if COMMANDS[name].processes is Processes.ALONE and processes.several():
        raise UserError(
            f"{name} runs in one process; start one alone, or set {processes.COUNT}=1 "
            "in it"
        )


def _result(said: arguments.Said) -> Any:
    command = COMMANDS[said.command]
    if said.configuration is None:
        from prompt_tuning import values

        function = load(command.function)
        given = values.read(function, said.given)
        values.check(function, given, lambda name: f"--{name}")
        return function(**given)
    from prompt_tuning import config

    config.parse(said.configuration)
    return config.run(said.command, said.given)


def _show(command: Command, result: Any) -> None:
    """Prints what a command found: as its own text, or as JSON."""
    if command.text is not None:
        print(load(command.text)(result))
    elif isinstance(result, Mapping):
        print(json.dumps(result, indent=2, ensure_ascii=False))
    elif result is not None:
        for row in result:
            print(json.dumps(row, ensure_ascii=False))


def _import_quietly(name: str) -> None:
    """Imports a module whose C++ parts print to standard error as they load.

    TensorFlow, which seqio imports, reports there that it has no GPU; ours is not its
    business. Python's own errors are not affected.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        importlib.import_module(name)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def main(words: Sequence[str] | None = None) -> int:
    """Entry point: 0 on success, 2 (or the error's own) and a line on a user's mistake."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        run(sys.argv[1:] if words is None else words)
    except UserError as error:
        # gin adds to a message where it passed; that is no news to the user.
        message = " ".join(str(error).split("\n  In call to")[0].split("\n"))
        # It may quote names of files and cards, which a terminal would obey.
        message = printable(message)
        print(f"prompt-tuning: {message}", file=sys.stderr)
        # A job that is done but for some rows, or was interrupted, has a code of its own.
        code = getattr(error, "exit_code", 2)
        _end_others(code, message)
        return code
    except KeyboardInterrupt:
        print("prompt-tuning: interrupted", file=sys.stderr)
        _end_others(130, "interrupted")
        return 130
    except Exception as error:
        _end_others(1, f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    return 0


def _end_others(code: int, reason: str, trace: str = "") -> None:
    """Ends all processes of the run, where this is one of several that have joined."""
    # Whoever has joined has imported it; a misspelt command should answer at once.
    if processes := sys.modules.get("prompt_tuning.processes"):
        processes.leave(code, reason, trace)
