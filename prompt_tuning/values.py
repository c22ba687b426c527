# SPDX-License-Identifier: Apache-2.0
"""Values that people write, checked against the annotations of what takes them.

One place for kinds and ranges: a function says ``batch_size: BatchSize``, and whoever
hands it what a person wrote asks `check` first. Nothing is converted: no 1 for True, no
2 for 2.5, no number for a text of one.
"""

import ast
import functools
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import annotated_types
import pydantic

from prompt_tuning.errors import UserError

# A message that quotes a value shows at most so many characters of it.
SHOWN = 80
_STRICT = pydantic.ConfigDict(strict=True, allow_inf_nan=False)
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    type(None): "None",
    Any: "anything",
}
_BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}


def check(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    called: Callable[[str], str] = str,
) -> None:
    """Refuses arguments of another kind or range than a function's annotations say.

    >>> def tune(*, steps: Annotated[int, annotated_types.Ge(1)]): ...
    >>> check(tune, {"steps": 2.5})
    Traceback (most recent call last):
    prompt_tuning.errors.UserError: steps=2.5 must be a whole number of at least 1

    Args:
      function: a function or a dataclass.
      arguments: by the name of their parameter.
      called: what the person calls a parameter.

    Raises:
      UserError: names all that are refused, their values and what is wanted.
    """
    check_each(arguments, _hints(function), called)


def check_each(
    given: Mapping[str, Any],
    annotations: Mapping[str, Any],
    called: Callable[[str], str] = str,
) -> None:
    """The same with annotations that are not those of a function, by name.

    Raises:
      UserError: see `check`.
    """
    wrong = [
        f"{called(name)}={_shown(value)} must be {wanted(annotations[name])}"
        for name, value in given.items()
        if name in annotations and not fits(value, annotations[name])
    ]
    if wrong:
        raise UserError("; ".join(wrong))


def read(function: Callable[..., Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """What texts stand for: the literal that they are, where the annotations want one.

    >>> def serve(*, port: int, model: str): ...
    >>> read(serve, {"port": "8000", "model": "8000"})
    {'port': 8000, 'model': '8000'}
    """
    hints, found = _hints(function), {}
    for name, text in texts.items():
        try:
            literal = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            literal = text
        as_text = fits(text, hints[name]) and not fits(literal, hints[name])
        found[name] = text if as_text else literal
    return found


def accepts(function: Callable[..., Any], name: str, value: Any) -> bool:
    """Whether a parameter takes a value; one that is not annotated takes any."""
    return fits(value, _hints(function).get(name, Any))


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of the kind and in the range of an annotation."""
    try:
        _adapter(annotation).validate_python([value])
    except pydantic.ValidationError:
        return False
    return True


def wanted(annotation: Any) -> str:
    """An annotation in words: 'a whole number from 1 to 8, or None'."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return wanted(arguments[0]) + _range(arguments[1:])
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        also = ", or None" if len(kinds) < len(arguments) else ""
        return " or ".join(map(wanted, kinds)) + also
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is Callable:
        return "a function"
    if _is(origin, Mapping):
        key, item = map(wanted, arguments)
        return f"a dict from {key} to {item}"
    if _is(origin, Sequence):
        items = f"a list, each item {wanted(arguments[0])}"
        return f"{items} ({len(arguments)} of them)" if _is_fixed(annotation) else items
    if annotation in _NAMES:
        return _NAMES[annotation]
    return f"a {annotation.__name__}"


def _range(marks: Sequence[Any]) -> str:
    """Bounds in words; the marks are those of `annotated_types`."""
    if any(hasattr(mark, "min_length") for mark in marks):
        return " that is not empty"
    bounds = {}
    for mark in marks:
        bounds |= {k: getattr(mark, k) for k in _BOUNDS if hasattr(mark, k)}
    if "ge" in bounds and "le" in bounds:
        return f" from {bounds['ge']:,} to {bounds['le']:,}"
    return " and".join(f" {_BOUNDS[k]} {bounds[k]:,}" for k in _BOUNDS if k in bounds)


def _is(origin: Any, kind: type) -> bool:
    return isinstance(origin, type) and issubclass(origin, kind)


def _is_fixed(annotation: Any) -> bool:
    """Whether it is a tuple of a given length."""
    return typing.get_origin(annotation) is tuple and (
        Ellipsis not in typing.get_args(annotation)
    )


@functools.cache
def _hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    return typing.get_type_hints(function, include_extras=True)


@functools.cache
def _adapter(annotation: Any) -> pydantic.TypeAdapter:
    # In a list, for pydantic takes no configuration beside a dataclass that stands alone.
    return pydantic.TypeAdapter(list[_for_pydantic(annotation)], config=_STRICT)


def _for_pydantic(annotation: Any) -> Any:
    """An annotation that takes instances of classes as they are, lists for tuples."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return Annotated[_for_pydantic(arguments[0]), *arguments[1:]]
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_for_pydantic, arguments))
    if origin is tuple:
        items = Sequence[_for_pydantic(arguments[0])]
        size = len(arguments)
        return (
            Annotated[items, annotated_types.Len(size, size)]
            if _is_fixed(annotation)
            else items
        )
    if origin is Callable or origin is Literal:
        return annotation
    if getattr(annotation, "_is_protocol", False):
        return Any  # it is not checked at run time what an object can do
    if origin is not None:
        return origin[tuple(map(_for_pydantic, arguments))]
    if isinstance(annotation, type) and annotation not in (Any, *_NAMES):
        return pydantic.InstanceOf[annotation]
    return annotation


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
