# SPDX-License-Identifier: Apache-2.0
"""gin files as data: found, read and put in order, before any of them is run.

Nothing that a file names is imported here, and none of its ``import`` lines is run.
"""

import difflib
import functools
import importlib.util
import io
import itertools
import pathlib
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gin import config_parser

from prompt_tuning.errors import UserError

# A gin file is written by people; nobody writes one of this many bytes.
LARGEST = 1_000_000
# Which value stands where several files give one: that of the highest rank. A run's file
# holds defaults, an experiment those of a small model; a method brings its paper's optimizer,
# which a file of optimizers/ may replace, and a recipe stands where a method does; other kinds
# do not overlap; your own files win over all of them.
RANKS = {"runs": 0, "experiments": 1, "methods": 2, "recipes": 2}
_OTHER_KINDS, _OWN = 3, 4
_MACRO = re.compile(r"[A-Z][A-Z0-9_]*")
_SENTENCE_END = re.compile(r"\.(?:\s+(?=[A-Z])|$)")
# Those of their kinds that are named first.
USUAL = ("methods/prompt_tuning.gin", "models/t5_1_1_mini.gin")
# T5X's way to write that a macro has no value.
REQUIRED = "gin.REQUIRED"


@dataclass(frozen=True)
class Macro:
    """``%NAME`` where a value could stand."""

    name: str


@dataclass(frozen=True)
class Reference:
    """``@name`` or ``@name()`` where a value could stand."""

    name: str
    evaluate: bool


class _AsData(config_parser.ParserDelegate):
    """Leaves references and macros what they are."""

    def configurable_reference(
        self, scoped_configurable_name: str, evaluate: bool
    ) -> Any:
        return Reference(scoped_configurable_name.rsplit("/", 1)[-1], evaluate)

    def macro(self, macro_name: str) -> Any:
        return Macro(macro_name)


@dataclass(frozen=True)
class Binding:
    """One line of a gin file.

    Attributes:
      target: ``NAME`` of a macro, or ``configurable.parameter``.
      value: what stands on the right, `Macro` and `Reference` among it.
      source: the file, or the words on the line.
    """

    target: str
    value: Any
    source: str

    @property
    def is_macro(self) -> bool:
        """Whether it gives a macro its value, rather than a parameter."""
        return _MACRO.fullmatch(self.target) is not None


@dataclass(frozen=True)
class GinFile:
    """A gin file that was read, with the files that it includes in their places.

    Attributes:
      path: where it was found.
      text: its lines, and those of the files that it includes, without ``include``.
      bindings: what the lines say.
      rank: see `RANKS`.
    """

    path: pathlib.Path
    text: str
    bindings: tuple[Binding, ...]
    rank: int

    @property
    def summary(self) -> str:
        """The first sentence of its head comment, without what is in parentheses."""
        head = itertools.takewhile(lambda x: x.startswith("#"), self.text.splitlines())
        text = " ".join(line.lstrip("# ") for line in head)
        return re.sub(r" \([^)]*\)", "", _SENTENCE_END.split(text)[0])

    @property
    def macros_set(self) -> dict[str, Any]:
        """The macros that it gives a value."""
        return {
            one.target: one.value
            for one in self.bindings
            if one.is_macro and one.value != Macro(REQUIRED)
        }

    @property
    def macros_used(self) -> set[Macro]:
        """The macros that its values refer to."""
        return {m for one in self.bindings for m in macros_in(one.value)}


def configs_folder() -> pathlib.Path:
    """The folder of the configs that come with the package."""
    spec = importlib.util.find_spec("prompt_tuning.configs")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the package's configs are missing; install prompt-tuning anew")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def shipped() -> tuple[str, ...]:
    """Names of the gin files of this package's own commands, as ``kind/name.gin``."""
    folder = configs_folder()
    paths = [path.relative_to(folder) for path in folder.rglob("*.gin")]
    names = [path.as_posix() for path in paths if path.parts[0] != "t5x"]
    place = lambda name: (name.split("/")[0], name not in USUAL, name)
    return tuple(sorted(names, key=place))


def find(name: str, search_paths: Sequence[str] = ()) -> pathlib.Path:
    """A gin file by path, or below one of the search paths or the package's configs.

    Raises:
      UserError: no such file; names near to it are listed.
    """
    relative = name.removeprefix("configs/")
    candidates = [pathlib.Path(name)]
    candidates += [pathlib.Path(path) / name for path in search_paths]
    candidates += [configs_folder() / relative]
    try:
        for candidate in candidates:
            if candidate.is_file():
                return candidate
    except (OSError, ValueError) as error:  # names that no file system takes
        raise UserError(f"no gin file can be called {name!r}") from error
    if candidates[0].is_dir():
        raise UserError(f"{name} is a folder: give a gin file of it")
    known = shipped()
    near = difflib.get_close_matches(relative, known, n=3, cutoff=0.4) or known[:3]
    raise UserError(f"no gin file {name}; did you mean {', '.join(near)}?")


