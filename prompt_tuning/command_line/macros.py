# SPDX-License-Identifier: Apache-2.0
"""What the macros of a command mean, where they stand and what they are by default.

All of it is read: meanings from the docstrings of what the macros are handed to, the
rest from the gin files.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from prompt_tuning.command_line import gin_files, signatures
from prompt_tuning.command_line.configuration import files_that_set
from prompt_tuning.command_line.gin_files import GinFile, Macro
from prompt_tuning.command_line.table import CONFIGURABLES, Command

# So many files of a kind that give a macro different values are not named one by one.
MANY = 3
MODELS = "models"


@dataclass
class MacroHelp:
    """A macro of a command.

    Attributes:
      name: as gin files write it.
      meaning: of the parameter that it is handed to.
      user: the first file that uses it, or sets it unused.
      read: the files that are read in any case.
      defaults: file -> value as text, of the files that give it one.
    """

    name: str
    user: str
    read: Collection[str] = ()
    meaning: str = ""
    defaults: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The first file that gives it a value, or else wants one."""
        return next(iter(self.defaults), self.user)

    @property
    def group(self) -> str:
        """The same, or the kind of files that all give it one."""
        kind = f"{self.file.split('/')[0]}/"
        alike = [file for file in self.defaults if file.startswith(kind)]
        return f"files of {kind}" if len(alike) >= MANY else self.file

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
        """Its value in the files that are read, and in others."""
        if not self.defaults:
            by_files = {name.split("/")[0] for name in files_that_set(self.name)}
            found = [f"or by a file of {kind}/" for kind in sorted(by_files)]
            return "; ".join(["required", *found])
        own = [value for file, value in self.defaults.items() if file in self.read]
        others = {f: v for f, v in self.defaults.items() if f not in self.read}
        if not own and len(set(others.values())) == 1:
            return next(iter(others.values()))
        texts = own[-1:] or ["required"]
        counts = Counter(file.split("/")[0] for file in others)
        said = set(own)
        for file, value in others.items():
            kind = file.split("/")[0]
            is_made, are_many = value.startswith("@"), counts[kind] >= MANY
            named = not are_many or file in gin_files.USUAL
            if named and not is_made and value not in said:
                texts.append(f"{value} in {file}")
                said.add(value)
            if is_made or are_many:
                texts.append(f"or by a file of {kind}/")
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
        if not name.startswith(("runs/", f"{MODELS}/"))
    ]
    return own + [
        file
        for file in kinds
        if file.path not in known and next(iter(file.macros_set)) in wanted
    ]


def macros_of(
    files: Sequence[GinFile], read: Collection[str] = ()
) -> dict[str, MacroHelp]:
    """The macros that files use or set, file by file, those without value first.

    Args:
      files: the files.
      read: names of those among them that are read in any case.
    """
    found: dict[str, MacroHelp] = {}
    for file in files:
        where = short_name(file)
        for name, value in file.macros_set.items():
            macro = found.setdefault(name, MacroHelp(name, where, read))
            macro.defaults[where] = as_text(value)
        for binding in file.bindings:
            for used in gin_files.macros_in(binding.value):
                macro = found.setdefault(used.name, MacroHelp(used.name, where, read))
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


def related_kinds(files: Sequence[GinFile]) -> Mapping[str, dict[str, str]]:
    """Kinds of files a command takes beside its own: kind -> name -> what it says."""
    kinds: dict[str, dict[str, str]] = {MODELS: {}}
    taken = {short_name(file).split("/")[0] for file in files} - {"runs"}
    for name in gin_files.shipped():
        kind, _, rest = name.partition("/")
        if kind in taken | {MODELS}:
            # Models are what their names say.
            text = "" if kind == MODELS else gin_files.read_shipped(name).summary
            kinds.setdefault(kind, {})[rest.removesuffix(".gin")] = text
    return kinds
