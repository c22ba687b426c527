# SPDX-License-Identifier: Apache-2.0
"""All gin files of a command and what was said on its line, as data: what wins.

What gin would make of it is in `config`; here it is checked and asked before that.
"""

import ast
import difflib
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from prompt_tuning.command_line import gin_files
from prompt_tuning.command_line.gin_files import (
    REQUIRED,
    Binding,
    GinFile,
    Macro,
    Reference,
    inside,
    macros_in,
)
from prompt_tuning.errors import UserError

# Macros within macros; deeper ones go round in a circle.
DEEPEST = 50
# What may stand for a value inside a list or a dict.
_CONFIGURABLE = re.compile(r"@[A-Za-z_][\w./]*(\(\))?|%[A-Za-z_]\w*")


@dataclass(frozen=True)
class Configuration:
    """All files of a command and what was said on its line, in the order of `RANKS`.

    Attributes:
      files: in the order in which gin is to read them.
      line: what was said on the line.
      line_texts: the same as gin is to read it.
    """

    files: tuple[GinFile, ...]
    line: tuple[Binding, ...] = ()
    line_texts: tuple[str, ...] = ()

    @property
    def texts(self) -> list[tuple[str, str]]:
        """What gin is to read, in order, and where each text is from."""
        files = [(file.text, str(file.path)) for file in self.files]
        return [*files, *((text, "the command line") for text in self.line_texts)]

    @functools.cached_property
    def bound(self) -> dict[str, Binding]:
        """The binding that stands, by its target."""
        found = {}
        for file in self.files:
            found |= {binding.target: binding for binding in file.bindings}
        return found | {binding.target: binding for binding in self.line}

    @functools.cached_property
    def used(self) -> set[str]:
        """Macros that some value refers to."""
        every = [*self.line, *(b for file in self.files for b in file.bindings)]
        return {m.name for b in every for m in macros_in(b.value)}

    @property
    def defined(self) -> dict[str, Binding]:
        """Macros that have a value."""
        return {
            name: binding
            for name, binding in self.bound.items()
            if binding.is_macro and binding.value != Macro(REQUIRED)
        }

    def value(self, target: str) -> Any:
        """What a target stands for, macros followed; None where nothing binds it."""
        binding = self.bound.get(target)
        return None if binding is None else self._resolved(binding.value)

    def _resolved(self, value: Any, depth: int = 0) -> Any:
        """A value with those of its macros in their place."""
        if depth > DEEPEST:
            raise UserError("macros stand for one another in a circle")
        again = functools.partial(self._resolved, depth=depth + 1)
        if isinstance(value, Macro):
            known = self.bound.get(value.name)
            return value if known is None else again(known.value)
        if isinstance(value, dict):
            return {again(key): again(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(again, value))
        return value

    def literals(self, name: str) -> dict[str, Any]:
        """Parameters of a configurable whose values refer to no other configurable."""
        values = {
            target.rpartition(".")[2]: self.value(target)
            for target in self.bound
            if target.rpartition(".")[0] == name
        }
        # What is left of macros are constants of Python modules.
        unknown = Reference | Macro
        return {k: v for k, v in values.items() if not list(inside(v, unknown))}

    def names(self) -> set[str]:
        """The configurables that the files speak of, without scopes and modules."""
        found = {t.rpartition(".")[0] for t in self.bound if "." in t}
        for binding in self.bound.values():
            found |= {ref.name for ref in inside(binding.value, Reference)}
        return {name.rsplit(".", 1)[-1] for name in found}

    def said_as(self, target: str) -> str:
        """What the user writes to set a parameter: its macro, or the parameter itself.

        >>> parse(["runs/train.gin"], []).said_as("Schedule.patience")
        'EARLY_STOPPING_PATIENCE'
        """
        binding = self.bound.get(target)
        if binding is not None and isinstance(binding.value, Macro):
            return self.said_as(binding.value.name)
        return target


def parse(
    files: Sequence[str],
    line: Sequence[str],
    search_paths: Sequence[str] = (),
    *,
    defaults: Mapping[str, str] = MappingProxyType({}),
) -> Configuration:
    """Reads the files of a command and ``NAME=value`` texts from its line.

    Args:
      files: names of gin files.
      line: bindings, which win over all files.
      search_paths: see `find`.
      defaults: target -> gin file that is added where no file binds it.

    Raises:
      UserError: a file or a text is wrong, or two files of one rank give one target
        two values.
    """
    marks = tuple(target for target in defaults if "." in target)
    given = [gin_files.read(name, search_paths, marks=marks) for name in files]
    bound = {b.target for file in given for b in file.bindings}
    added = [
        gin_files.read_shipped(name)
        for target, name in defaults.items()
        if target not in bound
    ]
    ordered = sorted([*added, *given], key=lambda file: file.rank)
    _refuse_two_values(ordered)
    texts = [binding(text) for text in line]
    said = [b for text in texts for b in gin_files.bindings_in(text, f"--gin.{text}")]
    return Configuration(tuple(ordered), tuple(said), tuple(texts))


def _refuse_two_values(files: Sequence[GinFile]) -> None:
    seen: dict[tuple[str, int], Binding] = {}
    for file in files:
        for one in file.bindings:
            other = seen.setdefault((one.target, file.rank), one)
            if other.source != one.source and other.value != one.value:
                raise UserError(
                    f"both {other.source} and {one.source} define {one.target}; use one "
                    "file of each kind (models, methods, prompts, ...)"
                )


def check_macros(configuration: Configuration) -> None:
    """Refuses macros without a value, and values from the line that nothing uses.

    Raises:
      UserError: names them, what they might have been meant for, or who sets them.
    """
    used, defined = configuration.used, configuration.defined
    for one in configuration.line:
        if one.is_macro and one.target not in used:
            near = difflib.get_close_matches(one.target, sorted(used), n=3, cutoff=0.6)
            hint = f"did you mean {', '.join(near)}?" if near else "no file uses it"
            raise UserError(f"--gin.{one.target} sets nothing: {hint}")
    if missing := sorted(used - set(defined)):
        raise UserError(f"not set: {_wanted(missing)}")


def _wanted(missing: Sequence[str]) -> str:
    """How to give macros their values: on the line, or by a file that has several."""
    setters = {name: set(files_that_set(name)) for name in missing}
    said = [f"--gin.{name}=..." for name in missing if not setters[name]]
    texts = [" ".join(said)] if said else []
    left = {name for name in missing if setters[name]}
    while left:
        best = _file_of_most({name: setters[name] for name in left})
        found = sorted(name for name in left if best in setters[name])
        texts.append(f"{', '.join(found)} (e.g. by --gin_file={best})")
        left -= set(found)
    return "; ".join(texts)


def _file_of_most(setters: Mapping[str, set[str]]) -> str:
    counts = Counter(file for files in setters.values() for file in files)
    # Of equals the one that is named first.
    return max(gin_files.shipped(), key=lambda file: counts[file])


def files_that_set(macro: str) -> list[str]:
    """The package's gin files, but those of runs, that give a macro its value."""
    return [
        name
        for name in gin_files.shipped()
        if not name.startswith("runs/")
        and any(b.target == macro for b in gin_files.read_shipped(name).bindings)
    ]


def binding(text: str) -> str:
    """``NAME=value`` as gin wants it: a value that gin cannot read becomes a string.

    >>> binding("MODEL_DIR=/tmp/run"), binding("TRAIN_STEPS=10")
    ("MODEL_DIR = '/tmp/run'", 'TRAIN_STEPS = 10')

    Raises:
      UserError: there is no '='.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--gin.{text} lacks a value: write --gin.{text}=VALUE")
    name, value = name.strip(), value.strip()
    if not (_is_literal(value) or _is_literal(_CONFIGURABLE.sub("None", value))):
        value = repr(value)
    return f"{name} = {value}"


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True