def read(
    name: str, search_paths: Sequence[str] = (), *, marks: Sequence[str] = ()
) -> GinFile:
    """Reads a gin file and the files that it includes.

    Args:
      name: see `find`.
      search_paths: see `find`.
      marks: targets by whose binding a file of one's own is that of a run, such as the
        ``config.gin`` that an earlier run wrote.

    Raises:
      UserError: a file is missing, is no text, is not gin, or includes itself.
    """
    path = find(name, search_paths)
    text = "".join(_lines(path, search_paths, ()))
    bindings = bindings_in(text, str(path))
    if path.resolve().parent.parent == configs_folder().resolve():
        rank = RANKS.get(path.resolve().parent.name, _OTHER_KINDS)
    else:
        is_run = any(binding.target in marks for binding in bindings)
        rank = RANKS["runs"] if is_run else _OWN
    return GinFile(path, text, bindings, rank)


@functools.cache
def read_shipped(name: str) -> GinFile:
    """One of the package's gin files, see `shipped`; read once."""
    return read(str(configs_folder() / name))


def _lines(
    path: pathlib.Path, search_paths: Sequence[str], including: tuple[pathlib.Path, ...]
) -> list[str]:
    """The lines of a file, those of included files in the place of ``include``."""
    if path.resolve() in including:
        names = " -> ".join(str(p) for p in (*including, path.resolve()))
        raise UserError(f"gin files include one another in a circle: {names}")
    text = _text(path)
    lines = list(io.StringIO(text))  # ends lines where gin does, at newlines alone
    for statement in reversed(list(statements(text, str(path)))):
        if isinstance(statement, config_parser.IncludeStatement):
            own = [str(path.parent), *search_paths]
            included = find(statement.filename, own)
            inner = (*including, path.resolve())
            at = statement.location.line_num - 1
            lines[at : at + 1] = _lines(included, search_paths, inner)
    if sum(map(len, lines)) > LARGEST:
        raise UserError(f"{path} includes more than {LARGEST} characters of gin files")
    return lines if text.endswith("\n") else [*lines, "\n"]


def _text(path: pathlib.Path) -> str:
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes: it is no gin file"
            )
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}): it is no gin file, or is "
            "damaged"
        ) from error
    return text.replace("\r\n", "\n")


def statements(text: str, source: str) -> list[Any]:
    """What gin's own parser reads in a text; nothing is imported or called.

    Raises:
      UserError: it is not gin.
    """
    try:
        return list(config_parser.ConfigParser(io.StringIO(text), _AsData()))
    # gin's parser passes on whatever the tokenizer and its own recursion run into.
    except Exception as error:
        line = getattr(error, "lineno", None)
        where = f"{source}, line {line}" if line else source
        raise UserError(f"{where}: not gin: {_reason(error)}") from error


def bindings_in(text: str, source: str) -> tuple[Binding, ...]:
    """The values that a text gives, in order.

    Raises:
      UserError: see `statements`.
    """
    found = []
    for one in statements(text, source):
        if not isinstance(one, config_parser.BindingStatement):
            continue
        selector = one.selector.rsplit(".", 1)[-1]
        target = ".".join(part for part in (selector, one.arg_name) if part)
        if (selector, one.arg_name) == ("macro", "value"):  # gin's other spelling
            target = one.scope
        found.append(Binding(target, one.value, source))
    return tuple(found)


def _reason(error: Exception) -> str:
    """What is wrong, without the place, which is said beside it."""
    placed = isinstance(error, SyntaxError | tokenize.TokenError)
    text = str(error.args[0] if placed else error)
    return text.strip().split("\n")[0] or type(error).__name__


def macros_in(value: Any) -> Iterator[Macro]:
    """The macros that a value refers to, also inside lists and dicts.

    A name with a dot is a constant of some module, no macro that a file gives a value.
    """
    return (macro for macro in inside(value, Macro) if "." not in macro.name)


def inside(value: Any, kind: Any) -> Iterator[Any]:
    """What is of a kind (a class, or several joined by |) in a value, at any depth."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        for item in (*value, *value.values()):
            yield from inside(item, kind)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from inside(item, kind)
