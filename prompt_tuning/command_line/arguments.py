# SPDX-License-Identifier: Apache-2.0
"""The words after ``prompt-tuning``: which command, which flags, which values.

Flags are read from what takes them: the macros of a command's gin files, or the
parameters of its function. So ``--help``, completion and what is accepted agree.
"""

import argparse
import difflib
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import prompt_tuning
from prompt_tuning.command_line import configuration, gin_files, macros, signatures
from prompt_tuning.command_line.configuration import Configuration
from prompt_tuning.command_line.table import COMMANDS, Command
from prompt_tuning.errors import UserError

PROGRAM = "prompt-tuning"
# Questions that are answered without doing anything.
_ASKING = {"-h", "--help", "--version", "--completion"}
WIDTH = 79
SHELLS = ("bash", "zsh", "tcsh")
# What is said beside a kind of files.
_CHOICES = {
    "methods": (
        " what is tuned: --gin_file=methods/NAME.gin brings METHOD, its options\n"
        "    and its learning rate"
    ),
}


@dataclass(frozen=True)
class Said:
    """What a command line says.

    Attributes:
      command: a key of `COMMANDS`.
      given: values of the function's parameters, as texts where they come from flags.
      configuration: the gin files and macros, of a command that takes them.
    """

    command: str
    given: Mapping[str, Any]
    configuration: Configuration | None = None


@dataclass(frozen=True)
class Flag:
    """A flag of a command, ``--name VALUE`` or, where it ``is_switch``, ``--name``."""

    name: str
    help: str
    group: str
    is_switch: bool = False
    required: bool = False


class _Parser(argparse.ArgumentParser):
    """Refuses as everything here does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help says more")


class _Completion(argparse.Action):
    """Prints the script of a shell and exits."""

    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        # Imported late: few ask for it.
        from prompt_tuning.command_line import completion

        print(completion.script(whole_parser(), str(values)))
        parser.exit()


def only_asks(words: Sequence[str]) -> bool:
    """Whether a command line wants help or the like, and nothing done."""
    return bool(_ASKING & set(words)) or not words


def parse(words: Sequence[str]) -> Said:
    """Reads a command line; prints help, version or completion and exits if asked.

    Raises:
      UserError: a command, flag, file or macro is unknown or lacks its value.
    """
    if not words or words[0] in _ASKING:
        top_parser().parse_args(words)
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(COMMANDS)}"
        raise UserError(f"no command is called {name!r}: {hint}")
    command = COMMANDS[name]
    return _parse_gin(name, rest) if command.defaults else _parse_plain(name, rest)


def _parse_plain(name: str, words: Sequence[str]) -> Said:
    flags = function_flags(COMMANDS[name])
    if gin := [word for word in words if word.startswith("--gin")]:
        raise UserError(f"{name} takes no {gin[0].split('=')[0]}")
    parser = command_parser(name, flags)
    options = parser.parse_intermixed_args(joined(words, flags, name))
    given = {key: value for key, value in vars(options).items() if value is not None}
    return Said(name, given)


def _named(name: str, kind: str, words: Sequence[str]) -> list[str]:
    """Words whose first one names a gin file of a kind, with that file in its place.

    Raises:
      UserError: it names none.
    """
    own = [file for file in gin_files.shipped() if file.startswith(f"{kind}/")]
    known = [file.removeprefix(f"{kind}/").removesuffix(".gin") for file in own]
    first, *rest = words
    if first.endswith(".gin") or first in known:
        file = first if first.endswith(".gin") else f"{kind}/{first}.gin"
        return [f"--gin_file={file}", *rest]
    raise UserError(
        f"{name} wants the name of one first, not {first!r}: {', '.join(known)}, or a "
        "gin file of your own"
    )


def _parse_gin(name: str, words: Sequence[str]) -> Said:
    command = COMMANDS[name]
    if command.kind and not (words and words[0] in _ASKING):
        words = _named(name, command.kind, words or [""])
    rest, _ = split_bindings(words)
    early = _Parser(prog=f"{PROGRAM} {name}", add_help=False, allow_abbrev=False)
    _add_gin_flags(early)
    found, _ = early.parse_known_args(
        [word for word in rest if word not in ("-h", "--help")]
    )
    search = [path for path in found.gin_search_paths.split(",") if path]
    if _ASKING & set(rest):
        related = macros.related_files(command)
        more = [gin_files.read(file, search) for file in found.gin_file]
        read = [*command.defaults.values(), *map(macros.short_name, more)]
        flags = macro_flags([*related, *more], read)
        command_parser(name, flags, macros.related_kinds(related)).parse_args(["-h"])
    plain = configuration.parse(found.gin_file, (), search, defaults=command.defaults)
    flags = macro_flags(plain.files)
    rest, bindings = split_bindings(words, {flag.name for flag in flags})
    options = command_parser(name, flags).parse_intermixed_args(
        joined(rest, flags, name)
    )
    bindings += [
        f"{key.upper()}={value}"
        for key, value in vars(options).items()
        if f"--{key}" in {flag.name for flag in flags} and value is not None
    ]
    whole = configuration.parse(
        found.gin_file, bindings, search, defaults=command.defaults
    )
    configuration.check_macros(whole)
    given = (
        {} if command.rest is None else {command.rest: getattr(options, command.rest)}
    )
    return Said(name, given, whole)


def split_bindings(
    words: Sequence[str], known: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Parts ``--gin.NAME=value`` (also ``--gin.NAME value``) from other words.

    Where ``known`` has the plain flag of a macro it takes its place: of several values of
    one macro the last stands, however they are written.
    """
    rest, bindings = [], []
    waiting = iter(words)
    for word in waiting:
        if word.startswith(("--gin.", "--gin_bindings=")):
            text = word.removeprefix("--gin.").removeprefix("--gin_bindings=")
            if "=" not in text and (value := next(waiting, None)) is not None:
                text = f"{text}={value}"
            name, equals, value = text.partition("=")
            flag = f"--{name.strip().lower()}"
            if equals and name.strip().isupper() and flag in known:
                rest.append(f"{flag}={value.strip()}")
            else:
                bindings.append(text)
        else:
            rest.append(word)
    return rest, bindings


