# SPDX-License-Identifier: Apache-2.0
"""What the macros of a command mean, where they stand and what they are by default.

All of it is read: meanings from the docstrings of what the macros are handed to, the
rest from the gin files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prompt_tuning.command_line import gin_files, signatures
from prompt_tuning.command_line.configuration import files_that_set
from prompt_tuning.command_line.gin_files import GinFile, Macro
from prompt_tuning.command_line.table import CONFIGURABLES, Command


@dataclass
class MacroHelp:
    """A macro of a command.

    Attributes:
      name: as gin files write it.
      meaning: of the parameter that it is handed to.
      user: the first file that uses it, or sets it unused.
      defaults: file -> value as text, of the files that give it one.
    """

    name: str
    user: str
    meaning: str = ""
    defaults: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The first file that gives it a value, or else wants one."""
        return next(iter(self.defaults), self.user)

    @property
    def flag(self) -> str:
        """The plain flag that sets it."""
        return f"--{self.name.lower()}"

    @property
    def is_switch(self) -> bool:
        """Whether its flag alone means True."""
        return set(self.defaults.values()) <= {"True", "False"} and self.defaults != {}

    @property
    def default(self) -> str:
        """Its values in the files, the first one first."""
        if not self.defaults:
            by_files = {name.split("/")[0] for name in files_that_set(self.name)}
            found = [f"or by a file of {kind}/" for kind in sorted(by_files)]
            return "; ".join(["required", *found])
        (_, first), *others = self.defaults.items()
        texts = [first]
        for file, value in others:
            if value.startswith("@"):
                texts.append(f"or by a file of {file.split('/')[0]}/")
            elif value != first:
                texts.append(f"{value} in {file}")
        return "; ".join(dict.fromkeys(texts))


def related_files(command: Command) -> list[GinFile]:
    """The package's files that set what a command uses: its own first, then by kind.

    A file begins with the macro that it is for, such as METHOD or DECODING.
    """
    own = [gin_files.read_shipped(name) for name in command.defaults.values()]
    known = {file.path for file in own}
    wanted = {m.name for file in own for m in file.macros_used}
    kinds = [
        gin_files.read_shipped(name)
        for name in gin_files.shipped()
        if not name.startswith(("runs/", "models/"))
    ]
    return own + [
        file
        for file in kinds
        if file.path not in known and next(iter(file.macros_set)) in wanted
    ]


def macros_of(files: Sequence[GinFile]) -> dict[str, MacroHelp]:
    """The macros that files use or set, file by file, those without value first."""
    found: dict[str, MacroHelp] = {}
    for file in files:
        where = short_name(file)
        for name, value in file.macros_set.items():
            found.setdefault(name, MacroHelp(name, where)).defaults[where] = as_text(
                value
            )
        for binding in file.bindings:
            for used in gin_files.macros_in(binding.value):
                macro = found.setdefault(used.name, MacroHelp(used.name, where))
                if binding.value == used:
                    macro.meaning = macro.meaning or meaning_of(binding.target)
    order = [short_name(file) for file in files]
    place = lambda macro: (order.index(macro.file), bool(macro.defaults))
    return {macro.name: macro for macro in sorted(found.values(), key=place)}


def meaning_of(target: str) -> str:
    """What the docstring says of a parameter, ``configurable.parameter``."""
    name, _, parameter = target.rpartition(".")
    if name not in CONFIGURABLES:
        return ""
    known = signatures.parameters(CONFIGURABLES[name])
    return known[parameter].meaning if parameter in known else ""


def short_name(file: GinFile) -> str:
    """A file's name below the package's configs, or its path."""
    folder = gin_files.configs_folder()
    path = file.path.resolve()
    is_ours = path.is_relative_to(folder.resolve())
    return path.relative_to(folder.resolve()).as_posix() if is_ours else str(file.path)


def as_text(value: object) -> str:
    """A value as gin files write it."""
    if isinstance(value, Macro):
        return f"%{value.name}"
    if isinstance(value, gin_files.Reference):
        return f"@{value.name}{'()' if value.evaluate else ''}"
    return repr(value)


def related_kinds(files: Sequence[GinFile]) -> Mapping[str, list[str]]:
    """Kinds of files a command takes beside its own: kind -> names."""
    kinds: dict[str, list[str]] = {"models": []}
    taken = {short_name(file).split("/")[0] for file in files} - {"runs"}
    for name in gin_files.shipped():
        kind, _, rest = name.partition("/")
        if kind in taken | {"models"}:
            kinds.setdefault(kind, []).append(rest.removesuffix(".gin"))
    return kinds
