# SPDX-License-Identifier: Apache-2.0
"""The command line: ``prompt-tuning COMMAND --gin_file=... --gin.NAME=value``."""

import argparse
import contextlib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from prompt_tuning.devices import huge_pages
from prompt_tuning.errors import UserError, printable

GIN_HELP = """\
gin files are found by path or by name among those of the package, in any order:
  models/   sizes: t5_1_1_{small,base,large,xl,xxl}, t5_1_0_*, mt5_*, byt5_*,
            t5_1_1_mini (embedded, needs no checkpoint)
  methods/  prompt_tuning, prompt_tuning_adamw, model_tuning
  prompts/  sampled_vocab, class_labels, text, random, saved
  decoding/ greedy, beam, sampling, topk, topp (for eval and infer)
  runs/     train, eval, infer, export, pretrain, plan (added by the command itself)
Values on the command line win: --gin.TRAIN_STEPS=500 --gin.MODEL_DIR=/tmp/run
"""

COMMANDS = {
    "train": "tune a prompt (or the whole model) on a task",
    "eval": "evaluate a prompt or a model on a split of a task",
    "infer": "answer texts with a tuned prompt, or rows of a file with many",
    "export": "write a model as programs that run without this package",
    "pretrain": "pre-train a model from arrays of token ids",
    "plan": "say what training or inference needs on TPUs that need not be there",
}
# Several processes work on these together; those would write one another's files.
JOINED, ALONE = ("train", "eval"), ("export", "pretrain", "serve", "demo")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="prompt-tuning",
        description="Soft prompt tuning of frozen T5 models in JAX.",
        epilog="prompt-tuning COMMAND --help says more.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=GIN_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--gin_file", action="append", default=[], metavar="FILE")
        sub.add_argument(
            "--gin_search_paths", default="", metavar="DIR,DIR", help="more folders"
        )
        if name in ("eval", "infer"):
            sub.add_argument(
                "--force",
                action="store_true",
                help="use a prompt that was tuned on another base model or vocabulary",
            )
        if name == "infer":
            sub.add_argument("texts", nargs="*", help="texts to answer")
    sub = commands.add_parser("inspect", help="say what a file or folder holds")
    sub.add_argument(
        "path",
        help="a prompt or a model of any format, a MODEL_DIR, or a file of a run or task",
    )
    sub.add_argument("--base", help="the base model, for a prompt's nearest tokens")
    sub.add_argument("--plot", metavar="PNG", help="draw a prompt's norms and cosines")
    sub = commands.add_parser(
        "convert", help="write a model or a prompt in another format"
    )
    sub.add_argument(
        "path",
        metavar="SRC",
        help="a model (T5X, Hugging Face folder or hub name, gs://, embedded:NAME) or "
        "a prompt (.safetensors, .npy, PEFT folder, T5X checkpoint)",
    )
    sub.add_argument("output", metavar="DST", help="the folder or file to write")
    sub.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="models: native, t5x, huggingface; prompts: native, npy, peft, "
        "peft-doubled",
    )
    sub.add_argument("--dtype", help="float32 or bfloat16; by default as it is")
    sub.add_argument("--vocabulary", metavar="FILE", help="spiece.model to put beside")
    sub = commands.add_parser(
        "serve", help="answer over HTTP with many prompts on one model"
    )
    sub.add_argument(
        "--model", required=True, help="the base model, of any format, or embedded:NAME"
    )
    sub.add_argument("--prompts", metavar="DIR", help="folder of prompts to begin with")
    sub.add_argument("--host", default="127.0.0.1", help="others need a token")
    sub.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    sub.add_argument(
        "--token_file",
        metavar="FILE",
        help="holds the token that requests must bear (or set PROMPT_TUNING_TOKEN)",
    )
    for name, default, text in (
        ("max_batch", 32, "rows of a batch"),
        ("max_queue", 1024, "rows that may wait; more are refused with status 429"),
        ("max_input_length", 512, "longest input in tokens, its prompt included"),
        ("max_decode_length", 32, "longest answer where a prompt has no labels"),
        ("prompt_rows", 65_536, "prompt positions that the device has room for"),
        ("warm_up", 128, "compile at the start for inputs of so many text tokens"),
    ):
        sub.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    sub.add_argument(
        "--timeout", type=float, default=30.0, help="seconds until an answer is due"
    )
    sub.add_argument("--dtype", default="auto", help="of the weights, e.g. bfloat16")
    sub.add_argument(
        "--force",
        action="store_true",
        help="take prompts that were tuned on another base model or vocabulary",
    )
    sub = commands.add_parser(
        "demo", help="tune a prompt of the embedded model on movie reviews"
    )
    sub.add_argument("--output", default="runs/demo", metavar="DIR")
    sub.add_argument("--seeds", type=int, default=1, help="repeat with so many seeds")
    return top


def split_bindings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts ``--gin.NAME=value`` (also ``--gin.NAME value``) from other arguments."""
    rest, bindings = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if argument.startswith(("--gin.", "--gin_bindings=")):
            text = argument.removeprefix("--gin.").removeprefix("--gin_bindings=")
            if "=" not in text:
                text = f"{text}={next(waiting, '')}"
            bindings.append(text)
        else:
            rest.append(argument)
    return rest, bindings


def run(arguments: Sequence[str]) -> None:
    """Runs one command; errors are exceptions."""
    rest, bindings = split_bindings(arguments)
    options = parser().parse_args(rest)
    if bindings and options.command not in COMMANDS:
        raise UserError(f"{options.command} takes no --gin.{bindings[0]}")
    # Imported late: --help and a misspelt command should answer at once.
    from prompt_tuning import processes

    if options.command in JOINED:
        processes.join()
    if options.command in ALONE and processes.several():
        raise UserError(
            f"{options.command} runs in one process; start one alone, or set "
            f"{processes.COUNT}=1 in it"
        )
    if options.command == "inspect":
        from prompt_tuning.commands import inspect

        inspect.show(options.path, options.base, options.plot)
        return
    if options.command == "convert":
        from prompt_tuning.commands import convert

        convert.convert(
            options.path,
            options.output,
            options.to,
            dtype=options.dtype,
            vocabulary=options.vocabulary,
        )
        return
    if options.command == "serve":
        from prompt_tuning.commands import serve

        values = vars(options)
        del values["command"]
        serve.serve(**values)
        return
    if options.command == "demo":
        _import_quietly("seqio")
        from prompt_tuning.commands import demo

        demo.run(options.output, options.seeds)
        return
    from prompt_tuning import config

    if options.command in ("train", "eval"):
        _import_quietly("seqio")
    search = [path for path in options.gin_search_paths.split(",") if path]
    if getattr(options, "force", False):
        bindings.append("FORCE=True")
    files = config.with_run_file(options.command, options.gin_file, search)
    config.parse(files, bindings, search)
    with contextlib.ExitStack() as stack:
        if not processes.is_first():
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        config.run(options.command, getattr(options, "texts", None))


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0 on success, 2 (or the error's own) and a line on a user's mistake."""
    if arguments is None:
        huge_pages.restart()
    # Its import takes longer than all others here, and would before a restart be in vain.
    from absl import logging

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.set_verbosity(logging.ERROR)
    try:
        run(sys.argv[1:] if arguments is None else arguments)
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