def joined(words: Sequence[str], flags: Sequence[Flag], command: str) -> list[str]:
    """Words with each flag and its value in one, under the flag's own spelling.

    Case and dashes do not matter: ``--Learning-Rate 0.1`` is ``--learning_rate=0.1``.

    Raises:
      UserError: an unknown flag; names those near to it.
    """
    known = {flag.name: flag for flag in (*flags, *_GIN_FLAGS)}
    found, waiting = [], list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or word in (*_ASKING, "--"):
            found += [word, *waiting] if word == "--" else [word]
            if word == "--":
                break
            continue
        name, equals, value = word.partition("=")
        name = f"--{name[2:].replace('-', '_').lower()}"
        if name not in known:
            raise UserError(_unknown(word.partition("=")[0], name, known, command))
        if not equals and known[name].is_switch:
            is_said = waiting and waiting[0] in ("True", "False")
            value = waiting.pop(0) if is_said else "True"
        elif not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UserError(f"{name} lacks a value: write {name}=VALUE")
            value = waiting.pop(0)
        found.append(f"{name}={value}")
    return found


def _unknown(said: str, name: str, known: Mapping[str, Flag], command: str) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    related = macros.macros_of(macros.related_files(COMMANDS[command]))
    if (other := related.get(name[2:].upper())) is not None:
        return (
            f"{command} has no flag {said} without a file that uses it, such as "
            f"--gin_file={other.file}"
        )
    if near:
        return f"{command} has no flag {said}: did you mean {', '.join(near)}?"
    return f"{command} has no flag {said}; {PROGRAM} {command} --help lists all"


def macro_flags(
    files: Sequence[gin_files.GinFile], read: Collection[str] = ()
) -> list[Flag]:
    """A flag for each macro that the files use or set (see `macros.macros_of`)."""
    return [
        Flag(
            macro.flag,
            # A macro may be another's value, '%TRAIN_STEPS'.
            f"{plain(macro.meaning)} [{escaped(macro.default)}]",
            macro.group,
            macro.is_switch,
        )
        for macro in macros.macros_of(files, read).values()
    ]


def function_flags(command: Command) -> list[Flag]:
    """A flag for each parameter of a function that is not given by its place."""
    flags = []
    for parameter in signatures.parameters(command.function).values():
        if is_placed(command, parameter) or parameter.name == command.rest:
            continue
        text = plain(parameter.meaning)
        if parameter.default not in (None, "None", "False"):
            text += f" [{escaped(parameter.default)}]"
        flags.append(
            Flag(
                f"--{parameter.name}",
                text,
                "",
                parameter.annotation == "bool",
                required=parameter.default is None,
            )
        )
    return flags


def is_placed(command: Command, parameter: signatures.Parameter) -> bool:
    """Whether a parameter is one word that has its place on the line, and no flag."""
    one = parameter.name != command.rest and parameter.default is None
    return one and parameter.positional


