# SPDX-License-Identifier: Apache-2.0
"""Parameters of functions and dataclasses, read from their source.

Importing the modules would bring JAX and take seconds; their syntax trees say the same.
"""

import ast
import functools
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import docstring_parser

PACKAGE = pathlib.Path(__file__).parents[1]
# How a tuning method makes itself known (see `methods.method`).
_METHOD = re.compile(r"^class (\w+)\(.*\bkind=", re.MULTILINE)


@dataclass(frozen=True)
class Parameter:
    """One parameter, as its source has it.

    Attributes:
      name: of the parameter.
      meaning: what the docstring says of it; '' where it says nothing.
      annotation: its type as source text.
      default: its default as source text, or None where it has none.
      positional: whether it may be given without its name.
    """

    name: str
    meaning: str
    annotation: str
    default: str | None
    positional: bool


def methods() -> Mapping[str, str]:
    """The classes of the package's tuning methods: name -> ``module:name``."""
    return {
        name: f"methods.{path.stem}:{name}"
        for path in sorted((PACKAGE / "methods").glob("*.py"))
        for name in _METHOD.findall(path.read_text(encoding="utf-8"))
    }


@functools.cache
def parameters(place: str) -> Mapping[str, Parameter]:
    """Parameters of ``module:name`` below this package, in their order."""
    module, _, name = place.partition(":")
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    kinds = (ast.ClassDef, ast.FunctionDef)
    (node,) = (n for n in body if isinstance(n, kinds) and n.name == name)
    found = docstring_parser.parse(
        ast.get_docstring(node) or "", docstring_parser.DocstringStyle.GOOGLE
    )
    meanings = {p.arg_name: _sentence(p.description) for p in found.params}
    fields = _of_class(node) if isinstance(node, ast.ClassDef) else _of_function(node)
    return {
        field: Parameter(
            field,
            meanings.get(field, ""),
            "" if annotation is None else ast.unparse(annotation),
            None if default is None else ast.unparse(default),
            positional,
        )
        for field, annotation, default, positional in fields
    }


def _of_class(node: ast.ClassDef) -> list[tuple]:
    lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
    return [(ast.unparse(x.target), x.annotation, x.value, True) for x in lines]


def _of_function(node: ast.FunctionDef) -> list[tuple]:
    given = node.args
    missing = [None] * (len(given.args) - len(given.defaults))
    pairs = [
        *zip(given.args, [*missing, *given.defaults], strict=True),
        *zip(given.kwonlyargs, given.kw_defaults, strict=True),
    ]
    return [
        (arg.arg, arg.annotation, default, arg in given.args) for arg, default in pairs
    ]


def _sentence(text: str | None) -> str:
    """A description in one line."""
    return " ".join((text or "").split())
