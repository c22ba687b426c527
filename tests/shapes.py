# SPDX-License-Identifier: Apache-2.0
"""Checks the shapes that comments in signatures promise, while the tests run.

A parameter is followed by ``# [B, T]``, a result by ``# [B, S, V]`` or, with those of the
parameters in front, ``# [B, H] -> [B]``. Within a call a name stands for one size, a
number for itself, and ``...`` for any axes; `or` gives a choice, `and` or a comma the
parts of a tuple, and ``same`` is the shape that came last. What is said otherwise, such as
sums, fits any size. The library itself pays nothing: the tests read its source.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import pathlib
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

# Where shapes are checked.
MODULES = (
    "network.layers",
    "network.losses",
    "network.model",
    "network.prompts",
    "network.quantization",
    "network.transformer",
    "decoding.beam",
    "decoding.loop",
    "decoding.token_by_token",
    "inference.answerer",
    "inference.engine",
)
_NAME = re.compile(r"[A-Za-z_]+")
_SHAPE = re.compile(r"\[([^\[\]]*)\]")
_EACH = re.compile(r"\beach\b")
# One value's possible shapes: dimensions by their text.
Choices = Sequence[tuple[str, ...]]


_on = False


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """Checks calls until it ends."""
    global _on
    before, _on = _on, True
    yield
    _on = before


class ShapeError(AssertionError):
    """An array has another shape than its comment says."""


class Promise(NamedTuple):
    """What comments say of a function: shapes by parameter, and of the result's parts."""

    parameters: dict[str, Choices]
    results: list[Choices]
    each: bool


def promises(source: str) -> Iterator[tuple[str, Promise]]:
    """The functions of a module with comments of shapes, by their dotted names."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    tree = ast.parse(source)
    owners = [("", tree.body)]
    owners += [(f"{n.name}.", n.body) for n in tree.body if isinstance(n, ast.ClassDef)]
    for owner, body in owners:
        for node in body:
            if isinstance(node, ast.FunctionDef) and (
                found := _promise(node, comments)
            ):
                yield f"{owner}{node.name}", found


def _promise(node: ast.FunctionDef, comments: dict[int, str]) -> Promise | None:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    last = max([node.lineno, *(a.end_lineno or 0 for a in given)])
    # The line that ends the signature: a result's annotation, or the colon.
    end = node.returns.end_lineno if node.returns else last
    parameters = {
        arg.arg: choices
        for arg in given
        if arg.end_lineno != end
        and (choices := _choices(comments.get(arg.end_lineno, "")))
    }
    before, arrow, after = comments.get(end or 0, "").rpartition("->")
    names = [arg.arg for arg in given if arg.arg not in ("self", "cls")]
    shapes = [[_dims(shape)] for shape in _SHAPE.findall(before)] if arrow else []
    parameters |= dict(zip(names, shapes))
    if after.strip() == "same" and shapes:
        results = [shapes[0]]
    else:
        after = after.replace("scalar", "[]")
        parts = re.split(r"\band\b|(?<=\]),", after)
        results = [choices for part in parts if (choices := _choices(part))]
        if len(results) != len(parts):
            results = []
    if not parameters and not results:
        return None
    return Promise(parameters, results, bool(_EACH.search(after)))


def _choices(text: str) -> Choices:
    return [_dims(shape) for shape in _SHAPE.findall(text)]


def _dims(text: str) -> tuple[str, ...]:
    return tuple(dim.strip() for dim in text.split(",") if dim.strip())


def checked(function: Callable[..., Any], promise: Promise) -> Callable[..., Any]:
    """The function, with its promise held against every call."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if not _on:
            return function(*args, **kwargs)
        sizes: dict[str, int] = {}
        given = signature.bind(*args, **kwargs).arguments
        for name, choices in promise.parameters.items():
            _check(function, name, given.get(name), choices, sizes)
        result = function(*args, **kwargs)
        parts = promise.results
        if len(parts) == 1 and not (isinstance(result, tuple) and promise.each):
            _check(function, "the result", result, parts[0], sizes)
        elif isinstance(result, tuple):
            several = parts * len(result) if promise.each else parts
            for number, (part, choices) in enumerate(zip(result, several), start=1):
                _check(function, f"result {number}", part, choices, sizes)
        return result

    return wrapper


def _check(
    function: Callable[..., Any],
    name: str,
    value: Any,
    choices: Choices,
    sizes: dict[str, int],
) -> None:
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple):
        return
    for dims in choices:
        if (found := _bound(shape, dims, sizes)) is not None:
            sizes.update(found)
            return
    said = " or ".join(f"[{', '.join(dims)}]" for dims in choices)
    raise ShapeError(
        f"{function.__module__}.{function.__qualname__}: {name} is {list(shape)}, its "
        f"comment says {said} where {sizes}"
    )


def _bound(
    shape: tuple[int, ...], dims: tuple[str, ...], sizes: dict[str, int]
) -> dict[str, int] | None:
    """The sizes that names stand for if the shape is this one; None if it is not."""
    if "..." in dims:
        at = dims.index("...")
        rest = len(dims) - at - 1
        if len(shape) < at + rest:
            return None
        shape = (*shape[:at], *shape[len(shape) - rest :])
        dims = (*dims[:at], *dims[at + 1 :])
    if len(shape) != len(dims):
        return None
    found = dict(sizes)
    for size, dim in zip(shape, dims, strict=True):
        if dim.isdigit() and size != int(dim):
            return None
        if _NAME.fullmatch(dim) and found.setdefault(dim, size) != size:
            return None
    return found


def install() -> list[str]:
    """Lets the functions of `MODULES` be checked; returns their names."""
    names = []
    for short in MODULES:
        module = importlib.import_module(f"prompt_tuning.{short}")
        source = pathlib.Path(str(module.__file__)).read_text()
        for path, promise in promises(source):
            owner, _, name = path.rpartition(".")
            place = getattr(module, owner) if owner else module
            setattr(place, name, checked(getattr(place, name), promise))
            names.append(f"{short}.{path}")
    return names