def plain(text: str) -> str:
    """A docstring's sentence without its markup."""
    text = re.sub(r"\s*\(see `[^)]*\)", "", text).replace("`", "")
    return escaped(text.removesuffix("."))


def escaped(text: str) -> str:
    """A text as it is, where argparse fills in ``%(prog)s``."""
    return text.replace("%", "%%")


_GIN_FLAGS = (
    Flag("--gin_file", "a gin file; may be given several times", "files"),
    Flag("--gin_search_paths", "more folders of gin files: DIR,DIR", "files"),
)


def _add_gin_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    first, second = _GIN_FLAGS
    parser.add_argument(
        first.name, action="append", default=[], metavar="FILE", help=first.help
    )
    parser.add_argument(second.name, default="", metavar="DIR,DIR", help=second.help)


def command_parser(
    name: str,
    flags: Sequence[Flag],
    kinds: Mapping[str, Mapping[str, str]] | None = None,
) -> argparse.ArgumentParser:
    """The parser of one command, with groups of flags for its ``--help``."""
    parser = _Parser(prog=f"{PROGRAM} {name}", allow_abbrev=False)
    fill(parser, name, flags, kinds)
    return parser


def fill(
    parser: argparse.ArgumentParser,
    name: str,
    flags: Sequence[Flag],
    kinds: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Gives a parser what may follow a command."""
    command = COMMANDS[name]
    parser.description = f"{command.summary[0].upper()}{command.summary[1:]}."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for parameter in signatures.parameters(command.function).values():
        if is_placed(command, parameter):
            parser.add_argument(parameter.name, help=plain(parameter.meaning))
    if command.rest is not None:
        meaning = signatures.parameters(command.function)[command.rest].meaning
        parser.add_argument(command.rest, nargs="*", help=plain(meaning))
    if command.defaults:
        words = "[TEXT]..." if command.rest else ""
        first = "NAME " if command.kind else ""
        parser.usage = (
            f"%(prog)s {first}[--gin_file FILE]... [--NAME VALUE]... {words}".strip()
        )
        _add_gin_flags(parser.add_argument_group("files"))
        parser.epilog = _files_help(kinds or {})
    groups: dict[str, Any] = {"": parser}
    for flag in flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        groups[flag.group].add_argument(
            flag.name,
            required=flag.required,
            metavar="" if flag.is_switch else "VALUE",
            help=flag.help,
        )


def _files_help(kinds: Mapping[str, Mapping[str, str]]) -> str:
    lines = [
        "gin files are found by path or by name among those of the package, in any order:"
    ]
    for kind, names in kinds.items():
        if kind == macros.MODELS:
            lines += _wrapped(f"{kind}/", ", ".join(names), 14)
            continue
        lines.append(f"  {kind}/{_CHOICES.get(kind, '')}")
        widest = max(map(len, names))
        for name, text in names.items():
            lines += _wrapped(f"  {name}", text, widest + 6)
    lines += [
        "--learning_rate 0.1 is short for --gin.LEARNING_RATE=0.1; what is said on the",
        "line wins over all files.",
    ]
    return "\n".join(lines)


def _wrapped(name: str, text: str, column: int) -> list[str]:
    """A name and what is said of it, from a column on."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"  {name:<{column - 2}}",
        subsequent_indent=" " * column,
        break_on_hyphens=False,
    )


def whole_parser() -> argparse.ArgumentParser:
    """The parser of ``prompt-tuning`` with all that may follow each command."""
    top = top_parser()
    (commands,) = (a.choices for a in top._actions if isinstance(a.choices, dict))
    for name, parser in commands.items():
        command = COMMANDS[name]
        if command.defaults:
            files = macros.related_files(command)
            flags = macro_flags(files, list(command.defaults.values()))
        else:
            flags = function_flags(command)
        fill(parser, name, flags)
    return top


def top_parser() -> argparse.ArgumentParser:
    """The parser of ``prompt-tuning`` itself: its help, version and completion."""
    top = _Parser(
        prog=PROGRAM,
        description="Soft prompt tuning of frozen T5 models in JAX.",
        epilog=f"{PROGRAM} COMMAND --help says more.",
        allow_abbrev=False,
    )
    top.add_argument(
        "--version", action="version", version=f"{PROGRAM} {prompt_tuning.__version__}"
    )
    top.add_argument(
        "--completion",
        choices=SHELLS,
        action=_Completion,
        help="print what makes a shell complete commands, flags and gin files",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary)
    return top
