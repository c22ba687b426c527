# SPDX-License-Identifier: Apache-2.0
"""HTML as trees of elements, in which a text is always a text.

Pages show what stands in files of others. The standard library's serialiser escapes all
texts and attributes; nothing here takes markup in a text.
"""

from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

from prompt_tuning.errors import printable

Element = ElementTree.Element
Child = Element | str | None


def tag(name: str, /, *children: Child, **attributes: Any) -> Element:
    """An element; texts may stand between its children, and None is left out.

    >>> to_text(tag("p", "a < b ", tag("b", "c"), class_="x"))
    '<p class="x">a &lt; b <b>c</b></p>'

    Args:
      name: of the element.
      children: elements and texts.
      attributes: with ``_`` for ``-``; one behind the name is for words of Python.
    """
    made = Element(
        name,
        {
            key.removesuffix("_").replace("_", "-"): printable(str(value))
            for key, value in attributes.items()
        },
    )
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif child and last is None:
            made.text = (made.text or "") + printable(child)
        elif child and last is not None:
            last.tail = (last.tail or "") + printable(child)
    return made


def raw(name: str, content: str, **attributes: str) -> Element:
    """A ``script`` or ``style``, whose content is written as it is.

    Raises:
      ValueError: the content would end the element.
    """
    if name not in ("script", "style") or "</" in content:
        raise ValueError(f"{name} cannot hold this as it is")
    made = Element(name, attributes)
    made.text = content
    return made


def to_text(element: Element) -> str:
    """HTML of an element."""
    return ElementTree.tostring(element, encoding="unicode", method="html")


def table(
    head: Sequence[str], lines: Iterable[Sequence[Child]], *, sortable: bool = True
) -> Element:
    """A table; the page's script sorts its lines by a column that is clicked.

    Args:
      head: names of the columns.
      lines: cells; a text that begins with a number is sorted by it.
      sortable: whether it may be sorted.
    """
    cells = [tag("th", tag("button", name, type="button")) for name in head]
    if not sortable:
        cells = [tag("th", name) for name in head]
    return tag(
        "div",
        tag(
            "table",
            tag("thead", tag("tr", *cells)),
            tag("tbody", *(tag("tr", *(tag("td", c) for c in line)) for line in lines)),
            class_="sortable" if sortable else "",
        ),
        class_="scroll",
    )


def facts(values: Iterable[tuple[str, str]]) -> Element:
    """A table of names and values."""
    lines = (tag("tr", tag("th", name), tag("td", value)) for name, value in values)
    return tag("table", tag("tbody", *lines), class_="facts")


def folded(summary: str, *children: Child) -> Element:
    """What is shown when its summary is clicked."""
    return tag("details", tag("summary", summary), *children)
